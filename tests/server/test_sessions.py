"""What an operator sees of sessions and does to them; how many there may be; what takes too long."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import monkey
from pyftpdlib.handlers import FTPHandler, ThrottledDTPHandler

import bridge
from bridge import GeventFTPServer, GeventIOLoop
from bridge.loop.monitor import calls_in, watch_hub
from bridge.server.server import AddressCounts
from bridge.session.control import SessionMixin
from bridge.session.data import TransferMixin
from bridge.session.handlers import prepared
from bridge.session.ports import ActiveMixin, PassiveMixin
from support.exhaustion import no_descriptors
from support.fakes import Gate, RecordingHandler, WaitingAuthorizer, WaitingFS
from support.servers import PATIENCE, Client, eventually, handler_class, serving, started, users

_native_thread = monkey.get_original("_thread", "start_new_thread")
_native_sleep = monkey.get_original("time", "sleep")
_native_lock = monkey.get_original("_thread", "allocate_lock")
_native_ident = monkey.get_original("_thread", "get_ident")


def waiting_handler(home: Path, gate: Gate, base: Any = RecordingHandler, **attributes: Any) -> Any:
    """Waits at the gate when a user `slow` logs in, and when a file `slow...` is opened."""
    filesystem = type("FS", (WaitingFS,), {"gate": gate})
    authorizer = users(home, WaitingAuthorizer(gate), "slow")
    return handler_class(authorizer, base, abstracted_fs=filesystem, events=[], **attributes)


# --- what one sees


def test_sessions_are_listed_with_what_they_do(tmp_path: Path) -> None:
    gate = Gate()
    before = time.time()
    with started(waiting_handler(tmp_path, gate)) as server, contextlib.ExitStack() as stack:
        assert server.sessions() == []
        idle = stack.enter_context(Client(server))
        sending = stack.enter_context(Client(server))
        data = stack.enter_context(sending.data())
        sending.command("STOR file", "1")
        data.sendall(b"four")
        slow = stack.enter_context(Client(server, login=False))
        slow.send("USER slow", "PASS p")
        gate.arrived()
        eventually(lambda: server.sessions()[1].transfer.bytes == 4)
        one, two, three = server.sessions()

        assert (one.user, two.user, three.user) == ("u", "u", "slow")
        for client, session in ((idle, one), (sending, two), (slow, three)):
            assert session.remote_address == client.sock.getsockname()
            assert before <= session.connected_since <= time.time()
        assert (one.command, one.transfer, one.waiting_since) == (None, None, None)
        assert one.connected_since <= one.idle_since <= time.time()

        assert (two.command, two.idle_since, two.waiting_since) == ("STOR", None, None)
        assert two.transfer.path == str(tmp_path / "file")
        assert (two.transfer.command, two.transfer.direction) == ("STOR", "upload")
        assert two.transfer.rate == two.transfer.bytes / two.transfer.seconds > 0

        assert (three.command, three.idle_since, three.transfer) == ("PASS", None, None)
        assert before <= three.waiting_since <= time.time()
        gate.open()


def test_a_listing_and_an_announced_download_are_transfers_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with started(waiting_handler(tmp_path, Gate())) as server, Client(server) as client:
        for command, path in (("LIST", None), ("RETR file", str(tmp_path / "file"))):
            client.command("EPSV", "229")
            client.command(command, "150")
            [session] = server.sessions()
            assert session.command == command[:4]
            assert session.transfer.direction == "download"
            assert session.transfer.path == path
            assert (session.transfer.bytes, session.transfer.seconds, session.transfer.rate) == (0, 0, 0)
            client.command("ABOR", "426")
            assert client.reply().startswith("2")


def test_sessions_are_listed_from_another_thread(tmp_path: Path) -> None:
    with started(waiting_handler(tmp_path, Gate())) as server, Client(server):
        assert in_thread(server.sessions)[0].user == "u"


def in_thread(function: Any, *args: Any) -> Any:
    """Call in a native thread, while the hub runs."""
    return gevent.get_hub().threadpool.apply(function, args)


def test_a_session_keeps_one_id_and_no_other_has_it(tmp_path: Path) -> None:
    with started(handler_class(users(tmp_path))) as server, Client(server) as one, Client(server) as two:
        one.command("NOOP", "200")
        two.command("NOOP", "200")
        ids = [session.handler.session_id for session in server.sessions()]
        assert ids == [session.handler.session_id for session in server.sessions()]
        assert len(set(ids)) == 2
        assert all(len(each) == 12 for each in ids)


# --- what one does to them


def in_hub(function: Any, *args: Any) -> None:
    gevent.get_hub().loop.run_callback(function, *args)


def directly(function: Any, *args: Any) -> None:
    function(*args)


PLACES = [directly, in_hub, in_thread]


@pytest.mark.parametrize("place", PLACES)
def test_disconnect_says_why(tmp_path: Path, place: Any) -> None:
    with started(waiting_handler(tmp_path, Gate())) as server, Client(server) as client, Client(server):
        place(server.sessions()[0].disconnect, "Go away\r\n230 not a reply.")
        assert client.reply() == "421 Go away 230 not a reply."
        assert client.ended()
        eventually(lambda: len(server.sessions()) == 1)


@pytest.mark.parametrize("place", PLACES)
def test_disconnect_ends_a_transfer_and_a_turn_that_waits(tmp_path: Path, place: Any) -> None:
    gate = Gate()
    with started(waiting_handler(tmp_path, gate)) as server, contextlib.ExitStack() as stack:
        sending = stack.enter_context(Client(server))
        data = stack.enter_context(sending.data())
        sending.command("STOR file", "1")
        data.sendall(b"four")
        waiting = stack.enter_context(Client(server, login=False))
        waiting.send("USER slow", "PASS p")
        gate.arrived()
        for session in server.sessions():
            place(session.disconnect)
        assert [sending.reply()[:3], sending.reply()[:3]] == ["426", "421"]
        assert [waiting.reply()[:3] for _ in range(3)] == ["220", "331", "421"]
        eventually(lambda: not server.sessions())


@pytest.mark.parametrize("place", PLACES)
def test_abort_transfer_says_why_and_the_session_goes_on(tmp_path: Path, place: Any) -> None:
    handler = waiting_handler(tmp_path, Gate())
    with started(handler) as server, Client(server) as client, client.data() as data:
        client.command("STOR file", "1")
        data.sendall(b"four")
        eventually(lambda: server.sessions()[0].transfer.bytes == 4)
        place(server.sessions()[0].abort_transfer, "Virus found.")
        assert client.reply() == "426 Virus found."
        assert ("incomplete", str(tmp_path / "file")) in handler.events
        assert client.store("file", b"content").startswith("226")


@pytest.mark.parametrize("command", ["STOR", "RETR"])
@pytest.mark.parametrize("place", PLACES)
def test_abort_transfer_ends_a_turn_that_waits_to_open_the_file(
    tmp_path: Path, place: Any, command: str
) -> None:
    gate = Gate()
    with started(waiting_handler(tmp_path, gate)) as server, Client(server) as client:
        client.send(f"{command} slow")
        gate.arrived()
        place(server.sessions()[0].abort_transfer)
        assert client.reply().startswith("426")
        client.command("NOOP", "200")


def test_abort_transfer_answers_one_that_was_announced(tmp_path: Path) -> None:
    handler = waiting_handler(tmp_path, Gate())
    with started(handler) as server, Client(server) as client:
        client.command("EPSV", "229")
        client.command("STOR file", "150")
        server.sessions()[0].abort_transfer()
        assert client.reply().startswith("426")
        assert handler.events[-1] == ("incomplete", str(tmp_path / "file"))
        assert client.store("file", b"content").startswith("226")


@pytest.mark.parametrize("place", PLACES)
def test_abort_transfer_without_a_transfer_does_nothing(tmp_path: Path, place: Any) -> None:
    """Also to a turn that waits for something else."""
    gate = Gate()
    with started(waiting_handler(tmp_path, gate)) as server, Client(server) as idle:
        with Client(server, login=False) as waiting:
            waiting.send("USER slow", "PASS p")
            gate.arrived()
            for session in server.sessions():
                place(session.abort_transfer)
            idle.command("NOOP", "200")
            gate.open()
            assert [waiting.reply()[:3] for _ in range(3)] == ["220", "331", "230"]


def test_what_comes_too_late_does_nothing(tmp_path: Path) -> None:
    with started(waiting_handler(tmp_path, Gate())) as server, Client(server) as client:
        [session] = server.sessions()
        client.command("QUIT", "221")
        eventually(lambda: not server.sessions())
        session.disconnect()
        session.abort_transfer()
        gevent.sleep(0)


class Strict(RecordingHandler):
    """Ends its own session, or its transfer, in its own turn."""

    def on_login(self, username: str) -> None:
        if username == "slow":
            self.disconnect("Not you.")
            gevent.sleep(0)  # the turn goes on

    def ftp_STAT(self, line: str) -> None:
        self.abort_transfer("Enough.")
        self.respond("211 Done.")


def test_both_are_legal_in_the_sessions_own_turn(tmp_path: Path) -> None:
    gate = Gate()
    gate.open()
    with started(waiting_handler(tmp_path, gate, Strict)) as server:
        with Client(server, login=False) as client:
            client.send("USER slow", "PASS p", "NOOP")
            assert [client.reply()[:3] for _ in range(4)] == ["220", "331", "230", "421"]
            assert client.ended()
        with Client(server) as client, client.data() as data:
            client.command("STOR file", "1")
            data.sendall(b"four")
            client.send("STAT")
            assert [client.reply() for _ in range(2)] == ["426 Enough.", "211 Done."]


class Hanging(RecordingHandler):
    """Finds out that its client has gone when it tells the port."""

    def respond(self, resp: str, *args: Any, **kwargs: Any) -> None:
        if resp.startswith("229"):
            self.close()
        super().respond(resp, *args, **kwargs)


def test_a_client_that_goes_as_it_is_told_the_port_leaves_no_port_open(tmp_path: Path) -> None:
    """pyftpdlib keeps it open for 30 s."""
    with started(waiting_handler(tmp_path, Gate(), Hanging)) as server, Client(server) as client:
        client.send("EPSV")
        assert client.ended()
        eventually(lambda: not server.sessions())
        assert [*server.ioloop.socket_map.values()] == [server]


# --- how many


def test_max_cons_counts_sessions(tmp_path: Path) -> None:
    """Not listeners and data connections, as pyftpdlib's does."""
    with started(waiting_handler(tmp_path, Gate()), max_cons=2) as server:
        with Client(server) as one, Client(server) as two, one.data(), two.data():
            one.command("STOR one", "1")
            two.command("STOR two", "1")
            with Client(server, login=False) as three:
                reply = three.reply()
                assert reply == "421 Too many connections. Service temporarily unavailable."
                assert three.ended()
        eventually(lambda: not server.sessions())
        with Client(server), Client(server):
            pass


