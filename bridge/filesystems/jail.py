"""ConfinedFS: no path leads out of the home, whatever happens between the look and the deed.

A mix-in for file systems on a disk, over local.py and under AtomicFS and the like, for homes whose users
do not trust each other. Linux only (O_PATH, /proc/self/fd); `available()` tells.

pyftpdlib resolves a path and compares it with the home (validpath), then hands it on as it was: who swaps a
directory for a symbolic link in between is let out, and STOU is not checked at all (2.2.0). Here the deed is
done on what was looked at:

    path ─► open its directory (O_PATH) ─► where is that? ─ outside ─► EACCES
                                               │ inside
                      openat, mkdirat, renameat, unlinkat, ... of the last part, which is not followed

Where the last part is to be followed (stat, chmod, utime, a file that is opened), it is opened too and asked
the same. Symbolic links that stay inside work. A hard link or a mount that somebody made inside is inside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import Any

from bridge.filesystems.local import LINKS, HomeFS, open_regular

_DIRECTORY = getattr(os, "O_PATH", 0) | getattr(os, "O_DIRECTORY", 0) | os.O_CLOEXEC
_ANYTHING = getattr(os, "O_PATH", 0) | os.O_CLOEXEC


def available() -> bool:
    """Whether this system has what it takes."""
    return hasattr(os, "O_PATH") and os.path.exists("/proc/self/fd/0")


class ConfinedFS(HomeFS):
    """A file system whose users stay in their homes. As it is, or under others::

        class FS(AtomicFS, ConfinedFS): ...
        class FS(OffloadedFS, AtomicFS, ConfinedFS): ...

    The home itself may be reached through links. What is outside gets PermissionError (EACCES): 550.
    """

    # --- runs in a worker greenlet, or behind OffloadedFS in a thread

    def __init__(self, root: str, cmd_channel: Any) -> None:
        super().__init__(root, cmd_channel)
        self._inside = os.path.realpath(root)

    def _check(self, fd: int, path: str) -> None:
        """Raise PermissionError if what *fd* is does not lie in the home."""
        found = os.readlink(f"/proc/self/fd/{fd}")
        if found != self._inside and not found.startswith(self._inside.rstrip("/") + "/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    @contextlib.contextmanager
    def _in(self, path: str) -> Iterator[tuple[int, str]]:
        """The directory of *path*, open, and its last part."""
        directory, name = os.path.split(os.path.normpath(path))
        if os.path.normpath(path) == os.path.normpath(self.root):  # its directory is outside
            directory, name = path, "."
        fd = os.open(directory, _DIRECTORY)
        try:
            self._check(fd, path)
            yield fd, name
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _at(self, path: str) -> Iterator[str]:
        """What *path* is, links followed, by a name that stays its own."""
        fd = os.open(path, _ANYTHING)
        try:
            self._check(fd, path)
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    def _open_inside(self, path: str, flags: int) -> int:
        for _ in range(LINKS):
            with self._in(path) as (directory, name):
                try:
                    return open_regular(name, flags | os.O_NOFOLLOW, directory)
                except OSError as error:
                    if error.errno != errno.ELOOP:
                        raise
            path = self.realpath(path)  # as good as any other path: it is looked at again
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    # --- pyftpdlib's interface

    def open(self, filename: str, mode: str) -> Any:
        """As AbstractedFS."""
        return open(filename, mode, opener=self._open_inside)

    def mkstemp(self, suffix: str = "", prefix: str = "", dir: str | None = None, mode: str = "wb") -> Any:
        """As AbstractedFS; the name is random (64 bits)."""
        name = os.path.join(dir or os.curdir, prefix + secrets.token_hex(8) + suffix)
        file = open(name, mode.replace("w", "x"), opener=self._open_inside)  # noqa: SIM115 (the caller's)
        os.fchmod(file.fileno(), 0o600)  # as tempfile.mkstemp
        return file

    def chdir(self, path: str) -> None:
        """As AbstractedFS, but the process stays where it is."""
        with self._at(path) as found:
            if not stat.S_ISDIR(os.stat(found).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if not os.access(found, os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self.cwd = self.fs2ftp(path)

    def listdir(self, path: str) -> list[str]:
        """As AbstractedFS."""
        with self._at(path) as found:
            return os.listdir(found)

    def listdirinfo(self, path: str) -> list[str]:
        """As AbstractedFS."""
        return self.listdir(path)

    def mkdir(self, path: str) -> None:
        """As AbstractedFS."""
        with self._in(path) as (directory, name):
            os.mkdir(name, dir_fd=directory)

    def rmdir(self, path: str) -> None:
        """As AbstractedFS."""
        with self._in(path) as (directory, name):
            os.rmdir(name, dir_fd=directory)

    def remove(self, path: str) -> None:
        """As AbstractedFS."""
        with self._in(path) as (directory, name):
            os.remove(name, dir_fd=directory)

    def rename(self, src: str, dst: str) -> None:
        """As AbstractedFS."""
        with self._in(src) as (here, name), self._in(dst) as (there, other):
            os.rename(name, other, src_dir_fd=here, dst_dir_fd=there)

    def chmod(self, path: str, mode: int) -> None:
        """As AbstractedFS."""
        with self._at(path) as found:
            os.chmod(found, mode)

    def utime(self, path: str, timeval: float) -> None:
        """As AbstractedFS."""
        with self._at(path) as found:
            os.utime(found, (timeval, timeval))

    def stat(self, path: str) -> os.stat_result:
        """As AbstractedFS."""
        with self._at(path) as found:
            return os.stat(found)

    def lstat(self, path: str) -> os.stat_result:
        """As AbstractedFS."""
        with self._in(path) as (directory, name):
            return os.lstat(name, dir_fd=directory)

    def readlink(self, path: str) -> str:
        """As AbstractedFS."""
        with self._in(path) as (directory, name):
            return os.readlink(name, dir_fd=directory)

    def getsize(self, path: str) -> int:
        """As AbstractedFS."""
        return self.stat(path).st_size

    def getmtime(self, path: str) -> float:
        """As AbstractedFS."""
        return self.stat(path).st_mtime
