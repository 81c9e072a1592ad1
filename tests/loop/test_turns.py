"""The order in which channels that are ready together are served, and that others on the hub are not kept."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import fcntl
import os
import random
import resource
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pyftpdlib.handlers
import pytest
from gevent import monkey
from pyftpdlib.ioloop import Acceptor
from pyftpdlib.servers import FTPServer

from bridge import GeventFTPServer, GeventIOLoop, current_session
from bridge.loop import registration as channels
from bridge.loop import turns
from bridge.loop.native_socket import NativeSocket
from bridge.loop.turns import Session, Turns
from support.fakes import Gate
from support.servers import PATIENCE, Client, eventually, handler_class, serving, users


class Channel:
    """Ready when told to be; what it does in its turn is up to the test."""

    def __init__(self, turns: Turns, served: list[str], name: str) -> None:
        self.session: Session | None = Session(turns, contextvars.copy_context())
        self.control = None
        self.watcher: Any = self
        self.name = name
        self.act: Callable[[], None] = lambda: None
        self._served = served

    def admit(self) -> Session | None:
        return None

    def handle(self) -> None:
        self._served.append(self.name)
        self.act()


class Bench:
    """Turns on this hub, served in it, and channels."""

    def __init__(self) -> None:
        self.hub = gevent.get_hub()
        self.raised: list[BaseException] = []
        self.turns = Turns(self.hub, self.raised.append, print, print, print, print)
        self.served: list[str] = []

    def channels(self, names: str) -> list[Channel]:
        return [Channel(self.turns, self.served, name) for name in names]

    def serve(self, ready: list[Channel], oldest_last: bool) -> None:
        """A pass of the hub in which the *ready* have become so, in this order."""
        self.turns.ready.extend(reversed(ready) if oldest_last else ready)
        self.hub.loop.run_callback(self.turns.serve, oldest_last)
        gevent.sleep(0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.turns.close()
    assert not bench.raised


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice is over after one turn."""
    monkeypatch.setattr(turns, "SLICE", 0.0)
    monkeypatch.setattr(turns, "SLICE_EACH", 0.0)


@pytest.fixture
def all_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice ends with what is ready, also when others have the processor meanwhile."""
    monkeypatch.setattr(turns, "SLICE", 1000.0)


either_order = pytest.mark.parametrize("oldest_last", [True, False])


@either_order
@pytest.mark.usefixtures("all_time")
def test_in_the_order_in_which_they_became_ready(bench: Bench, oldest_last: bool) -> None:
    bench.serve(bench.channels("abcde"), oldest_last)
    assert bench.served == list("abcde")


@either_order
@pytest.mark.usefixtures("no_time")
def test_what_a_slice_leaves_comes_first_and_once(bench: Bench, oldest_last: bool) -> None:
    a, b, c, d = bench.channels("abcd")
    bench.serve([a, b, c], oldest_last)
    assert bench.served == ["a"]
    bench.serve([a, c, b, d], oldest_last)  # watched all the time, they become ready again
    assert bench.served == ["a", "b"]
    bench.serve([c], oldest_last)
    bench.serve([], oldest_last)
    bench.serve([], oldest_last)
    assert bench.served == list("abcad")
    assert not bench.turns.ready


@either_order
@pytest.mark.usefixtures("no_time")
def test_nothing_is_lost_or_overtaken(bench: Bench, oldest_last: bool) -> None:
    """A model: first come, first served, with one place for each."""
    channels = bench.channels("abcdefgh")
    queue: list[str] = []
    choice = random.Random(1)
    for _ in range(2000):
        ready = choice.sample(channels, choice.randrange(4))
        queue += [each.name for each in ready if each.name not in queue]
        before = len(bench.served)
        bench.serve(ready, oldest_last)
        expected, queue = queue[:1], queue[1:]
        assert bench.served[before:] == expected


@either_order
@pytest.mark.usefixtures("all_time")
def test_a_turn_that_waits_does_not_hold_up_the_next(bench: Bench, oldest_last: bool) -> None:
    a, b, c = bench.channels("abc")
    gate = gevent.event.Event()
    b.act = lambda: bench.served.append("opened" if gate.wait() else "")
    bench.serve([a, b, c], oldest_last)
    assert bench.served == ["a", "b", "c"]
    gate.set()
    eventually(lambda: bench.served[-1] == "opened")


def test_others_on_the_hub_are_served_between_slices(bench: Bench) -> None:
    """20 turns of 1 ms: a greenlet that wakes meanwhile runs before the last of them."""
    channels = bench.channels("abcdefghijklmnopqrst")
    for channel in channels:
        channel.act = lambda: _native_sleep(0.001)
    watcher = bench.hub.loop.check(ref=False)
    watcher.start(bench.turns.serve, True)
    try:
        bench.turns.ready.extend(channels)
        gevent.sleep(0)
        while bench.turns.ready:
            bench.served.append("other")
            gevent.sleep(0)
    finally:
        watcher.stop()
        watcher.close()
    assert "other" in bench.served[1:-1]
    assert len(bench.served) - bench.served.count("other") == 20


_native_sleep = monkey.get_original("time", "sleep")


def test_an_accept_belongs_to_nobody_until_its_session_is_there(tmp_path: Any) -> None:
    """Killed before, it must not take the listener for the session that it ends."""
    seen: list[Any] = []

    class Server(FTPServer):
        def handle_accepted(self, sock: Any, addr: Any) -> Any:
            if not seen:
                seen.append(current_session())
                sock.close()
                raise gevent.GreenletExit
            return super().handle_accepted(sock, addr)

    server = Server(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
    server.ioloop.attach()
    try:
        gevent.socket.create_connection(server.address).close()
        eventually(lambda: seen)
        with Client(server) as client:
            client.command("PWD", "257")
    finally:
        server.close_all()
    assert seen == [None]


# --- one event, several blocks or connections

native_socket = monkey.get_original("socket", "socket")


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """Its one item: how often the hub has looked for events."""
    count = [0]
    watcher = gevent.get_hub().loop.check(ref=False)

    def _on_pass() -> None:
        count[0] += 1

    watcher.start(_on_pass)
    yield count
    watcher.stop()
    watcher.close()


def test_one_event_moves_several_blocks(tmp_path: Any, passes: list[int]) -> None:
    """pyftpdlib's own server and handlers, which move 64 KiB at a time."""
    moved: collections.Counter[int] = collections.Counter()
    block = pyftpdlib.handlers.DTPHandler.ac_in_buffer_size

    class DataHandler(pyftpdlib.handlers.DTPHandler):
        def handle_read(self) -> None:
            before = self.tot_bytes_received
            super().handle_read()
            moved[passes[0]] += self.tot_bytes_received - before

        handle_read_event = handle_read  # as pyftpdlib has it

        def initiate_sendfile(self) -> None:
            before = self.tot_bytes_sent
            super().initiate_sendfile()
            moved[passes[0]] += self.tot_bytes_sent - before

    content = random.Random(1).randbytes(4 << 20)
    handler = handler_class(users(tmp_path), dtp_handler=DataHandler)
    with serving(handler) as server, Client(server) as client:
        client.command("TYPE I", "200")
        assert client.store("file", content) == "226 Transfer complete."
        assert (tmp_path / "file").read_bytes() == content
        assert sum(moved.values()) == len(content)
        assert block < max(moved.values()) <= channels.BULK
        moved.clear()
        assert client.retrieve("file") == content
        assert block < max(moved.values()) <= channels.BULK + block  # (the first with the command)


