"""What a transfer of VirtualFS reads from or writes to, and what happens while it waits.

A leaf of the package. `Download` and `Upload` are what pyftpdlib has for open files: they take any object
that gives or takes bytes, ask it for one block at a time, and close it when the transfer ends. `Listing` is
what it has for the names in a directory.

While a turn waits nobody else looks at its connections, so they are looked at from here every LOOK seconds:
the end of the control connection, a reset of the data connection and ABOR interrupt what waits cooperatively
inside of `waiting_for`. What waits in a thread of OffloadedFS cannot be interrupted, and ABOR over TLS not
be seen: there it happens when the wait ends.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from gevent import get_hub, monkey
from pyftpdlib.exceptions import FilesystemError

from bridge.filesystems.text import one_line
from bridge.loop import current_session

# --- a private name this module stands on: of bridge.filesystems.offload.OffloadedFile, _file.

log = logging.getLogger(__name__)

_Socket: Any = monkey.get_original("socket", "socket")

#: Seconds between looks at the connections of a turn that waits: soon for a person, and few system calls.
LOOK = 0.25

#: Bytes of pipelined commands to look for ABOR in.
PEEK = 4096

#: Clients put Telnet's Interrupt Process and Synch before it, as RFC 959 4.1.3 wants.
_ABOR = re.compile(rb"(?:^|[^ -~])ABOR\r\n", re.IGNORECASE)


@contextlib.contextmanager
def waiting_for(control: Any, what: str, *passed: type[Exception]) -> Iterator[None]:
    """In here storage may be waited for, and may raise anything; the client of *control* is looked at.

    Raises *passed* and OSError with an errno. Other errors are logged, with *what* was tried.
    """
    watch = _watch(control)
    try:
        yield
    except passed:
        raise
    except FilesystemError as error:
        raise OSError(errno.EIO, one_line(error)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        log.error("%s: %s: %s", what, type(error).__name__, error, exc_info=error)
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
    finally:
        if watch is not None:
            watch.stop()
            watch.close()


class Stream:
    """A transfer's end that cannot seek: what pyftpdlib has for a file. Subclasses say who closes what."""

    def __init__(self, fs: Any, name: str, inner: Any) -> None:
        self.name = name
        self.closed = False
        self._fs = fs
        self._inner = inner

    def seek(self, *_: Any) -> int:
        """Refused with a FilesystemError: 554."""
        raise FilesystemError("Transfers cannot be restarted here, send or fetch the whole file")

    def close(self) -> None:
        """Twice is no harm."""
        self.closed = True


