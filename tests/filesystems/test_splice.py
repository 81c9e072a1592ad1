"""However a data connection moves its bytes, the same ones arrive, and whoever wants to see them does."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pyftpdlib.handlers
import pytest
from pyftpdlib.filesystems import AbstractedFS

from bridge import AtomicFS
from bridge.filesystems import splice as blocks
from bridge.filesystems.splice import RECEIVING, SENDING, Splice, Unspliceable
from bridge.loop.registration import TLS_RECORD
from support.cli import certificate
from support.exhaustion import no_descriptors
from support.servers import Client, eventually, handler_class, started, users
from support.uploads import TLSClient

needs_splice = pytest.mark.skipif(not hasattr(os, "splice"), reason="os.splice is Linux's")

#: Around the sizes of a TLS record, of pyftpdlib's block and of ours; the largest fills a socket.
SIZES = sorted(
    {
        0,
        1,
        *(base + more for base in (TLS_RECORD, 65536, RECEIVING, SENDING) for more in (-1, 0, 1)),
        24 << 20,
    }
)


def content_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@contextlib.contextmanager
def site(home: Path, base: Any = pyftpdlib.handlers.FTPHandler, **attributes: Any) -> Iterator[Any]:
    with started(handler_class(users(home), base, **attributes)) as server:
        client_class = TLSClient if hasattr(base, "ssl_protocol") else Client
        with client_class(server) as client:
            client.command("TYPE I", "200")
            yield client


@contextlib.contextmanager
def tls_site(tmp_path: Path) -> Iterator[Any]:
    base = type("Handler", (pyftpdlib.handlers.TLS_FTPHandler,), {"certfile": str(certificate(tmp_path))})
    with site(tmp_path, base) as client:
        yield client


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each call of splice from a socket has moved."""
    moved = []
    move = Splice._move

    def counting(self: Splice, *args: Any) -> int:
        count = move(self, *args)
        moved.append(count)
        return count

    monkeypatch.setattr(Splice, "_move", counting)
    return moved


# --- what arrives


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_all_sizes_arrive_whole(tmp_path: Path, tls: bool) -> None:
    with tls_site(tmp_path) if tls else site(tmp_path) as client:
        for size in SIZES:
            content = content_of(size)
            with client.data() as data:
                client.command("STOR file", "1")
                data.sendall(content)
                if tls:
                    data.unwrap()
            assert client.reply() == "226 Transfer complete."
            assert (tmp_path / "file").read_bytes() == content, size
            assert client.retrieve("file") == content, size


@pytest.mark.parametrize("fs", [AbstractedFS, AtomicFS])
@needs_splice
def test_uploads_do_not_pass_through_python(tmp_path: Path, fs: Any, spliced: list[int]) -> None:
    content = content_of(3 * RECEIVING)
    with site(tmp_path, abstracted_fs=fs) as client:
        assert client.store("file", content) == "226 Transfer complete."
    assert (tmp_path / "file").read_bytes() == content
    assert sum(spliced) == len(content)


@needs_splice
def test_rest_and_appe(tmp_path: Path, spliced: list[int]) -> None:
    with site(tmp_path) as client:
        client.store("file", b"0123456789")
        client.command("REST 4", "350")
        client.store("file", b"abc")
        assert (tmp_path / "file").read_bytes() == b"0123abc789"
        assert sum(spliced) == 13
        with client.data() as data:
            client.command("APPE file", "1")
            data.sendall(b"end")
        assert client.reply() == "226 Transfer complete."
    assert (tmp_path / "file").read_bytes() == b"0123abc789end"
    assert sum(spliced) == 13, "splice does not append"


@needs_splice
def test_uploads_at_once_share_a_pipe_but_no_bytes(tmp_path: Path) -> None:
    contents = {f"file{number}": content_of(RECEIVING + number) for number in range(8)}
    with started(handler_class(users(tmp_path))) as server, contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(Client(server)) for name in contents}
        for client in clients.values():
            client.command("TYPE I", "200")
        uploads = [gevent.spawn(clients[name].store, name, contents[name]) for name in contents]
        assert {upload.get() for upload in uploads} == {"226 Transfer complete."}
    assert {name: (tmp_path / name).read_bytes() for name in contents} == contents


# --- where it does not apply


