"""GeventFTPServer's life: every call in every state, the drain, where it listens, whose the loop is."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey
from gevent.pywsgi import WSGIServer
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer, GeventIOLoop
from bridge.server.drain import StopReport
from bridge.server.server import MOVES
from support.fakes import Gate, RecordingHandler, WaitingAuthorizer
from support.servers import PATIENCE, Client, eventually, handler_class, started, users

_native_thread = monkey.get_original("_thread", "start_new_thread")

LOCALHOST = ("127.0.0.1", 0)

# --- every call in every state


@contextlib.contextmanager
def server_in(state: str, home: Path) -> Iterator[GeventFTPServer]:
    """A server in that state; one that drains has a session, which only a timeout will end."""
    gate = Gate()
    handler = handler_class(users(home, WaitingAuthorizer(gate), "slow"))
    server = GeventFTPServer(LOCALHOST, handler)
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop, 0)
        if state in ("started", "draining"):
            server.start()
        if state == "draining":
            client = stack.enter_context(Client(server, login=False))
            client.send("USER slow", "PASS p")
            gate.arrived()
            server.close()
        if state == "closed":
            server.stop(0)
        assert server.state == state
        yield server


CALLS: dict[str, Callable[[GeventFTPServer], Any]] = {
    "start": lambda server: server.start(),
    "close": lambda server: server.close(),
    "stop": lambda server: server.stop(0),
    "close_all": lambda server: server.close_all(),
    "sessions": lambda server: server.sessions(),
    "address": lambda server: (server.address, server.server_host, server.server_port),
    "repr": repr,
}

#: What a call leaves the server in; "refused" leaves it as it was. Names not here change nothing.
OUTCOMES = {
    ("created", "start"): "started",
    ("created", "close"): "closed",
    ("created", "stop"): "closed",
    ("created", "close_all"): "closed",
    ("started", "close"): "closed",  # through draining, since nobody is connected
    ("started", "stop"): "closed",
    ("started", "close_all"): "closed",
    ("draining", "start"): "refused",
    ("draining", "stop"): "closed",
    ("draining", "close_all"): "closed",
    ("closed", "start"): "refused",
}


@pytest.mark.parametrize("state", MOVES)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_in_every_state(tmp_path: Path, state: str, call: str) -> None:
    with server_in(state, tmp_path) as server:
        address = server.address
        outcome = OUTCOMES.get((state, call), state)
        if outcome == "refused":
            with pytest.raises(RuntimeError, match=rf"no {call}\(\) when {state}"):
                CALLS[call](server)
            outcome = state
        else:
            CALLS[call](server)
        assert server.state == outcome
        assert server.started == (outcome == "started")
        assert server.closed == (outcome == "closed")
        assert server.address == address == (server.server_host, server.server_port)


@pytest.mark.parametrize("state", ["draining", "closed"])
def test_serve_forever_is_refused_when_the_server_has_ended(tmp_path: Path, state: str) -> None:
    with server_in(state, tmp_path) as server:
        with pytest.raises(RuntimeError, match=f"when {state}"):
            server.serve_forever()
        assert server.state == state


# --- start


def test_a_port_in_use_is_an_error_of_the_constructor(tmp_path: Path) -> None:
    handler = handler_class(users(tmp_path))
    with started(handler) as server, pytest.raises(OSError, match=str(server.server_port)) as caught:
        GeventFTPServer(server.address, handler)
    assert isinstance(caught.value, OSError)


def test_nothing_is_accepted_before_start(tmp_path: Path) -> None:
    """Also on a loop that runs already."""
    handler = handler_class(users(tmp_path))
    with started(handler) as running:
        server = GeventFTPServer(LOCALHOST, handler, ioloop=running.ioloop)
        with Client(server, login=False) as early, Client(running):
            assert not server.sessions()
            server.start()
            assert early.reply().startswith("220")
            server.stop(0)


def test_a_failed_constructor_leaves_nothing_open(short_path: Path) -> None:
    with pytest.raises(TypeError, match="FTPHandler"):
        GeventFTPServer(str(short_path / "socket"), object)
    assert list(short_path.iterdir()) == []
    with pytest.raises(TypeError, match="GeventIOLoop"):
        GeventFTPServer(LOCALHOST, FTPHandler, ioloop=object())  # type: ignore[arg-type]


def test_it_stands_in_a_list_beside_a_wsgi_server(tmp_path: Path) -> None:
    def application(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"page"]

    servers = [
        GeventFTPServer(LOCALHOST, handler_class(users(tmp_path))),
        WSGIServer(LOCALHOST, application, log=None),
    ]
    for each in servers:
        each.start()
    assert all(each.started and each.server_host == "127.0.0.1" for each in servers)
    with Client(servers[0]):
        pass
    for each in servers:
        each.stop()
    assert all(each.closed and not each.started for each in servers)


# --- the drain


class Slow(RecordingHandler):
    """Counts what is left open; STAT stops the server in the session's own turn."""

    def ftp_STAT(self, line: str) -> None:
        assert self.server.stop(self.server.patience) is None
        self.respond("211 Stopping.")


