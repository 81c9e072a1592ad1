"""Where a GeventFTPServer listens: addresses, sockets, paths, systemd; and `bridge.running()`."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import pytest
from pyftpdlib.handlers import FTPHandler

import bridge
from bridge import GeventFTPServer
from bridge.server.listeners import systemd_sockets
from support.cli import become_third
from support.servers import PATIENCE, Client, handler_class, users

LOCALHOST = ("127.0.0.1", 0)


def test_an_existing_socket(tmp_path: Path) -> None:
    listener = socket.socket()
    listener.bind(LOCALHOST)
    with started_at(listener, tmp_path) as server, Client(server):
        assert server.address == listener.getsockname()


@contextlib.contextmanager
def started_at(where: Any, home: Path) -> Iterator[GeventFTPServer]:
    server = GeventFTPServer(where, handler_class(users(home)))
    server.start()
    try:
        yield server
    finally:
        server.stop(0)


class UnixClient(Client):
    def __init__(self, path: str) -> None:
        self.sock = gevent.socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")

    def data(self) -> Any:
        port = int(self.command("EPSV", "229").split("|")[3])
        return gevent.socket.create_connection(("127.0.0.1", port), PATIENCE)


def test_a_unix_socket(tmp_path: Path, short_path: Path) -> None:
    """Its data connections go over the loopback interface."""
    path = short_path / "socket"
    with started_at(path, tmp_path) as server, UnixClient(str(path)) as client:
        assert server.address == str(path)
        assert server.server_host is None
        assert server.server_port is None
        assert client.reply().startswith("220")
        client.command("USER u", "331")
        client.command("PASS p", "230")
        assert client.store("file", b"content").startswith("226")
        assert client.retrieve("file") == b"content"
        assert "227 Entering passive mode (127,0,0,1," in client.command("PASV", "227")
    assert not path.exists()


def test_a_unix_socket_that_nobody_listens_on_is_replaced(tmp_path: Path, short_path: Path) -> None:
    path = str(short_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with started_at(path, tmp_path):
        with pytest.raises(OSError, match="in use"):
            GeventFTPServer(path, FTPHandler)


def test_a_file_that_is_no_socket_is_not_replaced(short_path: Path) -> None:
    path = short_path / "file"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        GeventFTPServer(path, FTPHandler)
    assert path.read_text() == "precious"


SYSTEMD = """
import os
from pyftpdlib.handlers import FTPHandler
from bridge.server.listeners import systemd_sockets
from bridge import GeventFTPServer
os.environ["LISTEN_PID"] = str(os.getpid())  # as systemd does, which forks itself
[listener] = systemd_sockets()
assert systemd_sockets() == [] and "LISTEN_FDS" not in os.environ and not listener.get_inheritable()
GeventFTPServer(listener, FTPHandler).serve_forever()
"""


@pytest.mark.program
def test_a_socket_from_systemd() -> None:
    with socket.socket() as listener:
        listener.bind(LOCALHOST)
        listener.listen()
        program = subprocess.Popen(
            [sys.executable, "-c", SYSTEMD],
            env={**os.environ, "LISTEN_FDS": "1"},
            # The descriptor systemd would use; the child has no other.
            preexec_fn=lambda: become_third(listener),
            close_fds=False,
        )
        try:
            with ftplib.FTP(timeout=PATIENCE) as client:
                client.connect(*listener.getsockname())
                assert client.getwelcome().startswith("220")
        finally:
            program.kill()
            program.wait()


def test_without_systemd_there_are_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd_sockets() == []
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")  # somebody else's
    assert systemd_sockets() == []
    monkeypatch.setenv("LISTEN_PID", "x")
    with pytest.raises(ValueError, match="LISTEN_PID='x'"):
        systemd_sockets()


# --- running()


@pytest.mark.parametrize("thread", [None, True])
def test_running_serves_for_a_block(tmp_path: Path, thread: bool | None) -> None:
    """With clients that block, which is why it takes a thread where the socket module is not patched."""
    with bridge.running(handler_class(users(tmp_path)), thread=thread, max_cons=7) as server:
        assert server.max_cons == 7
        with ftplib.FTP(timeout=PATIENCE) as client:
            client.connect(*server.address)
            client.login("u", "p")
            client.storbinary("STOR file", io.BytesIO(b"content"))
            assert client.nlst() == ["file"]
            idle = socket.create_connection(server.address, PATIENCE)
            assert idle.recv(3) == b"220"
    assert server.closed
    with idle, idle.makefile("rb") as replies:
        assert replies.readlines()[-1].startswith(b"421")


def test_running_on_the_callers_hub(tmp_path: Path) -> None:
    with bridge.running(handler_class(users(tmp_path)), thread=False) as server, Client(server) as client:
        client.command("NOOP", "200")
    assert server.closed


def test_running_raises_what_goes_wrong(tmp_path: Path) -> None:
    handler = handler_class(users(tmp_path))
    with pytest.raises(TypeError, match="'max_con'"), bridge.running(handler, max_con=1):
        pass
    with bridge.running(handler) as server, pytest.raises(OSError, match="in use"):
        with bridge.running(handler, server.address):
            pass
    with pytest.raises(ZeroDivisionError), bridge.running(handler):
        raise ZeroDivisionError
