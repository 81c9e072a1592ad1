"""close() from everywhere; the hub is borrowed."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey
from gevent.pywsgi import WSGIServer
from gevent.server import StreamServer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

import bridge
from bridge import GeventIOLoop
from bridge.loop import hubs
from support.fakes import Gate, RecordingHandler, WaitingAuthorizer
from support.servers import Client, eventually, handler_class, serving, users

TESTS = Path(__file__).parents[1]

_native_thread = monkey.get_original("_thread", "start_new_thread")


def close_from_greenlet(server: Any, client: Client) -> None:
    server.close_all()


def close_from_hub(server: Any, client: Client) -> None:
    gevent.get_hub().loop.run_callback(server.close_all)


def close_from_signal_handler(server: Any, client: Client) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.close_all())
    try:
        signal.raise_signal(signal.SIGUSR1)
        gevent.sleep(0)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def close_from_signal_handler_in_the_hub(server: Any, client: Client) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda *_: server.close_all())
    try:
        gevent.get_hub().loop.run_callback(signal.raise_signal, signal.SIGUSR1)
        server.runner.join(20)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def close_from_turn(server: Any, client: Client) -> None:
    client.send("STAT")


def close_from_thread(server: Any, client: Client) -> None:
    done = gevent.get_hub().loop.async_()
    returned = gevent.event.Event()
    done.start(returned.set)
    try:
        _native_thread(lambda: (server.close_all(), done.send()), ())
        assert returned.wait(20)
        assert server.ioloop._closed, "close() returned before it was done"
    finally:
        done.stop()
        done.close()


PLACES = [
    close_from_greenlet,
    close_from_hub,
    close_from_signal_handler,
    close_from_signal_handler_in_the_hub,
    close_from_turn,
    close_from_thread,
]


class ClosingHandler(RecordingHandler):
    """STAT closes the server."""

    events: list[tuple[Any, ...]] = []

    def ftp_STAT(self, line: str) -> None:
        self.server.close_all()


@pytest.mark.parametrize("close", PLACES, ids=lambda place: place.__name__)
def test_close_works_from_everywhere(tmp_path: Path, close: Any) -> None:
    """With an idle session, one whose turn waits, and one in a transfer. The guards see to the rest."""
    gate = Gate()
    handler = handler_class(users(tmp_path, WaitingAuthorizer(gate), "slow"), ClosingHandler)
    hub = gevent.get_hub()
    with serving(handler) as server, Client(server) as idle, Client(server) as sending:
        with sending.data() as data, Client(server, login=False) as waiting:
            sending.command("STOR half", "1")
            data.sendall(b"half")
            waiting.send("USER slow", "PASS p")
            gate.arrived()
            close(server, idle)
            server.runner.join(20)
            assert server.runner.successful()
            assert waiting.ended()
        assert idle.ended()
        assert sending.ended()
        assert not server.ioloop.socket_map
        server.close_all()  # again
    assert gevent.get_hub() is hub
    assert hub.loop is not None


@pytest.mark.parametrize("close", PLACES[:2] + PLACES[5:], ids=lambda place: place.__name__)
def test_close_wakes_an_idle_loop(tmp_path: Path, close: Any) -> None:
    """pyftpdlib's own serve_forever stays blocked after close_all() from another thread."""
    with serving(handler_class(users(tmp_path))) as server:
        close(server, None)
        server.runner.join(20)
        assert server.runner.successful()


def test_close_before_the_loop_ever_ran(tmp_path: Path) -> None:
    server = FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
    server.close_all()
    server.close_all()
    server.ioloop.loop()  # returns: there is nothing to serve


def test_a_closed_loop_says_so(tmp_path: Path) -> None:
    ioloop = GeventIOLoop()
    ioloop.close()
    with pytest.raises(OSError, match="is closed"):
        FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=ioloop)
    with pytest.raises(RuntimeError, match="is closed"):
        ioloop.poll(0)


def test_close_ends_poll(tmp_path: Path) -> None:
    server = FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
    poller = gevent.spawn(server.ioloop.poll)
    gevent.sleep(0)
    server.close_all()
    poller.join(20)
    assert poller.successful()


