"""What is logged of a session: a record for each event, with its facts beside its text.

A leaf of the package; output.py puts `RecordsMixin` before the command's handler class and formats what
comes. The texts are pyftpdlib's. What is added to each of its records is a dict, `record.ftp`:

    event, session, user, address, port, message; and with some events
    path, source, bytes, seconds, completed, code, command

Events: `connect`, `login`, `login_failed`, `disconnect`; for transfers of files `retr`, `stor`, `appe`,
`stou`; `dele`, `mkd`, `rmd`, `rename`; `command` for the others that pyftpdlib logs (CWD, MFMT, ...); `reply`
for a reply that is worth a line; `error`; `log` for other lines; with --debug `request` and `reply` for all.

A file's transfer is also a line of xferlog(5), for `XferlogMixin`.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyftpdlib.log import logger

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _log_debug, _last_response, _current_type; of SSLConnectionMixin: _ssl_established.

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # mix-ins: what they extend is the class they are put before
    _FTPHandler = object

Fields = dict[str, Any]

#: Lines of pyftpdlib that are events (control.py, `__init__` and `close`).
_OPENED = "FTP session opened (connect)"
_CLOSED = "FTP session closed (disconnect)."

#: The events of pyftpdlib's logged commands; others are `command`.
_COMMANDS = {"DELE": "dele", "MKD": "mkd", "XMKD": "mkd", "RMD": "rmd", "XRMD": "rmd", "RNTO": "rename"}


class RecordsMixin(_FTPHandler):
    """For a handler class: its log records say what happened, to whom. Put it before pyftpdlib's class."""

    #: What the next record is about, if its text does not tell: event and facts.
    _about: tuple[str, Fields] | None = None
    #: The path of the last RNFR.
    _renamed: str | None = None

    @functools.cached_property
    def session_id(self) -> str:
        """As SessionMixin's, which comes first where there is one."""
        return os.urandom(6).hex()

    # --- runs in a worker greenlet. pyftpdlib's methods

    def log(self, msg: str, logfun: Callable[..., None] = logger.info) -> None:
        """As pyftpdlib; what nobody will see costs nothing (most replies)."""
        if self._log_debug or logfun != logger.debug:
            about, self._about = self._about, None
            event, facts = about or self._recognized(msg)
            self._record(event, facts, msg, logfun)

    def logline(self, msg: str, logfun: Callable[..., None] = logger.debug) -> None:
        """As pyftpdlib."""
        if self._log_debug:
            if msg.startswith("-> "):
                self._record("reply", {"code": _code(msg[3:6])}, msg, logfun)
            else:
                self._record("request", {}, msg, logfun)

    def logerror(self, msg: str) -> None:
        """As pyftpdlib."""
        self._record("error", {}, msg, logger.error)

    def log_cmd(self, cmd: str, arg: str, respcode: int, respstr: str) -> None:
        """As pyftpdlib; in the debug log too, as the event that it is."""
        facts: Fields = {"command": cmd, "path": arg.strip(), "code": respcode}
        if cmd == "RNFR":
            self._renamed = arg if respcode < 400 else None
        elif cmd == "RNTO":
            facts["source"] = self._renamed
        self._about = _COMMANDS.get(cmd, "command"), facts
        try:
            super().log_cmd(cmd, arg, respcode, respstr)
            if self._log_debug and cmd in self.log_cmds_list:
                self.log(f"{cmd} {arg.strip()} {respcode}")
        finally:
            self._about = None

    def log_transfer(
        self, cmd: str | None, filename: str, receive: bool, completed: bool, elapsed: float, bytes: int
    ) -> None:
        """As pyftpdlib."""
        self._about = (
            (cmd or ("stor" if receive else "retr")).lower(),
            {
                "path": filename,
                "bytes": bytes,
                "seconds": elapsed,
                "completed": bool(completed),
                "code": _code(self._last_response[:3]),
            },
        )
        try:
            super().log_transfer(cmd, filename, receive, completed, elapsed, bytes)
        finally:
            self._about = None

    # --- helpers

    def _recognized(self, msg: str) -> tuple[str, Fields]:
        """Event and facts of one of pyftpdlib's texts."""
        if msg == _OPENED:
            return "connect", {}
        if msg == _CLOSED:
            return "disconnect", {"seconds": round(time.time() - self.started, 3)}
        if msg.startswith("USER '"):
            if msg == f"USER '{self.username}' logged in.":
                return "login", {}
            if msg.endswith("' failed login."):
                return "login_failed", {"user": msg[len("USER '") : -len("' failed login.")]}
        last = self._last_response
        if msg == last[4:]:
            return "reply", {"code": _code(last[:3])}
        return "log", {}

    def _record(self, event: str, facts: Fields, msg: str, logfun: Callable[..., None]) -> None:
        if logfun == logger.info and not logger.isEnabledFor(logging.INFO):  # --quiet
            return
        fields: Fields = {
            "event": event,
            "session": self.session_id,
            "user": self.username,
            "address": self.remote_ip,
            "port": self.remote_port,
            "message": msg,
        }
        fields.update(facts)
        # No arguments: the text is not a format.
        logfun(f"{self.log_prefix % self.__dict__} {msg}", extra={"ftp": fields})


