"""Blocking file systems on native threads: `OffloadedFS`.

Sits on threads.py. A turn may wait, but code that blocks for real (a slow disk, NFS) would stop the
hub and so everybody. Here such calls run on threads while the turn waits.

- **One session's calls keep their order**: a session has one turn at a time, and a turn waits for its call.
- **What nobody waits for any more** (the session was killed, the time limit passed) is thrown away when it
  comes, and a file that it opened is closed, by the thread. A file is never closed under a running read or
  write: close() then leaves that to the thread, and returns.

Costs (measured, Python 3.11): a call through the pool takes some 60 us of CPU, so files are read ahead and
sent in large blocks, uploads are spliced (bridge.filesystems.splice), and listings are made in batches.

(Over 400 lines: what is offloaded of a file system, of its listings and of its files is one decision.)
"""

from __future__ import annotations

import errno
import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from gevent import monkey
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS

from bridge.filesystems.local import check_directory
from bridge.filesystems.splice import RECEIVING, SENDING, Splice, Unspliceable, unread
from bridge.filesystems.threads import THREADS, Threads, on_one

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
from pyftpdlib.exceptions import _FileReadWriteError  # isort: skip

_allocate_lock = monkey.get_original("_thread", "allocate_lock")

#: Bytes that one trip through the pool reads ahead or sends: enough for the trip to cost little beside them,
#: and what each transfer keeps in memory.
READ_AHEAD = 1 << 20

#: Bytes after which an upload's trip is over, though the socket may have more.
TRIP = 4 * RECEIVING

#: A listing goes on in batches of so many entries, or what is there after so many seconds.
BATCH = 200
BATCH_SECONDS = 0.02

#: Names sorted at a time, which takes some 0.3 ms with Python's lock held.
RUN = 1000


class OffloadedFS(AbstractedFS):
    """A file system whose blocking methods run on threads, and the files it opens too.

    As it is for AbstractedFS; put it first among the bases for any other::

        class MyOffloadedFS(OffloadedFS, MyFS): ...
        class MyOffloadedFS(OffloadedFS, HomeFS): ...  # for NFS: bridge.filesystems.local tells why

    Class attributes:

    - (Threads) threads: where the calls run (64 at once, 30 s in line, then 451).
    - (float) fs_timeout: seconds for one call, then 451 and a log line (`bridge.filesystems.threads`,
      WARNING) that names it; None for no limit. Default 60: longer than an NFS server takes to restart its
      lock manager.

    Path arithmetic (ftpnorm, ftp2fs) stays inline unless it is overridden.
    """

    threads = THREADS
    fs_timeout: float | None = 60.0

    def __init__(self, root: str, cmd_channel: Any) -> None:
        super().__init__(root, cmd_channel)
        impersonate = getattr(cmd_channel, "authorizer", DummyAuthorizer()).impersonate_user
        if getattr(impersonate, "__func__", None) is not DummyAuthorizer.impersonate_user:
            raise RuntimeError(
                f"{type(self).__name__} cannot be used with an authorizer that impersonates its users "
                f"({impersonate!r}): that is for the whole process, so while one session waits for its file "
                f"system, all others would act as its user; use MultiprocessFTPServer"
            )

    # --- runs in a worker greenlet: may wait; on a thread: calls through

    def _call(self, function: Any, *args: Any, name: str, discard: Any = None) -> Any:
        try:
            return self.threads.call(function, *args, timeout=self.fs_timeout, name=name, discard=discard)
        except OSError as error:
            # pyftpdlib says 550 to whatever fails; this is for the moment (SessionMixin, if it is one).
            recode = getattr(self.cmd_channel, "recode_next_reply", None)
            if error.errno in (errno.EAGAIN, errno.ETIMEDOUT) and recode is not None and not on_one():
                recode("451")
            raise

    def open(self, filename: str, mode: str) -> Any:
        """As AbstractedFS; the file is an OffloadedFile."""
        return self._open(super().open, filename, mode)

    def mkstemp(self, *args: Any, **kwargs: Any) -> Any:
        """As AbstractedFS; the file is an OffloadedFile."""
        return self._open(_with(super().mkstemp, kwargs), *args)

    def _open(self, function: Any, *args: Any) -> Any:
        name = f"{type(self).__name__}.open{args!r}"
        file = self._call(function, *args, name=name, discard=_discard)
        if file is None or isinstance(file, OffloadedFile) or on_one():
            return file
        kind = OffloadedUpload if hasattr(file, "abort") else OffloadedFile
        return kind(file, self.threads, self.fs_timeout)

    def chdir(self, path: str) -> None:
        """As AbstractedFS, but without changing the directory of the process, which all threads share."""
        name = f"{type(self).__name__}.chdir({path!r})"
        if _overrides(self, "chdir"):
            self._call(_and_back, super().chdir, path, name=name)
        else:
            self._call(check_directory, path, name=name)
            self.cwd = self.fs2ftp(path)

    def listdir(self, path: str) -> list[str]:
        """As AbstractedFS; a long list is sorted piecemeal while it is sent."""
        name = f"{type(self).__name__}.listdir({path!r})"
        return _Names.of(self._call(super().listdir, path, name=name))

    def format_list(self, basedir: str, listing: Any, ignore_err: bool = True) -> Iterator[bytes]:
        """As AbstractedFS, in batches."""
        return self._batches(super().format_list(basedir, listing, ignore_err), f"listing {basedir}")

    def format_mlsx(
        self, basedir: str, listing: Any, perms: str, facts: Any, ignore_err: bool = True
    ) -> Iterator[bytes]:
        """As AbstractedFS, in batches."""
        lines = super().format_mlsx(basedir, listing, perms, facts, ignore_err)
        return self._batches(lines, f"listing {basedir}")

    def format_nlst(self, listing: Any) -> Iterator[bytes]:
        """The lines of NLST, in batches."""
        channel = self.cmd_channel
        encoding, errors = channel.encoding, channel.unicode_errors
        return self._batches((f"{name}\r\n".encode(encoding, errors) for name in listing), "listing names")

    def _batches(self, lines: Any, name: str) -> Iterator[bytes]:
        if on_one():
            yield from lines
            return
        batch: deque[bytes] = deque()
        lines = iter(lines)
        while self._call(_fill, batch, lines, name=name) or batch:
            while batch:
                yield batch.popleft()


