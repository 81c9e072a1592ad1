"""Data connections, and the files at their end: what may fail here costs a transfer, not the session.

Mix-ins for pyftpdlib's `dtp_handler`, `passive_dtp` and `active_dtp` classes; handlers.py puts them there
and says why they exist. They talk to a control connection that is a `handlers.SessionMixin`. What becomes of
an upload at its end is in receiving.py, what the program is told in events.py.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import NoneType
from typing import TYPE_CHECKING, Any

import pyftpdlib.handlers
from pyftpdlib.handlers import DTPHandler
from pyftpdlib.ioloop import AsyncChat
from pyftpdlib.log import logger
from pyftpdlib.utils import is_ssl_sock

from bridge.blocks import BURST, RECORD, SENDING, UPSTREAMS, Splice, Unspliceable
from bridge.events import StartingMixin
from bridge.receiving import ReceivingMixin, is_bare_eof

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Besides these, of DTPHandler: _resp, _closed, _initialized; of SSLConnectionMixin: _error; of FTPHandler:
# _in_dtp_queue, _out_dtp_queue, _dtp_acceptor.
from pyftpdlib.exceptions import _FileReadWriteError, _GiveUpOnSendfile  # isort: skip
from pyftpdlib.ioloop import _ERRNOS_DISCONNECTED  # isort: skip

if TYPE_CHECKING:
    from pyftpdlib.ioloop import AsyncChat as _AsyncChat
else:  # mix-ins: what they extend is the class they are put before
    _AsyncChat = object

_TLS: Any = getattr(pyftpdlib.handlers, "TLS_DTPHandler", DTPHandler)  # there if pyOpenSSL is installed
_SENDS = (DTPHandler.send, _TLS.send)

#: Errors that come and go with the load. The transfer that meets one gets 425, or 451 for its file.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: What the network does to a connection, besides what pyftpdlib knows as disconnection. Linux tells it to who
#: accepts the connection, too (accept(2)).
OF_CONNECTIONS = frozenset(
    {errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.EOPNOTSUPP, errno.ENETUNREACH}
)

_DISCONNECTED = _ERRNOS_DISCONNECTED | OF_CONNECTIONS

#: A file system that does not answer: what bridge.offload raises after its time limits, and NFS.
LIMITS = frozenset({errno.EAGAIN, errno.ETIMEDOUT})

#: What a file system's error is to the client, where pyftpdlib says 550 or 426 (RFC 959, 4.2.2).
REPLY_CODES = {
    **dict.fromkeys(SHORTAGES | LIMITS, "451"),
    errno.ENOSPC: "452",
    errno.EDQUOT: "552",
    errno.EFBIG: "552",
}

_SYSCTL = Path("/proc/sys/net/ipv4")  # for IPv6 too (Linux, ip-sysctl)

#: Ports to try before the kernel has to choose: with half of them in use, all fail once in a million times.
TRIES = 20

#: Linux: bind() leaves the port to connect() (ip(7)). Named by Python from 3.12 on.
_IP_BIND_ADDRESS_NO_PORT = 24 if sys.platform == "linux" else None


def transferring(control: Any) -> bool:
    """Whether a transfer runs, or was announced with 150 and waits for its data connection."""
    channel = getattr(control, "data_channel", None)
    if channel is not None and not channel._closed and channel._initialized:
        return True
    return (
        getattr(control, "_in_dtp_queue", None) is not None
        or getattr(control, "_out_dtp_queue", None) is not None
    )


class TransferMixin(StartingMixin, ReceivingMixin):
    """For a `dtp_handler` class: a file's errors become their replies, TLS or not."""

    moves_in_bulk = True  # for channels.py
    _offset: int
    _filefd: int
    _fileno: int
    cmd: str | None
    tot_bytes_sent: int
    tot_bytes_received: int
    ac_in_buffer_size: int
    ac_out_buffer_size: int
    _splice: Splice | None = None
    _receive_into: Callable[[int], int] | None = None
    _in_records = False
    _in_bursts = False

    def handle_failed_ssl_handshake(self) -> None:
        """As pyftpdlib, with its 522."""
        self._initialized = False
        super().handle_failed_ssl_handshake()

    def handle_error(self) -> None:
        """As pyftpdlib, with 452 and 552; over TLS too there is a reply."""
        error = sys.exc_info()[1]
        if is_bare_eof(error) and self._initialized:
            self.handle_close()
        elif isinstance(error, _FileReadWriteError):
            cause = error.__cause__
            self._fail(cause if isinstance(cause, OSError) else error)
            self._close_file()  # with the same error, for what was buffered
            self.close()
        else:
            if not self._closed:
                self.transfer_finished = False
            if not self._resp:
                self._resp = ("426 Internal error; transfer aborted.", logger.warning)
            self._close_file()  # before pyftpdlib does, which would lose the reply if that fails
            super().handle_error()

    def _fail(self, error: OSError) -> None:
        """Note the reply for an error of the file, and log it with what the reply does not say."""
        code = REPLY_CODES.get(error.errno or 0, "426" if self.receive else "451")
        reason = error.strerror or str(error)
        self.transfer_finished = False
        self._resp = (f"{code} {reason}; transfer aborted.", logger.warning)
        self._error = True  # no TLS shutdown
        what = f"{self.cmd} {getattr(self.file_obj, 'name', '?')}"
        self.log(f"{what}: {reason} after {self.get_transmitted_bytes()} bytes", logfun=logger.error)

    def initiate_sendfile(self) -> None:
        """As pyftpdlib, with larger blocks, and no other event for the end. OffloadedFiles send themselves"""
        send = getattr(self.file_obj, "sendfile", None)
        size = SENDING if self.ac_out_buffer_size == UPSTREAMS else self.ac_out_buffer_size
        for _ in range(2):  # the second time to hear whether this was the end, or all the socket takes now
            try:
                if send is None:
                    sent = os.sendfile(self._fileno, self._filefd, self._offset, size)
                else:
                    sent = send(self._fileno, self._offset)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _DISCONNECTED:
                    self.close_when_done()  # by what is queued handle_close() knows that this is not the end
                    self.handle_close()
                elif self.tot_bytes_sent == 0 and error.errno not in LIMITS:
                    raise _GiveUpOnSendfile from error
                else:
                    raise _FileReadWriteError(error) from error
                return
            if not sent:
                self.discard_buffers()
                self.handle_close()
                return
            self._offset += sent
            self.tot_bytes_sent += sent
            if sent >= size:
                return

    def enable_receiving(self, type: str, cmd: str) -> None:
        """As pyftpdlib; a file for which each write is a trip gets more at a time."""
        self.cmd, self.receive = cmd, True
        if self._start():
            super().enable_receiving(type, cmd)
            left = getattr(self.cmd_channel, "_upload_limit", None)
            if left is not None:
                self._limit(left)
            self._choose_how_to_read()
            self.ac_in_buffer_size = max(self.ac_in_buffer_size, getattr(self.file_obj, "block_size", 0))

    def _choose_how_to_read(self) -> None:
        """By splice, by bursts of TLS records, or as pyftpdlib does."""
        recv: Any = type(self).recv
        read: Any = super().handle_read
        if read.__func__ is not DTPHandler.handle_read or self.ac_in_buffer_size != UPSTREAMS:
            return  # the program wants to see what is read, or knows how much that should be
        if recv is AsyncChat.recv:
            if self._data_wrapper is None:
                self._splice = Splice.into(self.file_obj)
                offloaded = getattr(self.file_obj, "receive", None)
                self._receive_into = offloaded if self._splice is None else self._splice.receive
        elif recv is _TLS.recv:
            self._in_records = True

    def handle_read(self) -> None:
        """As pyftpdlib; by splice if that is possible."""
        if self._receive_into is None:
            super().handle_read()
        else:
            self._receive(self._receive_into)

    def handle_read_event(self) -> None:
        """As pyftpdlib; by splice if that is possible, and several TLS records at a time."""
        if self._receive_into is not None:
            self._receive(self._receive_into)
            return
        until = monotonic() + BURST if self._in_records else 0.0
        while not self._closed:
            before = self.tot_bytes_received
            super().handle_read_event()
            if self.tot_bytes_received - before < RECORD or monotonic() > until:
                return

    def initiate_send(self) -> None:
        """As pyftpdlib, with several TLS records or pieces of a listing at a time."""
        before, until = self.tot_bytes_sent, monotonic() + BURST
        super().initiate_send()
        while self._in_bursts and self.producer_fifo and not self._closed:
            if self.tot_bytes_sent == before or monotonic() > until:
                return
            before = self.tot_bytes_sent
            super().initiate_send()

    def _receive(self, receive: Callable[[int], int]) -> None:
        try:
            received = receive(self._fileno)
        except BlockingIOError:
            return
        except Unspliceable as error:
            self._receive_into = None
            self._write(error.args[0])
            return
        except OSError as error:
            if error.errno in _DISCONNECTED:
                self.handle_close()  # ReceivingMixin sees why
            else:
                self.handle_error()
            return
        self.tot_bytes_received += received
        if not received:
            self.handle_close()

    def _write(self, chunk: bytes) -> None:
        self.tot_bytes_received += len(chunk)
        try:
            self.file_obj.write(chunk)
        except OSError as error:
            raise _FileReadWriteError(error) from error

    def push_with_producer(self, producer: Any) -> None:
        """As pyftpdlib."""
        if self.cmd is None:
            self.cmd = self.cmd_channel.command  # pyftpdlib tells us afterwards, when all may be over
        if self._start():
            if type(self).send in _SENDS and type(self.file_obj) in (NoneType, io.BufferedReader):
                self._in_bursts = True  # others' files may wait, and others' send may count
                if is_ssl_sock(self.socket):
                    producer.buffer_size = RECORD
            super().push_with_producer(producer)
            if self._closed:
                self.__dict__.pop("initiate_send", None)  # a cycle

    def handle_timeout(self) -> None:
        """As pyftpdlib; without a TLS shutdown, which the client would let us wait for again."""
        previous, self._error = getattr(self, "_error", False), True
        super().handle_timeout()
        if not self._closed:
            self._error = previous

    def close(self) -> None:
        """As pyftpdlib; what fails when an uploaded file is closed is told, not raised."""
        if self._progress is not None:
            self._end_progress()
        if self._closed:
            return
        if not self._settled and (self.receive or hasattr(self, "_ssl_accepting")):
            self._settle()
            if self._closed:  # meanwhile
                return
        if self._splice is not None:
            self._splice.close()
        super().close()


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
