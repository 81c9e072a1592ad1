"""A control connection: what a session needs besides pyftpdlib's handler, and how it ends.

`SessionMixin` is put before pyftpdlib's class by handlers.py, whose header lists what differs and why. The
other mix-ins for control connections are in transfer.py, pipelining.py, hardening.py and hooks.py (with what
a program can set), those for data connections in ports.py, data.py and upload.py.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from gevent import GreenletExit, Timeout
from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.handlers.ftp.producers import BufferedIteratorProducer
from pyftpdlib.log import logger
from pyftpdlib.utils import strerror

from bridge.filesystems import encodable, one_line
from bridge.loop import Interrupt, current_session
from bridge.session.data import LIMITS, REPLY_CODES, is_unreachable, transferring
from bridge.session.hardening import HardeningMixin
from bridge.session.hooks import EventsMixin
from bridge.session.pipelining import PipeliningMixin
from bridge.session.transfer import TRANSFERS, TransferRepliesMixin
from bridge.session.upload import give_up

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _closing, _last_response, _in_dtp_queue, _out_dtp_queue, _rnfr; of DTPHandler:
# _closed; of SSLConnectionMixin: _error, _do_ssl_shutdown.

#: Seconds a client has to take a last reply before the connection is closed all the same. vsftpd: 5.
LAST_REPLY_TIMEOUT = 5.0

#: Seconds between the last 226 and the 421 of a server that stops: when its control connection ends, lftp
#: throws away what it has not yet read from the data connection.
FAREWELL_DELAY = 1.0


class SessionMixin(TransferRepliesMixin, PipeliningMixin, HardeningMixin, EventsMixin):
    """For a handler class: what a session needs. Put it before pyftpdlib's class, and Events behind that.

    Instance attributes: `command`, the command that is being handled (str, None between commands), and
    `last_active`, when the last one began or the last transfer ended (`time.time()`).
    """

    _rnfr: str | None
    #: Why the session is about to be ended, once its transfer has.
    farewell = ""
    #: The server knows that it has ended.
    _over = False
    #: The next reply may become another one.
    _recodes = False

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        self.command: str | None = None
        self.last_active = time.time()
        #: Transfer commands so far: tells whether one that is to be aborted is still the last.
        self._transfers = 0
        #: The command whose turn was ended before it had replied.
        self._interrupted: str | None = None
        super().__init__(conn, server, ioloop)

    @functools.cached_property
    def session_id(self) -> str:
        """What names this session in logs and metrics: 12 hexadecimal digits, made when first asked for."""
        return os.urandom(6).hex()

    # --- from everywhere, also other threads; on a GeventIOLoop

    def disconnect(self, reason: str = "Disconnected by the server.") -> None:
        """End this session: 426 for its transfer, 421 with *reason*, close. A turn that waits is ended.

        In the session's own turn it happens at once, else in the hub's next pass.
        """
        if current_session() is self:
            self._disconnect(one_line(reason))
        else:
            self.ioloop.submit(self._disconnect, one_line(reason), interrupt=True)

    def abort_transfer(self, reason: str = "Transfer aborted by the server.") -> None:
        """End this session's transfer with 426 and *reason*, but not the session.

        Without a transfer nothing happens. A turn that waits (for the file system, say) is ended.
        """
        reason = one_line(reason)
        if current_session() is self:
            if not self._end_transfer(f"426 {reason}") and self._transfers and not self._last_response:
                self.respond_w_warning(f"426 {reason}")
        elif self.command in TRANSFERS or transferring(self):
            self.ioloop.submit(self._abort_transfer, reason, self._transfers, interrupt=True)

    # --- runs in a worker greenlet: may wait

    def _disconnect(self, reason: str) -> None:
        if not self._closed:
            self._leaving = None  # 421 in place of QUIT's 221
            self._end_transfer(f"426 {reason}")
            self.respond_w_warning(f"421 {reason}")
            self._close_soon()

    def _abort_transfer(self, reason: str, number: int) -> None:
        command, self._interrupted = self._interrupted, None
        if self._closed:
            return
        if command is not None:  # it may be another one than the transfer's
            self.respond_w_warning(f"{426 if command in TRANSFERS else 451} {reason}")
        if number == self._transfers:
            self._end_transfer(f"426 {reason}")

    def finish(self, reason: str) -> None:
        """The server stops: 421 and close, unless a transfer runs; then when that ends."""
        if not self._closed and not self._closing and not transferring(self):
            self.respond(f"421 {reason}")
            self._close_soon()

    def finish_soon(self, reason: str) -> None:
        """The server stops, and the transfer has ended: 421 to the next command, or after FAREWELL_DELAY."""
        if not self._closed and not self.farewell:
            self.farewell = reason
            self.call_later(FAREWELL_DELAY, self.finish, reason)

    def cut(self, reason: str) -> None:
        """The server's time is up: 426, 421, close, whether the client reads it or not."""
        if not self._closed:
            self._leaving = None  # as above
            self._end_transfer(f"426 {reason}")
            self.respond(f"421 {reason}")
            self.close()

    def _close_soon(self) -> None:
        self.close_when_done()
        if not self._closed:
            self.call_later(LAST_REPLY_TIMEOUT, self.close)

    def _let_go(self, end: Callable[[Any], object], file: Any) -> None:
        """End the file of a transfer that has not begun, when the session ends, whatever that meets."""
        try:
            end(file)
        except (Exception, GreenletExit, Timeout) as error:
            self.log(f"cannot end {file.name}: {error!r}", logfun=logger.error)

    # --- pyftpdlib's methods

    def log(self, msg: str, logfun: Callable[..., None] = logger.info) -> None:
        """As pyftpdlib; bytes that are no text are `\\xNN`, since log handlers may write UTF-8 only."""
        super().log(encodable(msg), logfun)

    def logline(self, msg: str, logfun: Callable[..., None] = logger.debug) -> None:
        """As `log`."""
        super().logline(encodable(msg), logfun)

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """As pyftpdlib; also keeps `command` and `last_active`."""
        if self.farewell and cmd != "QUIT" and not transferring(self):
            self.finish(self.farewell)
            return
        self.command = cmd
        self.last_active = time.time()
        self._last_response = ""
        if cmd in TRANSFERS and not transferring(self):
            self._transfers += 1
        try:
            super().pre_process_command(line, cmd, arg)
        except Interrupt:
            if not self._last_response:
                self._interrupted = cmd
            raise
        except OSError as error:
            # From the file system, where pyftpdlib does not expect it to fail (validpath, say).
            if self._closed or self._last_response or error.errno not in LIMITS:
                raise
            self.respond_w_warning(f"451 {error.strerror}.")
        except AttributeError:
            # The session has ended with a reply in the middle of the command: `data_channel` is gone.
            if not self._closed:
                raise
        finally:
            self.command = None
            if self._recodes:
                self._recode_no_more()

    def run_as_current_user(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """As pyftpdlib; makes its 550 for an error of REPLY_CODES what that says."""
        try:
            return super().run_as_current_user(function, *args, **kwargs)
        except OSError as error:
            code = REPLY_CODES.get(error.errno or 0)
            if code is not None:
                self.recode_next_reply(code)
            raise

    def recode_next_reply(self, code: str) -> None:
        """Make it *code*, if pyftpdlib is about to call it 450 or 550."""

        def respond(resp: str, logfun: Any = logger.warning) -> None:
            self._recode_no_more()
            self.respond(code + resp[3:] if resp[:3] in ("450", "550") else resp, logfun)

        self.__dict__["respond"] = respond  # until it is called, or the command ends
        self._recodes = True

    def _recode_no_more(self) -> None:
        self._recodes = False
        self.__dict__.pop("respond", None)

    def ftp_MLSD(self, path: str) -> Any:
        """As pyftpdlib; 550 if nothing is there, 501 only for what is no directory (RFC 3659, 7.2.1)."""
        try:
            self.run_as_current_user(self.fs.lstat, path)
        except (OSError, FilesystemError) as error:
            self.respond(f"550 {strerror(error)}.")
            return None
        return super().ftp_MLSD(path)

    def ftp_RNTO(self, path: str) -> Any:
        """As pyftpdlib; to replace a file needs the right to delete it or to write it."""
        allowed = any(self.authorizer.has_perm(self.username, right, path) for right in "dw")
        if self._rnfr and not allowed and self.fs.lexists(path):
            self._rnfr = None
            self.respond("550 Not enough privileges to replace what is there.")
            return None
        return super().ftp_RNTO(path)

    def ftp_NLST(self, path: str) -> Any:
        """As pyftpdlib; a file system that has `format_nlst` makes the lines (bridge.filesystems.offload)."""
        format_nlst = getattr(self.fs, "format_nlst", None)
        if format_nlst is None:
            return super().ftp_NLST(path)
        try:
            if self.fs.isdir(path):
                listing = self.run_as_current_user(self.fs.listdir, path)
                listing.sort()
            else:
                self.fs.lstat(path)
                listing = [os.path.basename(path)]
        except (OSError, FilesystemError) as error:
            self.respond(f"550 {strerror(error)}.")
            return None
        self.push_dtp_data(BufferedIteratorProducer(format_nlst(listing)), isproducer=True, cmd="NLST")
        return path

    def close(self) -> None:
        """As pyftpdlib; then tells the server, after `on_disconnect`."""
        if self._over:
            return
        channel = getattr(self, "data_channel", None)
        closing = channel is not None and channel._closed  # its reply is what ends the session
        if channel is not None:
            channel._error = True  # no TLS shutdown, which nobody would wait for
        received = getattr(self, "_in_dtp_queue", None)
        if received is not None:
            self._in_dtp_queue = None  # pyftpdlib would close it
        sent = getattr(self, "_out_dtp_queue", None)
        if sent is not None:
            self._out_dtp_queue = None  # and end nothing else if that failed
        try:
            super().close()
        finally:
            if closing:
                self.data_channel = channel  # for _on_dtp_close, which it calls next
            if received is not None:
                self._let_go(give_up, received[0])
            if sent is not None and sent[2] is not None:
                self._let_go(_close, sent[2])
            ended = getattr(self.server, "session_ended", None)
            if self._closed and not self._over and ended is not None:
                self._over = True
                if self.ioloop.closed:
                    ended(self)
                else:
                    self.ioloop.after_turn(self, ended)  # behind on_disconnect

    # Over TLS, pyftpdlib goes past `close` in these two, straight to FTPHandler's.

    def handle_error(self) -> None:
        """As pyftpdlib, and all that `close` does; a client that cannot be reached is no error."""
        if is_unreachable(sys.exc_info()[1]):
            self.handle_close()
        else:
            super().handle_error()
        if self._closed:
            self.close()

    def _do_ssl_shutdown(self) -> None:
        super()._do_ssl_shutdown()
        if self._closed:
            self._error = True  # or `close` would try it again
            self.close()


def _close(file: Any) -> None:
    file.close()