def _offloaded(name: str) -> Any:
    def method(self: OffloadedFS, *args: Any, **kwargs: Any) -> Any:
        return self._call(
            _with(getattr(super(OffloadedFS, self), name), kwargs),
            *args,
            name=f"{type(self).__name__}.{name}{args!r}",
        )

    method.__name__ = name
    method.__qualname__ = f"OffloadedFS.{name}"
    method.__doc__ = "As AbstractedFS, on a thread."
    return method


def _offloaded_if_overridden(name: str) -> Any:
    offloaded = _offloaded(name)

    def method(self: OffloadedFS, *args: Any) -> Any:
        if _overrides(self, name):
            return offloaded(self, *args)
        return getattr(super(OffloadedFS, self), name)(*args)

    method.__name__ = name
    method.__qualname__ = f"OffloadedFS.{name}"
    method.__doc__ = "As AbstractedFS; on a thread if it is overridden."
    return method


for _name in (
    *("mkdir", "rmdir", "remove", "rename", "chmod", "utime", "stat", "lstat", "readlink", "listdirinfo"),
    *("isfile", "islink", "isdir", "getsize", "getmtime", "realpath", "lexists", "validpath", "fs2ftp"),
    *("get_user_by_uid", "get_group_by_gid"),
):
    setattr(OffloadedFS, _name, _offloaded(_name))
for _name in ("ftpnorm", "ftp2fs"):
    setattr(OffloadedFS, _name, _offloaded_if_overridden(_name))


