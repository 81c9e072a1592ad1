"""Real clients (ftplib, curl, lftp, wget) against `python -m bridge.ftp`, and the bytes that arrive.

Trees with the names and sizes that break servers, transfers cut in the middle and resumed, active and
passive mode over IPv4 and IPv6, TLS, ASCII mode. A client that is not installed skips its tests.
"""

from __future__ import annotations

import ftplib
import hashlib
import io
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import LIMIT, Command, certificate, environment, log_in, run
from support.clients import needs_curl, needs_lftp, needs_wget, quoted
from support.servers import has_utf8, needs_ipv6

pytestmark = pytest.mark.program

MB = 1 << 20
#: More than what the kernel buffers on both sides of a loopback connection (below 10 MB by default), so
#: that a transfer of it can be cut in the middle.
BIG = 32 * MB


needs_utf8 = pytest.mark.skipif(not has_utf8(), reason="this locale has no names for some files")


# --- files


BLOCK = os.urandom(MB - 8)


def content(size: int) -> bytes:
    """*size* bytes of which no stretch is like another: copies of a random block, each with its number."""
    copies = -(-size // MB)
    return b"".join(struct.pack(">Q", number) + BLOCK for number in range(copies))[:size]


ODD_NAMES = (
    *("with some  spaces", "ünï 日本 🙂", "-dash", "--help", "[brackets]", "a [b] c*?", "quo'te", 'dou"ble'),
    *("#hash", "100%", "%41%2F", "semi;colon", "a&b=c", "tilde~", "$HOME", "back`tick`", ".hidden"),
)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """500 files and one of 200 MB in nested directories with odd names; all removed after the test."""
    root = tmp_path / "tree"
    directories = [root, *(root / "odd" / name for name in ODD_NAMES), root / "a" / "b" / "c" / "d" / "e"]
    for directory in directories:
        directory.mkdir(parents=True)
        (directory / "empty directory").mkdir()
    for number in range(500 - len(ODD_NAMES) - 1):
        (directories[number % len(directories)] / f"file {number}").write_bytes(content(number * 37))
    for name in ODD_NAMES:
        (root / name).write_bytes(name.encode())
    (root / "empty").touch()
    assert sum(path.is_file() for path in root.rglob("*")) == 500
    (root / "large").write_bytes(content(200 * MB))
    yield root
    for directory in tmp_path.iterdir():
        shutil.rmtree(directory)


def relative_paths(root: Path) -> set[str]:
    return {str(path.relative_to(root)) + "/" * path.is_dir() for path in root.rglob("*")}


def assert_same_trees(left: Path, right: Path) -> None:
    """Same names, same kinds, same bytes."""
    assert relative_paths(left) == relative_paths(right)
    different = [
        path
        for path in relative_paths(left)
        if not path.endswith("/") and (left / path).read_bytes() != (right / path).read_bytes()
    ]
    assert different == []


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """The directory to serve."""
    path = tmp_path / "shared"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)  # (the tree's fixture may have done it)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Path]:
    """The directory the client works in."""
    path = tmp_path / "local"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)  # (the tree's fixture may have done it)


# --- clients


def url(server: Command, path: str = "", *, host: str = "127.0.0.1", login: str = "") -> str:
    return f"ftp://{login}{host}:{server.port}/{path}"


def curl(*arguments: str) -> str:
    result = run("curl", "--silent", "--show-error", "--max-time", str(LIMIT), *arguments)
    assert result.returncode == 0, result
    return result.stdout


def lftp(server: Command, commands: str) -> None:
    settings = "set cmd:fail-exit true; set net:max-retries 1; set net:timeout 30; set ftp:charset utf-8;"
    where = ("-p", str(server.port), "127.0.0.1")
    result = run("lftp", "--norc", "-e", f"{settings} {commands}; exit", *where)
    assert (result.returncode, result.stderr) == (0, ""), result


def wget(*arguments: str) -> None:
    result = run("wget", "--no-config", "--no-verbose", "--tries=1", f"--timeout={LIMIT}", *arguments)
    assert result.returncode == 0, result