def test_max_cons_per_ip(tmp_path: Path) -> None:
    with started(waiting_handler(tmp_path, Gate()), max_cons_per_ip=1) as server:
        with Client(server), Client(server, login=False) as two:
            assert two.reply() == "421 Too many connections from the same IP address."
            assert two.ended()
            assert server.ip_map.count("127.0.0.1") == 1
        eventually(lambda: not server.sessions())
        assert "127.0.0.1" not in server.ip_map
        with Client(server):
            pass


def test_addresses_are_counted_not_listed() -> None:
    """Whatever there is of others: a count is one look-up."""
    counts = AddressCounts()
    for ip in ("::1", "::1", "::2"):
        counts.append(ip)
    assert (counts.count("::1"), counts.count("::2"), counts.count("::3")) == (2, 1, 0)
    counts.remove("::1")
    counts.remove("::2")
    assert ("::1" in counts, "::2" in counts, "::3" in counts) == (True, False, False)
    assert len(counts) == 1


class Refusing(FTPHandler):
    """Does not take anybody."""

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        super().__init__(conn, server, ioloop)
        self.close()


class Broken(FTPHandler):
    """Has a bug."""

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("base", [Refusing, Broken])
def test_a_session_that_never_came_about_is_not_counted(tmp_path: Path, base: Any) -> None:
    with started(handler_class(users(tmp_path), base), max_cons_per_ip=1) as server:
        for _ in range(3):
            with Client(server, login=False) as client:
                assert client.ended()
        assert server.sessions() == []
        assert "127.0.0.1" not in server.ip_map
        assert server.started


