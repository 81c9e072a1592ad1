"""HomeFS: a file system on a disk for which what cannot be looked at is an error, and no answer.

A leaf of the package, under ConfinedFS; what the command and our handlers use if nothing else is said.

Python's os.path takes any error for a "no", and pyftpdlib builds on that. So when a disk fails for a moment
(EIO), NFS has lost a handle (ESTALE) or root, whom NFS squashes, checks the path of a user (EACCES):

- realpath() takes what it cannot look at for no symbolic link, validpath() for a path inside the home, and
  RETR, STOR and DELE follow the link out of it.
- isdir() is False for a directory, so that LIST has the directory's own name, and nothing of what is in it.
- A listing leaves out what lstat() fails for, and a client that mirrors it deletes that.

Here the client is told, 550, or 451 if the listing is on its way. What is left out of a listing are names
that have gone meanwhile, links that lead nowhere, and what its user may not look at.

And CWD leaves the process where it is: pyftpdlib goes to the directory and back, and takes along all sessions
that run while a file system of one's own waits in between.

Only regular files are opened. To open a FIFO waits for its other end, and blocks the hub until then.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
from pyftpdlib.exceptions import _FileReadWriteError  # isort: skip

#: Errors that are an answer: it is not there, or not for this user.
ANSWERS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM},
)

#: Links in a path that are followed, as Linux does (MAXSYMLINKS).
LINKS = 40

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})


class HomeFS(AbstractedFS):
    """As AbstractedFS, on a disk. Its methods may raise OSError where AbstractedFS's say False.

    Our handlers make a 550 of that. pyftpdlib's would end the session, with a traceback.
    """

    # --- runs in a worker greenlet, or behind OffloadedFS in a thread. pyftpdlib's interface

    def realpath(self, path: str) -> str:
        """As AbstractedFS; raises OSError if a part that is there cannot be looked at."""
        left = os.path.join(os.getcwd(), path).split("/")[::-1]
        found, missing, links = "/", False, 0
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                found, missing = os.path.dirname(found), False
                continue
            found = os.path.join(found, name)
            if missing:
                continue
            try:
                mode = os.lstat(found).st_mode
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
                missing = True  # and so is what follows, up to the next ".."
                continue
            if not stat.S_ISLNK(mode):
                continue
            links += 1
            if links > LINKS:  # leads nowhere
                return os.path.realpath(path)
            target = os.readlink(found)
            found = "/" if target.startswith("/") else os.path.dirname(found)
            left += target.split("/")[::-1]
        return found

    def chdir(self, path: str) -> None:
        """As AbstractedFS, but the process stays where it is."""
        check_directory(path)
        self.cwd = self.fs2ftp(path)

    def open(self, filename: str, mode: str) -> Any:
        """As AbstractedFS; raises FilesystemError if it is no regular file, and never waits for one."""
        return open(filename, mode, opener=open_regular)

    def isfile(self, path: str) -> bool:
        """As AbstractedFS."""
        return self._is(path, stat.S_ISREG)

    def isdir(self, path: str) -> bool:
        """As AbstractedFS."""
        return self._is(path, stat.S_ISDIR)

    def islink(self, path: str) -> bool:
        """As AbstractedFS."""
        found = _found(self.lstat, path)
        return found is not None and stat.S_ISLNK(found.st_mode)

    def lexists(self, path: str) -> bool:
        """As AbstractedFS."""
        return _found(self.lstat, path) is not None

    def _is(self, path: str, kind: Any) -> bool:
        found = _found(self.stat, path)
        return found is not None and bool(kind(found.st_mode))

    def format_list(self, basedir: str, listing: Any, ignore_err: bool = True) -> Iterator[bytes]:
        """As AbstractedFS; *ignore_err* is for errors that are an answer."""
        lines = super().format_list(basedir, listing, ignore_err and _Ignoring())
        return _told(lines) if ignore_err else lines

    def format_mlsx(
        self, basedir: str, listing: Any, perms: str, facts: Any, ignore_err: bool = True
    ) -> Iterator[bytes]:
        """As AbstractedFS; *ignore_err* is for errors that are an answer."""
        lines = super().format_mlsx(basedir, listing, perms, facts, ignore_err and _Ignoring())
        if "unix.mode" in facts:
            lines = map(_plain_mode, lines)
        return _told(lines) if ignore_err else lines


def check_directory(path: str) -> None:
    """Raise what os.chdir(path) would: the same permission is needed to look at what is in it."""
    os.stat(os.path.join(path, os.curdir))


def open_regular(path: str, flags: int, dir_fd: int | None = None) -> int:
    """Open a regular file, as os.open(); never waits. For `open(opener=...)`.

    Raises FilesystemError for a FIFO, a socket or a device, IsADirectoryError for a directory.
    """
    try:
        # O_NONBLOCK: do not wait for the other end of a FIFO. O_NOCTTY: do not take a terminal.
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO without a reader that is opened for writing
            raise FilesystemError("Not a regular file") from None
        raise
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise FilesystemError("Not a regular file")
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _plain_mode(line: bytes) -> bytes:
    """A line of MLSD with `unix.mode=0644`; pyftpdlib writes `0o644`, which lftp takes for 0."""
    return line.replace(b"unix.mode=0o", b"unix.mode=0", 1)  # facts come before the name


def _found(look: Any, path: str) -> os.stat_result | None:
    """What *look* says of *path*, None if nothing is there."""
    try:
        found: os.stat_result = look(path)
    except ValueError:  # a NUL
        return None
    except OSError as error:
        if error.errno not in ANSWERS:
            raise
        return None
    return found


class _Ignoring:
    """A flag that pyftpdlib looks at in an `except` clause: whether the error there can be ignored."""

    def __bool__(self) -> bool:
        error = sys.exc_info()[1]
        return not isinstance(error, OSError) or error.errno in ANSWERS


def _told(lines: Iterator[bytes]) -> Iterator[bytes]:
    """*lines*, whose errors pyftpdlib tells the client."""
    try:
        yield from lines
    except OSError as error:
        raise _FileReadWriteError(error) from error
