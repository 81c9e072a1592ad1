"""Handlers, authorizers, file systems and callbacks wait; only their own session stalls."""

from __future__ import annotations

import contextlib
import contextvars
import ftplib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event
from gevent.pool import Group
from pyftpdlib.ioloop import Acceptor, AsyncChat
from pyftpdlib.servers import ThreadedFTPServer

import bridge
from bridge import GeventIOLoop
from support.fakes import Gate, RecordingHandler, WaitingAuthorizer, WaitingFS
from support.servers import Client, eventually, handler_class, serving, serving_in_thread, users


def test_a_login_that_waits_leaves_other_sessions_alone(tmp_path: Path) -> None:
    gate = Gate()
    handler = handler_class(users(tmp_path, WaitingAuthorizer(gate), "slow"))
    with serving(handler) as server, Client(server, login=False) as slow:
        slow.reply()
        slow.command("USER slow", "331")
        slow.send("PASS p")
        gate.arrived()
        with Client(server) as other:
            assert other.store("a", b"x" * 100_000).startswith("226")
            assert other.retrieve("a") == b"x" * 100_000
        gate.open()
        assert slow.reply().startswith("230")


def test_200_logins_that_wait_200_ms_wait_together(tmp_path: Path) -> None:
    """Not timed: the authorizer sees how many wait at once."""
    waiting = most = 0
    everybody_in = Event()

    class Authorizer(WaitingAuthorizer):
        def validate_authentication(self, *args: Any) -> None:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            if waiting == 200:
                everybody_in.set()
            everybody_in.wait(20)
            super().validate_authentication(*args)
            waiting -= 1

    handler = handler_class(users(tmp_path, Authorizer(seconds=0.2)))

    def log_in() -> None:
        Client(server).close()

    with serving(handler, max_cons=0) as server:
        clients = Group()
        for _ in range(200):
            clients.spawn(log_in)
        clients.join(raise_error=True)
    assert most == 200


def test_pipelined_commands_are_kept_and_answered_in_order_while_a_turn_waits(tmp_path: Path) -> None:
    gate = Gate()
    handler = handler_class(users(tmp_path, WaitingAuthorizer(gate), "slow"))
    with serving(handler) as server, Client(server, login=False) as client:
        client.reply()
        client.send("USER slow", "PASS p")
        gate.arrived()
        client.send("PWD")
        client.send("SYST", "NOOP")
        assert client.reply().startswith("331")
        with gevent.Timeout(0.05, False):
            pytest.fail(f"answered while its turn waits: {client.reply()}")
        gate.open()
        codes = [client.reply()[:3] for _ in range(4)]
        assert codes == ["230", "257", "215", "200"]


def test_watchers_of_a_waiting_session_rest(tmp_path: Path) -> None:
    """Input that arrives during a wait wakes the hub once, not for ever."""
    gate = Gate()
    handler = handler_class(users(tmp_path, WaitingAuthorizer(gate), "slow"))
    with serving(handler) as server, Client(server, login=False) as client:
        client.reply()
        client.send("USER slow", "PASS p")
        gate.arrived()
        client.send("NOOP")
        (registration,) = (
            each for each in server.ioloop._registrations.values() if isinstance(each.channel, handler)
        )
        eventually(lambda: registration.parked)
        assert not registration.watcher.active
        gate.open()
        assert [client.reply()[:3] for _ in range(3)] == ["331", "230", "200"]
        assert registration.watcher.active


def test_a_waiting_on_connect_holds_back_its_client_only(tmp_path: Path) -> None:
    gate = Gate()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []
        first = True

        def on_connect(self) -> None:
            if Handler.first:
                Handler.first = False
                gate.wait()
            super().on_connect()

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server, login=False) as first:
        gate.arrived()
        first.send("USER u", "PASS p")
        with Client(server) as second:
            second.command("NOOP", "200")
        with gevent.Timeout(0.05, False):
            pytest.fail(f"a command overtook the banner: {first.reply()}")
        gate.open()
        assert [first.reply()[:3] for _ in range(3)] == ["220", "331", "230"]


