"""Active data connections (PORT): when one has ended, nobody else's descriptor is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import pytest
from pyftpdlib.handlers import FTPHandler
from support import PATIENCE, Client, eventually, handler_class, started, users


@contextlib.contextmanager
def port(client: Client) -> Iterator[Any]:
    """The client's end of a connection that the server has made for PORT."""
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        high, low = divmod(listener.getsockname()[1], 256)
        client.command(f"PORT 127,0,0,1,{high},{low}", "200")
        listener.settimeout(PATIENCE)
        connection, _ = listener.accept()
        with connection:
            yield connection


@pytest.mark.parametrize("command", ["PASV", "ABOR", "QUIT"])
def test_what_follows_an_active_transfer_leaves_other_sessions_alone(tmp_path: Path, command: str) -> None:
    """The descriptor is another session's by then: pyftpdlib would take it off the loop, for good."""
    (tmp_path / "small").write_bytes(b"small")
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        with gevent.socket.socket() as second, port(client) as data:
            eventually(lambda: len(server.ioloop.socket_map) == 3)
            descriptor = max(server.ioloop.socket_map)
            client.command("RETR small", "125")
            assert data.recv(100) == b"small"
            assert data.recv(100) == b""
            assert client.reply().startswith("226")
            second.settimeout(PATIENCE)
            second.connect(server.address)
            assert second.recv(100).startswith(b"220")
            assert max(server.ioloop.socket_map) == descriptor
            client.send(command)
            assert client.reply()
            second.sendall(b"NOOP\r\n")
            assert second.recv(100).startswith(b"200")


def test_pyftpdlib_keeps_what_has_given_its_socket_away() -> None:
    """When it does not, `ActiveMixin.handle_connect` and `SessionMixin._on_dtp_connection` may go."""
    names = ("_dtp_acceptor", "_idler", "_in_dtp_queue", "_out_dtp_queue")
    control = type("Control", (), {**dict.fromkeys(names), "_dtp_connector": 1})()
    FTPHandler._on_dtp_connection(control)
    assert control._dtp_connector == 1
