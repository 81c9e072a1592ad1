"""What an upload is worth when its data connection ends: complete or not, confirmed or refused.

A mix-in for data connections, part of `transfers.TransferMixin`, and what it shares with control connections;
a leaf of the package. It decides once, before TLS's goodbye and before the reply:

    the client has sent all? ── no ──► file.abort() (close() if it has none)  ──► 426, incomplete
            │ yes
    file.close() ── fails ──────────────────────────────────────────────────► 426, 451, 452 or 552, incomplete
            │
    confirm_uploads? ── on_file_received() refuses ───────────────────────────► 451 or 550
            │ no, or it accepts
           226

What comes meanwhile (ABOR, a kill, `disconnect`) finds a transfer that is not finished.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.log import logger

from bridge.filesystems import one_line

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of DTPHandler: _resp, _closed, _initialized, _data_wrapper; of SSLConnectionMixin: _ssl_accepting.
from pyftpdlib.exceptions import _FileReadWriteError  # isort: skip

if TYPE_CHECKING:
    from pyftpdlib.handlers import DTPHandler as _DTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _DTPHandler = object


#: OpenSSL.SSL.RECEIVED_SHUTDOWN, since pyOpenSSL need not be installed (SSL_get_shutdown(3)).
_RECEIVED_SHUTDOWN = 2


def cut_at_quota(file: Any, chunk: bytes, left: int) -> NoReturn:
    """Write the first *left* bytes of *chunk* (none if negative), then end the upload: 552."""
    try:
        if left > 0:
            file.write(chunk[:left])
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    except OSError as error:
        raise _FileReadWriteError(error) from error


def give_up(file: Any) -> bool:
    """Abort *file*, an upload that did not complete; if it cannot, close it. Whether it could.

    Raises what that does.
    """
    abort = getattr(file, "abort", None)
    if abort is None:
        file.close()
        return False
    abort()
    return True


class ReceivingMixin(_DTPHandler):
    """For a `dtp_handler` class, before pyftpdlib's."""

    _resp: Any
    _initialized: bool
    _data_wrapper: Callable[[bytes], bytes] | None
    transfer_finished: bool
    #: What has become of the upload is decided; what happens now can only end the connection.
    _settled = False
    #: The file was told that the upload did not complete, and has removed what there was, if that is its way.
    aborted = False

    def _fail(self, error: OSError) -> None:
        raise NotImplementedError

    def _settle(self) -> None:
        """Decide, once. May wait: for the file, and for `on_file_received`."""
        self._settled = True
        broke_off = self._broke_off()
        if broke_off:
            self.transfer_finished = False
        error = sys.exc_info()[1]
        if broke_off or is_bare_eof(error) or _is_reset(error):
            # No TLS shutdown: there is nobody to wait for, and OpenSSL fails it (pyftpdlib tries for ever).
            self._error = True
        failed = self._close_file()
        if failed is not None:
            replies = self._resp  # or else who closes it does: ABOR, PASV, the end of the session
            self._fail(failed)
            self._resp = replies and self._resp
        elif broke_off:
            self._resp = ("426 Connection broke off; transfer aborted.", logger.warning)
        elif self.transfer_finished and self._to_be_confirmed():
            self._confirm(self.file_obj.name)

    def _broke_off(self) -> bool:
        """Whether this is the end of the connection, but not of the file.

        pyftpdlib's recv() takes an error for the end of the file; it closes while it handles the error.
        """
        if self._initialized and not self._resp and getattr(self, "_ssl_accepting", False):
            return True
        error = sys.exc_info()[1] if self.receive and self.transfer_finished else None
        if isinstance(error, OSError):
            return True
        if _is_reset(error):
            return True
        if not is_bare_eof(error) or _has_said_goodbye(self.socket):
            return False
        return bool(getattr(self.cmd_channel, "require_close_notify", True))

    def _close_file(self) -> OSError | None:
        """Close or abort an uploaded file; what failed."""
        file = self.file_obj
        if not self.receive or file is None or file.closed:
            return None
        try:
            if self.transfer_finished:
                file.close()
            else:
                self.aborted = give_up(file)
        except OSError as error:
            return error
        except BaseException:
            self.transfer_finished, self._resp = False, ()
            raise
        return None

    # --- confirm_uploads

    def _to_be_confirmed(self) -> bool:
        wanted = self.receive and self.file_obj is not None
        return wanted and getattr(self.cmd_channel, "confirm_uploads", False)

    def _confirm(self, name: str) -> None:
        """Ask the program; until it has answered, the transfer is not finished."""
        control = self.cmd_channel
        reply, self._resp, self.transfer_finished = self._resp, (), False
        refusal = None
        try:
            if control.on_file_received(name) is False:
                refusal = "451 The server does not take the file"
        except FilesystemError as error:
            refusal = f"550 {one_line(error)}"
        except OSError as error:
            refusal = f"451 {error.strerror or 'The file cannot be taken now'}"
            self.log_exception(self)
        except Exception:
            refusal = "451 Internal error"
            self.log_exception(self)
        if self._closed:  # by the hook itself: it has aborted the transfer, or the session
            return
        if refusal is None:
            self._resp, self.transfer_finished = reply, True
            _skip_one_call(control, "on_file_received")
        else:
            self._resp = (f"{refusal}; upload refused.", logger.warning)
            _skip_one_call(control, "on_incomplete_file_received")

    # --- quota_left

    def _limit(self, left: int) -> None:
        """Let *left* more bytes into the file, then 552."""
        convert = self._data_wrapper

        def wrapper(chunk: bytes) -> bytes:
            nonlocal left
            if convert is not None:
                chunk = convert(chunk)
            left -= len(chunk)
            if left < 0:
                cut_at_quota(self.file_obj, chunk, len(chunk) + left)
            return chunk

        self._data_wrapper = wrapper


def is_bare_eof(error: BaseException | None) -> bool:
    """Whether *error* is TLS's: the connection ended without close_notify.

    With OpenSSL 3, pyOpenSSL raises SSL.Error ("unexpected eof while reading"); before, SysCallError with
    (-1, "Unexpected EOF"). By name, since pyOpenSSL need not be installed.
    """
    kind = type(error)
    if error is None or not kind.__module__.startswith("OpenSSL"):
        return False
    if kind.__name__ == "SysCallError":
        return bool(error.args[0] == -1)
    return kind.__name__ == "Error" and "unexpected eof" in str(error)


def _has_said_goodbye(sock: Any) -> bool:
    """Whether TLS's close_notify has come, whatever pyOpenSSL has raised.

    Java (JSSE) ends TLS 1.3 with `user_canceled` and close_notify: pyOpenSSL raises the error of a bare end.
    """
    return bool(getattr(sock, "get_shutdown", int)() & _RECEIVED_SHUTDOWN)


def _is_reset(error: BaseException | None) -> bool:
    """Whether *error* is what a system call of OpenSSL's has failed with. By name, as above."""
    return error is not None and type(error).__name__ == "SysCallError" and error.args[0] > 0


def _skip_one_call(control: Any, name: str) -> None:
    """pyftpdlib is about to call this method of *control*; the program has had its call."""

    def skip(_: str) -> None:
        control.__dict__.pop(name, None)

    control.__dict__[name] = skip
