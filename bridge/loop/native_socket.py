"""Native sockets for pyftpdlib's channels, also where gevent has put its own in their place.

A leaf of the package. Under `patch_all()`, and when a program hands over a gevent socket, a channel's socket
would be gevent's: two more watchers for each, more Python for each send, recv and close, and nothing gained,
since pyftpdlib's sockets never block. Measured: a patched drop-in costs 1.0 of an unpatched one for a command
and 1.01 for a login, before 1.08 and 1.13.
"""

from __future__ import annotations

from typing import Any

from gevent import monkey

_Socket: Any = monkey.get_original("socket", "socket")


class NativeSocket(_Socket):
    """The standard library's socket; what it accepts is one as well.

    With an *owner*, a gevent socket, it shares that one's descriptor, which the owner closes.
    """

    _owner: Any = None

    def accept(self) -> tuple[NativeSocket, Any]:
        """As socket.accept, whose result would be what `socket.socket` is now."""
        descriptor, address = self._accept()
        return NativeSocket(self.family, self.type, self.proto, fileno=descriptor), address

    def close(self) -> None:
        """As socket.close."""
        owner, self._owner = self._owner, None
        if owner is not None:
            self.detach()
            owner.close()
        super().close()

    def __del__(self) -> None:
        if self._owner is not None:
            self.detach()  # or this would close the descriptor, and so would the owner


def native(sock: Any) -> NativeSocket:
    """A native socket, non-blocking, that takes the place of gevent's *sock*."""
    shared = NativeSocket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
    shared.setblocking(False)
    shared._owner = sock
    return shared