# --- every handler class is given what it lacks


def test_any_handler_class_is_prepared() -> None:
    class Custom(FTPHandler):
        dtp_handler = ThrottledDTPHandler
        banner = "mine"

    handler = prepared(Custom)
    assert issubclass(handler, (SessionMixin, Custom))
    assert (handler.__name__, handler.__module__) == ("Custom", __name__)
    assert issubclass(handler.dtp_handler, ThrottledDTPHandler)
    for channel, mixin in (
        (handler.dtp_handler, TransferMixin),
        (handler.passive_dtp, PassiveMixin),
        (handler.active_dtp, ActiveMixin),
    ):
        assert issubclass(channel, mixin)
    assert prepared(handler) is handler
    assert prepared(bridge.FTPHandler) is bridge.FTPHandler
    Custom.banner = "mine too"  # what is set on the class later counts
    assert handler.banner == "mine too"
    assert not issubclass(Custom.dtp_handler, TransferMixin)


def test_a_class_that_is_no_handler_is_refused() -> None:
    with pytest.raises(TypeError, match="FTPHandler"):
        GeventFTPServer(("127.0.0.1", 0), ThrottledDTPHandler)


def test_our_handlers_also_serve_pyftpdlibs_server(tmp_path: Path) -> None:
    with serving(handler_class(users(tmp_path), bridge.FTPHandler)) as server, Client(server) as client:
        assert client.store("file", b"content").startswith("226")
        client.command("QUIT", "221")


