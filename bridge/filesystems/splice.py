"""How much a data connection moves at a time, and by which system calls.

A leaf of the package: it knows descriptors and plain files, no session and no reply. session/data.py asks it
which way an upload goes and calls it for each event. pyftpdlib moves 64 KiB for an event, as Python objects.

Measured (`python -m tests.bench --rows retr stor --same-core`; the server's CPU time for a MB against
pyftpdlib's 64 KiB, medians of 9 rounds, one client on the same core, tmpfs):

- RETR, sendfile with SENDING: 0.53 (1 MiB: 0.68, 4 MiB: 0.53). A full socket buffer is emptied by the
  network, without us.
- FTPS STOR, record after record as long as they are full: 0.85.
- STOR, splice with RECEIVING through a pipe into the file: 0.73; recv with as much: 0.82. (On a machine with
  slower memory splice had 0.52.) The bytes are copied once, not twice, and never become Python objects.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import sys
import termios
import weakref
from typing import Any

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
from pyftpdlib.exceptions import _FileReadWriteError  # isort: skip

#: Bytes that are received for one event: 0.6 ms, and the largest pipe that Linux lets everybody have
#: (/proc/sys/fs/pipe-max-size).
RECEIVING = 1 << 20

#: Bytes that are sent for one event, if the socket's buffer takes them: 0.2 to 0.7 ms from memory.
SENDING = 2 << 20

#: Seconds in which one event may move several pieces that are small: TLS records, lines of a listing.
BURST = 0.002

#: pyftpdlib's ac_in_buffer_size and ac_out_buffer_size: whoever has set others means them.
UPSTREAMS = 65536

#: What splice says where it cannot be used: file systems without it, old kernels, sandboxes.
_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})

#: A pipe that is not in use just now. It lives as long as there is an upload that has used it.
_spare: list[weakref.ref[_Pipe]] = []


class _Pipe:
    def __init__(self, out: int, into: int) -> None:
        self.out, self.into = out, into
        try:
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, RECEIVING)
        except OSError:
            pass  # too many pages in this user's pipes: it keeps the 64 KiB it has

    def __del__(self) -> None:
        os.close(self.out)
        os.close(self.into)


def unread(sock: int) -> int:
    """How many bytes the kernel has for who reads from *sock*."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


class Unspliceable(Exception):
    """Splice does not work here. `args[0]`: the bytes that were read from the socket, to be written."""


class Splice:
    """From a socket into a file without passing through Python; one for each upload.

    Uploads share a pipe, which is empty between two calls of `receive`. Use from several threads is safe.
    """

    __slots__ = ("_fd", "_pipe")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pipe: _Pipe | None = None  # the one used last, which must stay open

    @classmethod
    def into(cls, file: Any) -> Splice | None:
        """For *file*, if it is a regular one that `open` made, or its `plain` is; else None."""
        file = getattr(file, "plain", file)
        if not hasattr(os, "splice") or type(file) not in (io.BufferedWriter, io.BufferedRandom):
            return None
        try:
            fd = file.fileno()
            if not stat.S_ISREG(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                return None
            file.flush()
            if file.tell() != os.lseek(fd, 0, os.SEEK_CUR):
                return None
        except (OSError, ValueError):
            return None
        return cls(fd)

    def receive(self, sock: int) -> int:
        """Move what *sock* has, up to RECEIVING; how many bytes that were. 0 is the end.

        Raises BlockingIOError if there is nothing, OSError for an error of the socket, for one of the file
        what pyftpdlib raises then; or Unspliceable.
        """
        try:
            pipe = self._pipe = _borrow()
        except OSError as error:  # no descriptors
            raise Unspliceable(b"") from error
        try:
            return self._move(sock, pipe)
        finally:
            _spare[:] = [weakref.ref(pipe)]

    def close(self) -> None:
        """Release the pipe, if nobody else uses it."""
        self._pipe = None

    def _move(self, sock: int, pipe: _Pipe) -> int:
        try:
            moved = os.splice(sock, pipe.into, RECEIVING, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        except OSError as error:
            if error.errno in _CANNOT:
                raise Unspliceable(b"") from error
            raise
        left = moved
        while left:
            try:
                left -= os.splice(pipe.out, self._fd, left, flags=os.SPLICE_F_MOVE)
            except OSError as error:
                rest = os.read(pipe.out, left)
                if error.errno in _CANNOT:
                    raise Unspliceable(rest) from error
                raise _FileReadWriteError(error) from error
        return moved


def _borrow() -> _Pipe:
    """The spare pipe, or a new one. Raises OSError when there are no descriptors."""
    try:
        pipe = _spare.pop()()
    except IndexError:
        pipe = None
    return _Pipe(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)) if pipe is None else pipe
