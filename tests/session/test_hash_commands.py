"""Checksums that clients ask for: right, computed while the session goes on, and cut without a trace."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.subprocess
import pytest
from pyftpdlib.filesystems import AbstractedFS

import bridge
from bridge import OffloadedFS
from bridge.filesystems.threads import Threads
from bridge.session.checksums import HASH_BLOCK
from bridge.session.hash_commands import HashMixin
from support.cli import certificate
from support.fakes import Gate
from support.hash_commands import CONTENT, ENDS, MD5, Hashing, Memory, OffloadedMemory, Slow, crc32, sha256
from support.servers import Client, eventually, handler_class, serving, started, users


@pytest.fixture
def threads() -> Iterator[Threads]:
    pool = Threads(2)
    yield pool
    pool.kill()


@pytest.fixture
def client(tmp_path: Path, threads: Threads) -> Iterator[Client]:
    """Of a server that has a file, an empty one and a directory."""
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "with 2 3").write_bytes(b"0123456789")
    (tmp_path / 'quo"te').write_bytes(b"quote")
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    authorizer = users(tmp_path)
    authorizer.add_user("lister", "p", str(tmp_path), perm="el")
    handler = handler_class(authorizer, Hashing, hash_threads=threads)
    with started(handler) as server, Client(server) as client:
        yield client


# --- the right ones

#: The reply when no range is left.
WHOLE = f"213 SHA-256 0-9 {sha256(b'0123456789')} with 2 3"


@pytest.mark.parametrize("name", ["SHA-256", "SHA-512", "MD5", "CRC32"])
@pytest.mark.parametrize("filesystem", [AbstractedFS, OffloadedFS, Memory, OffloadedMemory])
def test_a_hash_is_the_one_of_hashlib(tmp_path: Path, threads: Threads, name: str, filesystem: Any) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    fs = type("FS", (filesystem,), {"threads": threads})
    expected = crc32(CONTENT) if name == "CRC32" else hashlib.new(name.replace("-", ""), CONTENT).hexdigest()
    with started(handler_class(users(tmp_path), Hashing, abstracted_fs=fs, hash_threads=threads)) as server:
        with Client(server) as client:
            client.command(f"opts hash {name.lower()}", f"200 {name}")
            assert client.command("HASH file", "213") == (f"213 {name} 0-{len(CONTENT) - 1} {expected} file")
            older = "XCRC" if name == "CRC32" else f"X{name.replace('-', '')}"
            assert client.command(f"{older} file", "250") == f"250 {expected.upper()}"


@pytest.mark.parametrize(
    ("lines", "reply"),
    [
        ("HASH empty", f"213 SHA-256 0-0 {sha256(b'')} empty"),
        ("HASH with 2 3", WHOLE),
        ("RANG 2 4|HASH with 2 3", f"213 SHA-256 2-4 {sha256(b'234')} with 2 3"),
        ("RANG 8 99|HASH with 2 3", f"213 SHA-256 8-9 {sha256(b'89')} with 2 3"),
        ("RANG 2 4|RANG 1 0|HASH with 2 3", WHOLE),
        ("RANG 2 4|RANG 4 2|HASH with 2 3", WHOLE),
        ("RANG 2 4|HASH empty|HASH with 2 3", WHOLE),
        ("RANG 2 4|XCRC empty|HASH with 2 3", f"213 SHA-256 2-4 {sha256(b'234')} with 2 3"),
        ("RANG 2 4|REIN|USER u|PASS p|HASH with 2 3", WHOLE),
        ("RANG 10 10|HASH with 2 3", "501 The file has 10 bytes."),
        ("RANG 4 2", "501 "),
        ("XCRC empty", "250 00000000"),
        ("RANG 2 4|STOR file", "504 "),
        ("RANG 2 4|RETR file|HASH with 2 3", WHOLE),
        ('XCRC "with 2 3"', f"250 {crc32(b'0123456789').upper()}"),
        ('XCRC "with 2 3" 4', f"250 {crc32(b'456789').upper()}"),
        ('XCRC "with 2 3" 2 4', f"250 {crc32(b'23').upper()}"),
        ("XCRC with 2 3 2 4", f"250 {crc32(b'23').upper()}"),
        ("XCRC with 2 3", "550 with is not retrievable."),
        ('XCRC "with 2 3" 4 2', "501 "),
        ('XCRC "with 2 3" 4 11', "501 The file has 10 bytes."),
        ('XCRC "with 2 3" a', "501 "),
        ('XCRC "quo""te"', f"250 {crc32(b'quote').upper()}"),
        ("HASH directory", "553 "),
        ("XMD5 directory", "550 "),
        ("HASH missing", "550 "),
        ("XSHA1 file", "504 "),
        ("OPTS HASH CRC-37", "501 "),
        ("OPTS HASH CRC-37|OPTS HASH", "200 SHA-256"),
        ("OPTS HASH MD5|REIN|USER u|PASS p|OPTS HASH", "200 SHA-256"),
        ("REIN|USER lister|PASS p|HASH file", "550 Not enough privileges."),
    ],
)
def test_what_is_asked_for_is_what_one_gets(client: Client, lines: str, reply: str) -> None:
    for line in lines.split("|"):
        client.send(line)
        answer = client.reply()
    assert answer == reply or (reply.endswith(" ") and answer.startswith(reply))


def test_feat_tells_what_there_is_and_marks_what_is_selected(client: Client) -> None:
    client.command("OPTS HASH MD5", "200")
    client.send("FEAT")
    features = []
    while not (line := client.file.readline().decode().strip()).startswith("211 "):
        features.append(line)
    assert "HASH SHA-256;SHA-512;MD5*;CRC32" in features
    assert {"XCRC", "XMD5", "XSHA256", "XSHA512", "MDTM"} <= set(features)
    assert not {"XSHA", "XSHA1", "RANG STREAM"} & set(features)


def test_it_is_off_by_default(tmp_path: Path) -> None:
    with started(handler_class(users(tmp_path), bridge.FTPHandler)) as server, Client(server) as client:
        for command in ("HASH file", "XCRC file", "RANG 1 0"):
            client.command(command, "500")


def test_what_is_offered_is_checked() -> None:
    with pytest.raises(ValueError, match=r"SHA-256, .*not .'SHA-3'"):
        type("Handler", (Hashing,), {"hash_algorithms": ("MD5", "SHA-3")})


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT)])
def test_more_than_the_limit_is_refused(tmp_path: Path, threads: Threads, known: bool, size: int) -> None:
    fs: Any = type("FS", (Memory,), {"known": known})
    if known and size < len(CONTENT):
        fs.open_read = None  # it is not even opened
    attributes = {"abstracted_fs": fs, "hash_max_size": size, "hash_threads": threads}
    with started(handler_class(users(tmp_path), Hashing, **attributes)) as server, Client(server) as client:
        if size < len(CONTENT):
            client.command("HASH file", "556 file is too large")
            client.command("XMD5 file", "550 file is too large")
        else:
            client.command("HASH file", "213")
            client.command("RANG 1 2", "350")
            client.command("HASH file", "554")  # streams do not seek


# --- the session goes on


@pytest.mark.parametrize("base", [Hashing, type("Handler", (HashMixin, bridge.FTPHandler), {})])
@pytest.mark.parametrize("serve", [started, serving])
def test_commands_are_answered_meanwhile(tmp_path: Path, threads: Threads, base: Any, serve: Any) -> None:
    slow = Slow(tmp_path, threads, base)
    with serve(slow.handler) as server, Client(server) as client, Client(server) as other:
        client.send("HASH file")
        slow.gate.arrived()
        client.command("NOOP", "200")
        client.send("STAT")
        progress = f"211-HASH: SHA-256 of {HASH_BLOCK} of {len(CONTENT)} bytes of file"
        assert client.file.readline().decode().strip() == progress
        assert client.reply() == "211 End of status."
        client.command("XMD5 file", "450")
        client.command("CWD /", "250")
        other.command("NOOP", "200")
        slow.gate.open()
        assert client.reply() == f"213 SHA-256 0-{len(CONTENT) - 1} {sha256(CONTENT)} file"
        client.command("XMD5 file", f"250 {MD5.upper()}")
        assert all(file.closed for file in slow.files)
        client.send("STAT")
        assert b"HASH" not in client.file.readline()


def test_a_client_that_waits_for_its_hash_is_not_idle(tmp_path: Path, threads: Threads) -> None:
    slow = Slow(tmp_path, threads)
    with started(slow.handler) as server, Client(server) as client:
        client.send("HASH file")
        slow.gate.arrived()
        control = server.sessions()[0].handler
        first = control._idler
        server.ioloop.submit(control.handle_timeout)
        eventually(lambda: control._idler is not first)
        due = control._idler.timeout
        slow.gate.open()
        assert client.reply().startswith("213")
        assert control._idler.timeout > due


def test_over_tls(tmp_path: Path, threads: Threads) -> None:
    from pyftpdlib.handlers import TLS_FTPHandler

    base = type("Handler", (HashMixin, TLS_FTPHandler), {})
    slow = Slow(tmp_path, threads, base, certfile=str(certificate(tmp_path)), ssl_context=None)
    with started(slow.handler) as server, Client(server) as client:
        client.command("AUTH TLS", "234")
        client.encrypt()
        client.command("USER u", "331")
        client.command("PASS p", "230")
        client.send("XMD5 file")
        slow.gate.arrived()
        client.command("NOOP", "200")
        slow.gate.open()
        assert client.reply() == f"250 {MD5.upper()}"


# --- and ends


def test_abor_ends_it(tmp_path: Path, threads: Threads) -> None:
    slow = Slow(tmp_path, threads)
    with started(slow.handler) as server, Client(server) as client:
        client.send("HASH file")
        slow.gate.arrived()
        client.command("ABOR", "426")
        assert client.reply().startswith("226")
        client.command("ABOR", "225")
        assert not slow.files[0].closed  # under the thread that reads it
        slow.gate.open()
        eventually(lambda: slow.files[0].closed)
        client.command("XMD5 file", f"250 {MD5.upper()}")


def test_abor_that_comes_with_it_ends_it(tmp_path: Path, threads: Threads) -> None:
    slow = Slow(tmp_path, threads)
    with started(slow.handler) as server, Client(server) as client:
        client.send("HASH file", "ABOR", "NOOP")
        assert [client.reply()[:3] for _ in range(3)] == ["426", "226", "200"]
        eventually(lambda: slow.files[0].closed)
        assert slow.gate.arrivals == 0


def test_abor_ends_what_waits_cooperatively(tmp_path: Path, threads: Threads) -> None:
    fs = type("FS", (Memory,), {"gate": (gate := Gate())})
    handler = handler_class(users(tmp_path), Hashing, abstracted_fs=fs, hash_threads=threads)
    with started(handler) as server, Client(server) as client:
        client.send("HASH file")
        gate.arrived()
        client.command("ABOR", "426")
        assert client.reply().startswith("226")
        client.command("NOOP", "200")


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_with_its_session(tmp_path: Path, threads: Threads, end: str) -> None:
    slow = Slow(tmp_path, threads)
    with started(slow.handler) as server, Client(server) as client:
        client.send("HASH file")
        slow.gate.arrived()
        job = server.sessions()[0].handler._hash
        ENDS[end](server, client)
        eventually(lambda: job._greenlet.dead and (end == "REIN" or not server.sessions()))
        assert isinstance(job._error, gevent.GreenletExit)
        slow.gate.open()
        eventually(lambda: slow.files[0].closed)


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), "451 Input/output error."),
        (OSError(errno.ETIMEDOUT, ""), "451 Connection timed out."),
        (RuntimeError("bug"), "451 Internal error."),
    ],
)
def test_what_fails_is_told(tmp_path: Path, threads: Threads, error: Exception, reply: str) -> None:
    slow = Slow(tmp_path, threads)
    slow.error = error
    slow.gate.open()
    with started(slow.handler) as server, Client(server) as client:
        assert client.command("HASH file", "451") == reply
        assert slow.files[0].closed
        client.command("NOOP", "200")


def test_no_free_thread_is_450(tmp_path: Path) -> None:
    pool = Threads(1, queue_timeout=0.01)
    slow = Slow(tmp_path, pool)
    with started(slow.handler) as server, Client(server) as client, Client(server, "other") as other:
        client.send("HASH file")
        slow.gate.arrived()
        other.send("HASH file")
        assert other.reply().startswith("450")
        assert slow.files[1].closed
        slow.gate.open()
        assert client.reply().startswith("213")
    pool.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_asks_for_a_hash(client: Client) -> None:
    host, port = client.sock.getpeername()
    command = ["curl", "-sv", "-u", "u:p", "-Q", "HASH file", f"ftp://{host}:{port}/", "--max-time", "20"]
    output = gevent.subprocess.run(command, capture_output=True, check=True).stderr.decode()
    assert f"< 213 SHA-256 0-{len(CONTENT) - 1} {sha256(CONTENT)} file" in output
