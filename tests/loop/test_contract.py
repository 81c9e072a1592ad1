"""One contract, four loops: pyftpdlib's Select, Poll and Epoll, and ours."""

from __future__ import annotations

import contextlib
import ftplib
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyftpdlib.ioloop
import pytest
from gevent import monkey
from pyftpdlib.handlers import DTPHandler, FTPHandler, ThrottledDTPHandler
from pyftpdlib.ioloop import AsyncChat
from pyftpdlib.servers import FTPServer, MultiprocessFTPServer, ThreadedFTPServer

from bridge import GeventIOLoop
from support import cli
from support.servers import (
    FORKS_BESIDE_THREADS,
    PATIENCE,
    handler_class,
    needs_ipv6,
    serving_in_thread,
    time_out,
    users,
)

LOOPS = [
    getattr(pyftpdlib.ioloop, name)
    for name in ("Select", "Poll", "Epoll")
    if hasattr(pyftpdlib.ioloop, name)  # patch_all() takes epoll away
] + [GeventIOLoop]


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.__name__)
def loop_class(request: pytest.FixtureRequest) -> Any:
    return request.param


HOSTS = ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)]


@contextlib.contextmanager
def connected(
    server: Any, client_class: Any = ftplib.FTP, passive: bool = True, **options: Any
) -> Iterator[Any]:
    client = client_class(timeout=PATIENCE, **options)
    try:
        client.connect(*server.address)
        client.login("u", "p")
        if client_class is ftplib.FTP_TLS:
            client.prot_p()
        client.set_pasv(passive)
        yield client
        client.quit()
    finally:
        client.close()