def read_and_kill(command: list[str], size: int) -> bytes:
    """Run a client that prints a file, and kill it when the first *size* bytes have come."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        try:
            return process.stdout.read(size)
        finally:
            process.kill()


def write_and_kill(command: list[str], part: bytes) -> None:
    """Run a client that uploads what it reads, and kill it when it has taken all of *part*, but no end."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(part)
            process.stdin.flush()
        finally:
            process.kill()


def assert_only_the_rest_was_sent(server: Command, command: str, size: int) -> None:
    """Whether the log tells of a complete transfer of *size* bytes."""
    server.logged(rf"\] {command} .* completed=1 bytes={size} ")


# --- ftplib


def test_ftplib_works_with_files_and_directories(shared: Path) -> None:
    data = content(3 * MB + 1)
    with Command("-w", directory=shared) as server, log_in(server) as client:
        client.mkd("sub")
        client.cwd("sub")
        client.storbinary("STOR file", io.BytesIO(data))
        assert (shared / "sub" / "file").read_bytes() == data
        assert client.size("file") == len(data)
        assert [
            (name, facts["type"], facts["size"]) for name, facts in client.mlsd(facts=["type", "size"])
        ] == [("file", "file", str(len(data)))]
        lines: list[str] = []
        client.dir(lines.append)
        assert [line.split()[-1] for line in lines] == ["file"]
        received = io.BytesIO()
        client.retrbinary("RETR file", received.write)
        assert received.getvalue() == data
        client.storbinary("APPE file", io.BytesIO(b"more"))
        assert (shared / "sub" / "file").read_bytes() == data + b"more"
        client.rename("file", "../moved")
        client.cwd("..")
        client.rmd("sub")
        assert client.nlst() == ["moved"]
        client.delete("moved")
        assert list(shared.iterdir()) == []


def test_ftplib_resumes_a_cut_download(shared: Path) -> None:
    data = content(BIG)
    (shared / "file").write_bytes(data)
    with Command(directory=shared) as server, log_in(server) as client:
        client.voidcmd("TYPE I")
        with client.transfercmd("RETR file") as connection, connection.makefile("rb") as stream:
            received = stream.read(MB)
        with pytest.raises(ftplib.error_temp, match=r"^426 "):
            client.voidresp()
        rest = io.BytesIO()
        client.retrbinary("RETR file", rest.write, rest=len(received))
        assert len(received) == MB
        assert received + rest.getvalue() == data