class Download(Stream):
    """Reads *inner*, a file or an iterable, and closes it."""

    def __init__(self, fs: Any, name: str, inner: Any) -> None:
        super().__init__(fs, name, inner)
        # read() of a connection waits until all it was asked for is there, read1() does not.
        self._read = getattr(inner, "read1", None) or getattr(inner, "read", None)
        self._chunks = iter(()) if self._read else iter(inner)
        self._chunk: Any = b""
        self._position = 0

    def read(self, size: int) -> bytes:
        """1 to *size* bytes, b"" at the end. May wait; raises OSError."""
        if self._read is not None:
            with waiting_for(self._fs.cmd_channel, f"reading {self.name}"):
                return bytes(self._read(size))
        while self._position >= len(self._chunk):
            self._chunk, self._position = b"", 0  # before the next: one chunk at a time in memory
            with waiting_for(self._fs.cmd_channel, f"reading {self.name}"):
                chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._chunk = chunk
        data = bytes(memoryview(self._chunk)[self._position : self._position + size])
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the source; if that fails, it is logged."""
        if not self.closed:
            self.closed = True
            self._chunk = b""
            close_quietly(self._chunks, self.name)
            close_quietly(self._inner, self.name)


class Upload(Stream):
    """Writes to *inner*, and closes or aborts it. `aborted`: it did not complete.

    `abort()` is there if *inner* has it: bridge's data connections call it if the upload did not complete.
    pyftpdlib's own call close() in any case, which finds out.
    """

    aborted = False

    def __init__(self, fs: Any, name: str, inner: Any) -> None:
        super().__init__(fs, name, inner)
        if hasattr(inner, "abort"):
            self.abort = self._give_up

    def write(self, data: bytes) -> int:
        """All of *data*. May wait; raises OSError."""
        with waiting_for(self._fs.cmd_channel, f"writing {self.name}"):
            self._inner.write(data)
        return len(data)

    def close(self) -> None:
        """Close the sink, or abort it if the upload did not complete. May wait; OSError if it fails."""
        if self.closed or not self._completed():
            self._give_up()
            return
        self.closed = True
        try:
            with waiting_for(None, f"closing {self.name}"):  # it has all: not to be interrupted
                self._inner.close()
        except BaseException:
            self.aborted = True
            if hasattr(self._inner, "abort"):
                close_quietly(self._inner, self.name, "abort")
            raise

    def _give_up(self) -> None:
        """Twice is no harm; what fails is logged."""
        if not self.closed:
            self.closed = self.aborted = True
            close_quietly(self._inner, self.name, "abort" if hasattr(self._inner, "abort") else "close")

    def _completed(self) -> bool:
        """Whether this is closed because the client has sent all: in the last turn of its data connection."""
        channel = getattr(self._fs.cmd_channel, "data_channel", None)
        file = getattr(channel, "file_obj", None)
        if channel is None or self not in (
            file,
            getattr(file, "_file", None),
        ):  # the latter behind OffloadedFS
            return False
        # pyftpdlib takes an error of the connection for its end, and closes the file while it handles that.
        return bool(channel.transfer_finished) and not isinstance(sys.exc_info()[1], OSError)


class Entry(NamedTuple):
    """A file or directory: name (without path), size in bytes, mtime in seconds since the epoch, type.

    Unknown is None: SIZE and MDTM then get 550, MLSD leaves the fact out, LIST shows 0 and 1970.
    """

    name: str
    size: int | None = None
    mtime: float | None = None
    type: str = "file"  # or "dir"

    def stat(self) -> os.stat_result:
        """As for a file on a disk; what is unknown is 0."""
        mode = stat.S_IFDIR | 0o755 if self.type == "dir" else stat.S_IFREG | 0o644
        times = (self.mtime or 0,) * 3
        return os.stat_result((mode, 0, 0, 1, 0, 0, self.size or 0, *times))


class Listing(list[str]):
    """What pyftpdlib takes for a list of names, and only sorts and goes through, is a stream of entries.

    The first is there already: what fails is told before the 150. It has no length.
    """

    def __init__(self, entries: Iterator[Entry]) -> None:
        super().__init__()
        #: To be gone through once.
        self.entries = itertools.chain(list(itertools.islice(entries, 1)), entries)

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.entries)

    def sort(self, **_: Any) -> None:
        """The order is that of the entries."""


class Shown:
    """For AbstractedFS.format_list: names, and as the `self` that it asks about the last one."""

    def __init__(self, control: Any, entries: Iterator[Entry]) -> None:
        self.cmd_channel = control
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        for entry in self._entries:
            self._entry = entry
            yield entry.name

    def lstat(self, _: str) -> os.stat_result:
        """Of the name that came last."""
        return self._entry.stat()

    def get_user_by_uid(self, _: int) -> str:
        """The owner and group of everything."""
        return "ftp"

    get_group_by_gid = get_user_by_uid


def close_quietly(inner: Any, name: str, method: str = "close") -> None:
    """Close what can be closed; the client need not know if that fails."""
    try:
        getattr(inner, method, lambda: None)()
    except Exception:
        log.warning("%s: %s() failed", name, method, exc_info=True)


def _watch(control: Any) -> Any:
    """A timer that looks at the connections of *control* while its turn waits; None outside of its turn."""
    if control is None or current_session() is not control or not hasattr(control, "abort_transfer"):
        return None
    timer = get_hub().loop.timer(LOOK, LOOK)
    timer.start(_on_look, control)
    return timer


# --- runs in the hub: must not block


def _on_look(control: Any) -> None:
    data = getattr(control, "data_channel", None)  # gone with the session
    try:
        if data is not None:
            _peek(data.socket.fileno())
    except OSError as error:
        control.abort_transfer(f"{error.strerror}; transfer aborted.")
    try:
        pending = _peek(control.socket.fileno())
    except OSError:
        pending = b""
    if pending == b"":
        control.disconnect("The client has left.")
    elif pending is not None and _ABOR.search(pending):
        control.abort_transfer("Transfer aborted via ABOR.")


def _peek(fd: int) -> bytes | None:
    """What has come and was not read, b"" for the end of the connection, None for neither."""
    if fd < 0:
        return None
    sock = _Socket(fileno=fd)
    try:
        return bytes(sock.recv(PEEK, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return None
    finally:
        sock.detach()
