"""Processes: pyftpdlib's pre-fork and multi-process servers, and forks of other people."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gevent
import psutil
import pytest

import bridge

pytestmark = pytest.mark.program

TESTS = Path(__file__).parents[1]

HEAD = """
import sys
if "patched" in sys.argv:
    from gevent import monkey; monkey.patch_all()
import logging, os, signal, tempfile
signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in a shell's background ignores it
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
import gevent
from pyftpdlib.servers import FTPServer, MultiprocessFTPServer
from pyftpdlib.handlers import FTPHandler
from support.servers import handler_class, users
from bridge import GeventIOLoop
home = sys.argv[1]
"""

PREFORK = """
if "hub" in sys.argv:
    # A program that used the hub before: another server of the parent must not live on in the children.
    from gevent.server import StreamServer
    StreamServer(("127.0.0.1", 0), lambda *args: None).start()
    gevent.sleep(0.001)
class Handler(FTPHandler):
    def on_login(self, username):
        gevent.sleep(0.001)
    def ftp_SYST(self, line):
        self.respond(f"215 {os.getpid()}")
# The test ends all three by SIGINT. Python drops a KeyboardInterrupt that is raised during a fork, so each
# says when it has forked. Without wake_on_signals(), a hub that is about to wait would notice the signal at
# its next event only.
from bridge.loop import wake_on_signals
class Loop(GeventIOLoop):
    def loop(self, *args, **kwargs):
        wake_on_signals(gevent.get_hub())
        print("serves", flush=True)
        super().loop(*args, **kwargs)
def wait_for_children(wait=os.wait):
    print("waits", flush=True)
    return wait()
os.wait = wait_for_children
server = FTPServer(("127.0.0.1", 0), handler_class(users(home), Handler), ioloop=Loop())
print(server.address[1], flush=True)
server.serve_forever(worker_processes=2)
"""

MULTIPROCESS = """
from gevent.server import StreamServer
served = []
def other(sock, address):
    sock.sendall(str(os.getpid()).encode())
    sock.close()
beside = StreamServer(("127.0.0.1", 0), other)
beside.start()
class Handler(FTPHandler):
    def ftp_SYST(self, line):
        gevent.sleep(0.001)
        self.respond(f"215 {os.getpid()}")
server = MultiprocessFTPServer(("127.0.0.1", 0), handler_class(users(home), Handler), ioloop=GeventIOLoop())
print(server.address[1], beside.address[1], flush=True)
server.serve_forever()
"""

FORKING_USER = """
server = FTPServer(("127.0.0.1", 0), handler_class(users(home)), ioloop=GeventIOLoop())
runner = gevent.spawn(server.serve_forever, handle_exit=False)
gevent.sleep(0.01)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    # The child goes on with gevent and must not serve the parent's clients.
    os.close(reader)
    gevent.reinit()
    gevent.sleep(0.3)
    os.write(writer, repr(len(server.ioloop._registrations) > 0 and all(
        each.watcher is None for each in server.ioloop._registrations.values())).encode())
    os._exit(0)
os.close(writer)
print(server.address[1], flush=True)
import gevent.os
gevent.os.make_nonblocking(reader)
said = gevent.os.nb_read(reader, 100)
assert said == b"True", said
sys.stdin.close()
runner.join()
"""


FORK_WHILE_ANOTHER_THREAD_CLOSES = """
# The other thread closes a loop of this one, as `close()` may, and holds the lock over all hubs meanwhile.
import threading
inside, forked = threading.Event(), threading.Event()
server = FTPServer(("127.0.0.1", 0), handler_class(users(home)), ioloop=GeventIOLoop())
server.ioloop.attach()
close = server.close
def close_slowly():
    inside.set()
    forked.wait(1)
    close()
server.close = close_slowly
closer = threading.Thread(target=server.ioloop.close)
closer.start()
inside.wait()
child = os.fork()
if child == 0:
    GeventIOLoop().attach()
    os._exit(0)
forked.set()
impatience = threading.Timer(20, os.kill, (child, signal.SIGKILL))
impatience.start()
_, status = os.waitpid(child, 0)
impatience.cancel()
closer.join()
print(status, flush=True)
"""


FORK_OF_A_PROGRAM_THAT_HEARS = """
import ctypes
from bridge.loop import wakeups
def pipe():
    writer = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return os.fstat(writer).st_ino