@needs_splice
@pytest.mark.parametrize("when", ["at once", "with bytes in the pipe", "no descriptors"])
def test_where_splice_does_not_work(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    splice, calls = os.splice, 0

    def fails(*args: Any, **kwargs: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == (1 if when == "at once" else 2):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return splice(*args, **kwargs)

    def none_left(flags: int) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    content = content_of(5 * RECEIVING)
    with site(tmp_path) as client:
        if when == "no descriptors":
            monkeypatch.setattr(os, "pipe2", none_left)
        else:
            monkeypatch.setattr(os, "splice", fails)
        assert client.store("file", content) == "226 Transfer complete."
    assert (tmp_path / "file").read_bytes() == content
    assert calls == {"at once": 1, "with bytes in the pipe": 2, "no descriptors": 0}[when]


class Counting(pyftpdlib.handlers.DTPHandler):
    """A program's data connection that looks at what it receives."""

    seen = 0

    def recv(self, buffer_size: int) -> bytes:
        chunk: bytes = super().recv(buffer_size)
        Counting.seen += len(chunk)
        return chunk


class Reading(pyftpdlib.handlers.DTPHandler):
    """The same, another way."""

    seen = 0

    def handle_read(self) -> None:
        before = self.tot_bytes_received
        super().handle_read()
        Reading.seen += self.tot_bytes_received - before

    handle_read_event = handle_read


def test_a_program_that_wants_to_see_the_bytes_does(tmp_path: Path, spliced: list[int]) -> None:
    content = content_of(100_000)
    for dtp_handler in (Counting, Reading):
        with site(tmp_path, dtp_handler=dtp_handler) as client:
            assert client.store("file", content) == "226 Transfer complete."
        assert (tmp_path / "file").read_bytes() == content
        assert dtp_handler.seen == len(content)
    assert not spliced


def test_a_programs_block_sizes_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sendfile = os.sendfile

    class Small(pyftpdlib.handlers.DTPHandler):
        ac_in_buffer_size = 1000
        ac_out_buffer_size = 2000

        def recv(self, buffer_size: int) -> bytes:
            sizes.append(buffer_size)
            return bytes(super().recv(buffer_size))

    def sending(*args: Any) -> int:
        sizes.append(args[3])
        return sendfile(*args)

    monkeypatch.setattr(os, "sendfile", sending)
    content = content_of(10_000)
    with site(tmp_path, dtp_handler=Small) as client:
        assert client.store("file", content) == "226 Transfer complete."
        assert client.retrieve("file") == content
    assert set(sizes) == {1000, 2000}


def test_a_bandwidth_limit_holds(tmp_path: Path, spliced: list[int]) -> None:
    """ThrottledDTPHandler takes itself off the loop when it has moved as much as it may in a second."""
    limited = {"read_limit": 30_000, "write_limit": 30_000}
    dtp_handler = type("DTP", (pyftpdlib.handlers.ThrottledDTPHandler,), limited)
    with started(handler_class(users(tmp_path), dtp_handler=dtp_handler)) as server, Client(server) as client:
        client.command("TYPE I", "200")
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(bytes(500_000))
            (session,) = server.sessions()
            eventually(lambda: session.handler.data_channel._throttler)
            assert session.handler.data_channel.tot_bytes_received < 100_000
    assert not spliced


@pytest.mark.parametrize("call", [1, 2])
def test_a_connection_that_breaks_at_once_is_no_success(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the turn of RETR: what is queued by then does not tell pyftpdlib that more was to be sent."""
    sendfile, calls = os.sendfile, 0

    def breaks(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return sendfile(args[0], args[1], args[2], 100)

    (tmp_path / "file").write_bytes(bytes(1000))
    monkeypatch.setattr(os, "sendfile", breaks)
    with site(tmp_path) as client, client.data():
        client.command("PWD", "257")  # the data connection is there
        client.command("RETR file", "125")
        assert client.reply().startswith("426")


# --- how much for one event


def test_a_small_download_is_over_in_the_turn_of_its_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"small")
    turns = []

    class Handler(pyftpdlib.handlers.FTPHandler):
        def on_file_sent(self, file: str) -> None:
            turns.append(self.command)

    with site(tmp_path, Handler) as client, client.data() as data:
        client.command("PWD", "257")  # the data connection is there
        client.command("RETR file", "125")
        assert data.recv(100) == b"small"
        assert data.recv(100) == b""
        assert client.reply() == "226 Transfer complete."
    assert turns == ["RETR"]


@needs_splice
def test_a_pipe_that_cannot_be_made_leaves_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_spare", [])
    with open(tmp_path / "file", "wb") as file, no_descriptors():
        splice = Splice.into(file)
        assert splice is not None
        with pytest.raises(Unspliceable):
            splice.receive(0)
