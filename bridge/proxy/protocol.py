"""Connections that a load balancer passes on: the PROXY header in front, and the address it tells.

Sits on loop/native_socket.py; ftp/parts/proxy.py puts it into a site. Needs proxy-protocol, which parses the
header and reads nothing itself. The header of a control connection is read before there is a handler, that of
a passive data connection before its origin is compared with the session's; so TLS, limits, logs and
`sessions()` see only a socket whose peer is the client.
https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt

- **Nothing behind the header is read.** Each recv() asks for bytes that are part of it: version 2 says how
  many they are, and version 1 is looked at (MSG_PEEK) up to the end of its line.
- **The header is believed from the networks of `proxy_networks` only, and demanded from them.** Anybody could
  send one, and what a balancer forwards without one is not the client the log would name.
- **A connection that waits for its header is nobody's session.** It is an accept whose turn waits, for
  `proxy_timeout` seconds at most; others are accepted meanwhile.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyftpdlib.handlers
from gevent.socket import wait_read
from proxyprotocol import ProxyProtocolIncompleteError
from proxyprotocol.detect import ProxyProtocolDetect
from proxyprotocol.result import ProxyResult, ProxyResultIPv4, ProxyResultIPv6
from pyftpdlib.log import logger as pyftpdlib_logger

from bridge.loop import NativeSocket, seconds_until
from bridge.session import plain

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler

    from bridge.server import GeventFTPServer as _Server
else:  # mix-ins: what they extend is the class they are put before
    _FTPHandler = _Server = object

log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = tuple[str, int]

#: Bytes of a version 1 header with its line end, at most (the specification, 2.1).
LINE = 107

_parser = ProxyProtocolDetect()


class ProxyError(Exception):
    """No PROXY header, or none that can be used: why."""


class NothingSent(ProxyError):
    """The connection ended before its first byte, as those of many health checks do."""


def is_among(ip: str, networks: Sequence[Network]) -> bool:
    """Whether *ip* is in one of *networks*."""
    address = plain(ip)
    return any(address in network for network in networks)


class ProxiedConnection(NativeSocket):
    """An accepted connection that gives the client's address for the balancer's."""

    _peer: Address
    #: The balancer's own connection: LOCAL (a health check), or UNKNOWN.
    own = False

    @classmethod
    def of(cls, accepted: Any, peer: Address, own: bool) -> ProxiedConnection:
        """Take the descriptor over from *accepted*."""
        connection = cls(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection._peer = peer
        connection.own = own
        return connection

    def getpeername(self) -> Any:
        """Where the client is."""
        return self._peer


# --- runs in a worker greenlet: may wait


def read_header(sock: Any, seconds: float) -> Address | None:
    """Read the PROXY header of *sock*, and no byte more; the client's address, None for the balancer's own.

    Waits for *seconds* at most. Raises ProxyError, or OSError if the connection breaks.
    """
    deadline = time.monotonic() + seconds
    header = b""
    while True:
        try:
            return _source(_parser.unpack(header))
        except ProxyProtocolIncompleteError as error:
            wanted = error.want_read
        except (ValueError, struct.error) as error:  # (struct.error: addresses that are too short)
            raise ProxyError(f"it began with {header[:24]!r} instead of a PROXY header") from error
        header += _receive(sock, header, wanted.want_bytes, deadline)


def _source(result: ProxyResult) -> Address | None:
    if not isinstance(result, ProxyResultIPv4 | ProxyResultIPv6):
        return None
    if result.protocol not in (None, socket.SOCK_STREAM):
        raise ProxyError("its PROXY header is not for TCP")
    ip, port = result.source
    return str(plain(str(ip))), port


def _receive(sock: Any, header: bytes, count: int | None, deadline: float) -> bytes:
    """Some of the *count* bytes that are missing at least; None for all up to the end of the line."""
    while True:
        try:
            if count is None:
                found: bytes = sock.recv(LINE - len(header), socket.MSG_PEEK | socket.MSG_DONTWAIT)
                count = found.find(b"\n") + 1 or len(found)
            data: bytes = sock.recv(count, socket.MSG_DONTWAIT) if count else b""
        except BlockingIOError:
            late = ProxyError(f"no PROXY header came in time, but {header!r}")
            if deadline <= time.monotonic():
                raise late from None
            wait_read(sock.fileno(), seconds_until(deadline), late)
        else:
            if data:
                return data
            if len(header) >= LINE:
                raise ProxyError("its PROXY header has no end")
            if header:
                raise ProxyError(f"it ended in its PROXY header, after {header!r}")
            raise NothingSent("it ended before its PROXY header")


def accept_proxied(
    sock: Any, addr: Any, seconds: float, log_line: Callable[..., None]
) -> ProxiedConnection | None:
    """The connection with its client's address; None, closed and logged in one line, if it has no header."""
    connection = None
    try:
        told = read_header(sock, seconds)
        connection = ProxiedConnection.of(sock, told or addr[:2], told is None)
    except NothingSent as error:
        log.debug("%s:%s, which is to tell its clients' addresses: closed, %s", *addr[:2], error)
    except (ProxyError, OSError) as error:
        log_line(f"{addr[0]}:{addr[1]}, which is to tell its clients' addresses: closed, {error}")
    finally:
        if connection is None:
            sock.close()
    return connection