def slow_handler(home: Path, gate: Gate | None = None) -> Any:
    return handler_class(users(home, WaitingAuthorizer(gate), "slow"), Slow, events=[])


def test_a_drain_lets_transfers_finish_and_sends_the_others_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content := b"content " * 1_000_000)
    handler = slow_handler(tmp_path)
    with started(handler) as server, contextlib.ExitStack() as stack:
        idle, up, down = (stack.enter_context(Client(server)) for _ in range(3))
        up_data, down_data = stack.enter_context(up.data()), stack.enter_context(down.data())
        up.command("STOR new", "1")
        up_data.sendall(b"first ")
        down.command("RETR file", "1")
        eventually(lambda: all(each.transfer for each in server.sessions()[1:]))
        stop = gevent.spawn(server.stop, PATIENCE)
        assert idle.reply().startswith("421")
        assert idle.ended()
        with pytest.raises(ConnectionRefusedError):
            gevent.socket.create_connection(server.address)
        assert server.state == "draining"
        received = b""
        while chunk := down_data.recv(1 << 20):
            received += chunk
        assert received == content
        assert [down.reply()[:3], down.reply()[:3]] == ["226", "421"]
        assert down.ended()
        up_data.sendall(b"second")
        up_data.close()
        assert [up.reply()[:3], up.reply()[:3]] == ["226", "421"]
        assert stop.get() == StopReport(sessions_finished=3, transfers_finished=2)
        assert (tmp_path / "new").read_bytes() == b"first second"
        assert handler.events.count(("disconnect",)) == 3


