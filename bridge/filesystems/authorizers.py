"""Authorizers that block, on native threads: `OffloadedAuthorizer`.

Sits on threads.py. For what asks a disk, a database or a directory server with code that does not wait
cooperatively; an authorizer that does (over patched sockets, say) needs nothing of this.
"""

from __future__ import annotations

import errno
from typing import Any

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.exceptions import AuthenticationFailed

from bridge.filesystems.threads import THREADS, Threads

#: Called once for each login: worth a thread, unless pyftpdlib's DummyAuthorizer looks it up in a dict.
_LOGIN = ("has_user", "get_home_dir", "get_msg_login", "get_msg_quit")
#: Called for each command: a thread only if somebody else's class does it.
_LOOKUPS = ("get_perms", "has_perm")


class OffloadedAuthorizer:
    """Any authorizer with its blocking methods on threads.

    - authorizer: what does the work; everything not mentioned here is passed through to it.
    - (float) auth_timeout: seconds for one call, then 530 for the login and a log line; None for no limit.
    - (Threads) threads: where the calls run.

    `validate_authentication` always runs on a thread. The look-ups do where they are not pyftpdlib's own in
    memory: `has_perm` of a class of yours does, `has_perm` of DummyAuthorizer and UnixAuthorizer does not.
    Impersonation stays inline: it is the process's.
    """

    def __init__(
        self, authorizer: Any, auth_timeout: float | None = 30.0, threads: Threads = THREADS
    ) -> None:
        self._authorizer = authorizer
        self._timeout = auth_timeout
        self._threads = threads
        for name in _LOGIN:
            if getattr(type(authorizer), name) is not getattr(DummyAuthorizer, name):
                setattr(self, name, self._offloaded(name))
        for name in _LOOKUPS:
            if not getattr(type(authorizer), name).__module__.startswith("pyftpdlib."):
                setattr(self, name, self._offloaded(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._authorizer, name)

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        """As the authorizer's, on a thread."""
        self._offloaded("validate_authentication")(username, password, handler)

    def _offloaded(self, name: str) -> Any:
        method = getattr(self._authorizer, name)

        def call(*args: Any) -> Any:
            try:
                return self._threads.call(
                    method, *args, timeout=self._timeout, name=f"{type(self._authorizer).__name__}.{name}"
                )
            except OSError as error:
                if error.errno not in (errno.ETIMEDOUT, errno.EAGAIN):
                    raise
                raise AuthenticationFailed("Authentication takes too long, try again later.") from error

        return call