@pytest.mark.usefixtures("all_time")
def test_one_event_accepts_several_connections(tmp_path: Any, passes: list[int]) -> None:
    accepted: list[int] = []

    class Handler(pyftpdlib.handlers.FTPHandler):
        def on_connect(self) -> None:
            accepted.append(passes[0])

    with serving(handler_class(users(tmp_path), Handler)) as server, contextlib.ExitStack() as stack:
        before = passes[0]
        clients = [stack.enter_context(native_socket()) for _ in range(20)]
        for client in clients:
            client.connect(server.address)
        assert passes[0] == before, "all of them wait"
        for client in clients:
            stack.enter_context(gevent.socket.socket(fileno=client.detach())).recv(4)
    assert len(accepted) == 20
    assert len(set(accepted)) < 10  # the kernel may still be at the handshakes of some


def test_who_connects_when_an_accept_goes_on_that_waited_is_accepted(tmp_path: Any) -> None:
    """On libuv, and libev by way of CFFI, nobody served what it made ready, nor anything after that."""
    gate = Gate()

    class Handler(pyftpdlib.handlers.FTPHandler):
        def on_connect(self) -> None:
            if not gate.arrivals:
                gate.wait()

    with serving(handler_class(users(tmp_path), Handler)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(native_socket()) for _ in range(3)]
        clients[0].connect(server.address)
        gate.arrived()
        clients[1].connect(server.address)
        clients[2].connect(server.address)
        gate.open()  # goes on before the hub looks at its sockets
        for client in clients:
            ours = stack.enter_context(gevent.socket.socket(fileno=client.detach()))
            ours.settimeout(PATIENCE)
            assert ours.recv(3) == b"220"


# --- native sockets where gevent's are handed over

#: A descriptor's number far above those that are open.
HIGH = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 10


def test_a_gevents_listener_stays_its_owners(tmp_path: Any) -> None:
    listener = gevent.socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(5)
    address = listener.getsockname()
    server: Any = GeventFTPServer(listener, handler_class(users(tmp_path)))
    server.start()
    with server, Client(server) as client:
        (session,) = server.sessions()
        assert type(server.socket) is NativeSocket
        assert type(session.handler.socket) is NativeSocket
        assert listener.getsockname() == address
        client.store("file", b"content")
        assert client.retrieve("file") == b"content"
        assert listener.fileno() == server.socket.fileno()
    assert listener.fileno() == -1, "closed with the server"


def test_nobody_closes_a_descriptor_twice() -> None:
    """The native socket and its owner have one descriptor; whichever goes first, another's stays open."""
    for last in ("native", "owner"):
        with gevent.socket.socket() as sock:
            # A number that no other thread is given meanwhile: the kernel gives the lowest that is free.
            owner = gevent.socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, HIGH))
        loop = GeventIOLoop()
        channel: Any = Acceptor(ioloop=loop)
        channel.socket, channel._closed = owner, True
        loop.register(owner.fileno(), channel, loop.READ)
        native = channel.socket
        assert type(native) is NativeSocket
        loop.unregister(owner.fileno())
        fd = owner.fileno()
        channel.socket = None
        another = os.open(os.devnull, os.O_RDONLY)
        native.close() if last == "owner" else owner.close()
        os.dup2(another, fd)  # the number is another's now
        os.close(another)
        del native, owner
        os.close(fd)  # it is still open
        loop.close()