class ProxyServerMixin(_Server):
    """For a GeventFTPServer class, before it: control connections."""

    #: Networks whose connections begin with a PROXY header.
    proxy_networks: Sequence[Network] = ()
    #: Seconds until it is there. The specification wants 3 at least, for a packet that is lost.
    proxy_timeout = 5.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._without_header: set[Any] = set()
        super().__init__(*args, **kwargs)

    def handle_accepted(self, sock: Any, addr: Any) -> Any:
        """As GeventFTPServer, with the address that the header tells. May wait."""
        if not isinstance(addr, tuple) or not is_among(addr[0], self.proxy_networks):
            return super().handle_accepted(sock, addr)
        self._without_header.add(sock)
        try:
            connection = accept_proxied(sock, addr, self.proxy_timeout, log.warning)
        finally:
            self._without_header.discard(sock)
        if connection is None:
            return None
        if self.closed:  # meanwhile; in a drain there is a 421
            connection.close()
            return None
        return super().handle_accepted(connection, connection.getpeername())

    def _end(self) -> None:
        super()._end()
        for sock in self._without_header:
            try:
                sock.shutdown(socket.SHUT_RDWR)  # ends the waiting
            except OSError:
                pass  # the other side was faster


class ProxiedPassiveDTP(pyftpdlib.handlers.FTPHandler.passive_dtp):
    """pyftpdlib's, for data connections that a balancer passes on; on a server that is a ProxyServerMixin."""

    def handle_accepted(self, sock: Any, addr: Any) -> None:
        """As pyftpdlib, with the address that the header tells. May wait."""
        control = self.cmd_channel
        if is_among(addr[0], control.server.proxy_networks):
            connection = accept_proxied(
                sock,
                addr,
                control.server.proxy_timeout,
                lambda line: control.log(f"data connection from {line}", logfun=pyftpdlib_logger.warning),
            )
            if connection is None:
                return
            if self._closed or not control.connected:  # meanwhile
                connection.close()
                return
            sock, addr = connection, connection.getpeername()
        if addr[0] != control.remote_ip and plain(addr[0]) == plain(control.remote_ip):
            addr = (control.remote_ip, *addr[1:])  # one of them was told, the other is a socket's for IPv6
        super().handle_accepted(sock, addr)


class QuietChecksMixin(_FTPHandler):
    """For a handler class: health checks of the balancer, every other second, are not logged."""

    def log(self, msg: str, logfun: Any = pyftpdlib_logger.info) -> None:
        """As pyftpdlib; on DEBUG if the connection is the balancer's own and nobody has tried to log in."""
        if logfun == pyftpdlib_logger.info and not self.username and getattr(self.socket, "own", False):
            logfun = pyftpdlib_logger.debug
        super().log(msg, logfun)
