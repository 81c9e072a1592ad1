"""How a data connection comes to be: the port of PASV and EPSV, the call of PORT and EPRT.

Mix-ins for pyftpdlib's `passive_dtp` and `active_dtp` classes; control.py puts them there. They choose
ports, and tell the control connection, a `handlers.SessionMixin`, when no connection comes. What it carries
is in data.py.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.session.data import OF_CONNECTIONS, SHORTAGES

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist): of
# AsyncChat: _closed, _fileno; of FTPHandler: _dtp_acceptor.

if TYPE_CHECKING:
    from pyftpdlib.ioloop import AsyncChat as _AsyncChat
else:  # mix-ins: what they extend is the class they are put before
    _AsyncChat = object

_SYSCTL = Path("/proc/sys/net/ipv4")  # for IPv6 too (Linux, ip-sysctl)

#: Ports to try before the kernel has to choose. Hardly ever are more than half in use, which makes all tries
#: fail once in a million times.
TRIES = 20

#: Linux: bind() leaves the port to connect() (ip(7)). Named by Python from 3.12 on.
_IP_BIND_ADDRESS_NO_PORT = 24 if sys.platform == "linux" else None


@functools.cache
def ephemeral_ports() -> Sequence[int]:
    """The ports the kernel would choose from. Raises OSError where it does not say (other than Linux)."""
    low, high = map(int, (_SYSCTL / "ip_local_port_range").read_text().split())
    reserved = (_SYSCTL / "ip_local_reserved_ports").read_text().strip()
    ports = range(low, high + 1)
    parts = [part.partition("-") for part in reserved.split(",") if part]
    taken = {port for first, _, last in parts for port in range(int(first), int(last or first) + 1)}
    return [port for port in ports if port not in taken] if taken else ports


class _ReusesAddresses(_AsyncChat):
    """Ports in TIME_WAIT may be bound again.

    With SO_REUSEADDR Linux lets them be asked for, but does not choose them (ip_autobind_reuse): bind() to
    port 0 takes longer and longer, then fails. 60 000 small RETRs in a row took 31 s with a port of our
    choice, 185 and more with the kernel's (tests/bench/passive_ports.py).
    """

    def create_socket(self, *args: Any, **kwargs: Any) -> None:
        super().create_socket(*args, **kwargs)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def _bind_to_any(self, addr: Any) -> None:
        """Bind to a port of our choice, if need be of the kernel's."""
        try:
            ports = ephemeral_ports()
        except OSError:  # also when there is no descriptor to find out
            ports = ()
        for _ in range(TRIES if ports else 0):
            try:
                # What is easily guessed is easily stolen.
                port = ports[int.from_bytes(os.urandom(4), "little") % len(ports)]
                super().bind((addr[0], port, *addr[2:]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return
        super().bind((addr[0], 0, *addr[2:]))


class PassiveMixin(_ReusesAddresses):
    """For a `passive_dtp` class."""

    def __init__(self, cmd_channel: Any, extmode: bool = False) -> None:
        self._probing = False
        try:
            super().__init__(cmd_channel, extmode)
        except BaseException:
            self.close()
            raise

    def bind_af_unspecified(self, addr: Any) -> Any:
        """As pyftpdlib, which finds out the address family so and does not keep the socket."""
        self._probing = True
        try:
            return super().bind_af_unspecified(addr)
        finally:
            self._probing = False

    def bind(self, addr: Any) -> None:
        """As asyncore; refuses the random port that pyftpdlib takes when none of `passive_ports` is left."""
        if addr[1] or self._probing:
            super().bind(addr)
        elif self.cmd_channel.passive_ports is not None:
            raise OSError(errno.EADDRINUSE, "all passive ports are in use")
        else:
            self._bind_to_any(addr)

    def close(self) -> None:
        """As pyftpdlib, which would write to the debug log each time it is called."""
        if not self._closed:
            super().close()

    def handle_accept(self) -> None:
        """As pyftpdlib; the client is told of a shortage, and of a connection that has failed already."""
        control = self.cmd_channel
        try:
            super().handle_accept()
            if self._closed and control._dtp_acceptor is self:
                control.data_connection_failed("it broke off")
        except OSError as error:
            if error.errno not in SHORTAGES | OF_CONNECTIONS:
                raise
            self.close()
            control.data_connection_failed(error.strerror or str(error))

    def handle_error(self) -> None:
        """As pyftpdlib; the transfer that waits for this connection is answered too."""
        super().handle_error()
        if not self.cmd_channel._closed and self.cmd_channel.data_channel is None:
            self.cmd_channel.data_connection_failed("internal error")

    def handle_timeout(self) -> None:
        """As pyftpdlib if no transfer waits for this connection."""
        if self.cmd_channel._drop_queued("425 Can't open data connection: timed out."):
            self.close()
        else:
            super().handle_timeout()


class ActiveMixin(_ReusesAddresses):
    """For an `active_dtp` class."""

    def del_channel(self, map: Any = None) -> None:
        """As pyftpdlib, which keeps this object when its connection is long closed.

        By then the descriptor may be another session's, which would never be heard again.
        """
        if self.ioloop.socket_map.get(self._fileno) is self:
            super().del_channel(map)

    def bind(self, addr: Any) -> None:
        """As asyncore; a port only has to be unused with this client's, so connect() chooses it."""
        if _IP_BIND_ADDRESS_NO_PORT is not None:
            self.socket.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        super().bind(addr)

    def connect(self, addr: Any) -> None:
        """As pyftpdlib, also from a port that a passive connection has left in TIME_WAIT."""
        try:
            super().connect(addr)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            self._bind_to_any(self.socket.getsockname())
            super().connect(addr)

    def handle_close(self) -> None:
        """As pyftpdlib; a transfer that waits for this connection is answered too."""
        super().handle_close()
        self.cmd_channel._drop_queued("425 Can't open data connection.")