def test_after_a_transfer_the_next_command_ends_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the client may read what it has been sent."""
    monkeypatch.setattr("bridge.session.control.FAREWELL_DELAY", 1000)
    for command, replies in (("STOR more", ["421"]), ("QUIT", ["221"])):
        with started(slow_handler(tmp_path)) as server, Client(server) as client:
            with client.data():
                client.command("STOR file", "1")
                eventually(lambda: server.sessions()[0].transfer)
                stop = gevent.spawn(server.stop, PATIENCE)
                gevent.sleep(0)
            assert client.reply().startswith("226")
            gevent.sleep(0.01)
            assert not stop.ready()
            client.send(command)
            assert [client.reply()[:3] for _ in replies] == replies
            assert client.ended()
            assert stop.get() == StopReport(sessions_finished=1, transfers_finished=1)


def test_whose_transfer_has_ended_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.session.control.FAREWELL_DELAY", 1000)
    with started(slow_handler(tmp_path)) as server, Client(server) as client:
        with client.data():
            client.command("STOR file", "1")
            eventually(lambda: server.sessions()[0].transfer)
            stop = gevent.spawn(server.stop, PATIENCE)
            gevent.sleep(0)
        assert client.reply().startswith("226")
        server.stop(0)
        assert client.reply().startswith("421")
        assert stop.get() == StopReport(sessions_finished=1, transfers_finished=1)


def test_a_transfer_announced_with_150_is_waited_for(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path)) as server, Client(server) as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        client.command("STOR new", "150")
        stop = gevent.spawn(server.stop, PATIENCE)
        gevent.sleep(0)
        with gevent.socket.create_connection(("127.0.0.1", port)) as data:
            data.sendall(b"content")
        assert [client.reply()[:3], client.reply()[:3]] == ["226", "421"]
        assert stop.get() == StopReport(sessions_finished=1, transfers_finished=1)


def test_a_turn_that_waits_may_finish(tmp_path: Path) -> None:
    gate = Gate()
    with started(slow_handler(tmp_path, gate)) as server, Client(server, login=False) as client:
        client.send("USER slow", "PASS p")
        gate.arrived()
        stop = gevent.spawn(server.stop, PATIENCE)
        gevent.sleep(0.01)
        assert server.state == "draining"
        gate.open()
        assert [client.reply()[:3] for _ in range(4)] == ["220", "331", "230", "421"]
        assert stop.get() == StopReport(sessions_finished=1)


def test_at_the_timeout_the_rest_is_cut(tmp_path: Path) -> None:
    gate = Gate()
    handler = slow_handler(tmp_path, gate)
    with started(handler) as server, contextlib.ExitStack() as stack:
        waiting = stack.enter_context(Client(server, login=False))
        waiting.send("USER slow", "PASS p")
        gate.arrived()
        sending, announced = (stack.enter_context(Client(server)) for _ in range(2))
        data = stack.enter_context(sending.data())
        sending.command("STOR half", "1")
        data.sendall(b"half")
        announced.command("EPSV", "229")
        announced.command("STOR never", "150")
        eventually(lambda: server.sessions()[1].transfer.bytes == 4)
        report = server.stop(0.01)
        assert report == StopReport(sessions_cut=3, transfers_cut=2)
        assert str(report) == "0 session(s) finished and 3 cut, 0 transfer(s) finished, 0 failed and 2 cut"
        assert [sending.reply()[:3], sending.reply()[:3]] == ["426", "421"]
        assert [announced.reply()[:3], announced.reply()[:3]] == ["426", "421"]
        assert [waiting.reply()[:3] for _ in range(3)] == ["220", "331", "421"]
        assert ("incomplete", str(tmp_path / "half")) in handler.events
        assert ("received", str(tmp_path / "half")) not in handler.events
        assert handler.events.count(("disconnect",)) == 3


def test_a_turn_that_cannot_be_ended_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.server.drain.KILL_GRACE", 0.05)
    stubborn = Gate()

    class Stubborn(FTPHandler):
        def on_login(self, username: str) -> None:
            while True:
                try:
                    return stubborn.wait()
                except gevent.GreenletExit:
                    pass

    with started(handler_class(users(tmp_path), Stubborn)) as server, Client(server, login=False) as client:
        client.send("USER u", "PASS p")
        stubborn.arrived()
        assert server.stop(0) == StopReport(sessions_cut=1)
        assert server.closed
        assert client.ended()
        stubborn.open()


def test_what_a_client_aborts_in_a_drain_is_no_finished_transfer(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path)) as server, Client(server) as client, client.data() as data:
        client.command("STOR half", "1")
        data.sendall(b"half")
        eventually(lambda: server.sessions()[0].transfer)
        stop = gevent.spawn(server.stop, PATIENCE)
        gevent.sleep(0)
        client.send("ABOR")
        assert client.reply().startswith("426")
        assert stop.get() == StopReport(sessions_finished=1, transfers_failed=1)


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bridge.server.drain")
    with started(slow_handler(tmp_path)) as server, Client(server):
        server.stop()
    assert caplog.messages == [
        "1 session(s) to end, 0 of them after their transfer",
        "stopped: 1 session(s) finished and 0 cut, 0 transfer(s) finished, 0 failed and 0 cut",
    ]


# --- stop from everywhere


def from_greenlet(server: Any, client: Client, timeout: float) -> None:
    server.stop(timeout)


def from_hub(server: Any, client: Client, timeout: float) -> None:
    gevent.get_hub().loop.run_callback(server.stop, timeout)


def from_signal_handler(server: Any, client: Client, timeout: float) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.stop(timeout))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def from_signal_handler_in_the_hub(server: Any, client: Client, timeout: float) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.stop(timeout))
    try:
        gevent.get_hub().loop.run_callback(signal.raise_signal, signal.SIGUSR1)
        gevent.sleep(0.001)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def from_turn(server: Any, client: Client, timeout: float) -> None:
    server.patience = timeout
    client.command("STAT", "211")


def from_thread(server: Any, client: Client, timeout: float) -> None:
    done = gevent.get_hub().loop.async_()
    returned = gevent.event.Event()
    done.start(returned.set)
    reports = []

    def stop() -> None:
        reports.append(server.stop(timeout))
        done.send()

    try:
        _native_thread(stop, ())
        assert returned.wait(PATIENCE)
        assert isinstance(reports[0], StopReport)
        assert server.closed, "stop() returned before it was done"
    finally:
        done.stop()
        done.close()


def by_killing_its_greenlet(server: Any, client: Client, timeout: float) -> None:
    server.stop_timeout = timeout
    server.runner.kill()


PLACES = [
    from_greenlet,
    from_hub,
    from_signal_handler,
    from_signal_handler_in_the_hub,
    from_turn,
    from_thread,
    by_killing_its_greenlet,
]


@pytest.mark.parametrize("stop", PLACES, ids=lambda place: place.__name__)
def test_stop_works_from_everywhere(tmp_path: Path, stop: Any) -> None:
    """With an idle session, one whose turn waits, and one in a transfer. The guards see to the rest."""
    gate = Gate()
    with started(slow_handler(tmp_path, gate)) as server, Client(server) as idle, Client(server) as sending:
        server.runner = gevent.spawn(server.serve_forever)
        with sending.data() as data, Client(server, login=False) as waiting:
            sending.command("STOR half", "1")
            data.sendall(b"half")
            waiting.send("USER slow", "PASS p")
            gate.arrived()
            stop(server, idle, 0.02)
            server.runner.join(PATIENCE)
            assert server.runner.ready()
            assert server.closed
            assert waiting.ended()
        assert idle.ended()
        assert sending.ended()
        assert server.ioloop.closed
        server.stop()  # again


@pytest.mark.parametrize("stop", PLACES[:4] + PLACES[5:], ids=lambda place: place.__name__)
def test_stop_ends_an_idle_server(tmp_path: Path, stop: Any) -> None:
    """pyftpdlib's own serve_forever stays blocked after close_all() from another thread."""
    with started(slow_handler(tmp_path)) as server:
        server.runner = gevent.spawn(server.serve_forever)
        gevent.sleep(0)
        stop(server, None, PATIENCE)
        server.runner.join(PATIENCE)
        assert server.runner.ready()
        assert server.closed