def test_a_file_system_that_waits_stalls_its_session_only(tmp_path: Path) -> None:
    gate = Gate()
    filesystem = type("FS", (WaitingFS,), {"gate": gate})
    handler = handler_class(users(tmp_path), abstracted_fs=filesystem)
    with serving(handler) as server, Client(server) as slow, Client(server) as other:
        with slow.data() as data:
            slow.send("STOR slow.bin")
            gate.arrived()
            assert other.store("quick.bin", b"q").startswith("226")
            data.sendall(b"s" * 50_000)
            gate.open()
            assert slow.reply().startswith("1")
        assert slow.reply().startswith("226")
    assert (tmp_path / "slow.bin").read_bytes() == b"s" * 50_000


def test_on_file_received_may_wait_and_the_next_command_waits_for_it(tmp_path: Path) -> None:
    gate = Gate()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_file_received(self, file: str) -> None:
            gate.wait()
            super().on_file_received(file)

        def ftp_NOOP(self, line: str) -> None:
            self.events.append(("noop",))
            super().ftp_NOOP(line)

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        assert client.store("a", b"1").startswith("226")
        gate.arrived()
        client.send("NOOP")
        gevent.sleep(0.01)
        gate.open()
        assert client.reply().startswith("200")
    kinds = [event[0] for event in Handler.events]
    assert kinds[:4] == ["connect", "login", "received", "noop"]


def test_the_last_on_disconnect_may_wait_before_loop_returns(tmp_path: Path) -> None:
    gate = Gate()
    done = []

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_disconnect(self) -> None:
            gate.wait()
            done.append(True)

    with serving(handler_class(users(tmp_path), Handler)) as server:
        client = Client(server)
        server.close()  # the listener only
        client.close()
        gate.arrived()
        assert not server.runner.dead
        gate.open()
        server.runner.join(20)
        assert server.runner.dead
        assert done


def test_a_turn_may_wait_in_the_threadpool(tmp_path: Path) -> None:
    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            self.respond(f"230-{gevent.get_hub().threadpool.apply(sum, ([1, 2],))}")

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server, login=False) as client:
        client.reply()
        client.send("USER u", "PASS p")
        assert [client.reply()[:4] for _ in range(2)] == ["331 ", "230 "]
        client.command("NOOP", "200")


# --- contexts

_request: contextvars.ContextVar[str] = contextvars.ContextVar("_request", default="none")


def test_turns_run_in_the_sessions_context_and_know_their_session(tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def note(self, what: str) -> None:
            assert bridge.current_session() is self
            seen.append((what, _request.get()))

        def on_connect(self) -> None:
            _request.set(f"request {self.remote_port}")
            self.note("connect")
            gevent.sleep(0.001)
            self.ioloop.call_later(0.001, self.note, "timer")
            self.ioloop.call_later(0.001, lambda: self.note("closure"))

        def on_login(self, username: str) -> None:
            gevent.sleep(0.001)
            self.note("login")

        def on_file_received(self, file: str) -> None:
            self.note("received")

        def on_disconnect(self) -> None:
            self.note("disconnect")

    with serving(handler_class(users(tmp_path), Handler)) as server:
        for _ in range(2):
            with Client(server) as client:
                port = client.sock.getsockname()[1]
                client.store("a", b"1")
                client.send("QUIT")
                client.ended()
                eventually(lambda: seen[-1][0] == "disconnect")
            names = {what for what, request in seen if request == f"request {port}"}
            assert names == {"connect", "timer", "closure", "login", "received", "disconnect"}
    assert len(seen) == 12
    assert bridge.current_session() is None
    assert _request.get() == "none"


def test_a_session_inherits_the_context_its_server_was_made_in(tmp_path: Path) -> None:
    seen = []

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_connect(self) -> None:
            seen.append(_request.get())

    token = _request.set("outside")
    try:
        with serving(handler_class(users(tmp_path), Handler)) as server:
            _request.set("later")
            Client(server).close()
    finally:
        _request.reset(token)
    assert seen == ["outside"]


def test_a_greenlet_spawned_by_a_turn_is_outside(tmp_path: Path) -> None:
    seen = []

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            seen.append(gevent.spawn(bridge.current_session).get())

    with serving(handler_class(users(tmp_path), Handler)) as server:
        Client(server).close()
    assert seen == [None]


# --- isolation


def test_a_timeout_that_one_turn_forgot_does_not_strike_another_session(tmp_path: Path) -> None:
    """Why a worker that has waited is not used again."""

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []
        timeouts: list[gevent.Timeout] = []

        def on_login(self, username: str) -> None:
            if username == "careless":
                self.timeouts.append(gevent.Timeout.start_new(0.02))
            gevent.sleep(0.001 if username == "careless" else 0.05)

    with serving(handler_class(users(tmp_path, None, "careless"), Handler)) as server:
        with Client(server, "careless") as careless, Client(server) as other:
            other.command("NOOP", "200")
            careless.command("NOOP", "200")
    for timeout in Handler.timeouts:
        timeout.close()  # (libuv goes on using the memory of a timer that nobody closes)


def test_a_channel_made_in_a_session_turn_runs_at_once(tmp_path: Path) -> None:
    """A handler's own client would deadlock if it were held until the turn ends."""
    answered = Event()

    class Peer(AsyncChat):
        def handle_read(self) -> None:
            self.recv(10)
            answered.set()
            self.close()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            ours, theirs = socket.socketpair()
            Peer(ours, ioloop=self.ioloop)
            theirs.send(b"x")
            assert answered.wait(5)
            theirs.close()

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        client.command("NOOP", "200")
    assert answered.is_set()


def test_timers_of_a_busy_session_wait_for_the_end_of_its_turn(tmp_path: Path) -> None:
    order: list[str] = []
    gate = Gate()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            self.ioloop.call_later(0, order.append, "zero")
            self.ioloop.call_later(0.001, order.append, "later")
            gate.wait()
            order.append("turn")

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server, login=False) as client:
        client.reply()
        client.send("USER u", "PASS p")
        gate.arrived()
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            gevent.sleep(0.005)
        assert order == []
        gate.open()
        client.reply()
        assert client.reply().startswith("230")
        eventually(lambda: len(order) == 3)
    assert order == ["turn", "zero", "later"]


