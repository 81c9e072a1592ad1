"""Servers and clients for the tests: real sockets, port 0.

Ways to serve: `serving` runs pyftpdlib's server on the test's own hub, for cooperative clients (`Client`),
and `started` ours; `serving_in_thread` runs it in a thread of its own, for clients that block (ftplib).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import DTPHandler, FTPHandler
from pyftpdlib.servers import FTPServer

from bridge import GeventFTPServer, GeventIOLoop

#: Seconds a client waits for a reply before the test fails.
PATIENCE = 20.0
#: Seconds of CPU that the rest of something may take before all is idle. A spin takes them in no time.
BUSY = 0.15
#: For `pytest.mark.filterwarnings`: a test whose own process forks. It has threads, of conftest.py and of
#: pytest-xdist; the child needs nothing that one of them may hold. Python warns from 3.12 on; from 3.15 on,
#: os.fork() raises the warning if warnings are errors.
FORKS_BESIDE_THREADS = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


def has_ipv6() -> bool:
    """Whether this machine has the address ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 address ::1")


def has_utf8() -> bool:
    """Whether this process can name files with any character: not in a locale such as de_DE (ISO 8859-1)."""
    return sys.getfilesystemencoding() == "utf-8"


def users(home: Any, authorizer: DummyAuthorizer | None = None, *names: str) -> DummyAuthorizer:
    """An authorizer with the users `u` and *names*, password `p`, who may do everything in *home*."""
    authorizer = authorizer or DummyAuthorizer()
    for name in ("u", *names):
        authorizer.add_user(name, "p", str(home), perm="elradfmwMT")
    return authorizer


def handler_class(authorizer: DummyAuthorizer, base: Any = FTPHandler, **attributes: Any) -> Any:
    """A handler class for one test, so that pyftpdlib's own classes stay as they are."""
    attributes.setdefault("auth_failed_timeout", 0.01)
    return type("Handler", (base,), {"authorizer": authorizer, **attributes})


@contextlib.contextmanager
def serving(handler: Any, ioloop: GeventIOLoop | None = None, **attributes: Any) -> Iterator[Any]:
    """A server on this hub. `server.runner` is the greenlet that runs serve_forever."""
    server_class = type("Server", (FTPServer,), attributes)
    server = server_class(("127.0.0.1", 0), handler, ioloop=ioloop or GeventIOLoop())
    server.runner = gevent.spawn(server.serve_forever, handle_exit=False)
    gevent.sleep(0)
    try:
        yield server
    finally:
        server.close_all()
        server.runner.join(PATIENCE)
        assert server.runner.dead


@contextlib.contextmanager
def started(handler: Any, ioloop: GeventIOLoop | None = None, **attributes: Any) -> Iterator[Any]:
    """A GeventFTPServer on this hub, stopped at the end without patience."""
    server_class = type("Server", (GeventFTPServer,), attributes)
    server = server_class(("127.0.0.1", 0), handler, ioloop)
    server.start()
    try:
        yield server
    finally:
        server.stop(0)
        assert server.closed


