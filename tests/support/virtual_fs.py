"""A small VirtualFS and its ends, for tests of files that are not on a disk."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Callable, Iterator
from typing import Any

from bridge.filesystems.virtual import Entry, VirtualFS
from support.fakes import Gate
from support.servers import Client, handler_class, started, users

BLOCK = 65536  # pyftpdlib's
CONTENT = bytes(range(256)) * 2000
WHEN = 1_000_000_000.0  # 2001-09-09 01:46:40 UTC

ENTRIES: dict[str, list[Any]] = {
    "/": [
        Entry("sub", type="dir"),
        Entry("known", 512_000, WHEN),
        ("unknown",),
        Entry("bad\r\nname", 1),
        Entry("../up", 1),
        Entry("..", 1),
    ],
    "/sub": [("inner", 3, WHEN, "file")],
}


class Sink:
    def __init__(self, **fail: Exception) -> None:
        self._pieces: list[bytes] = []
        self.calls: list[str] = []
        self.fail = fail

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def write(self, data: bytes) -> None:
        if "write" in self.fail:
            raise self.fail["write"]
        self._pieces.append(bytes(data))

    @property
    def taken(self) -> bytes:
        return b"".join(self._pieces)

    def close(self) -> None:
        self._do("close")

    def abort(self) -> None:
        self._do("abort")


class FS(VirtualFS):
    """Subclasses for each test have `source` and `sink`, made anew for each transfer."""

    source: Callable[[], Any] = staticmethod(lambda: io.BytesIO(CONTENT))
    sink: Callable[[], Any] = staticmethod(Sink)
    asked: list[str]

    def entries(self, path: str) -> Any:
        if path not in ENTRIES:
            raise FileNotFoundError(errno.ENOENT, "no such directory")
        yield from ENTRIES[path]

    def open_read(self, path: str) -> Any:
        self.asked.append(path)
        return self.source()

    def open_write(self, path: str) -> Any:
        self.asked.append(path)
        return self.sink()


@contextlib.contextmanager
def session(base: Any = FS, **attributes: Any) -> Iterator[tuple[Any, Client]]:
    """A server and a client; the server's `fs` is the file system's class."""
    attributes = {
        name: staticmethod(value) if name in ("source", "sink") else value
        for name, value in attributes.items()
    }
    filesystem = type("FS", (base,), {"asked": [], **attributes})
    with started(handler_class(users("/"), abstracted_fs=filesystem)) as server, Client(server) as client:
        server.fs = filesystem
        client.command("TYPE I", "200")
        yield server, client


def received(client: Client, command: str) -> str:
    with client.data() as data:
        client.command(command, "1")
        content = b"".join(iter(lambda: data.recv(BLOCK), b""))
    assert client.reply().startswith("226")
    return content.decode()


class Closing:
    """Chunks, and whether somebody has closed them; waits at the gate, if there is one, after the first."""

    def __init__(self, chunks: Any, gate: Gate | None = None) -> None:
        self.closed = 0
        self.produced = 0
        self._chunks = chunks
        self._gate = gate

    def __iter__(self) -> Iterator[Any]:
        for number, chunk in enumerate(self._chunks):
            if number == 1 and self._gate is not None:
                self._gate.wait()
            self.produced += len(chunk)
            yield chunk

    def close(self) -> None:
        self.closed += 1
