"""VirtualFS: files that are not on a disk, for pyftpdlib's handlers: web pages, objects, database blobs.

`abstracted_fs = MyFS` in a handler class, and nothing else changes. It sits on streams.py, the ends of its
transfers, and never touches the disk. Paths are virtual: absolute, POSIX, normal (no ".." is left in them).

Streams, not files, and what that means:

- **A block at a time.** The source is asked for the next block when the client has taken the last one, and a
  client that uploads is read when the sink has taken what came before. A transfer keeps one block of
  pyftpdlib's (64 KiB) in memory, or one chunk of an iterator; a huge one goes out in blocks.
- **No seek.** RETR and STOR after REST get 554 (RFC 1123 4.1.3.4), APPE 550: nothing starts in the middle.
- **An aborted transfer closes its stream**, also one that waits (streams.py has the exceptions).
- **What fails has a reply.** An OSError with an errno and a FilesystemError are told as they are; anything
  else that a storage library raises is logged, and the client told of an input/output error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS

from bridge.filesystems.streams import (
    Download,
    Entry,
    Listing,
    Shown,
    Stream,
    Upload,
    close_quietly,
    waiting_for,
)
from bridge.filesystems.text import one_line

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
from pyftpdlib.exceptions import _FileReadWriteError  # isort: skip

__all__ = ["Entry", "VirtualFS"]

log = logging.getLogger(__name__)

#: Names that no client could ask for, or that would be more than one line of a listing.
_FORBIDDEN = frozenset("/\0\r\n")


class VirtualFS(AbstractedFS):
    """A file system made of a few methods; a subclass has at least `entries` and `open_read`.

    All get virtual paths ("/" is the top) and may wait, cooperatively. For code that blocks for real::

        class MyOffloadedFS(OffloadedFS, MyFS): ...

    They raise OSError (FileNotFoundError, PermissionError) or pyftpdlib's FilesystemError, whose text the
    client gets. Making, removing and renaming is refused (550) unless AbstractedFS's methods are overridden.

    Instance attribute `home`: the user's home directory as the authorizer has it, for subclasses to use as
    they like; the user's top is "/" in any case. (DummyAuthorizer wants one that exists: "/" always does.)
    """

    def __init__(self, root: str, cmd_channel: Any) -> None:
        super().__init__("/", cmd_channel)
        self.home = root

    # --- for subclasses

    def entries(self, path: str) -> Iterable[Entry | tuple[Any, ...]]:
        """What is in directory *path*: `Entry` or (name, size, mtime, type), in the order of listings.

        A generator best: it is gone through while the listing is sent, and closed early if that is aborted.
        What it raises before the first entry is the reply (550). A name with "/" or a line break is left out.
        """
        raise NotImplementedError

    def entry(self, path: str) -> Entry | None:
        """What is at *path*, never "/"; None if nothing is. By default looked for among its directory's."""
        parent, name = posixpath.split(path)
        with contextlib.closing(self._listed(parent)) as entries:
            return next((each for each in entries if each.name == name), None)

    def open_read(self, path: str) -> Any:
        """The content of file *path*: an object with `read1` or `read`, or an iterable of bytes of any size.

        It is closed (if it can be, and once) when the transfer ends, however it does. One that ends before
        the file does must raise, or the client is told that it has all.
        """
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def open_write(self, path: str) -> Any:
        """Where to put file *path*: an object with `write(data)`, which takes all, and `close()`.

        If it has `abort()`, that is called in place of `close()` when the upload did not complete (ABOR, a
        reset, the end of the session or the server, a write that failed), and after a `close()` that failed.
        A client that was killed may look as if it had sent all: FTP has no other mark for the end of a file.
        """
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # --- runs in a worker greenlet, or behind OffloadedFS in a thread: may wait. pyftpdlib's interface

    def open(self, filename: str, mode: str) -> Any:
        """As AbstractedFS: a `Download` or an `Upload`; to append is refused."""
        if "+" in mode:  # STOR after REST: nothing is opened, and its seek() gets the 554
            return Stream(self, filename, None)
        if "a" in mode:
            raise FilesystemError("Appending is not possible here, use STOR")
        with waiting_for(self.cmd_channel, f"opening {filename}", FilesystemError):
            if "w" in mode:
                return Upload(self, filename, self.open_write(filename))
            return Download(self, filename, self.open_read(filename))

    def mkstemp(self, suffix: str = "", prefix: str = "", dir: str | None = None, mode: str = "wb") -> Any:
        """As AbstractedFS; the name is random (64 bits) and not looked up."""
        return self.open(posixpath.join(dir or "/", prefix + secrets.token_hex(8) + suffix), mode)

    def chdir(self, path: str) -> None:
        """As AbstractedFS; the directory of the process stays."""
        if self._found(path).type != "dir":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self.cwd = path

    def listdir(self, path: str) -> list[str]:
        """As AbstractedFS; the names come, unsorted, while one goes through them, once."""
        return Listing(self._listed(path))

    listdirinfo = listdir

    def stat(self, path: str) -> os.stat_result:
        """As AbstractedFS; what is unknown is 0."""
        return self._found(path).stat()

    lstat = stat

    def isdir(self, path: str) -> bool:
        """As AbstractedFS; False, and a line in the log, if it cannot be found out."""
        return self._type(path) == "dir"

    def isfile(self, path: str) -> bool:
        """As AbstractedFS; False, and a line in the log, if it cannot be found out."""
        return self._type(path) == "file"

    def lexists(self, path: str) -> bool:
        """As AbstractedFS; False, and a line in the log, if it cannot be found out."""
        return self._type(path) is not None

    def islink(self, path: str) -> bool:
        """False: there are no links."""
        return False

    def getsize(self, path: str) -> int:
        """As AbstractedFS; FilesystemError if unknown."""
        size = self._found(path).size
        if size is None:
            raise FilesystemError("The size is not known before the transfer")
        return size

    def getmtime(self, path: str) -> float:
        """As AbstractedFS; FilesystemError if unknown."""
        mtime = self._found(path).mtime
        if mtime is None:
            raise FilesystemError("The modification time is not known")
        return mtime

    def realpath(self, path: str) -> str:
        """*path*: there are no links."""
        return path

    def validpath(self, path: str) -> bool:
        """True: a normal path cannot leave "/"."""
        return True

    def _refuse(self, *args: Any) -> Any:
        """Refused; for subclasses to override."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    mkdir = rmdir = remove = rename = chmod = utime = readlink = _refuse

    # --- listings

    def format_list(self, basedir: str, listing: Any, ignore_err: bool = True) -> Iterator[bytes]:
        """As AbstractedFS; everything belongs to `ftp`."""
        shown = Shown(self.cmd_channel, self._entries(basedir, listing, ignore_err))
        yield from AbstractedFS.format_list(shown, basedir, shown)

    def format_mlsx(
        self, basedir: str, listing: Any, perms: str, facts: Any, ignore_err: bool = True
    ) -> Iterator[bytes]:
        """As AbstractedFS; only the facts that are known and so no `unique`, which clients would believe."""
        in_directory = "".join(perm for perm in perms if perm not in "arw")
        in_directory += "c" * any(perm in "waf" for perm in perms) + "p" * ("d" in perms)
        of_file = "".join(perm for perm in perms if perm not in "acelmp")
        times = time.gmtime if self.cmd_channel.use_gmt_times else time.localtime
        for entry in self._entries(basedir, listing, ignore_err):
            known = {"type": entry.type, "perm": in_directory if entry.type == "dir" else of_file}
            if entry.size is not None and entry.type != "dir":
                known["size"] = str(entry.size)
            if entry.mtime is not None:
                known["modify"] = time.strftime("%Y%m%d%H%M%S", times(entry.mtime))
            line = "".join(f"{fact}={known[fact]};" for fact in sorted(known) if fact in facts)
            yield self._encode(f"{line} {entry.name}")

    def format_nlst(self, listing: Any) -> Iterator[bytes]:
        """The lines of NLST."""
        return map(self._encode, listing)

    def _encode(self, line: str) -> bytes:
        return f"{line}\r\n".encode(self.cmd_channel.encoding, self.cmd_channel.unicode_errors)

    # --- what they are made of

    def _found(self, path: str) -> Entry:
        if path == "/":
            return Entry("", type="dir")
        with waiting_for(self.cmd_channel, f"looking for {path}", FilesystemError):
            entry = self.entry(path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return entry

    def _type(self, path: str) -> str | None:
        try:
            return self._found(path).type
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, FilesystemError) as error:
            log.warning("cannot find out whether %s exists: %s", path, error)
            return None

    def _listed(self, path: str) -> Generator[Entry, None, None]:
        """The usable entries of a directory; errors as `waiting_for` has them."""
        what = f"listing {path}"
        with waiting_for(self.cmd_channel, what, FilesystemError):
            entries = iter(self.entries(path))
        try:
            while True:
                with waiting_for(self.cmd_channel, what, FilesystemError):
                    each = next(entries, None)
                if each is None:
                    return
                entry = each if isinstance(each, Entry) else Entry(*each)
                if entry.name not in ("", ".", "..") and _FORBIDDEN.isdisjoint(entry.name):
                    yield entry
        finally:
            close_quietly(entries, what)

    def _entries(self, basedir: str, listing: Any, ignore_err: bool) -> Iterator[Entry]:
        """The entries of a listing, or those of names; an error after the 150 becomes a 451."""
        if not isinstance(listing, Listing):
            for name in listing:
                with contextlib.suppress(*((OSError, FilesystemError) if ignore_err else ())):
                    yield self._found(posixpath.join(basedir, name))._replace(name=name)
            return
        try:
            yield from listing.entries
        except (OSError, FilesystemError) as error:
            told = error if isinstance(error, OSError) else OSError(errno.EIO, one_line(error))
            raise _FileReadWriteError(told) from told