@contextlib.contextmanager
def serving_in_thread(
    handler: Any, ioloop_class: Any, host: str = "127.0.0.1", server_class: Any = FTPServer
) -> Iterator[Any]:
    """A server in a thread, on any of pyftpdlib's loops and ours, with pyftpdlib's own way to poll."""
    server = server_class((host, 0), handler, ioloop=ioloop_class())
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            server.serve_forever(timeout=0.005, blocking=False)
        server.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A new directory whose path is short, for Unix sockets: theirs have 107 bytes at most, on macOS 103.

    pytest's directories have more, if TMPDIR is a deep one or the test has a long name.
    """
    deep = len(os.fsencode(tempfile.gettempdir())) > 40
    with tempfile.TemporaryDirectory(dir="/tmp" if deep else None) as path:
        yield Path(path)


@contextlib.contextmanager
def held_ports(count: int, *hosts: str, among: range = range(21_000, 32_000)) -> Iterator[int]:
    """The first of *count* ports in a row that nobody has on *hosts* (127.0.0.1), nor gets by chance.

    They are bound here. A server can bind them, too, and listen, if it sets SO_REUSEADDR, as ours do; who
    wants any port that is free is not given them. The kernel and passive mode choose higher ones by default.
    """
    while True:
        first = random.randrange(among.start, among.stop - count + 1)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    for host in hosts or ("127.0.0.1",):
                        sock = stack.enter_context(socket.socket())
                        sock.bind((host, port))
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else held ones would do
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            yield first
            return


def eventually(condition: Callable[[], object]) -> None:
    """Let the hub run until *condition* holds."""
    with gevent.Timeout(PATIENCE):
        while not condition():
            gevent.sleep(0.001)


def assert_idle(seconds: float = 0.2) -> None:
    """Let the hub run for so long. Nothing may take a fifth of a processor then; a spin takes a whole one.

    What was under way before may come to its end first, but for less than BUSY.
    """
    started = before = time.process_time()
    gevent.sleep(seconds)
    while (used := time.process_time() - before) >= 0.2 * seconds:
        total = time.process_time() - started
        assert total < BUSY, f"{total:.3f} s of CPU, of these {used:.3f} in {seconds} s"
        before = time.process_time()
        gevent.sleep(seconds)


def settled(value: Callable[[], object]) -> Any:
    """Let the hub run until *value* stays the same; return it.

    Time alone does not tell: on a busy machine it passes without the hub having run.
    """
    with gevent.Timeout(PATIENCE):
        while True:
            before = value()
            for _ in range(50):
                gevent.sleep(0.001)
            if value() == before:
                return before


def time_out(channel: Any, seconds: float) -> None:
    """Give a channel *seconds*, from now on, before it times out, however long it took to come here."""
    if not hasattr(channel, "_idler"):  # a passive port
        channel.call_later(seconds, channel.handle_timeout)
        return
    channel._idler.cancel()
    call = channel.ioloop.call_every if isinstance(channel, DTPHandler) else channel.ioloop.call_later
    channel.timeout = seconds
    channel._idler = call(seconds, channel.handle_timeout, _errback=channel.handle_error)


class Client:
    """A cooperative FTP client that shows every reply and can pipeline."""

    def __init__(self, server: Any, login: bool | str = True) -> None:
        self.sock = gevent.socket.create_connection(server.address[:2], PATIENCE)
        self.file = self.sock.makefile("rb")
        if login:
            assert self.reply().startswith("220")
            name = login if isinstance(login, str) else "u"
            self.command(f"USER {name}", "331")
            self.command("PASS p", "230")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def encrypt(self) -> None:
        """The TLS handshake that follows AUTH."""
        self.file.close()
        self.sock = encrypted(self.sock)
        self.file = self.sock.makefile("rb")

    def send(self, *lines: str) -> None:
        self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def reply(self) -> str:
        """The next reply, its last line; '' at the end of the connection."""
        while True:
            line: str = self.file.readline().decode().rstrip("\r\n")
            if not line or (line[:3].isdigit() and line[3:4] == " "):
                return line

    def command(self, line: str, code: str) -> str:
        self.send(line)
        reply = self.reply()
        assert reply.startswith(code), (line, reply)
        return reply

    def data(self) -> Any:
        """A data connection in extended passive mode."""
        reply = self.command("EPSV", "229")
        port = int(reply.split("|")[3])
        return gevent.socket.create_connection((self.sock.getpeername()[0], port), PATIENCE)

    def store(self, name: str, content: bytes) -> str:
        with self.data() as data:
            self.command(f"STOR {name}", "1")
            data.sendall(content)
        return self.reply()

    def retrieve(self, name: str) -> bytes:
        content = b""
        with self.data() as data:
            self.command(f"RETR {name}", "1")
            while chunk := data.recv(65536):
                content += chunk
        assert self.reply().startswith("226")
        return content

    def ended(self) -> bool:
        """Whether the server has closed the connection (reads what is left)."""
        try:
            while self.file.readline():
                pass
        except ConnectionResetError:
            pass
        return True


def encrypted(sock: Any) -> Any:
    """*sock* after a client's TLS handshake, with whatever certificate."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)


def reset(connection: Any) -> None:
    """Close a client or a socket with RST; closed already is no harm."""
    sock = connection.sock if isinstance(connection, Client) else connection
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def vanish(sock: Any) -> None:
    """As if the cable was cut: the kernel answers nothing any more, neither with ACK nor with FIN or RST.

    By a filter that accepts no byte of any packet; Linux only.
    """
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0
    program = struct.pack("HL", 1, ctypes.addressof(drop_all))
    sock.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER, asm-generic/socket.h
