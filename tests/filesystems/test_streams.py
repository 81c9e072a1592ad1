"""Streams in place of files: no end runs ahead of the other, and they are closed when not wanted."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey

from bridge import OffloadedFS
from bridge.filesystems.streams import LOOK, Upload
from bridge.filesystems.threads import Threads
from bridge.filesystems.virtual import Entry
from support.fakes import Gate
from support.servers import Client, assert_idle, eventually, handler_class, reset, serving, settled, users
from support.virtual_fs import BLOCK, CONTENT, FS, Closing, Sink, received, session

# --- backpressure


def drained(data: Any) -> int:
    total = 0
    while block := data.recv(1 << 20):
        total += len(block)
    return total


def test_a_fast_source_waits_for_a_slow_client() -> None:
    ahead = 0
    size = 64 * 1024 * 1024
    chunk = bytes(100_000)
    produced = 0

    class Fast(FS):
        def open_read(self, path: str) -> Any:
            nonlocal produced, ahead
            for _ in range(size // len(chunk)):
                produced += len(chunk)
                channel = self.cmd_channel.data_channel
                ahead = max(ahead, produced - (channel.get_transmitted_bytes() if channel else 0))
                yield chunk

    with session(Fast) as (_, client), client.data() as data:
        tracemalloc.start()
        try:
            client.command("RETR x", "1")
            settled(lambda: produced)  # when the kernel's buffers are full, nearly
            assert_idle()
            assert produced < size / 2
            total = drained(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert client.reply().startswith("226")
        assert total == produced == size // len(chunk) * len(chunk)
        assert ahead <= BLOCK + len(chunk)
        assert peak < 4 << 20  # of which 1 MiB is the client's


def test_a_huge_chunk_goes_out_in_blocks() -> None:
    huge = bytes(32 << 20)
    with session(source=lambda: [huge]) as (_, client), client.data() as data:
        tracemalloc.start()
        try:
            client.command("RETR x", "1")
            assert drained(data) == len(huge)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20  # of which 1 MiB is the client's
        finally:
            tracemalloc.stop()
        assert client.reply().startswith("226")


def test_one_chunk_is_kept_at_a_time() -> None:
    live = most = 0

    class Chunk(bytearray):
        def __init__(self, size: int) -> None:
            nonlocal live, most
            super().__init__(size)
            live += 1
            most = max(most, live)

        def __del__(self) -> None:
            nonlocal live
            live -= 1

    with session(source=lambda: (Chunk(100_000) for _ in range(50))) as (_, client):
        assert len(client.retrieve("x")) == 5_000_000
    assert (most, live) == (1, 0)


def test_a_slow_sink_makes_a_fast_client_wait() -> None:
    gate = Gate()

    class Slow(Sink):
        def write(self, data: bytes) -> None:
            gate.wait()
            super().write(data)

    sink = Slow()
    content = CONTENT * 64  # 32 MB: more than the kernel keeps
    with session(sink=lambda: sink) as (server, client), client.data() as data, Client(server) as other:
        client.command("STOR x", "1")
        sending = gevent.spawn(data.sendall, content)
        gate.arrived()
        other.command("NOOP", "200")
        assert_idle()
        assert not sending.dead
        (transfer,) = [each.transfer for each in server.sessions() if each.transfer]
        assert transfer.bytes <= 1 << 20  # one read
        gate.open()
        sending.get()
        data.close()
        assert client.reply().startswith("226")
        assert sink.taken == content


# --- the end of a stream


def control_reset(client: Client, data: Any) -> None:
    reset(client)


def control_closed(client: Client, data: Any) -> None:
    client.close()


def data_reset(client: Client, data: Any) -> None:
    reset(data)


def abor(client: Client, data: Any) -> None:
    client.sock.sendall(b"NOOP\r\n\xff\xf4\xff\xf2ABOR\r\n")


ENDS = [control_reset, control_closed, data_reset, abor]


def go_on(client: Client, end: Any) -> None:
    """What is left of the session answers."""
    if end in (data_reset, abor):
        reply = client.reply()
        if end is abor and reply.startswith("200"):  # the NOOP, if its turn came first
            reply = client.reply()
        assert reply.startswith("426"), reply
        client.send("SYST")
        eventually(lambda: client.reply().startswith("215"))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("waits", [False, True], ids=["client does not read", "source waits"])
def test_an_aborted_download_closes_its_source(end: Any, waits: bool) -> None:
    gate = Gate()
    source = Closing((bytes(BLOCK) for _ in range(10_000)), gate if waits else None)
    with session(source=lambda: source) as (server, client), client.data() as data:
        client.command("RETR x", "1")
        eventually(lambda: source.produced)
        if waits:
            gate.arrived()
        end(client, data)
        eventually(lambda: source.closed)
        go_on(client, end)
        assert source.closed == 1
        eventually(lambda: len(server.sessions()) == (1 if end in (data_reset, abor) else 0))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("waits", [False, True], ids=["client sends nothing", "sink waits"])
def test_an_aborted_upload_aborts_its_sink(end: Any, waits: bool) -> None:
    gate = Gate()

    class Waiting(Sink):
        def write(self, data: bytes) -> None:
            super().write(data)
            if waits:
                gate.wait()

    sink = Waiting()
    with session(sink=lambda: sink) as (_, client), client.data() as data:
        client.command("STOR x", "1")
        data.sendall(b"some")
        eventually(lambda: sink.taken)
        end(client, data)
        eventually(lambda: sink.calls)
        go_on(client, end)
        assert sink.calls == ["abort"]


@pytest.mark.parametrize("waits", [False, True], ids=["client sends nothing", "sink waits"])
def test_a_server_that_stops_aborts_uploads_and_waits_for_that(waits: bool) -> None:
    gate = Gate()

    class Waiting(Sink):
        def write(self, data: bytes) -> None:
            super().write(data)
            if waits:
                gate.wait()

        def abort(self) -> None:
            gevent.sleep(0.01)
            super().abort()

    sink = Waiting()
    with session(sink=lambda: sink) as (server, client), client.data() as data:
        client.command("STOR x", "1")
        data.sendall(b"some")
        eventually(lambda: sink.taken)
        server.stop(0)
        assert sink.calls == ["abort"]


def test_a_complete_upload_is_not_interrupted_while_it_closes() -> None:
    gate = Gate()

    class Closes(Sink):
        def close(self) -> None:
            gate.wait()
            super().close()

    sink = Closes()
    with session(sink=lambda: sink) as (server, client):
        with client.data() as data:
            client.command("STOR x", "1")
            data.sendall(b"all")
        gate.arrived()
        client.close()
        assert_idle(2 * LOOK)
        gate.open()
        eventually(lambda: not server.sessions())
        assert sink.calls == ["close"]


@pytest.mark.parametrize("end", [None, abor, data_reset, control_reset])
def test_pyftpdlibs_own_data_connections_abort_a_sink_too(end: Any) -> None:
    sink = Sink()
    filesystem = type("OwnFS", (FS,), {"asked": [], "sink": lambda self: sink})
    with serving(handler_class(users("/"), abstracted_fs=filesystem)) as server:
        with Client(server) as client, client.data() as data:
            client.command("STOR x", "1")
            data.sendall(b"some")
            eventually(lambda: sink.taken)
            if end is not None:
                end(client, data)
        eventually(lambda: sink.calls)
        assert sink.calls == (["close"] if end is None else ["abort"])


def test_a_sink_that_cannot_be_aborted_is_closed() -> None:
    sink = io.BytesIO()
    with session(sink=lambda: sink) as (_, client), client.data() as data:
        client.command("STOR x", "1")
        data.sendall(b"some")
        eventually(lambda: sink.tell())
        abor(client, data)
        eventually(lambda: sink.closed)
        go_on(client, abor)


def test_an_upload_is_aborted_by_who_knows() -> None:
    sink = Sink()
    upload = Upload(FS("/", None), "/x", sink)
    upload.abort()
    upload.abort()
    upload.close()
    assert sink.calls == ["abort"]
    assert upload.aborted
    assert not hasattr(Upload(FS("/", None), "/x", io.BytesIO()), "abort")


def test_an_upload_whose_data_connection_never_comes_is_aborted() -> None:
    sink = Sink()
    with session(sink=lambda: sink) as (_, client):
        client.command("EPSV", "229")
        client.command("STOR x", "150")
        client.command("ABOR", "426")
        assert sink.calls == ["abort"]


@pytest.mark.parametrize("command", ["RETR x", "STOR x", "LIST", "CWD x"])
def test_a_client_that_leaves_ends_the_wait_for_an_answer(command: str) -> None:
    gate = Gate()
    base: Any = type("Waiting", (FS,), {"entries": lambda self, path: gate.wait()})
    with session(base, source=gate.wait, sink=gate.wait) as (server, client), client.data():
        client.send(command)
        gate.arrived()
        client.close()
        eventually(lambda: not server.sessions())


@pytest.mark.parametrize("command", ["LIST", "NLST", "MLSD"])
@pytest.mark.parametrize("aborted", [False, True])
def test_listings_are_streamed(command: str, aborted: bool) -> None:
    gate = Gate()
    state: list[Any] = []

    def entries(self: Any, path: str) -> Iterator[Any]:
        try:
            for number in range(5000):
                if number == 100:
                    gate.wait()
                state.append(number)
                yield Entry(f"file{number}", number)
        finally:
            state.append("closed")

    with session(entries=entries) as (_, client), client.data() as data:
        client.command(command, "1")
        assert b"file0" in data.recv(100)
        gate.arrived()
        assert state == list(range(100))
        if aborted:
            client.send("ABOR")
            assert client.reply().startswith("426")
            eventually(lambda: state[-1] == "closed")
            assert client.reply().startswith("225")
        else:
            gate.open()
            content = b"".join(iter(lambda: data.recv(BLOCK), b""))
            assert content.endswith(b"file4999\r\n")
            assert state == [*range(5000), "closed"]
            assert client.reply().startswith("226")


# --- code that blocks for real


@pytest.mark.parametrize("end", [None, abor, data_reset, control_reset])
def test_on_threads(end: Any) -> None:
    hub = monkey.get_original("_thread", "get_ident")()
    where: set[bool] = set()

    def seen() -> None:
        where.add(monkey.get_original("_thread", "get_ident")() == hub)

    class Blocking(FS):
        def entries(self, path: str) -> Any:
            seen()
            return super().entries(path)

        def open_read(self, path: str) -> Any:
            seen()
            yield CONTENT
            seen()

    class BlockingSink(Sink):
        def _do(self, name: str) -> None:
            seen()
            super()._do(name)

        def write(self, data: bytes) -> None:
            seen()
            super().write(data)

    sink = BlockingSink()
    threads = Threads()
    base = type("Base", (OffloadedFS, Blocking), {"threads": threads})
    try:
        with session(base, sink=lambda: sink) as (_, client):
            assert received(client, "LIST").count("\r\n") == 3
            assert received(client, "NLST") == "sub\r\nknown\r\nunknown\r\n"
            assert client.retrieve("known") == CONTENT
            client.command("SIZE known", "213 512000")
            client.command("REST 5", "350")
            client.command("RETR known", "554")
            client.command("APPE known", "550")
            with client.data() as data:
                client.command("STOR x", "1")
                data.sendall(b"some")
                eventually(lambda: sink.taken == b"some")
                if end is not None:
                    end(client, data)
            eventually(lambda: sink.calls)
            assert sink.calls == (["close"] if end is None else ["abort"])
        assert where == {False}
    finally:
        threads.kill()
