"""What a program is told and asked, beyond pyftpdlib's nine callbacks, and where that happens.

A leaf of the package. `Events` is the list, with what each does by default; control.py puts it last among
a handler class's bases, so that it hides nothing. `EventsMixin` comes first, and calls. Like pyftpdlib's
callbacks all run in the session's turn and may wait: the client's next command waits too, and nobody else.
One that raises is logged and ends its session; `on_transfer_started` and `on_transfer_progress`, only the
transfer (426).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyftpdlib.exceptions import FilesystemError

from bridge.filesystems import one_line

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _last_response, _rnfr, _in_dtp_queue, _out_dtp_queue, _closed; of DTPHandler: _closed,
# _initialized.


@dataclass(frozen=True)
class Transfer:
    """A transfer of a session at one moment."""

    #: RETR, STOR, LIST, ...
    command: str
    #: The file's absolute path on this system; None for a listing.
    path: str | None
    #: "upload" or "download", as the client sees it.
    direction: str
    #: Bytes that have passed the data connection.
    bytes: int
    #: Seconds since the data connection was opened; 0 while it is waited for.
    seconds: float
    #: Whose it is.
    user: str = ""

    @property
    def rate(self) -> float:
        """Bytes per second since the data connection was opened."""
        return self.bytes / self.seconds if self.seconds else 0.0


def transfer_of(handler: Any) -> Transfer | None:
    """What *handler* transfers, if it does (`bridge.session.data.transferring`)."""
    channel = getattr(handler, "data_channel", None)
    if channel is not None:
        return Transfer(
            command=channel.cmd or handler.command or "",
            path=_path(channel.file_obj),
            direction="upload" if channel.receive else "download",
            bytes=channel.get_transmitted_bytes(),
            seconds=channel.get_elapsed_time(),
            user=handler.username,
        )
    received = getattr(handler, "_in_dtp_queue", None)
    if received is not None:
        return Transfer(received[1], _path(received[0]), "upload", 0, 0.0, handler.username)
    sent = getattr(handler, "_out_dtp_queue", None)
    if sent is not None:
        return Transfer(sent[3], _path(sent[2]), "download", 0, 0.0, handler.username)
    return None  # it has ended since, in another thread


def _path(file: Any) -> str | None:
    return None if file is None else str(file.name)


class Events:
    """Set or override these in your handler class; paths are absolute, on this system.

    `self.username` is whose session it is, `self.remote_ip` where from.

    - (bool) confirm_uploads: True calls `on_file_received` before the 226 is sent, so that 226 can mean "it
      is in the database". The client hears 451 if it returns False or raises, 550 and the text if it raises
      pyftpdlib's FilesystemError; then no other callback is called, and `keep_incomplete_uploads` says what
      becomes of the file. If the turn is killed meanwhile, `on_incomplete_file_received` is called.
      Default False: after the 226, as pyftpdlib.
    - (bool) keep_incomplete_uploads: False removes the file of a STOR or STOU that did not complete,
      after `on_incomplete_file_received`. Never what was there before (APPE, REST). Default True, as
      pyftpdlib.
    - (bool) require_close_notify: an upload over TLS that ends without TLS's goodbye may have been cut, by
      anybody: 426. False for clients that never send it (vsftpd: strict_ssl_read_eof). Default True.
    - (float) progress_interval: seconds between two calls of `on_transfer_progress` for a transfer.
    """

    confirm_uploads = False
    keep_incomplete_uploads = True
    require_close_notify = True
    progress_interval = 1.0

    def quota_left(self, user: str, path: str) -> int | None:
        """How many bytes more *user* may store in *path*, None for no limit. May wait.

        Asked once for each STOR, APPE and STOU (*path*: the name that was asked for, or the directory),
        before the file is opened, and for ALLO (*path*: the current directory). Nothing left: 552;
        FilesystemError: 550. An upload that is longer is stored to the last byte of it, then 552, and is
        incomplete. What the file that is overwritten will free is for you to add; nothing reserves bytes for
        uploads that run.
        """
        return None

    def on_file_deleted(self, file: str) -> None:
        """*file* was removed by the client (DELE); the reply is on its way."""

    def on_file_renamed(self, src: str, dst: str) -> None:
        """*src*, a file or directory, is called *dst* now (RNFR, RNTO)."""

    def on_directory_made(self, path: str) -> None:
        """The client has made a directory (MKD)."""

    def on_directory_removed(self, path: str) -> None:
        """The client has removed a directory (RMD)."""

    def on_transfer_started(self, transfer: Transfer) -> None:
        """The data connection for a file (not a listing) is there; no byte has passed it."""

    def on_transfer_progress(self, transfer: Transfer) -> None:
        """Bytes of a file have passed since the last call; at most every `progress_interval` seconds.

        Not for the last bytes, which `on_file_received` and `on_file_sent` tell.
        """


if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler

    class _Handler(_FTPHandler, Events): ...
else:  # a mix-in: what it extends is the class it is put before
    _Handler = object


class EventsMixin(_Handler):
    """For a handler class: calls what is in `Events`. Put it before pyftpdlib's class, and that last."""

    #: Bytes the next upload may have; None for no limit.
    _upload_limit: int | None = None

    # --- runs in a worker greenlet: may wait. pyftpdlib's methods

    def _succeeded(self) -> bool:
        return not self._closed and str(self._last_response)[:1] == "2"

    def ftp_DELE(self, path: str) -> Any:
        """As pyftpdlib, and the event."""
        result = super().ftp_DELE(path)
        if self._succeeded():
            self.on_file_deleted(path)
        return result

    def ftp_RNTO(self, path: str) -> Any:
        """As pyftpdlib, and the event."""
        src = self._rnfr
        result = super().ftp_RNTO(path)
        if self._succeeded():
            self.on_file_renamed(src, path)
        return result

    def ftp_MKD(self, path: str) -> Any:
        """As pyftpdlib, and the event."""
        result = super().ftp_MKD(path)
        if self._succeeded():
            self.on_directory_made(path)
        return result

    def ftp_RMD(self, path: str) -> Any:
        """As pyftpdlib, and the event."""
        result = super().ftp_RMD(path)
        if self._succeeded():
            self.on_directory_removed(path)
        return result

    def ftp_ALLO(self, line: str) -> None:
        """As pyftpdlib; 552 for more than `quota_left`."""
        size = (line.split() or [""])[0]
        if size.isascii() and size.isdigit() and not self._has_room(self.fs.ftp2fs(self.fs.cwd), int(size)):
            return
        super().ftp_ALLO(line)

    def ftp_STOR(self, file: str, mode: str = "w") -> Any:
        """As pyftpdlib; 552 if nothing is left."""
        if not self._has_room(file):
            self._restart_position = 0
            return None
        return super().ftp_STOR(file, mode)

    def ftp_STOU(self, line: str) -> Any:
        """As pyftpdlib; 552 if nothing is left."""
        if not self._has_room(self.fs.ftp2fs(line or self.fs.cwd)):
            return None
        return super().ftp_STOU(line)

    def _has_room(self, path: str, size: int = 1) -> bool:
        """Whether *size* bytes more may be stored; else the client is told."""
        try:
            self._upload_limit = left = self.quota_left(self.username, path)
        except FilesystemError as error:
            self.respond_w_warning(f"550 {one_line(error)}.")
            return False
        if left is not None and left < size:
            self.respond_w_warning(f"552 Quota exceeded: {max(left, 0)} bytes are left.")
            return False
        return True