def transfer(client: Any, root: Path, size: int = 3_000_000) -> None:
    """Up, down, list, rename, delete; contents compared."""
    content = os.urandom(1000) * (size // 1000)
    client.storbinary("STOR up.bin", io.BytesIO(content))
    assert (root / "up.bin").read_bytes() == content
    received = io.BytesIO()
    client.retrbinary("RETR up.bin", received.write)
    assert received.getvalue() == content
    assert client.nlst() == ["up.bin"]
    client.rename("up.bin", "other.bin")
    assert [name for name, _ in client.mlsd()] == ["other.bin"]
    client.delete("other.bin")
    assert not list(root.iterdir())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
@pytest.mark.parametrize("sendfile", [True, False], ids=["sendfile", "send"])
def test_binary_transfers(loop_class: Any, tmp_path: Path, host: str, passive: bool, sendfile: bool) -> None:
    handler = handler_class(users(tmp_path), use_sendfile=sendfile)
    with serving_in_thread(handler, loop_class, host) as server, connected(server, passive=passive) as client:
        transfer(client, tmp_path)


@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
def test_ascii_transfers(loop_class: Any, tmp_path: Path, passive: bool) -> None:
    lines = [f"line {number}" for number in range(20_000)]
    with serving_in_thread(handler_class(users(tmp_path)), loop_class) as server:
        with connected(server, passive=passive) as client:
            client.storlines("STOR text", io.BytesIO("\r\n".join([*lines, ""]).encode()))
            assert (tmp_path / "text").read_text() == "\n".join([*lines, ""])
            received: list[str] = []
            client.retrlines("RETR text", received.append)
            assert received == lines


def test_throttled_transfers(loop_class: Any, tmp_path: Path) -> None:
    limits = {"read_limit": 400_000, "write_limit": 400_000}
    throttled = type("Throttled", (ThrottledDTPHandler,), limits)
    with serving_in_thread(handler_class(users(tmp_path), dtp_handler=throttled), loop_class) as server:
        with connected(server) as client:
            transfer(client, tmp_path, 500_000)


@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
def test_tls_transfers(loop_class: Any, tmp_path: Path, certificate: Path, passive: bool) -> None:
    from pyftpdlib.handlers import TLS_FTPHandler

    handler = handler_class(
        users(tmp_path), TLS_FTPHandler, certfile=str(certificate), ssl_context=None, tls_data_required=True
    )
    context = ssl.create_default_context(cafile=str(certificate))
    with serving_in_thread(handler, loop_class) as server:
        with connected(server, ftplib.FTP_TLS, passive=passive, context=context) as client:
            transfer(client, tmp_path)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("OpenSSL", reason="FTPS needs pyOpenSSL")
    return cli.certificate(tmp_path_factory.mktemp("tls"))


def test_abort_in_the_middle_of_an_upload(loop_class: Any, tmp_path: Path) -> None:
    events: list[str] = []
    received = threading.Event()

    class DataHandler(DTPHandler):
        def recv(self, size: int) -> bytes:
            received.set()
            data: bytes = super().recv(size)
            return data

    handler = handler_class(
        users(tmp_path),
        dtp_handler=DataHandler,
        on_incomplete_file_received=lambda self, file: events.append(file),
    )
    with serving_in_thread(handler, loop_class) as server, connected(server) as client:
        with contextlib.closing(client.transfercmd("STOR half")) as data:
            data.sendall(b"x" * 100_000)
            assert received.wait(PATIENCE)
            client.putcmd("ABOR")
            assert client.getmultiline().startswith("426")
            assert client.getmultiline().startswith("226")
        assert events == [str(tmp_path / "half")]


def test_an_active_connection_that_is_refused(loop_class: Any, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with serving_in_thread(handler_class(users(tmp_path)), loop_class) as server:
            with connected(server) as client, pytest.raises(ftplib.error_temp, match="425"):
                client.sendport("127.0.0.1", port)


def test_an_idle_session_is_ended(loop_class: Any, tmp_path: Path) -> None:
    with serving_in_thread(handler_class(users(tmp_path), timeout=0.05), loop_class) as server:
        client = ftplib.FTP(timeout=PATIENCE)
        client.connect(*server.address)
        with contextlib.closing(client):
            assert client.getmultiline().startswith("421")


def test_a_stalled_transfer_is_ended(loop_class: Any, tmp_path: Path) -> None:
    class Stalling(DTPHandler):
        def enable_receiving(self, *args: Any) -> None:
            super().enable_receiving(*args)
            time_out(self, 0.05)  # not before: the client may take its time to connect and to say what for

    with serving_in_thread(handler_class(users(tmp_path), dtp_handler=Stalling), loop_class) as server:
        client = ftplib.FTP(timeout=PATIENCE)
        client.connect(*server.address)
        client.login("u", "p")
        with contextlib.closing(client), contextlib.closing(client.transfercmd("STOR never")):
            assert client.getmultiline().startswith("421")


# --- the interface


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Chat(AsyncChat):
    """Counts its events."""

    def __init__(self, sock: socket.socket, ioloop: Any) -> None:
        self.reads = self.writes = 0
        self.wants_write = True
        super().__init__(sock, ioloop=ioloop)

    def handle_read(self) -> None:
        self.reads += 1
        self.recv(100)

    def handle_write(self) -> None:
        self.writes += 1
        self.wants_write = False

    def writable(self) -> bool:
        return self.wants_write

    def handle_close(self) -> None:
        self.close()


def poll_until(ioloop: Any, condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        ioloop.poll(0.01)


def test_register_modify_unregister(loop_class: Any) -> None:
    with pair() as (ours, theirs), loop_class() as ioloop:
        chat = Chat(ours, ioloop)
        assert ioloop.socket_map == {ours.fileno(): chat}
        theirs.send(b"x")
        poll_until(ioloop, lambda: chat.reads == 1)
        assert chat.writes == 0
        ioloop.modify(ours.fileno(), ioloop.READ | ioloop.WRITE)
        poll_until(ioloop, lambda: chat.writes == 1)
        ioloop.modify(ours.fileno(), ioloop.READ)
        theirs.send(b"x")
        poll_until(ioloop, lambda: chat.reads == 2)
        assert chat.writes == 1
        ioloop.unregister(ours.fileno())
        ioloop.unregister(ours.fileno())
        assert ioloop.socket_map == {}
        theirs.send(b"x")
        ioloop.poll(0.01)
        assert chat.reads == 2
        chat.close()


def test_register_takes_any_object_with_a_fileno(loop_class: Any) -> None:
    with pair() as (ours, theirs), loop_class() as ioloop, loop_class() as other:
        chat = Chat(ours, other)
        ioloop.register(ours, chat, ioloop.READ)
        assert ours in ioloop.socket_map
        if loop_class is GeventIOLoop:  # pyftpdlib's own look the event's number up in the map
            theirs.send(b"x")
            poll_until(ioloop, lambda: chat.reads == 1)
        ioloop.modify(ours, ioloop.WRITE)
        ioloop.unregister(ours)
        assert ours not in ioloop.socket_map


def test_the_last_registration_of_a_descriptor_counts(loop_class: Any) -> None:
    if loop_class is pyftpdlib.ioloop.Select:
        pytest.skip("Select keeps the first registration of a descriptor")
    with pair() as (ours, theirs), loop_class() as ioloop:
        first = Chat(ours, ioloop)
        second = Chat(ours, ioloop)
        theirs.send(b"x")
        poll_until(ioloop, lambda: second.reads)
        assert first.reads == 0


def test_loop_returns_when_no_channel_is_left(loop_class: Any) -> None:
    with pair() as (ours, theirs), loop_class() as ioloop:
        Chat(ours, ioloop)
        theirs.close()
        ioloop.loop()
        assert ioloop.socket_map == {}


@pytest.mark.parametrize("timeout", [None, 0.001])
def test_loop_returns_when_closed(loop_class: Any, timeout: float | None) -> None:
    with pair() as (ours, _), loop_class() as ioloop:
        Chat(ours, ioloop)
        ioloop.call_later(0, ioloop.close)
        ioloop.call_later(0.01, ioloop.close)
        if loop_class is not GeventIOLoop:
            timeout = 0.001  # calls made before loop() wait for the first event there
        ioloop.loop(timeout)


def test_loop_that_does_not_block_returns_the_time_to_the_next_call(loop_class: Any) -> None:
    with pair() as (ours, _), loop_class() as ioloop:
        Chat(ours, ioloop)
        assert ioloop.loop(0.001, blocking=False) is None
        ioloop.call_later(60, len, "")
        delay = ioloop.loop(0.001, blocking=False)
        assert 50 < delay <= 60


def test_serve_forever_that_does_not_block_polls_once(loop_class: Any, tmp_path: Path) -> None:
    handler = handler_class(users(tmp_path))
    with FTPServer(("127.0.0.1", 0), handler, ioloop=loop_class()) as server:
        server.serve_forever(timeout=0.001, blocking=False)
        server.ioloop.call_later(60, len, "")
        delay = server.serve_forever(timeout=0.001, blocking=False)
        assert delay is None  # pyftpdlib's server drops what its loop returns
        assert 50 < server.ioloop.loop(0.001, blocking=False) <= 60


def test_call_later_and_call_every(loop_class: Any) -> None:
    with pair() as (ours, _), loop_class() as ioloop:
        Chat(ours, ioloop)
        calls: list[str] = []
        ioloop.call_later(0.01, calls.append, "later")
        every = ioloop.call_every(0.002, calls.append, "every")
        deadline = time.monotonic() + PATIENCE
        while "later" not in calls or calls.count("every") < 2:
            assert time.monotonic() < deadline
            ioloop.loop(0.001, blocking=False)
        every.cancel()


def test_instance_and_factory(loop_class: Any) -> None:
    instance = loop_class.instance()
    try:
        assert loop_class.instance() is instance
        other = loop_class.factory()
        assert type(other) is loop_class
        assert other is not instance
        other.close()
    finally:
        instance.close()


def test_repr_tells_channels_and_calls(loop_class: Any) -> None:
    with pair() as (ours, _), loop_class() as ioloop:
        Chat(ours, ioloop)
        ioloop.call_later(60, len, "")
        assert "fds=1, tasks=1" in repr(ioloop)
        assert repr(ioloop) == str(ioloop)


def test_close_closes_channels_and_cancels_calls(loop_class: Any) -> None:
    with pair() as (ours, _):
        ioloop = loop_class()
        chat = Chat(ours, ioloop)
        call = ioloop.call_later(60, len, "")
        ioloop.poll(0.001)
        ioloop.close()
        assert chat._closed
        assert ours.fileno() == -1
        assert call.cancelled


def test_fileno_is_an_open_descriptor(loop_class: Any) -> None:
    if not hasattr(loop_class, "fileno"):
        pytest.skip("Select and Poll have no descriptor")
    with loop_class() as ioloop:
        os.fstat(ioloop.fileno())


# --- pyftpdlib's other servers


def test_threaded_server(loop_class: Any, tmp_path: Path) -> None:
    server_class = type("Threaded", (ThreadedFTPServer,), {"poll_timeout": 0.01})
    with serving_in_thread(handler_class(users(tmp_path)), loop_class, server_class=server_class) as server:
        with connected(server) as client:
            transfer(client, tmp_path)
        with connected(server) as one, connected(server) as two:
            assert one.pwd() == two.pwd()


def test_a_client_that_has_left_when_its_thread_begins(tmp_path: Path) -> None:
    """Its thread registers what is closed: libev aborted the process."""

    class Handler(FTPHandler):
        def handle(self) -> None:
            super().handle()
            if not left:
                left.append(self)
                self.close()  # as when the 220 meets a connection that was reset

    left: list[Any] = []
    server_class = type("Threaded", (ThreadedFTPServer,), {"poll_timeout": 0.01})
    handler = handler_class(users(tmp_path), Handler)
    with serving_in_thread(handler, GeventIOLoop, server_class=server_class) as server:
        with contextlib.closing(socket.create_connection(server.address, PATIENCE)) as first:
            assert first.recv(3) == b"220"
            assert first.makefile("rb").read()
        with connected(server) as client:
            transfer(client, tmp_path)
    assert left


@pytest.mark.filterwarnings(FORKS_BESIDE_THREADS)
def test_multiprocess_server(loop_class: Any, tmp_path: Path) -> None:
    if loop_class is not GeventIOLoop and monkey.is_module_patched("os"):
        pytest.skip("MultiprocessFTPServer on pyftpdlib's own loops does not stand patch_all()")
    with serving_in_thread(
        handler_class(users(tmp_path)), loop_class, server_class=MultiprocessFTPServer
    ) as server:
        with connected(server) as client:
            transfer(client, tmp_path)
        with connected(server) as one, connected(server) as two:
            assert one.pwd() == two.pwd()


def test_a_handler_class_is_left_as_it_was(loop_class: Any, tmp_path: Path) -> None:
    before = dict(vars(FTPHandler))
    with serving_in_thread(handler_class(users(tmp_path)), loop_class) as server, connected(server) as client:
        transfer(client, tmp_path)
    assert dict(vars(FTPHandler)) == before
    assert threading.active_count() >= 1