def test_channels_that_left_the_loop_for_a_while_are_closed_too(tmp_path: Path) -> None:
    """A failed login takes its control connection off the loop until the delay is over."""
    handler = handler_class(users(tmp_path), auth_failed_timeout=60)
    with serving(handler) as server, Client(server, login=False) as client:
        client.reply()
        client.command("USER u", "331")
        client.send("PASS wrong")
        eventually(lambda: len(server.ioloop.socket_map) == 1)
        server.close_all()
        assert client.ended()


def test_a_channel_that_fails_to_close_does_not_keep_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Handler(FTPHandler):
        def close(self) -> None:
            super().close()
            raise RuntimeError("cannot close")

    with (
        serving(handler_class(users(tmp_path), Handler)) as server,
        Client(server) as one,
        Client(server) as two,
    ):
        server.close_all()
        assert one.ended()
        assert two.ended()
    assert "cannot close" in caplog.text


def test_a_closed_loop_and_its_sessions_are_freed(tmp_path: Path) -> None:
    ioloop = GeventIOLoop()
    alive = weakref.ref(ioloop)
    with serving(handler_class(users(tmp_path)), ioloop=ioloop) as server:
        with Client(server) as client:
            client.store("a", b"1")
    del ioloop, server, client
    gc.collect()
    assert alive() is None


def test_a_session_is_freed_when_its_client_goes(tmp_path: Path) -> None:
    sessions: weakref.WeakSet[Any] = weakref.WeakSet()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_login(self, username: str) -> None:
            sessions.add(self)
            gevent.sleep(0.001)

    with serving(handler_class(users(tmp_path), Handler)) as server:
        for _ in range(10):
            with Client(server) as client:
                client.store("a", b"1")
        eventually(lambda: len(server.ioloop.socket_map) == 1)
        eventually(lambda: gc.collect() >= 0 and not sessions)


# --- the loop borrows the hub


