"""AtomicFS: a file is there when all of it is there, or not at all.

A leaf of the package: a mix-in for file systems on a disk. Data goes to a hidden file in the same directory,
which takes the final name when the upload has completed and is removed when it has not. Who decides that is
the data connection (session/upload.py), by calling `close()` or `abort()`; this module does not judge.

Several servers may share a directory: each holds a lock (flock) on the hidden files that it writes, so what
nobody holds was left by a crash, and `remove_leftovers` removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from typing import Any

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS

from bridge.filesystems.replace import fsync_directory

log = logging.getLogger(__name__)

#: What ends the names of hidden files. "~" makes other programs that watch the directory skip them too.
SUFFIX = ".upload~"

#: A hidden file's name: `.NAME.<16 hex digits>.upload~`.
HIDDEN = re.compile(r"\..*\.[0-9a-f]{16}" + re.escape(SUFFIX), re.DOTALL)

#: Bytes of NAME that are kept in it: with what is added it stays under the 255 that file systems take.
KEPT = 200

#: What a file system without locks says to flock (NFS without a lock manager, some of FUSE).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def is_hidden(name: str) -> bool:
    """Whether *name* (without path) is that of an upload under way, or of a leftover."""
    return name.endswith(SUFFIX) and HIDDEN.fullmatch(name) is not None


class AtomicFS(AbstractedFS):
    """A file system on a disk on which nobody sees half an upload. As it is, or with others::

        class FS(AtomicFS, MyFS): ...
        class FS(OffloadedFS, AtomicFS): ...  # renames and fsync on threads

    What an `open` of MyFS gets is the hidden name; if it judges names, put MyFS in front of AtomicFS.

    - STOR, STOU: the file appears, whole, before the 226. Overwriting leaves the old file until then; the new
      one gets its permissions and, if we may, its owner and group. Extended attributes, ACLs and other hard
      links of the old file are lost; a symbolic link stays, and what it points to is replaced.
    - APPE: to a new file, as STOR. To a file that exists: 550, as is STOR after REST. Either would copy the
      whole file for each piece that is added, and of two clients that append at once one would lose.
    - An upload that fails leaves nothing, whatever `keep_incomplete_uploads` says.
    - Hidden files are not listed, and clients cannot name them (550). A directory with one is not empty.

    Class attribute `fsync_uploads`: True for a file that survives a power cut once the 226 is sent: fsync of
    it and of its directory. It blocks for as long as the disk needs: put OffloadedFS in front. Default False.

    With pyftpdlib's own handlers, a connection that was reset counts as the end of the file.
    """

    fsync_uploads = False

    # --- runs in a worker greenlet, or behind OffloadedFS in a thread. pyftpdlib's interface

    def open(self, filename: str, mode: str) -> Any:
        """As AbstractedFS; to write gives an AtomicFile, to write into a file that exists is refused."""
        if mode == "rb" or not any(each in mode for each in "wa+"):
            return super().open(filename, mode)
        target = self.realpath(filename)
        old = _writable(target)
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise FilesystemError("Not a regular file")
        if "+" in mode or ("a" in mode and old is not None):
            raise FilesystemError("Uploads are atomic here: send the whole file, with STOR")
        return AtomicFile(self, filename, target, super().open, old)

    def mkstemp(self, suffix: str = "", prefix: str = "", dir: str | None = None, mode: str = "wb") -> Any:
        """As AbstractedFS; the name is random (64 bits), and becomes visible with the content."""
        directory = os.path.realpath(dir or os.curdir)
        name = os.path.join(directory, prefix + secrets.token_hex(8) + suffix)
        file = AtomicFile(self, name, name, super().open, None)
        os.fchmod(file.fileno(), 0o600)  # as tempfile.mkstemp
        return file

    def listdir(self, path: str) -> list[str]:
        """As AbstractedFS, without hidden files."""
        return [name for name in super().listdir(path) if not is_hidden(name)]

    def listdirinfo(self, path: str) -> list[str]:
        """As AbstractedFS, without hidden files."""
        return [name for name in super().listdirinfo(path) if not is_hidden(name)]

    def validpath(self, path: str) -> bool:
        """As AbstractedFS; the name of a hidden file is not."""
        return not is_hidden(os.path.basename(path)) and bool(super().validpath(path))

    def upload_is_over(self, file: AtomicFile) -> bool:
        """Whether *file* is closed because its transfer failed, by a handler that knows no `abort()`."""
        control = self.cmd_channel
        if control is None or control._closed:
            return True
        channel: Any = getattr(control, "data_channel", None)
        served = getattr(channel, "file_obj", None)
        return served is not None and served.name == file.name and not channel.transfer_finished


class AtomicFile:
    """A file that is written under a hidden name. `name` is the final one.

    `close()` makes it visible, `abort()` removes it; after either `closed` is True, and both do nothing. If
    close() raises (OSError: the disk, the rename), nothing is left either, and the old file stays; except
    that with `fsync_uploads` the fsync of the directory comes last, when the file is visible already.
    """

    def __init__(self, fs: AtomicFS, name: str, target: str, open: Any, old: os.stat_result | None) -> None:
        self.name = name
        self.closed = False
        self._fs = fs
        self._target = target
        while True:
            self._hidden = _hidden_name(target)
            self._file = open(self._hidden, "wb")
            try:
                if _lock(self._file.fileno()) and os.fstat(self._file.fileno()).st_nlink:
                    if old is not None:
                        _inherit(self._file.fileno(), old)
                    return
            except BaseException:
                self._remove()
                raise
            self._file.close()  # somebody's remove_leftovers() was faster than our lock

    @property
    def plain(self) -> Any:
        """The file that is written, for who need not go through `write` (bridge.filesystems.splice)."""
        return self._file

    def write(self, data: Any) -> int:
        """As a file's."""
        return int(self._file.write(data))

    def flush(self) -> None:
        """As a file's; nobody sees more for it."""
        self._file.flush()

    def fileno(self) -> int:
        """Of the hidden file."""
        return int(self._file.fileno())

    def close(self) -> None:
        """Make the file visible."""
        if self.closed:
            return
        if self._fs.upload_is_over(self):
            self.abort()
            return
        self.closed = True
        fd = self._file.fileno()
        try:
            self._file.flush()
            if self._fs.fsync_uploads:
                os.fsync(fd)
            # NFS tells what could not be written only when a descriptor is closed; ours holds the lock.
            os.close(os.dup(fd))
            os.replace(self._hidden, self._target)
        except BaseException:
            self._remove()
            raise
        try:
            if self._fs.fsync_uploads:
                fsync_directory(os.path.dirname(self._target))
        finally:
            self._file.close()

    def abort(self) -> None:
        """Remove what was written."""
        if not self.closed:
            self.closed = True
            self._remove()

    def _remove(self) -> None:
        try:
            with contextlib.suppress(FileNotFoundError):  # its directory is gone, say
                os.unlink(self._hidden)
        finally:
            with contextlib.suppress(OSError):  # a full disk, when what is buffered is written
                self._file.close()


