"""The disk is full, a file too large, a quota exhausted: brought about for real, but for the quota.

What is promised: the client gets 452 or 552 whenever the error comes, at the opening, while writing or with
close(), over TLS too; the log says it in one line; the session goes on; and it is known which incomplete
files stay. Small disks need root; without it those tests skip.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent.ssl
import pyftpdlib.handlers
import pytest
from pyftpdlib.filesystems import AbstractedFS

from support import cli, exhaustion
from support.exhaustion import connected, handler_for, limited, lines_of
from support.fakes import RecordingHandler
from support.servers import Client, eventually, started

MB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with exhaustion.small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """With room for the name of one more file, but not for its content."""
    (small_disk / "other").write_bytes(b"y" * MB)
    return small_disk


def upload(client: Client, command: str, content: bytes) -> str:
    """The reply; the server may close the data connection before it has read everything."""
    with client.data() as data:
        client.command(command, "1")
        with contextlib.suppress(OSError):
            data.sendall(content)
            if isinstance(client, TLSClient):
                data.unwrap()  # closing is a reset, if there is something unread
    return client.reply()


class TLSClient(Client):
    """Encrypts commands and data."""

    def __init__(self, server: Any) -> None:
        self._context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = gevent.ssl.CERT_NONE
        super().__init__(server, login=False)
        self.reply()
        self.command("AUTH TLS", "234")
        self.file.close()
        self.sock = self._context.wrap_socket(self.sock)
        self.file = self.sock.makefile("rb")
        for line, code in (("USER u", "331"), ("PASS p", "230"), ("PBSZ 0", "200"), ("PROT P", "200")):
            self.command(line, code)

    def data(self) -> Any:
        return self._context.wrap_socket(super().data())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("OpenSSL")
    pytest.importorskip("cryptography")
    return cli.certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "TLS"])
def connect(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Serve a directory, with or without TLS; a context manager for the client and the handler class."""

    @contextlib.contextmanager
    def serve(home: Path, **attributes: Any) -> Iterator[tuple[Client, Any]]:
        base: Any = RecordingHandler
        client_class: Any = Client
        if request.param == "TLS":
            certfile = str(request.getfixturevalue("certificate"))
            base = type("TLSHandler", (RecordingHandler, pyftpdlib.handlers.TLS_FTPHandler), {})
            attributes.update(certfile=certfile, ssl_context=None)
            client_class = TLSClient
        handler = handler_for(home, base, **attributes)
        with started(handler) as server, client_class(server) as client:
            client.command("TYPE I", "200")
            yield client, handler

    return serve


@pytest.mark.parametrize(("used", "size"), [(100_000, 3 * MB), (MB, 100)], ids=["while writing", "at close"])
def test_a_full_disk_is_452(
    used: int, size: int, connect: Any, full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(full_disk / "other", used)  # so that a write is cut short, and close() has a rest to write
    with connect(full_disk) as (client, handler):
        assert upload(client, "STOR file", b"x" * size).startswith("452 No space left on device")
        client.command("NOOP", "200")
        (line,) = lines_of(caplog, "pyftpdlib", logging.ERROR)
        assert re.search(r"STOR .*/file: No space left on device after \d+ bytes", line)
        assert handler.events[-1] == ("incomplete", str(full_disk / "file"))
        assert "received" not in [event[0] for event in handler.events]
        # What is there can be read, and removing it makes room.
        assert client.retrieve("other") == b"y" * used
        client.command("DELE other", "250")
        assert upload(client, "STOR file", b"x" * 100).startswith("226")


def test_an_upload_that_fails_otherwise_on_a_full_disk_is_answered(connect: Any, full_disk: Path) -> None:
    class File(io.BufferedWriter):
        def write(self, chunk: Any) -> int:
            super().write(chunk)
            raise RuntimeError("a bug")

    class BuggyFS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            return File(io.FileIO(filename, mode))

    with connect(full_disk, abstracted_fs=BuggyFS) as (client, _):
        assert upload(client, "STOR file", b"x").startswith("426 Internal error")
        client.command("NOOP", "200")


def test_an_upload_that_is_aborted_on_a_full_disk_is_answered_as_such(full_disk: Path) -> None:
    with started(handler_for(full_disk)) as server, Client(server) as client:
        with connected(server, client) as data:
            (control,) = server._sessions
            client.command("STOR file", "125")
            data.sendall(b"x")
            eventually(control.data_channel.transfer_in_progress)
            client.command("ABOR", "426")
            assert client.reply().startswith("226")
        client.command("NOOP", "200")


def test_a_file_that_grows_too_large_is_552(connect: Any, tmp_path: Path) -> None:
    with connect(tmp_path) as (client, _):
        with limited(resource.RLIMIT_FSIZE, MB // 2):
            assert upload(client, "STOR file", b"x" * MB).startswith("552 File too large")
        assert upload(client, "STOR file", b"x" * MB).startswith("226")


def test_an_exhausted_quota_is_552(connect: Any, tmp_path: Path) -> None:
    class QuotaFS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with connect(tmp_path, abstracted_fs=QuotaFS) as (client, _):
        client.command("STOR file", "552")
        client.command("NOOP", "200")


@pytest.mark.parametrize("command", ["STOR new", "STOU"])
def test_no_room_for_a_file_s_name_is_452(command: str, connect: Any, small_disk: Path) -> None:
    for name in "ab":
        (small_disk / name).touch()
    with connect(small_disk) as (client, _):
        client.command(command, "452")
        client.command("NOOP", "200")
        assert upload(client, "STOR a", b"x").startswith("226")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("command", ["STOR file", "STOU", "APPE old", "REST 3"])
def test_what_becomes_of_an_incomplete_upload(command: str, keep: bool, small_disk: Path) -> None:
    old = small_disk / "old"
    old.write_bytes(b"was here")
    handler = handler_for(small_disk, keep_incomplete_uploads=keep)
    with started(handler) as server, Client(server) as client:
        client.command("TYPE I", "200")
        if command.startswith("REST"):
            client.command(command, "350")
            command = "STOR old"
        assert upload(client, command, b"x" * 2 * MB).startswith("452")
        client.command("NOOP", "200")
    ((_, name),) = (event for event in handler.events if event[0] == "incomplete")
    if command.endswith("old"):
        assert old.read_bytes()[:9] == (b"was" + 6 * b"x" if command == "STOR old" else b"was herex")
    else:
        assert old.read_bytes() == b"was here"
        assert os.path.exists(name) == keep
    if os.path.exists(name):
        assert os.path.getsize(name) > MB // 2