def test_concurrent_stops_share_a_drain_and_the_shortest_timeout_counts(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path)) as server, Client(server) as client, client.data():
        client.command("STOR half", "1")
        stops = [gevent.spawn(server.stop, timeout) for timeout in (None, 1000, 0.02, 500)]
        server.stop_timeout = None
        reports = {stop.get(timeout=PATIENCE) for stop in stops}
        assert reports == {StopReport(sessions_cut=1, transfers_cut=1)}
        assert server.stop() in reports


def test_a_drain_goes_on_when_the_greenlet_that_asked_for_it_is_killed(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path)) as server, Client(server) as client, client.data() as data:
        client.command("STOR whole", "1")
        with gevent.Timeout(0.02, False):
            server.stop(PATIENCE)
        assert server.state == "draining"
        data.sendall(b"whole")
        data.close()
        assert client.reply().startswith("226")
        eventually(lambda: server.closed)


def test_serve_forever_does_not_shorten_a_drain(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path), stop_timeout=0) as server, Client(server) as client:
        runner = gevent.spawn(server.serve_forever)
        with client.data() as data:
            client.command("STOR whole", "1")
            gevent.spawn(server.stop, PATIENCE)
            gevent.sleep(0.02)
            assert not runner.ready()
            data.sendall(b"whole")
        assert client.reply().startswith("226")
        runner.join(PATIENCE)
        assert runner.successful()


def test_an_exception_in_serve_forever_stops_the_server_and_is_raised(tmp_path: Path) -> None:
    with started(slow_handler(tmp_path)) as server, Client(server) as client:
        me = gevent.getcurrent()
        gevent.get_hub().loop.run_callback(me.throw, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert server.closed
        assert client.reply().startswith("421")


def test_close_only_stops_accepting(tmp_path: Path) -> None:
    """As gevent's: sessions go on; with the last one the server is closed."""
    with started(slow_handler(tmp_path)) as server, Client(server) as client:
        server.close()
        assert server.state == "draining"
        assert client.store("file", b"content").startswith("226")
        client.command("QUIT", "221")
        eventually(lambda: server.closed)
        assert server.ioloop.closed


PROGRAM = """
import sys, threading, time
from pyftpdlib.handlers import FTPHandler
from bridge import GeventFTPServer
server = GeventFTPServer(("127.0.0.1", 0), FTPHandler)
server.start()
threading.Timer(0.1, lambda: print(server.stop(0.1), server.state, flush=True)).start()
threading.enumerate()[-1].join()  # blocks for real: nobody runs the hub
"""


@pytest.mark.program
def test_stop_from_a_thread_works_even_if_nobody_runs_the_hub() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("closed\n"), done


# --- loops


def test_servers_share_a_loop_and_end_one_by_one(tmp_path: Path) -> None:
    ioloop = GeventIOLoop()
    handler = handler_class(users(tmp_path))
    with started(handler, ioloop) as first, started(handler, ioloop) as second:
        with Client(first) as one, Client(second) as two:
            first.stop(0)
            assert one.reply().startswith("421")
            assert first.closed
            two.command("NOOP", "200")
            assert second.started
        second.stop()
        assert not ioloop.closed
        assert not ioloop.socket_map
    ioloop.close()


def test_closing_a_shared_loop_closes_its_servers(tmp_path: Path) -> None:
    ioloop = GeventIOLoop()
    handler = handler_class(users(tmp_path))
    with started(handler, ioloop) as busy, started(handler, ioloop) as idle, Client(busy) as client:
        runners = [gevent.spawn(each.serve_forever) for each in (busy, idle)]
        gevent.sleep(0)
        ioloop.close()
        assert busy.closed
        assert idle.closed
        assert client.ended()
        assert gevent.joinall(runners, PATIENCE) == runners


def test_servers_with_loops_of_their_own_do_not_meet(tmp_path: Path) -> None:
    handler = handler_class(users(tmp_path))
    with started(handler) as first, started(handler) as second, Client(second) as client:
        assert first.ioloop is not second.ioloop
        first.stop(0)
        client.command("NOOP", "200")