class OffloadedFile:
    """A file whose operations run on *threads*; each takes at most *timeout* seconds.

    Reads ahead by READ_AHEAD bytes. What the file has besides (`name`, `mode`, `fileno`) is passed through.
    """

    #: Bytes that a caller had better write at a time (bridge.session.data).
    block_size = READ_AHEAD

    def __init__(self, file: Any, threads: Threads, timeout: float | None) -> None:
        self._file = file
        self._threads = threads
        self._timeout = timeout
        self._ahead = memoryview(b"")
        self._lock = _allocate_lock()
        self._busy = False
        self._socket = -1
        self._splice: Splice | None = None
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    # --- runs in a worker greenlet: may wait

    def read(self, size: int = -1) -> bytes:
        """Up to *size* bytes, b"" at the end."""
        if not self._ahead and size != 0:
            self._ahead = memoryview(self._run(self._file.read, size if size < 0 else max(size, READ_AHEAD)))
        size = len(self._ahead) if size < 0 else size
        data = bytes(self._ahead[:size])
        self._ahead = self._ahead[size:]
        return data

    def write(self, data: Any) -> Any:
        """As the file's."""
        return self._run(self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> Any:
        """As the file's."""
        if whence == 1:
            offset -= len(self._ahead)
        self._ahead = memoryview(b"")
        return self._run(self._file.seek, offset, whence)

    def tell(self) -> int:
        """As the file's."""
        return int(self._run(self._file.tell)) - len(self._ahead)

    def flush(self) -> None:
        """As the file's."""
        self._run(self._file.flush)

    def sendfile(self, sock: int, offset: int) -> int:
        """Send up to SENDING bytes from *offset* to socket *sock*, with sendfile(2): 0 at the end.

        Raises BlockingIOError if the socket takes nothing now, and what sendfile raises.
        """
        return int(self._run(_sendfile, self._our(sock), self._file.fileno(), offset))

    def receive(self, sock: int) -> int:
        """As `bridge.filesystems.splice.Splice.receive`, from socket *sock*."""
        try:
            received: int | OSError = self._run(self._receive, self._our(sock))
        except OSError as error:  # no thread, or no end
            raise _FileReadWriteError(error) from error
        if isinstance(received, OSError):
            raise received
        return received

    def _our(self, sock: int) -> int:
        """Of our own: the connection may be closed, and its number another's, while a thread uses it."""
        if self._socket < 0:
            self._socket = os.dup(sock)
        return self._socket

    def close(self) -> None:
        """Close the file; if a thread is busy with it, that thread will. Twice is no harm."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            if self._busy:
                return
        self._threads.call(self._close, timeout=self._timeout, name=f"closing {self._name()}")

    def _end(self) -> None:
        """How the file itself is closed."""
        self._file.close()

    def _run(self, method: Any, *args: Any) -> Any:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        name = f"{getattr(method, '__name__', 'using')} {self._name()}"
        return self._threads.call(self._do, method, args, timeout=self._timeout, name=name)

    def _name(self) -> str:
        return str(getattr(self._file, "name", "a file"))

    # --- runs in a threadpool thread: no gevent

    def _do(self, method: Any, args: tuple[Any, ...]) -> Any:
        with self._lock:
            if self.closed:
                raise ValueError("I/O operation on closed file")
            self._busy = True
        try:
            return method(*args)
        finally:
            with self._lock:
                self._busy = False
                close = self.closed
            if close:
                self._close()

    def _receive(self, sock: int) -> int | OSError:
        """How many bytes were moved, or the error of the socket."""
        if self._splice is None:
            self._splice = Splice.into(self._file)
            if self._splice is None:
                raise Unspliceable(b"")
        total = 0
        try:
            while True:
                received = self._splice.receive(sock)
                total += received
                if not received or total >= TRIP or unread(sock) < RECEIVING // 4:
                    return total
        except OSError as error:
            return total or error

    def _close(self) -> None:
        sock, self._socket = self._socket, -1
        self._splice = None
        try:
            self._end()
        finally:
            if sock >= 0:
                os.close(sock)


class OffloadedUpload(OffloadedFile):
    """An OffloadedFile that can be aborted in place of closed (bridge.session.upload), by the same rules."""

    _aborted = False

    def abort(self) -> None:
        """Abort the file; if a thread is busy with it, that thread will. Twice is no harm."""
        if not self.closed:
            self._aborted = True
            self.close()

    def _end(self) -> None:
        if self._aborted:
            self._file.abort()
        else:
            super()._end()


def _discard(file: Any) -> None:
    """Nobody waits for it any more."""
    getattr(file, "abort", file.close)()


# --- runs in a threadpool thread: no gevent


def _sendfile(sock: int, file: int, offset: int) -> int:
    """Until SENDING bytes are sent, the file ends or the socket is full."""
    total = 0
    while total < SENDING:
        try:
            sent = os.sendfile(sock, file, offset + total, SENDING - total)
        except BlockingIOError:
            if total:
                break
            raise
        if not sent:
            break
        total += sent
    return total


def _fill(batch: deque[bytes], lines: Iterator[bytes]) -> bool:
    """Put the next lines into *batch*; False if there are none."""
    end = time.monotonic() + BATCH_SECONDS
    for line in lines:
        batch.append(line)
        if len(batch) >= BATCH or time.monotonic() > end:
            return True
    return False


_directory_of_the_process = _allocate_lock()


def _and_back(chdir: Callable[[str], None], path: str) -> None:
    """A chdir() that may change the directory of the process, one at a time."""
    with _directory_of_the_process:
        before = os.getcwd()
        try:
            chdir(path)
        finally:
            os.chdir(before)


class _Names(list[str]):
    """A directory's names; when there are many, `sort()` happens while they are gone through.

    Sorting 100 000 names holds Python's lock for 60 ms, during which the hub cannot run.
    """

    @classmethod
    def of(cls, names: list[str]) -> list[str]:
        return cls(names) if len(names) > RUN else names

    _sort = False

    def sort(self, **kwargs: Any) -> None:
        if kwargs:
            super().sort(**kwargs)
        else:
            self._sort = True

    def __iter__(self) -> Iterator[str]:
        if not self._sort:
            return super().__iter__()
        return heapq.merge(*(sorted(self[start : start + RUN]) for start in range(0, len(self), RUN)))


def _with(method: Any, kwargs: dict[str, Any]) -> Any:
    return (lambda *args: method(*args, **kwargs)) if kwargs else method


def _overrides(fs: OffloadedFS, name: str) -> bool:
    method = getattr(super(OffloadedFS, fs), name)
    return method.__func__ is not getattr(AbstractedFS, name)
