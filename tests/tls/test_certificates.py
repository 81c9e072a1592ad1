"""The certificate that --tls makes and keeps, and what is said of those that cannot be used."""

from __future__ import annotations

import datetime
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("OpenSSL")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bridge.server import ConfigError
from bridge.tls.certificates import kept, load
from support.cli import LIMIT, environment, run
from support.ftps_clients import Authority, pem_of


@pytest.fixture
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the certificate is kept: not there yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "pyftpdlib-gevent"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the one that is kept


def test_it_is_made_once_and_kept_for_its_user_alone(data_home: Path) -> None:
    previous = os.umask(0)
    try:
        first = kept()
    finally:
        os.umask(previous)
    assert Path(first.path) == data_home / "certificate.pem"
    assert mode(data_home) == 0o700
    assert {name: mode(data_home / name) for name in os.listdir(data_home)} == {
        "certificate.pem": 0o600,
        "lock": 0o600,
    }
    assert kept().fingerprint == first.fingerprint


def test_without_xdg_data_home_it_is_in_the_home_directory(
    data_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert Path(kept().path) == tmp_path / ".local/share/pyftpdlib-gevent/certificate.pem"


def test_it_is_a_servers_for_years_with_the_names_of_this_host(
    data_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "files")
    (certificate,) = kept("192.0.2.7").chain
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["files", "localhost"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1", "192.0.2.7"]
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    assert left > datetime.timedelta(days=3 * 365)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.SERVER_AUTH]  # type: ignore[attr-defined]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    ("interface", "added"),
    [
        *((None, []), ("0.0.0.0", []), ("::", []), ("größe", [])),
        *(("ftp.example", ["ftp.example"]), ("fe80::1%eth0", ["fe80::1"])),
    ],
)
def test_an_interface_is_a_name_if_it_can_be_one(
    data_home: Path, monkeypatch: pytest.MonkeyPatch, interface: str | None, added: list[str]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    (certificate,) = kept(interface).chain
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["localhost", "127.0.0.1", "::1", *added]


@pytest.mark.parametrize("spoilt", ["expired", "not PEM", "another key", "a key alone"])
def test_what_cannot_be_used_is_made_anew_and_said(
    data_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: str
) -> None:
    first = kept()
    path = Path(first.path)
    if spoilt == "expired":
        path.write_bytes(Authority(tmp_path).issue("old", days=-1).read_bytes())
    elif spoilt == "not PEM":
        path.write_text("nothing")
    elif spoilt == "another key":
        certificate = path.read_text().partition("-----BEGIN CERT")
        path.write_bytes(pem_of(ec.generate_private_key(ec.SECP256R1())))
        path.write_text(path.read_text() + certificate[1] + certificate[2])
    else:
        path.write_bytes(pem_of(first.key))
    caplog.clear()
    second = kept()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "a new certificate is made, with another fingerprint" in record.getMessage()
    assert second.fingerprint != first.fingerprint
    assert mode(path) == 0o600
    caplog.clear()
    assert kept().fingerprint == second.fingerprint
    assert not caplog.records


def test_where_nothing_can_be_kept_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^--tls: cannot keep .*Not a directory; .*--certfile$"):
        kept()


def test_a_half_written_one_is_never_seen(data_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge.tls.certificates.os.fsync", fail)
    with pytest.raises(ConfigError, match="No space left"):
        kept()
    assert os.listdir(data_home) == ["lock"]


MAKE = """
import sys
from bridge.tls.certificates import kept
print("ready", flush=True)
sys.stdin.readline()
print(kept().fingerprint)
"""


@pytest.mark.program
def test_processes_that_start_at_once_agree(data_home: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        made = {process.communicate(timeout=LIMIT)[0] for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert made == {kept().fingerprint + "\n"}


# --- those that are given


def test_a_chain_and_its_key_are_read(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    path = authority.issue("server")
    path.write_bytes(path.read_bytes() + authority.path.read_bytes())
    identity = load(str(path))
    assert len(identity.chain) == 2
    assert identity.chain[1].subject == identity.chain[0].issuer
    assert identity.out_of_date() is None


@pytest.mark.parametrize(("days", "said"), [(-1, r"^expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC$"), (1, None)])
def test_it_knows_whether_it_has_expired(tmp_path: Path, days: int, said: str | None) -> None:
    wrong = load(str(Authority(tmp_path).issue("server", days=days))).out_of_date()
    if said is None:
        assert wrong is None
    else:
        assert wrong is not None
        assert re.search(said, wrong)


def test_what_is_wrong_is_one_line_with_the_option_and_the_way_out(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, other = authority.issue("server"), authority.issue("other")
    secret, nothing = tmp_path / "a secret.pem", tmp_path / "nothing.pem"
    secret.write_bytes(pem_of(ec.generate_private_key(ec.SECP256R1()), b"passphrase"))
    nothing.write_text("nothing\n")
    both = tmp_path / "both.pem"
    both.write_bytes(secret.read_bytes() + authority.path.read_bytes())
    cases: list[tuple[Path, Path | None, str]] = [
        (
            tmp_path / "missing",
            None,
            f"--certfile: cannot read {str(tmp_path / 'missing')!r}: No such file or directory",
        ),
        (nothing, None, f"--certfile: no certificate, PEM, in {str(nothing)!r}"),
        (
            authority.path,
            None,
            f"--certfile: no private key, PEM, in {str(authority.path)!r}; is it in a --keyfile?",
        ),
        (server, nothing, f"--keyfile: no private key, PEM, in {str(nothing)!r}"),
        (
            server,
            other,
            f"--keyfile: the key in {str(other)!r} is not that of the certificate in {str(server)!r}",
        ),
    ]
    for path, option in ((secret, "--keyfile"), (both, "--certfile")):
        said = f"{option}: the key in {str(path)!r} has a passphrase, which nobody can type here; "
        said += f"take it off: openssl pkey -in {shlex.quote(str(path))} -out NEW"
        cases.append((server, path, said) if path is secret else (path, None, said))
    for certfile, keyfile, expected in cases:
        with pytest.raises(ConfigError) as caught:
            load(str(certfile), str(keyfile) if keyfile else None)
        assert str(caught.value) == expected


def test_a_key_that_every_user_can_read_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Authority(tmp_path).issue("server")
    for wide, warnings in ((0o600, 0), (0o640, 0), (0o644, 1)):
        path.chmod(wide)
        caplog.clear()
        load(str(path))
        assert len(caplog.records) == warnings


def test_the_fingerprint_is_openssls(data_home: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    identity = kept()
    result = run("openssl", "x509", "-in", identity.path, "-noout", "-fingerprint", "-sha256")
    assert result.stdout.strip().partition("=")[2] == identity.fingerprint