def remove_leftovers(directory: str) -> list[str]:
    """Remove what crashed servers have left in *directory* and below; the paths removed.

    For the start of a server; goes through the whole tree once, and blocks meanwhile. Hidden files that any
    process still writes stay, and so do those on a file system without locks. Logs each to
    `bridge.filesystems.atomic` (INFO), and what cannot be looked at or removed (WARNING).
    """
    removed = []
    for path in _hidden_files(directory):
        try:
            if _remove_unlocked(path):
                removed.append(path)
                log.info("removed %s, left by an upload that never ended", path)
        except FileNotFoundError:
            pass  # its upload has just ended
        except OSError as error:
            log.warning("cannot remove what an upload has left: %s", error)
    return removed


def _hidden_files(directory: str) -> Iterator[str]:
    """Paths of hidden files in *directory* and below. Clients make the tree, so nothing recurses over it.

    (`os.walk` does before Python 3.12.)
    """
    directories = [directory]
    while directories:
        try:
            with os.scandir(directories.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
                    elif is_hidden(entry.name):
                        yield entry.path
        except OSError as error:
            log.warning("cannot look for leftovers of uploads: %s", error)


def _remove_unlocked(path: str) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # somebody writes it
        os.unlink(path)
        return True
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Hold it; False if somebody else does."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _hidden_name(target: str) -> str:
    directory, name = os.path.split(target)
    kept = os.fsdecode(os.fsencode(name)[:KEPT])
    return os.path.join(directory, f".{kept}.{secrets.token_hex(8)}{SUFFIX}")


def _writable(target: str) -> os.stat_result | None:
    """What is there, None if nothing is; raises what opening it for writing would."""
    try:
        fd = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads
            return os.stat(target)
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _inherit(fd: int, old: os.stat_result) -> None:
    """Permissions at once, so that nobody reads more than before; an owner is only for root to give."""
    new = os.fstat(fd)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode) & 0o777)
