"""Many users, each with a password, a home, permissions and limits: --users and --anonymous.

A feature of the command (ftp/application.py). The file is file.py's; here is who may log in by it, and when
it is read again. What users may use is in quota.py, what keeps them in their homes in filesystems/jail.py.

- **Refusing takes the same for all**: one scrypt on a thread and one reply, whether the user exists, the
  password is wrong, the user is locked or the home is missing. The log has the difference. At most as many
  passwords are checked at once as there are cores; who waits longer than THREADS' limit gets 451.
- **The file is looked at every INTERVAL seconds**, and on SIGHUP. If a line is wrong, the log names it and
  everything stays as it was.
- **Sessions of a user who is removed go on**, as with pyftpdlib and vsftpd, with what they had. New
  permissions and quotas hold at once; the home, sessions and bytes a second with the next login.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import gevent
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.exceptions import AuthenticationFailed

from bridge.filesystems import THREADS, Threads
from bridge.users.file import (
    ANONYMOUS,
    READ_ONLY,
    DummyHashes,
    Limits,
    User,
    UserFileError,
    parse,
)

log = logging.getLogger(__name__)

#: Seconds between two looks at the file: one stat(2), 0.06 ms of a thread.
INTERVAL = 2.0

#: Where passwords are checked. 16 MiB each.
PASSWORD_THREADS = Threads(os.cpu_count() or 1)

FAILED = "Authentication failed."


def reason_for(path: str, error: Exception) -> str:
    """Why the file of users at *path* cannot be used."""
    if isinstance(error, OSError):
        return f"cannot read {path!r}: {error.strerror or error}"
    return f"{path}, {error}"


class UserAuthorizer(DummyAuthorizer):
    """pyftpdlib's authorizer for the users of a file; besides these, `add_anonymous` works.

    - (str) directory: what relative homes lie below.
    - (str) permissions: pyftpdlib's letters for who has none in the file.
    """

    def __init__(
        self, directory: str, permissions: str = READ_ONLY, threads: Threads = PASSWORD_THREADS
    ) -> None:
        super().__init__()
        self._directory = directory
        self._permissions = permissions
        self._threads = threads
        self._current: tuple[dict[str, User], DummyHashes] = ({}, DummyHashes({}))
        #: Who was removed, for their sessions.
        self._former: dict[str, User] = {}

    @property
    def users(self) -> Mapping[str, User]:
        """Who may log in, without anonymous."""
        return self._current[0]

    def replace(self, users: dict[str, User]) -> None:
        """From now on these are the users."""
        gone = {name: user for name, user in self.users.items() if name not in users}
        self._former = {**self._former, **gone}
        self._current = (users, DummyHashes(users))

    def limits_of(self, username: str) -> Limits:
        """What a user may use; anonymous has no limits."""
        return self._user(username).limits

    def _user(self, username: str) -> User:
        return self.users.get(username) or self._former.get(username) or User(username)

    # --- runs in a worker greenlet: may wait. pyftpdlib's interface

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        """As DummyAuthorizer's. Raises OSError (EAGAIN) if no thread gets free in time."""
        if username == ANONYMOUS and username in self.user_table:
            return
        refused = self._threads.call(self._refuses, username, password, handler, name="checking a password")
        if refused:
            if username in self.users:
                log.warning("USER %r from %s: %s", username, handler.remote_ip, refused)
            raise AuthenticationFailed(FAILED)

    def has_user(self, username: str) -> bool:
        """As DummyAuthorizer's."""
        return username in self.users or username in self.user_table

    def get_home_dir(self, username: str) -> str:
        """As DummyAuthorizer's."""
        if username in self.user_table:
            return str(super().get_home_dir(username))
        return os.path.realpath(self._user(username).home_in(self._directory))

    def has_perm(self, username: str, perm: str, path: str | None = None) -> bool:
        """As DummyAuthorizer's; the same for all paths."""
        return perm in self.get_perms(username)

    def get_perms(self, username: str) -> str:
        """As DummyAuthorizer's."""
        if username in self.user_table:
            return str(super().get_perms(username))
        return self._user(username).permissions(self._permissions)

    def get_msg_login(self, username: str) -> str:
        """As DummyAuthorizer's."""
        return "Login successful."

    def get_msg_quit(self, username: str) -> str:
        """As DummyAuthorizer's."""
        return "Goodbye."

    # --- runs in a threadpool thread: no gevent

    def _refuses(self, username: str, password: str, handler: Any) -> str:
        """Why the user may not log in, for the log; "" if it may."""
        banned = getattr(handler, "login_refused", None)
        if banned is not None and banned():  # while this was in line
            return "banned"
        users, dummies = self._current
        user = users.get(username)
        stored = None if user is None else user.password
        matches = (stored or dummies.hash_for(username)).matches(password)
        if user is None or stored is None:
            return "locked"
        if not matches:
            return "wrong password"
        home = user.home_in(self._directory)
        return "" if os.path.isdir(home) else f"there is no directory {home}"


class WatchedFile:
    """The file of users, and what was last seen of it."""

    def __init__(self, path: str, authorizer: UserAuthorizer) -> None:
        self._path = path
        self._authorizer = authorizer
        self._seen: tuple[int, ...] | None = None
        self._others_may_read = False

    def load(self) -> None:
        """Read it. Raises OSError or UserFileError; then nothing has changed. May block.

        Logs nothing, since the log may not be set up yet: `warn` does.
        """
        self._take(*self._read())

    def warn(self) -> None:
        """Log what is wrong with the file that was read last."""
        if self._others_may_read:
            log.warning("%s: everybody on this machine may read it; chmod o-rwx", self._path)

    def _take(self, users: dict[str, User], others_may_read: bool) -> None:
        self._authorizer.replace(users)
        self._others_may_read = others_may_read

    # --- runs in a greenlet of its own: may wait

    def start(self) -> Callable[[], object]:
        """Look at it every INTERVAL seconds from now on; returns what ends that."""
        greenlet = gevent.spawn(self._run)
        return lambda: greenlet.kill()

    def _run(self) -> None:
        while True:
            gevent.sleep(INTERVAL)
            try:
                seen = THREADS.call(self._look, timeout=None, name=f"looking at {self._path}")
            except OSError:
                continue  # no thread: next time
            if seen != self._seen:
                self.reload()

    def reload(self) -> None:
        """Read it now; logs what was found, or why nothing has changed."""
        try:
            users, others_may_read = THREADS.call(self._read, name=f"reading {self._path}")
        except (OSError, UserFileError) as error:
            log.error("%s; the users stay as they were", reason_for(self._path, error))
        else:
            self._take(users, others_may_read)
            self.warn()
            log.info("%s: %d users", self._path, len(users))

    # --- runs in a threadpool thread: no gevent

    def _look(self) -> tuple[int, ...] | None:
        try:
            return _signature(os.stat(self._path))
        except OSError:
            return None

    def _read(self) -> tuple[dict[str, User], bool]:
        self._seen = None
        with open(self._path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            found = os.fstat(file.fileno())
            self._seen = _signature(found)
            return parse(file.read()), bool(found.st_mode & 0o007)


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
