"""Killed turns, timeouts, exits, bugs in handlers, and descriptors that run out."""

from __future__ import annotations

import errno
import fcntl
import logging
import socket
import time
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey
from pyftpdlib.ioloop import AsyncChat
from pyftpdlib.servers import FTPServer

from bridge import GeventIOLoop
from bridge.loop import registration as channels
from bridge.loop.native_socket import NativeSocket
from support.exhaustion import no_descriptors
from support.fakes import Gate, RecordingHandler, WaitingFS
from support.servers import Client, eventually, handler_class, serving, users


class Opened:
    """Remembers the files a file system opens."""

    def __init__(self) -> None:
        self.files: list[Any] = []

    def filesystem(self, base: Any = WaitingFS, **attributes: Any) -> Any:
        opened = self

        class FS(base):
            def open(self, filename: str, mode: str) -> Any:
                file = super().open(filename, mode)
                opened.files.append(file)
                return file

        for name, value in attributes.items():
            setattr(FS, name, value)
        return FS


def waiting_handler(home: Path, wait: Any, **attributes: Any) -> Any:
    """A handler whose STAT waits by calling *wait*."""

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []
        turns: list[Any] = []

        def ftp_STAT(self, line: str) -> None:
            self.turns.append(gevent.getcurrent())
            wait()
            super().ftp_STAT(line)

    return handler_class(users(home), Handler, **attributes)


def test_killing_a_waiting_turn_ends_its_session_with_421(tmp_path: Path) -> None:
    gate = Gate()
    opened = Opened()
    handler = waiting_handler(tmp_path, gate.wait, abstracted_fs=opened.filesystem(gate=gate))
    with serving(handler) as server, Client(server) as client, Client(server) as other:
        with client.data() as data:
            client.command("STOR a", "1")
            data.sendall(b"half a file")
            client.send("STAT")
            gate.arrived()
            gevent.kill(handler.turns[0])
            assert client.reply().startswith("421")
            assert client.ended()
        other.command("NOOP", "200")
    (file,) = opened.files
    assert file.closed
    assert ("incomplete", str(tmp_path / "a")) in handler.events
    assert handler.turns[0].dead


def test_a_turn_killed_while_it_opens_a_file_leaves_nothing_open(tmp_path: Path) -> None:
    gate = Gate()
    workers: list[Any] = []

    class FS(WaitingFS):
        def open(self, filename: str, mode: str) -> Any:
            workers.append(gevent.getcurrent())
            return super().open(filename, mode)

    FS.gate = gate
    handler = handler_class(users(tmp_path), abstracted_fs=FS)
    with serving(handler) as server, Client(server) as client:
        client.send("STOR slow")
        gate.arrived()
        gevent.kill(workers[0])
        assert client.reply().startswith("421")
        assert client.ended()


def test_killing_a_waiting_on_connect_ends_that_client_only(tmp_path: Path) -> None:
    gate = Gate()
    workers: list[Any] = []

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_connect(self) -> None:
            if not workers:
                workers.append(gevent.getcurrent())
                gate.wait()

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server, login=False) as client:
        gate.arrived()
        gevent.kill(workers[0])
        assert client.reply().startswith("421")
        assert client.ended()
        with Client(server) as other:
            other.command("NOOP", "200")


def test_an_uncaught_timeout_ends_its_session_with_421_and_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wait() -> None:
        with gevent.Timeout(0.01):
            gevent.sleep(10)

    handler = waiting_handler(tmp_path, wait)
    with serving(handler) as server, Client(server) as client:
        client.send("STAT")
        assert client.reply().startswith("421")
        assert client.ended()
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "Timeout" in record.getMessage()
    assert record.exc_info


def test_an_uncaught_timeout_in_a_timer_ends_its_session(tmp_path: Path) -> None:
    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            self.ioloop.call_later(0.001, self.wait)

        def wait(self) -> None:
            with gevent.Timeout(0.01):
                gevent.sleep(10)

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        assert client.reply().startswith("421")
        assert client.ended()


def poll_for_ever(ioloop: GeventIOLoop) -> None:
    while True:
        ioloop.poll()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run", [GeventIOLoop.loop, poll_for_ever])