def test_ftp_lives_beside_wsgi_and_other_servers_in_one_process(tmp_path: Path) -> None:
    def application(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
        return [b"web"]

    def echo(sock: Any, address: Any) -> None:
        sock.sendall(sock.recv(100))
        sock.close()

    def ask_web() -> bytes:
        with gevent.socket.create_connection(web.address[:2], 20) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while chunk := sock.recv(1000):
                answer += chunk
        return answer

    def ask_echo() -> bytes:
        with gevent.socket.create_connection(stream.address[:2], 20) as sock:
            sock.sendall(b"echo")
            answer: bytes = sock.recv(100)
            assert sock.recv(1) == b""
        return answer

    web = WSGIServer(("127.0.0.1", 0), application, log=None)
    stream = StreamServer(("127.0.0.1", 0), echo)
    web.start()
    stream.start()
    try:
        with serving(handler_class(users(tmp_path))) as one:
            with serving(handler_class(users(tmp_path))) as two:
                with Client(one) as first, Client(two) as second:
                    first.store("a", b"1")
                    assert second.retrieve("a") == b"1"
                assert ask_web().endswith(b"web")
                assert ask_echo() == b"echo"
            with Client(one) as first:
                first.command("NOOP", "200")
            assert ask_web().endswith(b"web")
        assert ask_web().endswith(b"web")
        assert ask_echo() == b"echo"
    finally:
        web.stop()
        stream.stop()
    gevent.sleep(0.01)


def test_closing_one_of_two_loops_leaves_the_default_instance_alone() -> None:
    instance = GeventIOLoop.instance()
    try:
        GeventIOLoop().close()
        assert GeventIOLoop.instance() is instance
    finally:
        instance.close()
    assert GeventIOLoop._instance is None


# --- threads


@pytest.mark.skipif(monkey.is_module_patched("threading"), reason="needs native threads: unpatched only")
def test_a_server_built_here_runs_in_a_thread_and_its_hub_ends_with_the_thread(tmp_path: Path) -> None:
    server = FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
    hub: list[Any] = []

    def run() -> None:
        server.serve_forever(handle_exit=False)
        hub.append(hubs.current())

    thread = threading.Thread(target=run)
    thread.start()
    with socket.create_connection(server.address, 20) as sock:
        assert sock.recv(3) == b"220"
        server.close_all()
        while sock.recv(100):
            pass
    thread.join(20)
    assert not thread.is_alive()
    assert hub[0].loop is None  # destroyed


@pytest.mark.skipif(monkey.is_module_patched("threading"), reason="needs native threads: unpatched only")
def test_a_thread_may_end_its_hub_and_have_another() -> None:
    seen: list[Any] = []

    def run() -> None:
        one = hubs.current()
        hubs.end()
        hubs.end()  # again
        seen.extend([one.loop, hubs.current()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    loop_of_the_first, second = seen
    assert loop_of_the_first is None  # destroyed
    assert second.loop is None


@pytest.mark.skipif(monkey.is_module_patched("threading"), reason="needs native threads: unpatched only")
def test_a_hub_that_was_there_before_outlives_the_loop(tmp_path: Path) -> None:
    left: list[Any] = []

    def run() -> None:
        hub = gevent.get_hub()
        gevent.sleep(0)
        server = FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
        server.serve_forever(timeout=0.001, blocking=False)
        server.close_all()
        gevent.sleep(0)
        hubs.end()
        left.append(hub.loop is not None)
        hub.destroy()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert left == [True]


@pytest.mark.skipif(monkey.is_module_patched("threading"), reason="needs native threads: unpatched only")
def test_a_loop_moves_to_the_thread_that_polls_it(tmp_path: Path) -> None:
    server = FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop=GeventIOLoop())
    try:
        server.serve_forever(timeout=0.001, blocking=False)
        with socket.create_connection(server.address, 20) as sock:

            def run() -> None:
                while not greeted.is_set():
                    server.serve_forever(timeout=0.005, blocking=False)

            greeted = threading.Event()
            thread = threading.Thread(target=run)
            thread.start()
            assert sock.recv(3) == b"220"
            greeted.set()
            thread.join(20)
            # and back, after that thread has ended
            sock.sendall(b"NOOP\r\n")
            answer = b""
            with gevent.Timeout(20):
                while b"\r\n200 " not in answer:
                    server.serve_forever(timeout=0.005, blocking=False)
                    if select.select([sock], [], [], 0)[0]:
                        answer += sock.recv(100)
    finally:
        server.close_all()
        gevent.sleep(0)


@pytest.mark.skipif(monkey.is_module_patched("threading"), reason="needs native threads: unpatched only")
def test_two_threads_cannot_run_one_loop(tmp_path: Path) -> None:
    with serving(handler_class(users(tmp_path))) as server:
        raised: list[BaseException] = []

        def run() -> None:
            try:
                server.ioloop.poll(0)
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            gevent.sleep(0.001)
        thread.join()
    assert "already runs in another thread" in str(raised[0])


HEAD = """
import ftplib, io, logging, os, signal, sys, threading
logging.basicConfig(level=logging.WARNING)
from support.servers import handler_class, users
import bridge
handler = handler_class(users(sys.argv[1]))
def upload(address):
    with ftplib.FTP(timeout=20) as client:
        client.connect(*address)
        client.login("u", "p")
        client.storbinary("STOR file", io.BytesIO(b"content"))
for _ in range(50):
    child = os.fork()  # sooner there than a program that imports all of this
    if child == 0:
        signal.alarm(60)
        break
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()
"""

RUNNING = """
with bridge.running(handler) as server:
    hub = server.ioloop.hub
    client = threading.Thread(target=upload, args=[server.address])
    client.start()
    client.join()
assert hub.loop is None, "running() returned before the hub was destroyed"
"""

DAEMON = """
server = bridge.GeventFTPServer(("127.0.0.1", 0), handler)
started, ended = threading.Event(), threading.Event()
def serve():
    server.start()
    started.set()
    server.serve_forever()
    ended.set()
threading.Thread(target=serve, daemon=True).start()
started.wait()
upload(server.address)
server.stop(0)
ended.wait()
"""


@pytest.mark.program
@pytest.mark.parametrize("code", [RUNNING, DAEMON], ids=["running", "daemon"])
def test_a_program_exits_cleanly_just_after_its_server_in_a_thread(tmp_path: Path, code: str) -> None:
    """50 times: only now and then the thread is destroying its hub when Python finalizes."""
    path = os.pathsep.join(
        [str(TESTS), str(Path(bridge.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, "-c", HEAD + code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["0"] * 50