hub = gevent.get_hub()
wakeups.wake_on_signals(hub)
parents = pipe()
child = os.fork()
signal.signal(signal.SIGUSR1, (lambda *args: None) if child else (lambda *args: os._exit(0)))
if child:
    print(os.waitpid(child, 0)[1], flush=True)
    sys.exit()
if pipe() == parents:  # whoever reads first would take what is the other's
    os._exit(2)
# To be called in the hub when it is about to rest, with no Python code after it.
hub.loop.run_callback(hub.loop.run_callback, ctypes.CDLL(None)["raise"], signal.SIGUSR1)
gevent.sleep(20)
os._exit(1)
"""


class Program:
    """A server program as a subprocess."""

    def __init__(self, code: str, *args: str) -> None:
        path = os.pathsep.join(
            [str(TESTS), str(Path(bridge.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + code, *args],
            env={**os.environ, "PYTHONPATH": path},
            cwd=TESTS,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ports = [int(port) for port in self.process.stdout.readline().split()]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdout is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        for process in [*children, psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
        _gone, alive = psutil.wait_procs(children, timeout=20)
        for process in alive:
            process.kill()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
        assert not alive

    def client(self) -> ftplib.FTP:
        client = ftplib.FTP(timeout=20)
        client.connect("127.0.0.1", self.ports[0])
        client.login("u", "p")
        return client


def transfer(client: ftplib.FTP, home: Path) -> None:
    content = os.urandom(1000) * 1000
    client.storbinary("STOR a", io.BytesIO(content))
    assert (home / "a").read_bytes() == content
    received = io.BytesIO()
    client.retrbinary("RETR a", received.write)
    assert received.getvalue() == content


PATCHING = pytest.mark.parametrize("patching", ["unpatched", "patched"])


@PATCHING
@pytest.mark.parametrize("hub", ["hub", "fresh"])
def test_worker_processes(tmp_path: Path, patching: str, hub: str) -> None:
    with Program(PREFORK, str(tmp_path), patching, hub) as program:
        workers = {each.pid for each in psutil.Process(program.process.pid).children()}
        with program.client() as client:
            transfer(client, tmp_path)
            assert int(client.sendcmd("SYST")[4:]) in workers | {
                each.pid for each in psutil.Process(program.process.pid).children()
            }
        with program.client() as one, program.client() as two:
            assert one.pwd() == two.pwd() == "/"
        assert program.process.stdout is not None
        assert sorted(program.process.stdout.readline() for _ in range(3)) == [
            "serves\n",
            "serves\n",
            "waits\n",
        ]


@pytest.mark.parametrize(
    "patching",
    [
        "unpatched",
        pytest.param(
            "patched",
            marks=pytest.mark.skipif(
                gevent.config.loop.__module__.startswith("gevent.libuv"),
                reason="on libuv, patched os.waitpid() can miss a child (gevent 26.9)",
            ),
        ),
    ],
)
def test_multiprocess_server_beside_another_server(tmp_path: Path, patching: str) -> None:
    """A session's process serves that session and nothing else of the parent."""
    with Program(MULTIPROCESS, str(tmp_path), patching) as program:
        with program.client() as one, program.client() as two:
            pids = {int(client.sendcmd("SYST")[4:]) for client in (one, two)}
            assert len(pids) == 2
            assert program.process.pid not in pids
            transfer(one, tmp_path)
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", program.ports[1]), 20) as sock:
                    assert int(sock.recv(100)) == program.process.pid


@PATCHING
@pytest.mark.parametrize("loop", ["libev-cext", "libuv"])
def test_a_fork_in_the_parent_s_program_leaves_the_server_alone(
    tmp_path: Path, patching: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEVENT_LOOP", loop)
    with Program(FORKING_USER, str(tmp_path), patching) as program:
        for _ in range(5):
            with program.client() as client:
                transfer(client, tmp_path)
        assert program.process.poll() is None


def test_a_child_does_not_wait_for_what_another_thread_of_its_parent_was_doing(tmp_path: Path) -> None:
    with Program(FORK_WHILE_ANOTHER_THREAD_CLOSES, str(tmp_path)) as program:
        assert program.ports == [0]  # the child's exit status


def test_a_child_hears_its_own_signals(tmp_path: Path) -> None:
    with Program(FORK_OF_A_PROGRAM_THAT_HEARS, str(tmp_path)) as program:
        assert program.ports == [0]  # the child's exit status
