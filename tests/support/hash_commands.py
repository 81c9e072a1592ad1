"""Handlers that compute checksums, and what is slow or fails under them, for the tests."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from bridge import OffloadedFS
from bridge.filesystems.streams import Entry
from bridge.filesystems.threads import Threads, on_one
from bridge.filesystems.virtual import VirtualFS
from bridge.session.checksums import HASH_BLOCK
from bridge.session.hash_commands import HashMixin
from support.fakes import Gate, NativeGate
from support.servers import Client, handler_class, reset, users

CONTENT = os.urandom(HASH_BLOCK + 1000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hashing(HashMixin, FTPHandler):
    pass


class Memory(VirtualFS):
    """`file` in memory; of unknown size if not `known`; waits at `gate` after each block."""

    gate: Gate | None = None
    known = True
    on_thread = False

    def entries(self, path: str) -> Iterable[Entry]:
        yield Entry("file", len(CONTENT) if self.known else None)

    def open_read(self, path: str) -> Iterator[bytes]:
        for start in range(0, len(CONTENT), 1 << 20):
            if on_one() != self.on_thread:
                raise RuntimeError("read where one cannot wait")
            yield CONTENT[start : start + (1 << 20)]
            if self.gate is not None:
                self.gate.wait()


class OffloadedMemory(OffloadedFS, Memory):
    on_thread = True


class SlowFile(io.FileIO):
    """Blocks its thread for real before the second block; or fails there."""

    def __init__(self, path: str, gate: NativeGate, error: Exception | None) -> None:
        super().__init__(path)
        self.gate = gate
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            self.gate.wait()
            if self.error is not None:
                raise self.error
        return super().read(-1 if size is None else size)


class Slow:
    """A handler whose files are slow; they are in `files`."""

    def __init__(self, home: Path, threads: Threads, base: Any = Hashing, **attributes: Any) -> None:
        self.gate = gate = NativeGate()
        self.files = files = list[SlowFile]()
        self.error: Exception | None = None
        slow = self
        (home / "file").write_bytes(CONTENT)

        class FS(AbstractedFS):
            def open(self, filename: str, mode: str) -> Any:
                files.append(SlowFile(filename, gate, slow.error))
                return files[-1]

        attributes = {"abstracted_fs": FS, "hash_threads": threads, **attributes}
        self.handler = handler_class(users(home, None, "other"), base, **attributes)


#: What ends a session's hash: called with the server and the client.
ENDS: dict[str, Callable[[Any, Client], object]] = {
    "QUIT": lambda server, client: client.command("QUIT", "221"),
    "REIN": lambda server, client: (client.command("REIN", "426"), client.reply().index("230")),
    "reset": lambda server, client: reset(client),
    "disconnect": lambda server, client: server.sessions()[0].disconnect(),
    "stop(0)": lambda server, client: server.stop(0),
    "stop(10)": lambda server, client: server.stop(10),
}