class StartingMixin:
    """For a `dtp_handler` class: tells when a file's transfer starts, and how it goes."""

    cmd_channel: Any
    ioloop: Any
    file_obj: Any
    _closed: bool
    _initialized: bool
    _progress: Any = None
    _told = 0

    def _start(self) -> bool:
        """Tell the program; False if it has ended the transfer."""
        control = self.cmd_channel
        if self.file_obj is None or not isinstance(control, EventsMixin):
            return True
        self._initialized = True  # so that it can be ended
        kind = type(control)
        try:
            if kind.on_transfer_started is not Events.on_transfer_started:
                control.on_transfer_started(transfer_of(control))  # type: ignore[arg-type]
        except Exception:
            self.handle_error()  # type: ignore[attr-defined]
        if self._closed:
            return False
        if kind.on_transfer_progress is not Events.on_transfer_progress:
            self._progress = self.ioloop.call_every(
                control.progress_interval,
                self._on_progress,
                _errback=self.handle_error,  # type: ignore[attr-defined]
            )
        return True

    def _on_progress(self) -> None:
        if self._closed:  # it was closed without us: after an error over TLS
            self._end_progress()
            return
        transfer = transfer_of(self.cmd_channel)
        if transfer is not None and transfer.bytes > self._told:
            self._told = transfer.bytes
            self.cmd_channel.on_transfer_progress(transfer)

    def _end_progress(self) -> None:
        if self._progress is not None:
            if not self._progress.cancelled:
                self._progress.cancel()
            self._progress = None
