"""Data connections, and the files at their end: what may fail here costs a transfer, not the session.

A mix-in for pyftpdlib's `dtp_handler` classes; control.py puts it there and says why it exists. It talks
to a control connection that is a `handlers.SessionMixin`. How the connection comes to be is in ports.py,
what becomes of an upload at its end in upload.py, what the program is told in hooks.py.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
import traceback
from collections.abc import Callable
from time import monotonic
from types import NoneType
from typing import Any

import pyftpdlib.handlers
from gevent import GreenletExit, Timeout
from pyftpdlib.handlers import DTPHandler
from pyftpdlib.handlers.ftp.producers import FileProducer
from pyftpdlib.ioloop import AsyncChat
from pyftpdlib.log import logger
from pyftpdlib.utils import is_ssl_sock

from bridge.filesystems import BURST, SENDING, UPSTREAMS, Splice, Unspliceable
from bridge.loop import TLS_RECORD, Interrupt
from bridge.session.hooks import StartingMixin
from bridge.session.upload import ReceivingMixin, is_bare_eof

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Besides these, of DTPHandler: _resp, _closed, _initialized; of SSLConnectionMixin: _error; of FTPHandler:
# _in_dtp_queue, _out_dtp_queue; of FileProducer: _posix_ascii_data_wrapper, _prev_chunk_endswith_cr.
from pyftpdlib.exceptions import _FileReadWriteError, _GiveUpOnSendfile  # isort: skip
from pyftpdlib.ioloop import _ERRNOS_DISCONNECTED  # isort: skip

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

_MOVES = frozenset({AsyncChat.recv.__code__, AsyncChat.send.__code__})

#: Linux: the first byte of struct tcp_info is the connection's state (tcp(7)); this is TCP_ESTABLISHED.
_ESTABLISHED = b"\x01"

#: A file system that does not answer: what bridge.filesystems.offload raises after its time limits, and NFS.
LIMITS = frozenset({errno.EAGAIN, errno.ETIMEDOUT})

#: What a file system's error is to the client, where pyftpdlib says 550 or 426 (RFC 959, 4.2.2).
REPLY_CODES = {
    **dict.fromkeys(SHORTAGES | LIMITS, "451"),
    errno.ENOSPC: "452",
    errno.EDQUOT: "552",
    errno.EFBIG: "552",
}


class TextProducer(FileProducer):
    """A file in ASCII mode, its lines ended by CRLF.

    As pyftpdlib's, which inserts each CR for itself: 64 KiB of line feeds block the hub for 0.12 s, here for
    1.3 ms (measured). And it takes a CR that ends a piece for one that comes before its first line feed.
    """

    _prev_chunk_endswith_cr: bool

    def _posix_ascii_data_wrapper(self, chunk: bytes) -> bytes:
        text = chunk.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        if self._prev_chunk_endswith_cr and chunk.startswith(b"\n"):
            text = text[1:]  # its CR has been sent
        self._prev_chunk_endswith_cr = chunk.endswith(b"\r")
        return text


def transferring(control: Any) -> bool:
    """Whether a transfer runs, or was announced with 150 and waits for its data connection."""
    channel = getattr(control, "data_channel", None)
    if channel is not None and not channel._closed and channel._initialized:
        return True
    return (
        getattr(control, "_in_dtp_queue", None) is not None
        or getattr(control, "_out_dtp_queue", None) is not None
    )


def is_unreachable(error: BaseException | None) -> bool:
    """Whether recv() or send() has raised *error*, and it is an end that pyftpdlib does not know as one."""
    if not isinstance(error, OSError) or error.errno not in OF_CONNECTIONS:
        return False
    return any(frame.f_code in _MOVES for frame, _ in traceback.walk_tb(error.__traceback__))


class TransferMixin(StartingMixin, ReceivingMixin):
    """For a `dtp_handler` class: a file's errors become their replies, TLS or not."""

    moves_in_bulk = True  # for loop/registration.py
    _offset: int
    _filefd: int
    _idler: Any
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
        if self._closed and self._initialized:  # a callback, when all was over: as any other
            self.cmd_channel.handle_error()
        elif (is_bare_eof(error) and self._initialized) or is_unreachable(error):
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
        """As pyftpdlib, with larger blocks, and done when all is sent: pyftpdlib waits for another event.

        A file that can send itself (bridge.filesystems.offload.OffloadedFile) does it elsewhere.
        """
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

    def readable(self) -> bool:
        """As pyftpdlib, for which any event before a transfer is the client's end of the connection.

        It may be an error of epoll_ctl(2) (loop/registration.py), or an upload that came before its command.
        """
        busy = self.receive or self._initialized or getattr(self, "_ssl_accepting", False)
        if not (busy or self._closed) and sys.platform == "linux":
            state: bytes = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            if state == _ESTABLISHED:
                return False
        return bool(super().readable())

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
            if self.tot_bytes_received - before < TLS_RECORD or monotonic() > until:
                return

    def handle_ssl_established(self) -> None:
        """As pyftpdlib; then sends what had to wait."""
        super().handle_ssl_established()
        if self.producer_fifo and not self._closed:
            self.initiate_send()

    def initiate_send(self) -> None:
        """As pyftpdlib, with several TLS records or pieces of a listing at a time, behind TLS's handshake.

        (The first write can do the handshake too, and pyftpdlib would not know: 426 twice for an ABOR then.
        To write nothing at all, an empty NLST, is an error to OpenSSL, and the handshake would fail.)
        """
        if getattr(self, "_ssl_accepting", False):
            return
        while self.producer_fifo and self.producer_fifo[0] == b"":
            self.producer_fifo.popleft()
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
            if type(producer) is FileProducer and producer.type == "a":
                producer = TextProducer(producer.file, "a")
            if type(self).send in _SENDS and type(self.file_obj) in (NoneType, io.BufferedReader):
                self._in_bursts = True  # others' files may wait, and others' send may count
                if is_ssl_sock(self.socket):
                    producer.buffer_size = TLS_RECORD
            try:
                super().push_with_producer(producer)
            except _FileReadWriteError:
                raise
            except OSError as error:  # the file cannot tell where it is
                raise _FileReadWriteError(error) from error
            if self._closed:
                self.__dict__.pop("initiate_send", None)  # a cycle

    def handle_timeout(self) -> None:
        """As pyftpdlib; without a TLS shutdown, which the client would let us wait for again."""
        previous, self._error = getattr(self, "_error", False), True
        super().handle_timeout()
        if not self._closed:
            self._error = previous

    def close(self) -> None:
        """As pyftpdlib; what fails when an uploaded file is closed is told, not raised.

        If the session ends, so does this, whatever the file and the callbacks meet: it is only logged.
        """
        for _ in range(2):  # what the file raises, and what a callback does
            try:
                self._close()
                return
            except (Exception, GreenletExit, Timeout) as error:
                if self._closed:
                    self._finish_closing(error)
                if not self.cmd_channel._closed:
                    raise
                if isinstance(error, Exception):
                    self.log_exception(self)
                else:
                    self.log(f"{self.cmd}: its end was ended: {error!r}", logfun=logger.info)
            if self._closed:
                return

    def _finish_closing(self, error: BaseException) -> None:
        """Do what pyftpdlib does behind the callback that has raised *error*."""
        if self._idler is not None and not self._idler.cancelled:
            self._idler.cancel()
        if self.cmd_channel._closed or isinstance(error, Interrupt):  # else it ends the session
            self.cmd_channel._on_dtp_close()

    def _close(self) -> None:
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
        if not self.receive and self.file_obj is not None and not self.file_obj.closed:
            try:
                self.file_obj.close()  # or if the turn ended in it, there would be no reply
            except Exception:
                self.log_exception(self)
        super().close()