def test_channels_are_served_in_the_order_they_became_ready() -> None:
    """libev calls its watchers the other way round."""
    order: list[int] = []

    class Numbered(AsyncChat):
        number = 0

        def handle_read(self) -> None:
            order.append(self.number)
            self.recv(10)

    with contextlib.ExitStack() as stack:
        ioloop = stack.enter_context(GeventIOLoop())
        ends = []
        for number in range(5):
            ours, theirs = socket.socketpair()
            Numbered(ours, ioloop=ioloop).number = number
            ends.append(stack.enter_context(theirs))
        ioloop.poll(0.001)
        for number in (3, 1, 4, 0, 2):
            ends[number].send(b"x")
        while len(order) < 5:
            ioloop.poll(1.0)
    assert order == [3, 1, 4, 0, 2]


def test_everything_an_accept_creates_is_held_until_its_turn_ends() -> None:
    gate = Gate()
    heard: list[str] = []

    class Hearing(AsyncChat):
        name = ""

        def handle_read(self) -> None:
            heard.append(self.name)
            self.recv(10)

    class Listener(Acceptor):
        def handle_accepted(self, sock: Any, address: Any) -> None:
            Hearing(sock, ioloop=self.ioloop).name = "accepted"
            ours, self.theirs = socket.socketpair()
            Hearing(ours, ioloop=self.ioloop).name = "second"
            self.theirs.send(b"x")
            gate.wait()
            heard.append("accept")

    with GeventIOLoop() as ioloop:
        listener = Listener(ioloop=ioloop)
        listener.bind_af_unspecified(("127.0.0.1", 0))
        listener.listen(5)
        runner = gevent.spawn(ioloop.loop)
        with gevent.socket.create_connection(listener.socket.getsockname()) as client:
            client.sendall(b"x")
            gate.arrived()
            gevent.sleep(0.01)
            assert heard == []
            gate.open()
            eventually(lambda: len(heard) == 3)
        assert heard[0] == "accept"
        assert set(heard[1:]) == {"accepted", "second"}
        listener.theirs.close()
        ioloop.close()
        runner.join(20)


def test_the_last_on_disconnect_may_wait_in_a_threaded_server_too(tmp_path: Path) -> None:
    """Its threads poll until they have no channel left; what still waits must not be cut off."""
    done = threading.Event()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_disconnect(self) -> None:
            gevent.sleep(0.05)
            done.set()

    server_class = type("Threaded", (ThreadedFTPServer,), {"poll_timeout": 0.01})
    handler = handler_class(users(tmp_path), Handler)
    with serving_in_thread(handler, GeventIOLoop, server_class=server_class) as server:
        client = ftplib.FTP(timeout=20)
        client.connect(*server.address)
        client.login("u", "p")
        client.quit()
        assert done.wait(20)
