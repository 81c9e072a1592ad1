"""A session that ends in the middle of a command, with the reply that begins or ends a transfer; and a data
connection that fails while it is accepted.

pyftpdlib goes on with the session and stumbles over what is gone. What is promised: the file is closed,
the transfer is counted, nothing is logged as a bug and no timer is left; a client that is there gets a reply.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from support.servers import Client, eventually, handler_class, started, users


def breaking(home: Path, code: str, **attributes: Any) -> Any:
    """A handler class whose connection is gone as soon as *code* has been said."""

    def respond(self: Any, resp: str, logfun: Any = logging.debug) -> None:
        FTPHandler.respond(self, resp)
        if resp.startswith(code):
            self.close()

    return handler_class(users(home), respond=respond, **attributes)


@pytest.mark.parametrize("code", ["125", "226"])
@pytest.mark.parametrize("command", ["RETR old", "STOR new", "STOU", "APPE new", "LIST"])
def test_the_session_ends_with_a_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str, code: str
) -> None:
    (tmp_path / "old").write_bytes(b"x" * 1000)
    descriptors = len(os.listdir("/proc/self/fd"))
    with started(breaking(tmp_path, code)) as server:
        calls = len(server.ioloop.sched._tasks)
        with Client(server) as client, client.data() as data:
            (control,) = server._sessions
            eventually(lambda: control.data_channel)
            client.send(command)
            data.shutdown(1)
            assert client.ended()
            eventually(lambda: not server._sessions)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 1)  # the listener
        left = [each for each in server.ioloop.sched._tasks[calls:] if not each.cancelled]
        assert not left
    assert not [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_connection_that_fails_when_it_is_accepted(tmp_path: Path) -> None:
    """As accept(2) says of Linux: it has the errors of the connection, such as EPROTO."""

    def accept(self: Any) -> Any:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))

    passive = type("Passive", (FTPHandler.passive_dtp,), {"accept": accept})
    with started(handler_class(users(tmp_path), passive_dtp=passive)) as server, Client(server) as client:
        with client.data():
            client.send("STOR new")
            replies = [client.reply()]
            if replies[0].startswith("150"):
                replies.append(client.reply())
            assert replies[-1].startswith("425"), replies
        client.command("NOOP", "200")


class Unreachable:
    """A socket whose network has gone: its `recv` and `send` fail."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, _: int) -> bytes:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    def send(self, _: bytes) -> int:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_client_that_cannot_be_reached_has_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """pyftpdlib logs a traceback, as for a bug."""
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        (control,) = server._sessions
        control.socket = Unreachable(control.socket)
        client.send("NOOP")
        assert client.ended()
    assert not errors(caplog)


@pytest.mark.parametrize("command", ["RETR old", "STOR new"])
def test_a_data_connection_that_cannot_be_reached_has_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    (tmp_path / "old").write_bytes(b"x" * 1000)
    handler = handler_class(users(tmp_path), use_sendfile=False)
    with started(handler) as server, Client(server) as client, client.data() as data:
        (control,) = server._sessions
        eventually(lambda: control.data_channel)
        client.command("TYPE A", "200")  # no pipe
        control.data_channel.socket = Unreachable(control.data_channel.socket)
        client.command(command, "125")
        if command.startswith("STOR"):
            data.sendall(b"content")
        assert client.reply().startswith("426")
        client.command("NOOP", "200")
    assert not errors(caplog)


def test_a_file_that_cannot_tell_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """451, and no traceback."""

    class Lost(io.FileIO):
        def tell(self) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    class FS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            return Lost(filename)

    (tmp_path / "old").write_bytes(b"x" * 1000)
    with started(handler_class(users(tmp_path), abstracted_fs=FS)) as server, Client(server) as client:
        client.command("TYPE I", "200")
        with client.data():
            client.send("RETR old")
            assert client.reply()[0] == "1"
            assert client.reply().startswith("451")
        client.command("NOOP", "200")
    assert not [each for each in errors(caplog) if "Traceback" in each]
    assert "Input/output error" in errors(caplog)[0]


def test_an_upload_that_comes_before_its_command(tmp_path: Path) -> None:
    """pyftpdlib takes it for the client's end of the connection, and waits for another one for ever."""
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        with client.data() as data:
            (control,) = server._sessions
            eventually(lambda: control.data_channel)
            data.sendall(b"content")
            eventually(lambda: not control.data_channel or rests(server, control.data_channel))
            client.command("STOR new", "125")
        assert client.reply().startswith("226")
    assert (tmp_path / "new").read_bytes() == b"content"


def rests(server: Any, channel: Any) -> bool:
    """Whether what *channel* was ready for has been looked at."""
    return server.ioloop._registrations[channel._fileno].resting is not None
