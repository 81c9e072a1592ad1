"""What is thrown into a session while it ends, or raised by what it calls then: it ends, alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from pyftpdlib.filesystems import AbstractedFS

from support.fakes import Gate, RecordingHandler
from support.servers import Client, eventually, handler_class, serving, started, users


def waiting_handler(home: Path, gate: Gate, **attributes: Any) -> Any:
    """A handler whose `on_incomplete_file_received` waits, in the greenlet that is `turns[-1]`."""

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []
        turns: list[Any] = []

        def on_incomplete_file_received(self, file: str) -> None:
            self.turns.append(gevent.getcurrent())
            super().on_incomplete_file_received(file)
            gate.wait()

        def ftp_STAT(self, line: str) -> None:
            raise gevent.GreenletExit

    return handler_class(users(home), Handler, **attributes)


@contextlib.contextmanager
def uploading(client: Client) -> Iterator[None]:
    with client.data() as data:
        client.command("STOR a", "1")
        data.sendall(b"half of it")
        yield


@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout])
def test_a_turn_killed_again_while_it_ends_its_session_does_not_end_the_server(
    tmp_path: Path, error: Any
) -> None:
    gate = Gate()
    handler = waiting_handler(tmp_path, gate)
    with serving(handler) as server, Client(server) as client, Client(server) as other:
        with uploading(client):
            client.send("STAT")  # which is killed
            gate.arrived()
            gevent.kill(handler.turns[-1], error)
            assert client.reply().startswith("421")
            assert client.ended()
        other.command("NOOP", "200")
        assert not server.runner.dead


@pytest.mark.parametrize("how", ["STAT", "close"])
@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout, ValueError, "disconnect"])
def test_nothing_of_a_session_is_left_whatever_its_end_meets(tmp_path: Path, how: str, error: Any) -> None:
    gate = Gate()
    handler = waiting_handler(tmp_path, gate)
    with started(handler) as server, Client(server) as client:
        with uploading(client):
            (session,) = server.sessions()
            if how == "close":
                client.close()
            else:
                client.send(how)
            gate.arrived()
            if error == "disconnect":
                session.disconnect()
            else:
                gevent.kill(handler.turns[-1], error)
            eventually(lambda: not server.sessions())
        eventually(lambda: ("disconnect",) in handler.events)
        assert handler.events.count(("disconnect",)) == 1
        assert not server.ip_map
        assert [call for call in server.ioloop.sched._tasks if not call.cancelled] == []
        with Client(server) as other:
            other.command("NOOP", "200")


@pytest.mark.parametrize("error", [gevent.GreenletExit, gevent.Timeout, ValueError, OSError])
@pytest.mark.parametrize("command", ["STOR a", "RETR b"])
@pytest.mark.parametrize("connects", [False, True])
def test_nothing_of_a_session_is_left_if_a_file_cannot_be_closed_at_its_end(
    tmp_path: Path, connects: bool, command: str, error: Any
) -> None:
    (tmp_path / "b").write_bytes(b"b" * (16 << 20))  # more than the kernel takes at once

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def close(self) -> None:
            self.file.close()
            raise error

    class FS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            return File(super().open(filename, mode))

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

    handler = handler_class(users(tmp_path), Handler, abstracted_fs=FS)
    with started(handler) as server:
        with Client(server) as client:
            port = int(client.command("EPSV", "229").split("|")[3])
            client.command(command, "150")
            if connects:
                with gevent.socket.create_connection((server.address[0], port)):
                    eventually(lambda: server.sessions()[0].handler.data_channel)
                    client.close()
                    eventually(lambda: not server.sessions())
        eventually(lambda: not server.sessions())
        eventually(lambda: ("disconnect",) in handler.events)
        assert not server.ip_map
        assert [call for call in server.ioloop.sched._tasks if not call.cancelled] == []
        with Client(server) as other:
            other.command("NOOP", "200")


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_callback_of_a_transfer_that_raises_ends_its_session(tmp_path: Path, error: Any) -> None:
    """As bridge.session.hooks says."""

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_file_received(self, file: str) -> None:
            raise error

    handler = handler_class(users(tmp_path), Handler)
    with started(handler) as server, Client(server) as client:
        assert client.store("a", b"content").startswith("226")
        assert client.ended()
        eventually(lambda: not server.sessions())
        assert ("disconnect",) in handler.events
