"""What pyftpdlib lets clients do to the server, to themselves and to each other, and we do not.

A mix-in for control connections, part of `handlers.SessionMixin`; a leaf of the package.
(tests/proof/test_security.py has the attacks, with their sources.)

- **A NUL is in no command.** No file's name has one; Python's ValueError would end the session, with a
  traceback.
- **Replies and listings have the line breaks that we put there.** Names may have some, and whoever gives a
  directory such a name would write replies, and lines of listings, for others.
- **Only the client is told about its passive port.** pyftpdlib tells it in a reply of its own, 425, when
  somebody else connects there, so that any host can put the session's replies out of step.
- **A client has `timeout` seconds to log in**, however many commands it sends meanwhile.
- **STOU stays in the home**, by symbolic links too; pyftpdlib checks every path but this.
- **After AUTH one logs in again** (RFC 2228): who was there in the clear may have been somebody else.
- **PROT C closes the port of PASV where data connections need TLS** (`tls_data_required`); pyftpdlib checks
  only that PASV comes after PROT P.
- **A path that changes while it is looked at is 550.** os.path.realpath() raises FileNotFoundError when a
  link goes that was there (Python 3.11), and pyftpdlib ends the session, with a traceback. So is one that
  cannot be looked at (filesystems/local.py).
- **A listing of STAT that fails ends the session**, and the log says why: the reply's code, 213, has been
  said, and whatever else came would be taken for a part of it.
- **SITE CHMOD sets no set-user-id and no set-group-id bit**: whoever may run the file would be the server's
  user.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.ioloop import AsyncChat
from pyftpdlib.log import logger

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _last_response, _shutdown_connecting_dtp; of TLS_FTPHandler: _prot.

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _FTPHandler = object

#: Commands whose data connection has names in it, one on each line.
LISTINGS = frozenset({"LIST", "NLST", "MLSD"})

#: How pyftpdlib's reply to somebody else's data connection begins.
_STRANGER = "425 Rejected data connection from foreign address"

#: What is raised when a path has changed between one look and the next.
_CHANGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ELOOP})

#: What passes, which control.py answers with 451.
_LATER = frozenset({errno.EAGAIN, errno.ETIMEDOUT})

#: A line break that ends no line. (vsftpd writes `?`, too.)
_BREAK = re.compile(r"\r(?!\n)|(?<!\r)\n")
_BREAK_BYTES = re.compile(_BREAK.pattern.encode())


def _whole_lines(data: bytes) -> bytes:
    """*data* without line breaks that end no line. (To count first takes a tenth of the time.)"""
    if data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r"):
        return data
    return _BREAK_BYTES.sub(b"?", data)


class Lines:
    """A producer whose lines are broken by CRLF only. *producer* yields whole lines."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer

    def more(self) -> bytes:
        """The next lines; empty at the end."""
        return _whole_lines(self._producer.more())


class _Unfinished(Exception):
    """A reply of several lines that cannot go on."""


class _Status(Lines):
    """STAT's listing. *failed*: called with its error."""

    def __init__(self, producer: Any, failed: Callable[[Exception], None]) -> None:
        super().__init__(producer)
        self._failed = failed

    def more(self) -> bytes:
        """The next lines; empty at the end."""
        try:
            return super().more()
        except (OSError, FilesystemError) as error:
            self._failed(error)
            raise _Unfinished from error


class HardeningMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class."""

    ac_in_buffer: bytes
    attempted_logins: int
    _prot: bool
    #: `time.time()` since when nobody is logged in.
    _unknown_since: float

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        self._unknown_since = time.time()
        super().__init__(conn, server, ioloop)

    # --- runs in a worker greenlet. What comes

    # (A method here that every command passes through costs 2 % of it: a call that is not in the caches.)

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """As pyftpdlib, unless it is too late to log in, and without NUL.

        550 if the path changes meanwhile, or cannot be looked at.
        """
        if not self.authenticated and self.timeout and time.time() - self._unknown_since > self.timeout:
            self.ac_in_buffer = b""
            self.handle_timeout()
            return
        if "\0" in line:
            self.respond("501 A command has no NUL in it.")
            return
        self._last_response = ""
        try:
            super().pre_process_command(line, cmd, arg)
        except OSError as error:
            of_path = error.errno in _CHANGED or (error.filename is not None and error.errno not in _LATER)
            if not of_path or self._last_response or self._closed:
                raise
            self.respond(f"550 {error.strerror}.")

    def ftp_AUTH(self, line: str) -> None:
        """As pyftpdlib; whoever was logged in no longer is."""
        super().ftp_AUTH(line)
        if not self._closed and self._last_response.startswith("234"):
            self.flush_account()

    def ftp_PROT(self, line: str) -> None:
        """As pyftpdlib; where TLS is required, PROT C does not get rid of it."""
        super().ftp_PROT(line)
        if not (self._closed or self._prot) and getattr(self, "tls_data_required", False):
            self._shutdown_connecting_dtp()

    def flush_account(self) -> None:
        """As pyftpdlib; AUTH gives nobody more time to log in, and makes up for no failed login."""
        if self.authenticated:
            self._unknown_since = time.time()
        failed = self.attempted_logins
        super().flush_account()
        self.attempted_logins = failed

    def ftp_STOU(self, line: str) -> Any:
        """As pyftpdlib, in the home."""
        if line and not self.fs.validpath(self.fs.ftp2fs(line)):
            self.respond("550 That is outside the user's root directory.")
            return None
        return super().ftp_STOU(line)

    def ftp_SITE_CHMOD(self, path: str, mode: str) -> Any:
        """As pyftpdlib, of the file's permissions only (and the sticky bit)."""
        if len(mode) == 4 and mode[0] in "234567":
            self.respond("550 Set-user-id and set-group-id are not for clients.")
            return None
        return super().ftp_SITE_CHMOD(path, mode)

    # --- what goes

    def push(self, data: str) -> None:
        """As pyftpdlib; *data* are lines that end with CRLF, and have no other breaks."""
        if not data.find("\r") == len(data) - 2 == data.find("\n") - 1:  # more than one line
            data = _BREAK.sub("?", data)
        try:
            super().push(data)
        except UnicodeEncodeError:  # pyftpdlib does not use `unicode_errors` here
            AsyncChat.push(self, data.encode(self.encoding, self.unicode_errors))

    def push_with_producer(self, producer: Any) -> None:
        """As pyftpdlib; this is STAT's listing. If that fails, the session ends."""
        super().push_with_producer(_Status(producer, self._status_failed))

    def _status_failed(self, error: Exception) -> None:
        self.log(f"STAT ends the session, for its listing failed: {error}", logfun=logger.warning)

    def handle_error(self) -> None:
        """As pyftpdlib; a reply that cannot go on has been told."""
        if isinstance(sys.exc_info()[1], _Unfinished):
            self.handle_close()
        else:
            super().handle_error()

    def push_dtp_data(self, data: Any, isproducer: bool = False, file: Any = None, cmd: Any = None) -> None:
        """As pyftpdlib; listings have a line for each name."""
        if cmd in LISTINGS:
            data = Lines(data) if isproducer else _whole_lines(data)
        super().push_dtp_data(data, isproducer, file, cmd)

    def respond_w_warning(self, resp: str) -> None:
        """As pyftpdlib; what a stranger does is no reply, and only logged. The port stays open."""
        if resp.startswith(_STRANGER):
            self.log(resp[4:], logfun=logger.warning)
        else:
            super().respond_w_warning(resp)
