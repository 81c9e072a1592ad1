"""Every command has one reply, also if its turn is ended by `abort_transfer` or what follows is too late."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyftpdlib.filesystems import AbstractedFS

from support.fakes import Gate, RecordingHandler
from support.servers import Client, handler_class, started, users


def waiting_at_the_gate(home: Path, gate: Gate) -> Any:
    """A handler whose commands wait at the gate if their path is `slow`."""

    class FS(AbstractedFS):
        def validpath(self, path: str) -> bool:
            if path.endswith("slow"):
                gate.wait()
            return bool(super().validpath(path))

    return handler_class(users(home), abstracted_fs=FS)


def test_a_timeout_after_the_reply_is_no_other_reply(tmp_path: Path) -> None:
    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            raise OSError(errno.ETIMEDOUT, "too late")

    with started(handler_class(users(tmp_path), Handler)) as server, Client(server, login=False) as client:
        client.send("USER u", "PASS p")
        assert [client.reply()[:3] for _ in range(4)] == ["220", "331", "230", ""]


@pytest.mark.parametrize("command", ["RETR slow", "NLST slow"])
def test_a_transfer_command_whose_turn_is_ended_is_answered(tmp_path: Path, command: str) -> None:
    gate = Gate()
    with started(waiting_at_the_gate(tmp_path, gate)) as server, Client(server) as client:
        client.send(command, "NOOP")
        gate.arrived()
        server.sessions()[0].abort_transfer("no more")
        assert [client.reply() for _ in range(2)] == ["426 no more", "200 I successfully did nothing'."]


def test_another_command_whose_turn_is_ended_is_answered(tmp_path: Path) -> None:
    gate = Gate()
    with started(waiting_at_the_gate(tmp_path, gate)) as server, Client(server) as client:
        with client.data() as data:
            client.command("STOR a", "1")
            data.sendall(b"some of it")
            client.send("SIZE slow", "NOOP")
            gate.arrived()
            server.sessions()[0].abort_transfer("no more")
            replies = [client.reply() for _ in range(3)]
    assert replies == ["451 no more", "426 no more", "200 I successfully did nothing'."]


def test_what_is_ended_when_it_has_replied_is_not_answered_again(tmp_path: Path) -> None:
    gate = Gate()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def ftp_RETR(self, file: str) -> None:
            super().ftp_RETR(file)
            gate.wait()

    (tmp_path / "a").touch()
    with started(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        client.command("EPSV", "229")
        client.send("RETR a", "NOOP")
        gate.arrived()
        server.sessions()[0].abort_transfer("no more")
        assert [client.reply()[:3] for _ in range(3)] == ["150", "426", "200"]
        with gevent.Timeout(0.05, False):
            pytest.fail(client.reply())
