"""Files that are not on a disk: what is where, what they hold, and what cannot be done with them."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from pyftpdlib.exceptions import FilesystemError

from bridge.filesystems.virtual import Entry, VirtualFS
from support.servers import Client, handler_class, serving, users
from support.virtual_fs import CONTENT, FS, Sink, received, session

# --- what is where


def test_listings_show_what_is_known() -> None:
    with session() as (_, client):
        lines = received(client, "LIST").splitlines()
        assert lines == [
            "drwxr-xr-x   1 ftp      ftp             0 Jan 01  1970 sub",
            "-rw-r--r--   1 ftp      ftp        512000 Sep 09  2001 known",
            "-rw-r--r--   1 ftp      ftp             0 Jan 01  1970 unknown",
        ]
        assert received(client, "LIST known") == lines[1] + "\r\n"
        assert received(client, "NLST") == "sub\r\nknown\r\nunknown\r\n"
        assert received(client, "NLST known") == "known\r\n"
        assert received(client, "MLSD").splitlines() == [
            "perm=eldfmMTcp;type=dir; sub",
            "modify=20010909014640;perm=rdfwMT;size=512000;type=file; known",
            "perm=rdfwMT;type=file; unknown",
        ]
        client.send("STAT /", "MLST /sub/inner")
        assert client.reply() == "213 End of status."
        assert client.reply() == "250 End MLST."


def test_what_is_not_known_or_not_there_is_refused() -> None:
    with session() as (_, client):
        assert client.command("SIZE known", "213") == "213 512000"
        assert client.command("MDTM known", "213") == "213 20010909014640"
        for command in (
            "SIZE unknown",
            "MDTM unknown",
            "SIZE nothing",
            "CWD nothing",
            "CWD known",
            "SIZE sub",
        ):
            client.command(command, "550")
        client.command("MLST nothing", "550")
        client.command("CWD sub", "250")
        assert client.command("SIZE inner", "213") == "213 3"
        client.command("MLSD inner", "501")
        client.command("CDUP", "250")
        client.command("LIST nothing/at/all", "550")


def test_a_search_for_an_entry_ends_when_it_is_found() -> None:
    class Pages:
        def __init__(self) -> None:
            self.left = [Entry("other"), Entry("known", 5), Entry("last")]
            self.closed = 0

        def __iter__(self) -> Pages:
            return self

        def __next__(self) -> Entry:
            return self.left.pop(0)

        def close(self) -> None:
            self.closed += 1

    pages = Pages()
    with session(entries=lambda self, path: pages) as (_, client):
        client.command("RNFR known", "350")
        assert pages.left == [Entry("last")]
        assert pages.closed == 1


def test_paths_do_not_leave_the_top() -> None:
    with session() as (server, client):
        client.command("CWD sub", "250")
        for path in ("../../../etc/passwd", "/../etc/passwd", "//etc/./x/../passwd"):
            assert client.retrieve(path) == CONTENT
        assert set(server.fs.asked) == {"/etc/passwd"}
        client.command("CWD ../../..", "250")
        assert client.command("PWD", "257").startswith('257 "/"')


def test_what_streams_cannot_do_is_refused() -> None:
    with session() as (server, client), client.data():
        for command in (
            "MKD x",
            "RMD sub",
            "DELE known",
            "SITE CHMOD 644 known",
            "MFMT 20200101000000 known",
        ):
            assert client.command(command, "550") == "550 Operation not supported."
        client.command("RNFR known", "350")
        client.command("RNTO other", "550")
        client.command("APPE known", "550 Appending")
        for command in ("RETR known", "RETR unknown", "STOR known", "STOR new"):
            client.command("REST 5", "350")
            client.command(command, "554")
        assert server.fs.asked == ["/known", "/unknown"]
        client.command("NOOP", "200")
    with session(VirtualFS, entries=FS.entries) as (_, client):
        client.command("STOR x", "550 Read-only file system")
        client.command("RETR known", "550 Permission denied")


def test_pyftpdlibs_own_handler_and_server(tmp_path: Any) -> None:
    handler = handler_class(users(tmp_path), abstracted_fs=type("OwnFS", (FS,), {"asked": []}))
    with serving(handler) as server, Client(server) as client:
        client.command("TYPE I", "200")
        assert received(client, "NLST") == "known\r\nsub\r\nunknown\r\n"
        assert client.retrieve("known") == CONTENT


# --- contents


@pytest.mark.parametrize(
    "source",
    [
        lambda: io.BytesIO(CONTENT),
        lambda: [CONTENT],  # huge for a chunk
        lambda: iter([b"", CONTENT[:70_000], b"", bytearray(CONTENT[70_000:]), b""]),
        lambda: (CONTENT[at : at + 999] for at in range(0, len(CONTENT), 999)),
        list,
    ],
    ids=["file", "one chunk", "chunks of any size", "small chunks", "nothing"],
)
@pytest.mark.parametrize("type_", ["I", "A"])
def test_download(source: Any, type_: str) -> None:
    expected = CONTENT if source() else b""
    with session(source=source) as (_, client):
        client.command(f"TYPE {type_}", "200")
        content = client.retrieve("unknown")
        assert content == (expected if type_ == "I" else expected.replace(b"\n", b"\r\n"))


def test_the_first_bytes_do_not_wait_for_the_last() -> None:
    reader, writer = gevent.socket.socketpair()
    with reader, writer, reader.makefile("rb") as file, session(source=lambda: file) as (server, client):
        writer.sendall(b"first")
        with client.data() as data, Client(server) as other:
            client.command("RETR x", "1")
            assert data.recv(100) == b"first"
            other.command("NOOP", "200")
            writer.sendall(b"last")
            writer.close()
            assert data.recv(100) == b"last"
        assert client.reply().startswith("226")
        assert file.closed


def test_upload() -> None:
    sinks: list[Sink] = []

    def sink() -> Sink:
        sinks.append(Sink())
        return sinks[-1]

    with session(sink=sink) as (server, client):
        assert client.store("new", CONTENT).startswith("226")
        with client.data() as data:
            name = client.command("STOU", "1").split()[-1]
            data.sendall(b"unique")
        assert client.reply().startswith("226")
        assert [sink.taken for sink in sinks] == [CONTENT, b"unique"]
        assert [sink.calls for sink in sinks] == [["close"], ["close"]]
        assert server.fs.asked == ["/new", f"/{name}"]


# --- what fails


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (OSError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
        (OSError("no number"), "Input/output error"),
        (KeyError("a bug"), "Input/output error"),
        (FilesystemError("the tape\r\n226 is torn"), "the tape 226 is torn"),
    ],
)
def test_errors_have_replies(error: Exception, reply: str) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        yield b"some"
        raise error

    def refused(*_: Any) -> Any:
        raise error

    sink = Sink(write=error)
    with session(source=broken, sink=lambda: sink) as (server, client):
        with client.data() as data:
            client.command("RETR x", "1")
            assert data.recv(100) == b"some"
            assert client.reply() == f"451 {reply}; transfer aborted."
        with client.data() as data:
            client.command("STOR x", "1")
            data.sendall(b"some")
            assert client.reply() == f"426 {reply}; transfer aborted."
        assert sink.calls == ["abort"]
        sink = Sink(close=error)
        assert client.store("x", b"some") == f"426 {reply}; transfer aborted."
        assert sink.calls == ["close", "abort"]
        server.fs.source = server.fs.sink = staticmethod(refused)
        if not isinstance(error, FilesystemError):
            client.command("RETR x", "550 " + reply)
            client.command("STOR x", "550 " + reply)
        server.fs.entries = refused
        if not isinstance(error, FilesystemError):
            for command, code in (("LIST", "550"), ("SIZE x", "550"), ("CWD x", "550"), ("MLSD x", "550")):
                client.command(command, code)


def test_a_full_store_is_452_and_a_broken_listing_451() -> None:
    def entries(self: Any, path: str) -> Iterator[Any]:
        yield ("one",)
        raise FilesystemError("the index is torn")

    with session(entries=entries, sink=lambda: Sink(write=OSError(errno.ENOSPC, "full"))) as (_, client):
        assert client.store("x", b"some").startswith("452")
        with client.data():
            client.command("LIST", "1")
            assert client.reply() == "451 the index is torn; transfer aborted."