# --- what takes too long


@contextlib.contextmanager
def long_wait(seconds: float) -> Iterator[GeventIOLoop]:
    ioloop = GeventIOLoop()
    ioloop.long_wait = seconds
    try:
        yield ioloop
    finally:
        ioloop.close()


def test_a_turn_that_waits_long_is_named_once_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    with long_wait(0.02) as ioloop, started(waiting_handler(tmp_path, gate), ioloop) as server:
        with Client(server, login=False) as slow, Client(server) as other:
            slow.send("USER slow", "PASS p")
            gate.arrived()
            eventually(lambda: caplog.messages)
            gevent.sleep(0.06)
            other.command("NOOP", "200")
            gate.open()
            assert [slow.reply()[:3] for _ in range(3)] == ["220", "331", "230"]
            slow.send("RETR slow")
    [message] = [text for text in caplog.messages if "has waited" in text]
    assert re.search(
        r"^<Handler\(.*user='slow'\)> has waited \d+\.\d s in its turn, at .*fakes\.py:\d+ in wait: "
        r"if not self\._open\.wait\(PATIENCE\):$",
        message,
    )


def test_a_short_wait_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = handler_class(users(tmp_path, WaitingAuthorizer(seconds=0.02)))
    with long_wait(20) as ioloop, started(handler, ioloop) as server, Client(server):
        pass
    assert not [text for text in caplog.messages if "has waited" in text]


def test_long_wait_0_names_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    handler = handler_class(users(tmp_path, WaitingAuthorizer(seconds=0.05)))
    with long_wait(0) as ioloop, started(handler, ioloop) as server, Client(server):
        pass
    assert not [text for text in caplog.messages if "has waited" in text]


@pytest.mark.parametrize("others", [0, 120])
def test_where_a_thread_is_can_be_seen_from_another(others: int) -> None:
    """Of how many there may be: faulthandler tells of 100."""
    end = _native_lock()
    end.acquire()
    seen: list[list[tuple[str, int, str]]] = []

    def wait() -> None:
        with end:
            pass

    this = _native_ident()
    for _ in range(others):
        _native_thread(wait, ())
    _native_thread(lambda: seen.append(calls_in(this)), ())
    while not seen:
        _native_sleep(0.001)
    end.release()
    assert "test_where_a_thread_is_can_be_seen_from_another" in [name for _, _, name in seen[0]]


@pytest.mark.parametrize("name", ["größe.py", "日本.py", "\U0001f642.py"], ids=ascii)
def test_a_file_is_named_whatever_its_name(name: str) -> None:
    code = compile("def look():\n    return calls_in(this)", name, "exec")
    named: dict[str, Any] = {"calls_in": calls_in, "this": _native_ident()}
    exec(code, named)
    assert (name, 2, "look") in named["look"]()


def test_where_a_thread_is_can_be_seen_without_a_descriptor() -> None:
    with no_descriptors():
        (call,) = calls_in(_native_ident())
    assert call[2] == "calls_in"


@pytest.mark.blocks
def test_what_blocks_the_hub_is_named_once_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def named() -> int:
        return sum("in ftp_STAT: " in text for text in caplog.messages)

    class Blocking(FTPHandler):
        def ftp_STAT(self, line: str) -> None:
            before, deadline = named(), time.monotonic() + PATIENCE
            while named() == before and time.monotonic() < deadline:
                _native_sleep(0.01)  # everybody
            _native_sleep(0.2)  # and is not named again
            self.respond("211 Done.")

    end = watch_hub(gevent.get_hub(), 0.05)
    assert not gevent.config.monitor_thread, "hubs of other threads would start monitors, which never end"
    thread = gevent.get_hub().periodic_monitoring_thread
    try:
        with started(handler_class(users(tmp_path), Blocking)) as server, Client(server) as client:
            client.command("STAT", "211")
            client.command("STAT", "211")
    finally:
        end()
        while monitor_runs(thread):
            gevent.sleep(0.001)
    # (On a busy machine others may be named besides.)
    messages = [text for text in caplog.messages if "in ftp_STAT: " in text]
    assert len(messages) == 2
    for message in messages:
        assert "user='u'" in message
        assert "blocks the hub" in message


def monitor_runs(thread: Any) -> bool:
    return thread.monitor_thread_ident in sys._current_frames()
