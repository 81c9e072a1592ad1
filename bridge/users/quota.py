"""What a user may use: sessions at once, bytes a second, bytes of files.

Mix-ins for the handler, its data connections and the server of the command, with `Accounts`, which they
share; authorizer.py puts them together. Sits on throttle.py (how to be slow), server/shared_table.py (counted
in all processes) and file.py (what the limits are).

Sessions count from the login to the logout or the end, whichever comes first. Used bytes are those of the
regular files in the home, with hidden ones, without those that links lead to. They are counted when somebody
logs in, on a thread, and kept up from then on by what FTP does: uploads byte by byte, so that uploads side by
side share what is left; files that are overwritten, removed and renamed over. What changes files besides is
seen with a login later, MEASURED seconds at the earliest.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.filesystems import THREADS
from bridge.server import Full, SharedTable
from bridge.session import cut_at_quota
from bridge.users.file import Limits
from bridge.users.throttle import Rate, ThrottledMixin

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _restart_position; of DTPHandler: _data_wrapper.

if TYPE_CHECKING:
    from pyftpdlib.handlers import DTPHandler as _DTPHandler

    from bridge.server import GeventFTPServer as _GeventFTPServer
    from bridge.session import FTPHandler as _FTPHandler
else:  # mix-ins: what they extend is the class they are put before
    _FTPHandler = _GeventFTPServer = _DTPHandler = object

log = logging.getLogger(__name__)

#: Seconds for which a home is not counted again: clients open several sessions at once. 100 000 files take a
#: thread 0.45 s (measured, with all of them in the kernel's cache).
MEASURED = 60.0

#: Seconds that counting may take; then the login goes on with what is known.
COUNT_TIMEOUT = 60.0

FULL_HOUSE = "Too many sessions of this user; try again later."


def tree_size(home: str) -> int:
    """Bytes of the regular files in *home*; links are not followed, and hard links count once.

    On a thread: it blocks. Raises OSError if *home* cannot be read; what cannot be below counts as nothing.
    """
    total, seen = 0, set()
    waiting = [home]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        if found.st_nlink > 1:
                            if (found.st_dev, found.st_ino) in seen:
                                continue
                            seen.add((found.st_dev, found.st_ino))
                        total += found.st_size
        except OSError:
            if directory == home:
                raise
            # removed meanwhile, or not for us
    return total


def file_size(path: str) -> int:
    """Bytes that removing *path* would free; 0 for what is not there or no regular file."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 else 0


class Accounts:
    """What all users use now.

    - limits_of: the limits of a name.
    - tables: gives the table of sessions by name, that of bytes by home, and this process's column in both.

    If a table is full, who finds no row in it is not limited, and that is logged.
    """

    def __init__(
        self,
        limits_of: Callable[[str], Limits],
        tables: Callable[[], tuple[SharedTable, SharedTable, int]],
    ) -> None:
        self.limits_of = limits_of
        self._tables = tables
        self._rates: dict[str, tuple[Rate, Rate]] = {}
        self._measured: dict[str, float] = {}

    # --- runs in a worker greenlet: may wait

    def enter(self, name: str) -> bool:
        """Count a session of *name*, if it may have one more."""
        sessions, _, slot = self._tables()
        limit = self.limits_of(name).sessions
        count = _add(sessions, name, 1, slot)
        if limit and count > limit:
            _add(sessions, name, -1, slot)
            return False
        return True

    def leave(self, name: str) -> None:
        """One session less."""
        sessions, _, slot = self._tables()
        _add(sessions, name, -1, slot)

    def rates(self, name: str) -> tuple[Rate, Rate]:
        """What its sessions share in this process: bytes a second up and down, as the file now says."""
        up, down = self._rates.setdefault(name, (Rate(), Rate()))
        limits = self.limits_of(name)
        up.limit, down.limit = limits.up, limits.down
        return up, down

    def used(self, home: str) -> int:
        """Bytes of files in *home*."""
        return max(self._tables()[1].total(home), 0)

    def add(self, home: str, count: int) -> int:
        """*count* bytes more; how many there are then."""
        _, used, slot = self._tables()
        return _add(used, home, count, slot)

    def measure(self, home: str) -> None:
        """Count *home* if that was not done just now; logs what fails."""
        now = time.monotonic()
        if now - self._measured.get(home, -MEASURED) < MEASURED:
            return
        try:
            size = THREADS.call(tree_size, home, timeout=COUNT_TIMEOUT, name=f"counting {home}")
        except OSError as error:
            log.error("cannot count the bytes in %s: %s", home, error)
            return
        self._measured[home] = now
        self.add(home, size - self._tables()[1].total(home))


def _add(table: SharedTable, key: str, amount: int, slot: int) -> int:
    try:
        return table.add(key, amount, slot)
    except Full as error:
        log.error("a limit cannot be kept: %s", error)
        return 0


@dataclass
class CountedUpload:
    """An upload that counts: *old* bytes were at *path* (None: not known yet) before."""

    home: str
    quota: int
    path: str | None
    old: int
    #: Of these, what is overwritten.
    freed: int
    #: What `Accounts` knows of it by now.
    counted: int = 0


class AccountMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class."""

    accounts: Accounts
    up: Rate
    down: Rate
    #: Whose session is counted.
    _entered: str | None = None
    _home = ""
    _upload: CountedUpload | None = None
    #: Bytes of the file that the command at hand may remove.
    _removes = 0

    # --- runs in a worker greenlet: may wait. pyftpdlib's methods

    def handle_auth_success(self, home: str, password: str, msg_login: str) -> None:
        """As pyftpdlib; 421 if it is one session too many."""
        name, accounts = self.username, self.accounts
        limits = accounts.limits_of(name)
        if not accounts.enter(name):
            self.log(f"USER '{name}' has {limits.sessions} sessions already.")
            self.finish(FULL_HOUSE)
            return
        self._entered, self._home = name, home
        self.up, self.down = accounts.rates(name)
        if limits.up or limits.down:
            self.dtp_handler = _throttled(type(self).dtp_handler)
        else:
            self.__dict__.pop("dtp_handler", None)
        if limits.quota:
            accounts.measure(home)
        if not self._closed:  # meanwhile
            super().handle_auth_success(home, password, msg_login)

    def flush_account(self) -> None:
        """As pyftpdlib; the session does not count any more."""
        super().flush_account()
        self._leave()

    def close(self) -> None:
        """As pyftpdlib; the session does not count any more."""
        super().close()
        self._leave()

    def on_disconnect(self) -> None:
        """An upload that never began may have left a file."""
        self.settle_upload()
        super().on_disconnect()

    def _leave(self) -> None:
        name, self._entered = self._entered, None
        if name is not None:
            self.accounts.leave(name)

    # --- the quota

    def quota_left(self, user: str, path: str) -> int | None:
        """As `bridge.session.hooks.Events`."""
        left: int | None = super().quota_left(user, path)
        quota = self.accounts.limits_of(user).quota
        if not quota:
            return left
        freed = 0
        if self.command != "ALLO":
            old = 0 if self.command == "STOU" else file_size(os.path.realpath(path))
            freed = max(old - self._restart_position, 0) if self.command == "STOR" else 0
            known = None if self.command == "STOU" else path
            self._upload = CountedUpload(self._home, quota, known, old, freed)
        mine = quota - self.accounts.used(self._home) + freed
        return mine if left is None else min(mine, left)

    def ftp_STOR(self, file: str, mode: str = "w") -> Any:
        """As pyftpdlib."""
        result = super().ftp_STOR(file, mode)
        if result is None:
            self.settle_upload()
        return result

    def ftp_STOU(self, line: str) -> Any:
        """As pyftpdlib."""
        result = super().ftp_STOU(line)
        if result is None:
            self.settle_upload()
        return result

    def on_file_received(self, file: str) -> None:
        """What STOU has called it."""
        self._name_upload(file)
        super().on_file_received(file)

    def on_incomplete_file_received(self, file: str) -> None:
        """What STOU has called it."""
        self._name_upload(file)
        super().on_incomplete_file_received(file)

    def _name_upload(self, file: str) -> None:
        if self._upload is not None and self._upload.path is None:
            self._upload.path = file

    def settle_upload(self) -> None:
        """An upload is over: what is there now counts, whatever was expected."""
        upload, self._upload = self._upload, None
        if upload is not None:
            new = 0 if upload.path is None else file_size(os.path.realpath(upload.path))
            self.accounts.add(upload.home, new - upload.old - upload.counted)

    def ftp_DELE(self, path: str) -> Any:
        """As pyftpdlib."""
        self._removes = file_size(path)
        return super().ftp_DELE(path)

    def on_file_deleted(self, file: str) -> None:
        """Its bytes are free."""
        self._count_removed()
        super().on_file_deleted(file)

    def ftp_RNTO(self, path: str) -> Any:
        """As pyftpdlib."""
        self._removes = file_size(path) if path != self._rnfr else 0
        return super().ftp_RNTO(path)

    def on_file_renamed(self, src: str, dst: str) -> None:
        """The bytes of what was there are free."""
        self._count_removed()
        super().on_file_renamed(src, dst)

    def _count_removed(self) -> None:
        removed, self._removes = self._removes, 0
        if removed and self.accounts.limits_of(self.username).quota:
            self.accounts.add(self._home, -removed)


class AccountDataMixin(_DTPHandler):
    """For a `dtp_handler` class: counts what is uploaded, and ends it when the quota is used."""

    cmd_channel: Any
    file_obj: Any
    _data_wrapper: Callable[[bytes], bytes] | None

    def enable_receiving(self, type: str, cmd: str) -> None:
        """As pyftpdlib."""
        super().enable_receiving(type, cmd)
        upload: CountedUpload | None = self.cmd_channel._upload
        if upload is None:
            return
        accounts, convert = self.cmd_channel.accounts, self._data_wrapper
        accounts.add(upload.home, -upload.freed)
        upload.counted = -upload.freed

        def count(chunk: bytes) -> bytes:
            if convert is not None:
                chunk = convert(chunk)
            over = accounts.add(upload.home, len(chunk)) - upload.quota
            upload.counted += len(chunk)
            if over > 0:
                cut_at_quota(self.file_obj, chunk, len(chunk) - over)
            return chunk

        self._data_wrapper = count


class AccountServerMixin(_GeventFTPServer):
    """For a GeventFTPServer class."""

    def transfer_ended(self, control: Any, completed: bool) -> None:
        """As GeventFTPServer's; what was uploaded is counted."""
        control.settle_upload()
        super().transfer_ended(control, completed)


@functools.cache
def _throttled(dtp_handler: Any) -> Any:
    return type(dtp_handler.__name__, (ThrottledMixin, dtp_handler), {"__module__": dtp_handler.__module__})