def test_an_exit_raised_in_a_turn_reaches_the_caller(tmp_path: Path, error: Any, run: Any) -> None:
    def leave() -> None:
        raise error

    def talk() -> None:
        with Client(server) as client:
            client.send("STAT")
            client.ended()

    server = FTPServer(("127.0.0.1", 0), waiting_handler(tmp_path, leave), ioloop=GeventIOLoop())
    talker = gevent.spawn(talk)
    try:
        with pytest.raises(error):
            run(server.ioloop)
    finally:
        server.close_all()
    talker.join(20)
    assert talker.successful()


def test_killing_the_greenlet_that_serves_stops_the_server(tmp_path: Path) -> None:
    with serving(handler_class(users(tmp_path))) as server, Client(server) as client:
        address = server.address
        server.runner.kill()
        assert client.ended()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_a_bug_in_a_handler_ends_its_session_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = waiting_handler(tmp_path, lambda: 1 / 0)
    with serving(handler) as server, Client(server) as client, Client(server) as other:
        client.send("STAT")
        assert client.ended()
        other.command("NOOP", "200")
    assert "ZeroDivisionError" in caplog.text


def test_a_bug_in_handle_error_ends_its_session_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On pyftpdlib's own loop this ends the server."""

    def fail(self: Any) -> None:
        raise RuntimeError("even this")

    handler = waiting_handler(tmp_path, lambda: 1 / 0, handle_error=fail)
    with serving(handler) as server, Client(server) as client, Client(server) as other:
        client.send("STAT")
        assert client.ended()
        other.command("NOOP", "200")
    assert "even this" in caplog.text


def test_a_listener_survives_the_lack_of_descriptors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """pyftpdlib closes the listener at the first EMFILE."""
    with serving(handler_class(users(tmp_path))) as server, Client(server) as client:
        waiting = socket.socket()
        with no_descriptors():
            waiting.setblocking(False)
            assert waiting.connect_ex(server.address) in (0, errno.EINPROGRESS)
            (registration,) = (
                each for each in server.ioloop._registrations.values() if each.channel is server
            )
            eventually(lambda: registration.delay >= 4 * channels.MIN_DELAY)
            client.command("NOOP", "200")
        eventually(lambda: not registration.delay)
        waiting.close()
        with Client(server) as late:
            late.command("NOOP", "200")
    lines = [each.getMessage() for each in caplog.records if each.name == "bridge.loop.registration"]
    assert len(lines) == 2, lines  # once per episode, and its end
    assert "RLIMIT_NOFILE" in lines[0]


@pytest.mark.parametrize("when", ["before the loop has a hub", "before the hub runs", "while it is watched"])
def test_a_descriptor_that_is_closed_is_not_watched(when: str) -> None:
    """libev and libuv would abort the process."""
    ended = []

    class Chat(AsyncChat):
        def handle_close(self) -> None:
            ended.append(self)
            self.close()

    end, theirs = socket.socketpair()
    with end:  # one that nobody gets who opens something else
        ours = NativeSocket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD, 500))
    with theirs, GeventIOLoop() as ioloop:
        chat = Chat(ours, ioloop=ioloop)
        descriptor = ours.fileno()
        if when != "before the loop has a hub":
            ioloop.attach()
        if when == "while it is watched":
            gevent.sleep(0)
            chat.modify_ioloop_events(ioloop.READ)
        monkey.get_original("os", "close")(ours.detach())  # behind the back of gevent, too
        if when == "while it is watched":
            ioloop.modify(descriptor, ioloop.READ | ioloop.WRITE)
        ioloop.attach()
        eventually(lambda: ended or when == "before the hub runs")
        chat.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            ioloop.register(descriptor, chat, ioloop.READ)
    with GeventIOLoop() as ioloop, pytest.raises(OSError, match="Bad file descriptor"):
        ioloop.register(descriptor, chat, ioloop.READ)


def test_a_channel_that_cannot_use_its_events_does_not_spin() -> None:
    asked = []

    class Deaf(AsyncChat):
        def readable(self) -> bool:
            asked.append(time.monotonic())
            return False

    ours, theirs = socket.socketpair()
    with theirs, GeventIOLoop() as ioloop:
        Deaf(ours, ioloop=ioloop)
        theirs.send(b"x")
        runner = gevent.spawn(ioloop.loop)
        eventually(lambda: len(asked) >= 5)
        # after 0.01, 0.02, 0.04 and 0.08 s of rest: not thousands of times at once
        assert asked[4] - asked[0] > 0.9 * 0.15
        ioloop.close()
        runner.join(20)
