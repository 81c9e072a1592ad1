"""Listening sockets that pyftpdlib does not make itself: Unix sockets, and those that systemd hands over.

A leaf of the package. pyftpdlib wants an IP address on both ends of a control connection, to offer data
connections there and to check who opens them. A Unix connection has none; `LocalConnection` says 127.0.0.1,
so its data connections go over the loopback interface.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any

#: The first descriptor that systemd passes (sd_listen_fds(3)).
SD_LISTEN_FDS_START = 3


def unix_listener(path: str) -> socket.socket:
    """A Unix stream socket bound to *path*, not yet listening. The caller closes it and removes the file.

    A socket file that nobody listens on any more is replaced. Raises OSError (EADDRINUSE) if somebody
    does, or if the file is no socket.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            listener.bind(path)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog is somebody too
        return probe.connect_ex(path) == errno.ECONNREFUSED


class LocalConnection(socket.socket):
    """An accepted Unix connection that gives 127.0.0.1 for both its addresses; port 0."""

    @classmethod
    def of(cls, accepted: Any) -> LocalConnection:
        """Take the descriptor over from *accepted*."""
        return cls(fileno=accepted.detach())

    def getpeername(self) -> Any:
        """Where pyftpdlib thinks the client is."""
        return ("127.0.0.1", 0)

    def getsockname(self) -> Any:
        """Where pyftpdlib offers data connections."""
        return ("127.0.0.1", 0)


def systemd_sockets() -> list[socket.socket]:
    """The sockets systemd has passed to this process (LISTEN_FDS), in its order; none without it.

    They are the caller's from then on; a second call returns none, and child processes do not see the
    variables. Raises ValueError if the variables make no sense.
    """
    pid, count = os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")
    if pid is None or count is None:
        return []
    try:
        if int(pid) != os.getpid():  # meant for a parent that did not clear it
            return []
        descriptors = range(SD_LISTEN_FDS_START, SD_LISTEN_FDS_START + int(count))
    except ValueError:
        raise ValueError(f"LISTEN_PID={pid!r} and LISTEN_FDS={count!r} are no numbers") from None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    sockets = []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        sockets.append(socket.socket(fileno=descriptor))
    return sockets