def _code(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def fields_of(record: logging.LogRecord) -> Fields | None:
    """What a `RecordsMixin` has said of this record; None if it is somebody else's."""
    fields: Fields | None = getattr(record, "ftp", None)
    return fields


# --- xferlog(5)


class XferlogMixin(_FTPHandler):
    """For a handler class: a line for each file that was transferred or deleted. Behind `RecordsMixin`.

    - xferlog: takes the line; must not block.
    """

    xferlog: Callable[[str], None]
    session_id: str

    def log_transfer(
        self, cmd: str | None, filename: str, receive: bool, completed: bool, elapsed: float, bytes: int
    ) -> None:
        """As pyftpdlib, and xferlog."""
        super().log_transfer(cmd, filename, receive, completed, elapsed, bytes)
        type(self).xferlog(xferlog_line(self, filename, "i" if receive else "o", completed, elapsed, bytes))

    def log_cmd(self, cmd: str, arg: str, respcode: int, respstr: str) -> None:
        """As pyftpdlib, and xferlog."""
        super().log_cmd(cmd, arg, respcode, respstr)
        if cmd == "DELE" and respcode < 400:
            type(self).xferlog(xferlog_line(self, arg, "d"))


def xferlog_line(
    handler: Any,
    path: str,
    direction: str,
    completed: bool = True,
    elapsed: float = 0.0,
    bytes: int = 0,
    now: float | None = None,
) -> str:
    """A line of xferlog(5), as wu-ftpd, ProFTPD and vsftpd write it and their readers read it.

    - (str) direction: `i` for an upload, `o` for a download, `d` for a deletion (ProFTPD; of 0 bytes here).
    - (float) now: `time.time()` if None. The line has the local time.

    Fields are divided by spaces, so that what is a space or cannot be printed in one of them becomes `_`; the
    time is never 0 s (wu-ftpd, vsftpd). The *authenticated-user-id*, which is `*` elsewhere, is the
    session's: of the fields that could hold it, the one that all the readers we looked at leave free. They
    want `ftp` or `ftps` as the service name, and a digit as the authentication method.
    """
    return " ".join(
        (
            time.ctime(now),  # English, and the day of the month with a space before it, wherever we run
            str(max(1, round(elapsed))),
            _word(str(handler.remote_ip)) or "localhost",
            str(bytes),
            _word(path),
            "a" if handler._current_type == "a" else "b",
            "_",
            direction,
            "a" if handler.username == "anonymous" else "r",
            _word(handler.username) or "-",
            "ftps" if getattr(handler, "_ssl_established", False) else "ftp",
            "0",
            handler.session_id,
            "c" if completed else "i",
        )
    )


def _word(text: str) -> str:
    """*text* as one field: `isprintable` is false for every space but this one, and for invalid UTF-8."""
    if text.isprintable() and " " not in text:
        return text
    return "".join(each if each.isprintable() and each != " " else "_" for each in text)