@pytest.mark.parametrize("command", ["STOR", "APPE"])
def test_ftplib_resumes_a_cut_upload(shared: Path, command: str) -> None:
    data = content(BIG)
    with Command("-w", directory=shared) as server, log_in(server) as client:
        client.voidcmd("TYPE I")
        with client.transfercmd("STOR file") as connection:
            connection.sendall(data[: BIG // 2])
            # A reset, not an end: what the kernel has not handed over yet is lost.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with pytest.raises(ftplib.error_temp, match=r"^426"):  # pyftpdlib takes a reset for an end
            client.voidresp()
        arrived = client.size("file")
        assert arrived is not None
        assert 0 < arrived <= BIG // 2
        assert (shared / "file").read_bytes() == data[:arrived]
        rest = arrived if command == "STOR" else None
        client.storbinary(f"{command} file", io.BytesIO(data[arrived:]), rest=rest)
        assert (shared / "file").read_bytes() == data


LINES = [b"line %d %s" % (number, b"x" * (number % 97)) for number in range(20_000)]


def test_an_upload_in_ascii_mode_arrives_with_this_systems_line_ends(shared: Path) -> None:
    with Command("-w", directory=shared) as server, log_in(server) as client:
        client.storlines("STOR file", io.BytesIO(b"\r\n".join(LINES)))
        expected = os.linesep.encode().join(LINES) + os.linesep.encode()
        assert (shared / "file").read_bytes() == expected


def test_a_download_in_ascii_mode_arrives_with_ftps_line_ends(shared: Path) -> None:
    (shared / "file").write_bytes(b"\n".join(LINES) + b"\n")
    with Command(directory=shared) as server, log_in(server) as client:
        client.voidcmd("TYPE A")
        with client.transfercmd("RETR file") as connection, connection.makefile("rb") as stream:
            received = stream.read()
        client.voidresp()
        assert received == b"\r\n".join(LINES) + b"\r\n"
        lines: list[str] = []
        client.retrlines("RETR file", lines.append)
        assert lines == [line.decode() for line in LINES]


# --- curl


@needs_curl
def test_curl_lists_downloads_and_uploads_as_a_user(shared: Path, local: Path) -> None:
    data = content(3 * MB + 1)
    (local / "file").write_bytes(data)
    with Command("-w", "-u", "ada", "-P", "lovelace", directory=shared) as server:
        login = ("--user", "ada:lovelace")
        curl(*login, "-T", str(local / "file"), "--ftp-create-dirs", url(server, "new/sub/file"))
        assert (shared / "new" / "sub" / "file").read_bytes() == data
        assert curl(*login, "--list-only", url(server, "new/sub/")).split() == ["file"]
        curl(*login, "-o", str(local / "copy"), url(server, "new/sub/file"))
        assert (local / "copy").read_bytes() == data
        refused = run("curl", "--silent", url(server))
        assert refused.returncode == 67  # CURLE_LOGIN_DENIED


@needs_curl
def test_curl_asks_for_checksums(shared: Path) -> None:
    (shared / "file").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    with Command("--hash", directory=shared) as server:
        result = run("curl", "-sv", "--quote", "HASH file", "--quote", "XSHA256 file", url(server))
        assert f"< 213 SHA-256 0-6 {digest}" in result.stderr
        assert re.search(rf"^< 2\d\d {digest}", result.stderr, re.MULTILINE | re.IGNORECASE), result.stderr


@needs_curl
def test_curl_resumes_a_cut_download(shared: Path, local: Path) -> None:
    data = content(BIG)
    (shared / "file").write_bytes(data)
    with Command(directory=shared) as server:
        part = read_and_kill(["curl", "--silent", url(server, "file")], 5 * MB + 1)
        server.logged(r"RETR .* completed=0 ")
        (local / "file").write_bytes(part)
        curl("-C", "-", "-o", str(local / "file"), url(server, "file"))
        assert (local / "file").read_bytes() == data
        assert_only_the_rest_was_sent(server, "RETR", BIG - len(part))


@needs_curl
def test_curl_resumes_a_cut_upload(shared: Path, local: Path) -> None:
    data = content(BIG)
    (local / "file").write_bytes(data)
    with Command("-w", directory=shared) as server:
        write_and_kill(["curl", "--silent", "-T", "-", url(server, "file")], data[: BIG // 2])
        server.logged(r"FTP session closed")
        arrived = (shared / "file").stat().st_size
        assert 0 < arrived <= BIG // 2
        curl("-C", "-", "-T", str(local / "file"), url(server, "file"))
        assert (shared / "file").read_bytes() == data
        assert_only_the_rest_was_sent(server, "APPE", BIG - arrived)


@needs_curl
@pytest.mark.parametrize(
    ("interface", "options", "command"),
    [
        ("127.0.0.1", ["--disable-epsv"], "PASV"),
        ("127.0.0.1", [], "EPSV"),
        ("127.0.0.1", ["-P", "-", "--disable-eprt"], "PORT"),
        ("127.0.0.1", ["-P", "-"], "EPRT"),
        pytest.param("::1", [], "EPSV", marks=needs_ipv6),
        pytest.param("::1", ["-P", "-"], "EPRT", marks=needs_ipv6),
    ],
    ids=["PASV", "EPSV", "PORT", "EPRT", "EPSV-IPv6", "EPRT-IPv6"],
)
def test_curl_transfers_in_every_mode(
    shared: Path, local: Path, interface: str, options: list[str], command: str
) -> None:
    data = content(3 * MB + 1)
    (local / "file").write_bytes(data)
    host = f"[{interface}]" if ":" in interface else interface
    with Command("-w", "-D", "-i", interface, directory=shared) as server:
        assert server.host == interface
        curl(*options, "-T", str(local / "file"), url(server, "file", host=host))
        assert (shared / "file").read_bytes() == data
        curl(*options, "-o", str(local / "copy"), url(server, "file", host=host))
        assert (local / "copy").read_bytes() == data
        assert curl(*options, "--list-only", url(server, host=host)).split() == ["file"]
        for number in range(1, 4):
            server.logged(rf"<- {command}\b", number)
        used = {name for name in ("PASV", "EPSV", "PORT", "EPRT") if f"<- {name}" in server.stderr}
        assert used == {command}


@needs_curl
def test_curl_transfers_with_tls(shared: Path, local: Path, tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL")
    data = content(BIG)
    (local / "file").write_bytes(data)
    tls = ("--tls", "--certfile", str(certificate(tmp_path)), "--tls-control-required", "--tls-data-required")
    with Command("-w", *tls, directory=shared) as server:
        curl("--ssl-reqd", "-k", "-T", str(local / "file"), url(server, "file"))
        assert (shared / "file").read_bytes() == data
        curl("--ssl-reqd", "-k", "-o", str(local / "copy"), url(server, "file"))
        assert (local / "copy").read_bytes() == data
        refused = run("curl", "--silent", url(server))
        assert refused.returncode != 0


# --- lftp


@needs_utf8
@needs_lftp
def test_lftp_mirrors_a_tree_down(tree: Path, local: Path) -> None:
    with Command(directory=tree) as server:
        lftp(server, f"mirror --parallel=3 / {quoted(local)}")
    assert_same_trees(tree, local)
    for path in relative_paths(tree):
        assert (local / path).stat().st_mode == (tree / path).stat().st_mode, path


@needs_utf8
@needs_lftp
def test_lftp_mirrors_a_tree_up(tree: Path, shared: Path) -> None:
    with Command("-w", directory=shared) as server:
        lftp(server, f"mirror -R --parallel=3 {quoted(tree)} /")
    assert_same_trees(tree, shared)


@needs_lftp
def test_lftp_resumes_a_cut_download(shared: Path, local: Path) -> None:
    data = content(BIG)
    (shared / "file").write_bytes(data)
    with Command(directory=shared) as server:
        part = read_and_kill(["lftp", "--norc", "-c", f"cat {url(server, 'file')}"], 5 * MB + 1)
        server.logged(r"RETR .* completed=0 ")
        (local / "file").write_bytes(part)
        lftp(server, f"get -c file -o {quoted(local / 'file')}")
        assert (local / "file").read_bytes() == data
        assert_only_the_rest_was_sent(server, "RETR", BIG - len(part))


@needs_lftp
def test_lftp_resumes_a_cut_upload(shared: Path, local: Path) -> None:
    data = content(BIG)
    (local / "file").write_bytes(data)
    with Command("-w", directory=shared) as server:
        upload = f"set ftp:use-allo no; open {url(server)}; put /dev/stdin -o file"
        write_and_kill(["lftp", "--norc", "-c", upload], data[: BIG // 2])
        server.logged(r"FTP session closed")
        arrived = (shared / "file").stat().st_size
        assert 0 < arrived <= BIG // 2
        lftp(server, f"put -c {quoted(local / 'file')} -o file")
        assert (shared / "file").read_bytes() == data
        assert_only_the_rest_was_sent(server, "STOR", BIG - arrived)


# --- wget


@needs_utf8
@needs_wget
def test_wget_downloads_a_tree(shared: Path, local: Path) -> None:
    names = ("plain", "with some spaces", "ünï 日本", "#hash", "100%", "quo'te", "[brackets]", ".hidden")
    for directory in (shared, shared / "sub", shared / "sub" / "a directory", shared / "sub" / "ünï"):
        directory.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            (directory / name).write_bytes(content(number * 40_000))
    with Command(directory=shared) as server:
        wget("-r", "-nH", "--restrict-file-names=nocontrol", "-P", str(local), url(server))
    assert_same_trees(shared, local)
