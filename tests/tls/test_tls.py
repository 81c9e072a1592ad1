"""--tls in all its forms: `python -m bridge.ftp` as a process; curl, lftp, openssl and Python as clients.

The certificate that is made and kept has tests of its own (test_certificates.py), and so have handshakes that
do not come to an end (test_transport.py).
"""

from __future__ import annotations

import ftplib
import hashlib
import io
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("OpenSSL")

import bridge.ftp.command
from bridge.ftp.options import parser_of
from support.cli import LIMIT, Command, run
from support.clients import needs_curl, needs_lftp, quoted
from support.ftps_clients import FTPS, VERSIONS, Authority, client_context

pytestmark = pytest.mark.program

MB = 1 << 20
#: More than the sockets between client and server take at once.
CONTENT = os.urandom(20 * MB)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
BOTH_VERSIONS = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
BOTH_MODES = pytest.mark.parametrize("mode", ["explicit", "implicit"])


@pytest.fixture(autouse=True)
def data_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where certificates are kept: not in the home of who runs the tests."""
    path = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(path))
    return path / "pyftpdlib-gevent"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


def store(client: ftplib.FTP, name: str = "file", content: bytes = CONTENT) -> None:
    client.storbinary(f"STOR {name}", io.BytesIO(content))


def fingerprint(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest().upper()


def announced(server: Command) -> str:
    return server.printed("^SHA-256: ").split()[1].replace(":", "")


# --- one flag


@BOTH_MODES
def test_one_flag_serves_with_a_certificate_that_is_kept(home: Path, data_home: Path, mode: str) -> None:
    path = data_home / "certificate.pem"
    seen = set()
    for _ in range(2):
        with Command("--tls", mode, directory=home) as server:
            assert server.printed("^TLS: ") == f"TLS:      {mode}, self-signed certificate {path}\n"
            client = FTPS(server, implicit=mode == "implicit")
            seen |= {announced(server), fingerprint(client.certificate())}
            client.close()
    assert len(seen) == 1


def test_explicit_is_the_default_and_the_port_stays(home: Path) -> None:
    with Command("--tls", directory=home) as server:
        assert server.printed("^TLS: ").startswith("TLS:      explicit, ")
    parser = parser_of(bridge.ftp.command.PARTS)
    assert parser.parse_args(["--tls", "implicit"]).port == parser.parse_args([]).port == 2121


@needs_openssl
@BOTH_MODES
def test_the_fingerprint_is_that_of_what_clients_get(home: Path, mode: str) -> None:
    with Command("--tls", mode, directory=home) as server:
        starttls = [] if mode == "implicit" else ["-starttls", "ftp"]
        shown = run("openssl", "s_client", *starttls, "-connect", f"127.0.0.1:{server.port}")
        pem = re.search(r"-----BEGIN.*?-----END CERTIFICATE-----\n", shown.stdout, re.DOTALL)
        assert pem is not None, shown.stdout + shown.stderr
        (home / "seen.pem").write_text(pem[0])
        printed = run("openssl", "x509", "-in", str(home / "seen.pem"), "-noout", "-fingerprint", "-sha256")
        assert printed.stdout.strip().partition("=")[2] == server.printed("^SHA-256: ").split()[1]


@needs_curl
@BOTH_MODES
def test_the_line_that_tells_how_to_connect_is_right(home: Path, mode: str) -> None:
    (home / "hello").touch()
    with Command("--tls", mode, "--tls-required", directory=home) as server:
        line = server.printed("^Connect: ")
        result = run(*line.split()[1:2], "-sS", "--list-only", *line.split()[2:])
        assert (result.stdout, result.stderr) == ("hello\n", "")


def test_an_expired_certificate_is_served_with_a_warning(home: Path, tmp_path: Path) -> None:
    pem = Authority(tmp_path).issue("server", days=-1)
    with Command("--tls", "--certfile", str(pem), directory=home) as server:
        named = re.escape(repr(str(pem)))
        server.logged(rf"--certfile: the certificate in {named} expired on .*; clients will refuse it$")
        FTPS(server).close()


# --- transfers


@needs_curl
@BOTH_MODES
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl_transfers_large_files(home: Path, tmp_path: Path, mode: str, version: str) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with Command("-w", "--tls", mode, "--tls-required", "--require-session-reuse", directory=home) as server:
        url = f"{'ftps' if mode == 'implicit' else 'ftp'}://127.0.0.1:{server.port}/file"
        curl = ("curl", "-sS", "-k", "--ssl-reqd", f"--tlsv{version}", "--tls-max", version)
        for more in (("-T", str(tmp_path / "file")), ("-o", str(tmp_path / "copy"))):
            result = run(*curl, *more, url)
            assert (result.returncode, result.stderr) == (0, "")
        assert (home / "file").read_bytes() == (tmp_path / "copy").read_bytes() == CONTENT
        assert " STOR " in server.logged(f"completed=1 bytes={len(CONTENT)} ")


@needs_lftp
@BOTH_MODES
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_lftp_transfers_large_files(home: Path, tmp_path: Path, mode: str, version: str) -> None:
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(CONTENT)
    priority = f"NORMAL:-VERS-ALL:+VERS-TLS{version}"
    with Command("-w", "--tls", mode, "--tls-required", "--require-session-reuse", directory=home) as server:
        scheme = "ftps" if mode == "implicit" else "ftp"
        commands = (
            "set cmd:fail-exit yes; set net:max-retries 1; set ssl:verify-certificate no",
            f"set ftp:ssl-allow-anonymous yes; set ftp:ssl-protect-data yes; set ssl:priority {priority}",
            f"open {scheme}://127.0.0.1:{server.port}; put {quoted(file)}; get file -o {quoted(copy)}; ls",
        )
        result = run("lftp", "--norc", "-c", "; ".join(commands))
        assert result.returncode == 0, result.stderr + server.output
        assert (home / "file").read_bytes() == copy.read_bytes() == CONTENT
        assert "file" in result.stdout


@BOTH_VERSIONS
@BOTH_MODES
def test_python_transfers_large_files(home: Path, mode: str, version: ssl.TLSVersion) -> None:
    with Command("-w", "--tls", mode, directory=home) as server:
        client = FTPS(server, client_context(version), implicit=mode == "implicit")
        client.session = None  # which nobody requires
        store(client)
        assert (home / "file").read_bytes() == CONTENT
        parts: list[bytes] = []
        client.retrbinary("RETR file", parts.append)
        assert b"".join(parts) == CONTENT
        client.quit()


@BOTH_VERSIONS
def test_empty_listings_are_no_broken_connections(home: Path, version: ssl.TLSVersion) -> None:
    with Command("--tls", directory=home) as server:
        client = FTPS(server, client_context(version))
        client.session = None
        for _ in range(20):  # three of four failed, by chance
            assert client.nlst() == []
        client.quit()


def test_an_upload_that_breaks_off_is_not_complete(home: Path) -> None:
    with Command("-w", "--tls", directory=home) as server:
        client = FTPS(server)
        conn = client.transfercmd("STOR file")
        conn.sendall(b"half")
        plain = socket.socket(fileno=conn.detach())
        plain.shutdown(socket.SHUT_WR)  # TCP's end of the stream, without TLS's
        with pytest.raises(ftplib.error_temp, match=r"^426 "):
            client.voidresp()
        plain.close()
        server.logged("STOR .*/file completed=0 ")
        client.close()


# --- what is required


@pytest.mark.parametrize(
    ("options", "control", "data"),
    [
        ([], False, False),
        (["--tls-required"], True, True),
        (["--tls-required", "both"], True, True),
        (["--tls-required", "control"], True, False),
        (["--tls-required", "data"], False, True),
        (["--tls-required", "data", "--tls-control-required"], True, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_tls_required_is_for_control_or_data_connections_or_both(
    home: Path, options: list[str], control: bool, data: bool
) -> None:
    with Command("--tls", *options, directory=home) as server:
        with ftplib.FTP(timeout=LIMIT) as plain:
            plain.connect("127.0.0.1", server.port)
            assert _refused(plain.login, "550 .*TLS required on the control") is control
        client = FTPS(server)
        assert client.nlst() == []
        client.prot_c()
        assert _refused(client.makepasv, "550 .*TLS required on the data") is data
        client.close()


def _refused(command: Callable[[], object], reply: str) -> bool:
    try:
        command()
    except ftplib.error_perm as error:
        if re.match(reply, str(error)):
            return True
        raise
    return False


@pytest.mark.parametrize("tickets", [True, False], ids=["tickets", "no tickets"])
@BOTH_VERSIONS
def test_a_data_connection_must_resume_the_session_of_its_control_connection(
    home: Path, version: ssl.TLSVersion, tickets: bool
) -> None:
    context = client_context(version, tickets=tickets)
    with Command("-w", "--tls", "--require-session-reuse", directory=home) as server:
        other = FTPS(server, context)
        client = FTPS(server, context)
        assert isinstance(other.sock, ssl.SSLSocket)
        for number, session in enumerate((None, other.sock.session)):
            client.session = session
            with pytest.raises(ssl.SSLError, match=r"(?i)alert handshake failure"):
                store(client, "stolen")
            with pytest.raises(ftplib.error_perm, match=r"^522 TLS session reuse required: "):
                client.voidresp()
            server.logged("TLS session reuse required", number + 1)
            assert (home / "stolen").read_bytes() == b""
        client.session = "control"
        for _ in range(3):
            store(client)
            assert (home / "file").read_bytes() == CONTENT
        assert sorted(client.nlst()) == ["file", "stolen"]
        # One that was not brought to its end does not end the session either.
        conn = client.transfercmd("STOR cut")
        conn.sendall(CONTENT)  # more than can be under way: some of it has come
        with pytest.raises(ftplib.error_temp, match=r"^426 "):
            client.sendcmd("ABOR")
        assert client.voidresp().startswith("226 ")
        conn.close()
        store(client)
        if tickets or version is ssl.TLSVersion.TLSv1_3:  # else OpenSSL forgets it (ftps.py)
            conn = client.transfercmd("STOR cut")
            conn.sendall(b"half")
            conn.close()
            with pytest.raises(ftplib.error_temp, match=r"^426 "):
                client.voidresp()
            store(client)
        client.quit()
        other.quit()


def test_a_data_connection_that_fails_too_early_is_told_to_its_transfer(home: Path) -> None:
    with Command("--tls", "--require-session-reuse", directory=home) as server:
        client = FTPS(server)
        with socket.create_connection(client.makepasv(), LIMIT) as plain:
            with pytest.raises(ssl.SSLError, match=r"(?i)alert handshake failure"):
                client.context.wrap_socket(plain, server_hostname="localhost")
        server.logged("TLS session reuse required")
        with pytest.raises(ftplib.error_perm, match=r"^522 TLS session reuse required: "):
            client.voidcmd("NLST")
        assert client.nlst() == []
        client.quit()


# --- client certificates


def failed_login(server: Command, certificate: Path | None, version: ssl.TLSVersion, implicit: bool) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        FTPS(server, client_context(version, certificate), implicit=implicit)


@BOTH_VERSIONS
@BOTH_MODES
@pytest.mark.parametrize("reuse", [[], ["--require-session-reuse"]], ids=["", "reuse"])
def test_only_clients_with_a_certificate_of_the_authority_get_in(
    home: Path, tmp_path: Path, version: ssl.TLSVersion, mode: str, reuse: list[str]
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    implicit = mode == "implicit"
    with Command("-w", "--tls", mode, "--client-ca", str(authority.path), *reuse, directory=home) as server:
        failed_login(server, None, version, implicit)
        failed_login(server, stranger.issue("mallory"), version, implicit)
        failed_login(server, authority.issue("old", days=-1), version, implicit)
        failed = server.logged("TLS handshake failed", 3)
        for said in (
            r"peer did not return a certificate \(the client has no certificate, see --client-ca\)\.",
            r"certificate verify failed \(unable to get issuer cert(ificate)? locally: 'CN=mallory'; see -",
            r"certificate verify failed \(cert has expired: 'CN=old'; see --client-ca\)\.",
        ):
            assert re.search(said, server.stderr), failed
        client = FTPS(server, client_context(version, authority.issue("ada")), implicit=implicit)
        for session in ("control",) if reuse else ("control", None):
            client.session = session
            store(client)
        client.quit()
        server.logged("FTP session closed", 4)
        assert "Traceback" not in server.stderr
        assert server.stderr.count("TLS handshake failed") == 3


def test_a_data_connection_needs_the_client_certificate_too(home: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Command("-w", "--tls", "--client-ca", str(authority.path), directory=home) as server:
        client = FTPS(server, client_context(ssl.TLSVersion.TLSv1_2, authority.issue("ada")))
        client.context = client_context(ssl.TLSVersion.TLSv1_2)
        client.session = None
        with pytest.raises(ssl.SSLError):
            store(client)
        with pytest.raises(ftplib.error_perm, match=r"^522 TLS handshake failed: peer did not return a cert"):
            client.voidresp()
        client.close()


# --- SIGHUP


@pytest.fixture
def served(home: Path, tmp_path: Path) -> Iterator[tuple[Command, Path, Callable[[], Path]]]:
    """A server, the file of its certificate, and what makes another."""
    authority = Authority(tmp_path)
    pem = tmp_path / "served.pem"
    numbers = iter(range(100))

    def issue() -> Path:
        return authority.issue(f"server{next(numbers)}")

    shutil.copy(issue(), pem)
    with Command("-w", "--tls", "--certfile", str(pem), "--require-session-reuse", directory=home) as server:
        yield server, pem, issue


def test_sighup_takes_up_a_new_certificate_and_drops_no_session(
    served: tuple[Command, Path, Callable[[], Path]], home: Path
) -> None:
    server, pem, issue = served
    waiting = ftplib.FTP_TLS(timeout=LIMIT, context=client_context())
    waiting.connect("127.0.0.1", server.port)
    before = FTPS(server)
    before.voidcmd("TYPE I")
    conn: Any = before.transfercmd("STOR file")
    conn.sendall(CONTENT[:MB])
    os.replace(issue(), pem)
    server.send(signal.SIGHUP)
    new = server.logged("new TLS handshakes get the certificate with SHA-256 ").split()[-1].replace(":", "")
    assert new != announced(server)
    conn.sendall(CONTENT[MB:])
    conn.unwrap()
    conn.close()
    before.voidresp()
    assert (home / "file").read_bytes() == CONTENT
    store(before)  # another handshake of the session that has begun with the old one
    after = FTPS(server)
    assert fingerprint(after.certificate()) == new
    waiting.auth()
    assert isinstance(waiting.sock, ssl.SSLSocket)
    assert fingerprint(waiting.sock.getpeercert(binary_form=True) or b"") == new
    for client in (before, after):
        client.quit()
    waiting.close()


@pytest.mark.parametrize("broken", ["missing", "not PEM", "another key"])
def test_sighup_leaves_what_was_if_the_new_files_cannot_be_used(
    served: tuple[Command, Path, Callable[[], Path]], broken: str
) -> None:
    server, pem, issue = served
    if broken == "missing":
        pem.unlink()
    elif broken == "not PEM":
        pem.write_text("nothing")
    else:
        key = issue().read_text().partition("-----BEGIN CERT")[0]
        pem.write_text(key + "".join(issue().read_text().partition("-----BEGIN CERT")[1:]))
    server.send(signal.SIGHUP)
    line = server.logged("the certificate that was in force stays$")
    assert "--certfile: " in line
    assert {"missing": "cannot read", "not PEM": "no certificate", "another key": "is not that of"}[
        broken
    ] in line
    client = FTPS(server)
    assert fingerprint(client.certificate()) == announced(server)
    client.quit()


def test_sighup_renews_a_self_signed_certificate_that_is_gone(home: Path, data_home: Path) -> None:
    with Command("--tls", directory=home) as server:
        (data_home / "certificate.pem").unlink()
        server.send(signal.SIGHUP)
        server.logged("new TLS handshakes get the certificate")
        client = FTPS(server)
        assert fingerprint(client.certificate()) != announced(server)
        client.quit()


# --- what TLS must not do


def s_client(server: Command, *options: str, commands: str = "") -> str:
    """What openssl says, and what its session said."""
    result = subprocess.run(
        [
            "openssl",
            "s_client",
            "-crlf",
            "-starttls",
            "ftp",
            "-connect",
            f"127.0.0.1:{server.port}",
            *options,
        ],
        input=commands,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return result.stdout + result.stderr


@needs_openssl
def test_nothing_older_than_tls_1_2_is_spoken(home: Path) -> None:
    with Command("--tls", directory=home) as server:
        for option, spoken in (("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)):
            shown = s_client(server, option, "-cipher", "DEFAULT@SECLEVEL=0", commands="Q\n")
            assert ("Cipher is (NONE)" not in shown) is spoken, shown
        server.logged(
            r"TLS handshake failed: unsupported protocol \(the client does not speak TLS 1\.2 or later\)"
        )


@needs_openssl
def test_renegotiation_is_refused(home: Path) -> None:
    with Command("--tls", directory=home) as server:
        shown = s_client(server, "-tls1_2", commands="R\nQ\n")
        assert "RENEGOTIATING" in shown
        assert "no renegotiation" in shown
        server.logged("FTP session closed")
        assert "Traceback" not in server.stderr


# --- who does not speak it, or not yet


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"USER anonymous\r\n", r"wrong version number \(the client does not speak TLS\)"),
        (b"GET / HTTP/1.1\r\n\r\n", r"http request \(that was HTTP\)"),
    ],
    ids=["FTP", "HTTP"],
)
def test_a_plain_client_on_the_implicit_port_is_one_line_and_closed(
    home: Path, said: bytes, reason: str
) -> None:
    with Command("--tls", "implicit", directory=home) as server:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as plain:
            plain.sendall(said)
            try:
                while plain.recv(4096):
                    pass
            except ConnectionResetError:
                pass  # it has not read all
        server.logged(rf"\] TLS handshake failed: {reason}\.$")
        server.logged("FTP session closed")
        _only(server, "TLS handshake failed")


def test_a_tls_client_on_the_explicit_port_is_one_line_and_closed(home: Path) -> None:
    with Command("--tls", directory=home) as server:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as plain:
            with pytest.raises((ssl.SSLError, ConnectionError)):  # the greeting is no TLS
                client_context().wrap_socket(plain)
        server.logged("TLS without AUTH: the client wants implicit TLS")
        server.logged("FTP session closed")
        _only(server, "TLS without AUTH")


def _only(server: Command, words: str) -> None:
    """There is no other line about it."""
    lines = [line for line in server.stderr.splitlines() if ">>>" not in line and "127.0.0.1:" in line]
    assert len(lines) == 3, server.stderr
    assert words in lines[1]


def test_implicit_sessions_are_encrypted_throughout(home: Path) -> None:
    """No PBSZ and PROT P are needed, there is no AUTH, and a login anew changes nothing."""
    with Command("-w", "--tls", "implicit", "--tls-required", directory=home) as server:
        client = FTPS(server, implicit=True)
        assert "AUTH" not in client.sendcmd("FEAT")
        with pytest.raises(ftplib.error_perm, match=r"^503 "):
            client.sendcmd("AUTH TLS")
        store(client, content=b"once")
        client.sendcmd("REIN")
        client.login(secure=False)
        store(client, content=b"twice")
        assert (home / "file").read_bytes() == b"twice"
        client.quit()


@BOTH_MODES
def test_worker_processes_resume_sessions(home: Path, mode: str) -> None:
    options = ["--require-session-reuse", "--workers", "2"]
    with Command("-w", "--tls", mode, *options, directory=home) as server:
        client: Any = FTPS(server, implicit=mode == "implicit")
        store(client)
        assert (home / "file").read_bytes() == CONTENT
        client.quit()


@BOTH_MODES
def test_tls_max_leaves_out_what_is_newer(home: Path, mode: str) -> None:
    with Command("--tls", mode, "--tls-max", "1.2", "-w", directory=home) as server:
        implicit = mode == "implicit"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            FTPS(server, client_context(ssl.TLSVersion.TLSv1_3), implicit=implicit)
        context = client_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        client = FTPS(server, context, implicit=implicit)
        assert isinstance(client.sock, ssl.SSLSocket)
        assert client.sock.version() == "TLSv1.2"
        store(client)
        assert (home / "file").read_bytes() == CONTENT
        client.quit()
