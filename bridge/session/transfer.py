"""Every transfer has one end, and the client is told of it: the control connection's half of transfers.

A mix-in under SessionMixin (control.py); the data connections' half is in ports.py and data.py.
What differs from pyftpdlib, and why:

- **A transfer whose data connection never comes ends with 425**, and its file is closed; so does one that the
  client gives up. pyftpdlib says 421, goes on, and starts the old transfer on the next data connection.
- **A transfer that has begun has an end**: 426 if the client asks for another data connection meanwhile, or
  ABORs before the first byte; pyftpdlib closes the file and says nothing.
- **QUIT waits for a transfer**, also for one whose data connection is still to come, and its 221 follows the
  transfer's reply. pyftpdlib says 221 first, and refuses the data connection that comes after it. A data
  connection that has no transfer is not waited for (pyftpdlib: 300 s).
- **One transfer at a time; else 503.** pyftpdlib gives the running one another file, and may then send from
  the first one's descriptor: closed, and by now perhaps another user's file (seen).
- **An upload that has failed is removed** if `keep_incomplete_uploads` says so, unless it was there before.
- The session may end in any reply that tells of a transfer, since the client may have left: what was opened
  for it is closed all the same.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pyftpdlib.log import logger

from bridge.session.addresses import plain
from bridge.session.data import transferring
from bridge.session.upload import give_up

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _dtp_acceptor, _dtp_connector, _in_dtp_queue, _out_dtp_queue, _restart_position,
# _make_epasv, _make_eport, _on_dtp_connection, _on_dtp_close; of DTPHandler: _resp, _closed, _initialized; of
# SSLConnectionMixin: _error.

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _FTPHandler = object

#: Commands that need a data connection.
TRANSFERS = frozenset({"RETR", "STOR", "STOU", "APPE", "LIST", "NLST", "MLSD"})


class TransferRepliesMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class."""

    _in_dtp_queue: Any
    _out_dtp_queue: Any
    _dtp_acceptor: Any
    _dtp_connector: Any
    data_channel: Any
    keep_incomplete_uploads: bool
    last_active: float
    #: Why the data connection failed before there was a command that it could be told to.
    _no_data_connection: str | None = None
    #: The argument of a QUIT that waits for the end of the transfer.
    _leaving: str | None = None
    #: Whether the upload makes a file that was not there.
    _fresh_upload = False

    def _end_transfer(self, reply: str) -> bool:
        """End the transfer that runs or is about to, with *reply*; False if there is none."""
        channel = getattr(self, "data_channel", None)
        if channel is not None and not channel._closed and channel._initialized:
            if not channel.transfer_finished:
                channel._resp = (reply, logger.warning)
            channel._error = True  # no TLS shutdown, for which the client may let us wait
            channel.close()
            return True
        return self._drop_queued(reply)

    def _drop_queued(self, reply: str) -> bool:
        """Answer the transfer that waits for its data connection; False if there is none."""
        received: Any = getattr(self, "_in_dtp_queue", None)
        sent: Any = getattr(self, "_out_dtp_queue", None)
        if self._closed or (received is None and sent is None):
            return False
        self._in_dtp_queue = self._out_dtp_queue = None
        self._shutdown_connecting_dtp()
        file: Any = sent[2] if sent is not None else received[0]  # None: a listing
        aborted = False
        if received is not None:
            aborted = self._give_up(file)
        elif file is not None:
            file.close()
        self.respond_w_warning(reply)
        try:
            if received is not None:
                self.on_incomplete_file_received(file.name)
                if not aborted:
                    self._remove_incomplete(file)
            elif file is not None:
                self.on_incomplete_file_sent(file.name)
        finally:
            self._transfer_ended(False)
        return True

    def _end_transfer_without_bytes(self) -> bool:
        """End a transfer of which no byte has passed: pyftpdlib does not reply then."""
        if not self._transfer_runs() or self.data_channel.transfer_in_progress():
            return False
        return self._end_transfer("426 Transfer aborted.")

    def _transfer_runs(self) -> bool:
        channel = self.data_channel
        return channel is not None and not channel._closed and channel._initialized

    def _awaits_data_connection(self) -> bool:
        """Whether PASV's or PORT's data connection may still come."""
        connector = self._dtp_connector  # pyftpdlib keeps it when it is connected
        connecting = connector is not None and self.ioloop.socket_map.get(connector._fileno) is connector
        return self._dtp_acceptor is not None or connecting

    def _transfer_ended(self, completed: bool) -> None:
        ended = getattr(self.server, "transfer_ended", None)
        if ended is not None:
            ended(self, completed)
        line, self._leaving = self._leaving, None
        if line is not None and not self._closed:
            self.add_channel()  # for what the client does not take at once
            self.ftp_QUIT(line)

    def data_connection_failed(self, reason: str) -> None:
        """Tell the client, with the reply to the transfer command it has sent or will send next."""
        if not self._drop_queued(f"425 Can't open data connection: {reason}."):
            self._no_data_connection = reason
            self.log(f"Can't open data connection: {reason}.", logfun=logger.warning)

    def _give_up_data_connection(self) -> None:
        self._no_data_connection = None
        if self._transfer_runs():
            self._end_transfer("426 Transfer aborted: the client asks for another data connection.")
        elif self._in_dtp_queue is not None or self._out_dtp_queue is not None:
            self._drop_queued("425 Can't open data connection: the client gave it up.")

    def _give_up(self, file: Any) -> bool:
        try:
            return give_up(file)
        except OSError as error:
            self.log(f"cannot end the incomplete {file.name}: {error}", logfun=logger.error)
            return hasattr(file, "abort")

    def _give_up_orphan(self) -> None:
        """The session was closed while pyftpdlib told the client that the file is open, and queued it."""
        received = getattr(self, "_in_dtp_queue", None)
        if self._closed and received is not None:
            del self._in_dtp_queue
            self._give_up(received[0])

    def _remove_incomplete(self, file: Any) -> None:
        if self.keep_incomplete_uploads or not self._fresh_upload or self.fs is None:
            return
        try:
            self.run_as_current_user(self.fs.remove, file.name)
        except Exception as error:
            self.log(f"cannot remove the incomplete {file.name}: {error}", logfun=logger.error)
        else:
            self.log(f"removed the incomplete {file.name}")

    # --- pyftpdlib's methods

    def process_command(self, cmd: str, *args: Any, **kwargs: Any) -> None:
        """As pyftpdlib; a transfer whose data connection has failed already gets its 425."""
        if cmd in TRANSFERS:
            if transferring(self):
                self.respond_w_warning("503 Wait for the end of the transfer.")
                return
            reason, self._no_data_connection = self._no_data_connection, None
            if reason is not None:
                self.respond_w_warning(f"425 Can't open data connection: {reason}.")
                return
        super().process_command(cmd, *args, **kwargs)

    def ftp_STOR(self, file: str, mode: str = "w") -> Any:
        """As pyftpdlib; notes whether the file is a new one."""
        self._fresh_upload = mode == "w" and not self._restart_position
        try:
            return super().ftp_STOR(file, mode)
        finally:
            self._give_up_orphan()

    def ftp_STOU(self, line: str) -> Any:
        """As pyftpdlib; the file is always a new one."""
        self._fresh_upload = True
        try:
            return super().ftp_STOU(line)
        finally:
            self._give_up_orphan()

    def push_dtp_data(
        self, data: Any, isproducer: bool = False, file: Any = None, cmd: str | None = None
    ) -> None:
        """As pyftpdlib; the session may end while the client is told that the transfer begins."""
        try:
            super().push_dtp_data(data, isproducer, file, cmd)
        finally:
            if self._closed:
                self._out_dtp_queue = None
                if file is not None:
                    file.close()

    def ftp_QUIT(self, line: str) -> None:
        """As pyftpdlib, once the transfer that was asked for before has ended (RFC 959, 4.1.1).

        Nothing more is read meanwhile, so the client may close the control connection. A data connection that
        has no transfer is not waited for, nor one that was never asked for (425).
        """
        if not self._transfer_runs() and not self._awaits_data_connection():
            self._drop_queued("425 Can't open data connection: no PASV, EPSV, PORT or EPRT came before.")
        elif transferring(self):
            self._leaving = line
            self.del_channel()
            return
        if self._closed:  # by the client, when it was told
            return
        channel = self.data_channel
        if channel is not None:
            channel._error = True  # no TLS shutdown
            channel.close()
        super().ftp_QUIT(line)

    def ftp_ABOR(self, line: str) -> None:
        """As pyftpdlib; also ends a transfer that waits for its data connection, or for its first byte."""
        if self._drop_queued("426 Transfer aborted via ABOR.") or self._end_transfer_without_bytes():
            self.respond("226 ABOR command successful.")
        else:
            super().ftp_ABOR(line)

    def flush_account(self) -> None:
        """As pyftpdlib; also ends a transfer that waits for its data connection, or for its first byte."""
        if not self._drop_queued("426 Transfer aborted."):
            self._end_transfer_without_bytes()
        super().flush_account()

    def _make_eport(self, ip: Any, port: int) -> None:
        ip = self._as_we_write_it(ip)
        self._give_up_data_connection()
        if not self._closed:
            super()._make_eport(ip, port)
        if self._closed:  # when it was told, and before pyftpdlib knows what it has opened for it
            self._shutdown_connecting_dtp()

    def _as_we_write_it(self, ip: str) -> str:
        """The client's own address, however *ip* writes it: pyftpdlib compares texts. Else *ip*."""
        try:
            theirs, ours = plain(ip), plain(self.remote_ip)
        except ValueError:
            return ip
        if theirs != ours:
            return ip
        return str(ours) if ours.version == 4 else self.remote_ip  # as pyftpdlib connects to it

    def _make_epasv(self, extmode: bool = False) -> None:
        self._give_up_data_connection()
        try:
            if not self._closed:
                super()._make_epasv(extmode)
        except OSError as error:
            self._shutdown_connecting_dtp()
            self.respond_w_warning(f"425 Can't open data connection: {error.strerror or error}.")
        if self._closed:  # as above
            self._shutdown_connecting_dtp()

    def _on_dtp_connection(self) -> None:
        """As pyftpdlib; the session may end while the client is told that the transfer is over.

        One that PORT has made may have been reset by now: pyftpdlib would wait for it for ever.
        """
        if self.data_channel._closed:
            self.data_channel = None
            self.data_connection_failed("it broke off")
            return
        try:
            super()._on_dtp_connection()
        except AttributeError:  # as in pre_process_command
            if not self._closed:
                raise

    def _on_dtp_close(self) -> None:
        channel = self.data_channel
        self.last_active = time.time()
        if self._closed:
            self.data_channel = None  # pyftpdlib would start the idle timer again
        else:
            super()._on_dtp_close()
        completed = channel is not None and channel.transfer_finished
        file = channel.file_obj if channel is not None and channel.receive else None
        if file is not None and not (completed or getattr(channel, "aborted", False)):
            self._remove_incomplete(file)
        self._transfer_ended(completed)
