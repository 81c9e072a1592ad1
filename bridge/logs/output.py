"""The command's log: readable or JSON lines, to stderr or a file, and xferlog; reopened on a signal.

A feature of the command (ftp/application.py). records.py says what is logged, writer.py takes the lines to
where they go without ever blocking the hub; in here are the options, the two formats, and the handler between
them.

Nothing that a client sends can forge a line or write to the operator's terminal: in text, what cannot be
printed is escaped, and the further lines of a traceback are indented; JSON is plain ASCII.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from bridge.filesystems import encodable, printable
from bridge.logs.records import fields_of
from bridge.logs.writer import Writer
from bridge.loop import current_session
from bridge.server import ConfigError

log = logging.getLogger(__name__)

#: Seconds the end of the process waits for what is not yet written: a disk gets there, a stuck pipe does not.
FLUSH = 2.0

#: Whose records the command shows.
LOGGERS = ("pyftpdlib", "bridge")

#: Of a terminal (ECMA-48), as pyftpdlib's and Tornado's: blue, green, yellow, red.
_COLOURS = {logging.DEBUG: "34", logging.INFO: "32", logging.WARNING: "33", logging.ERROR: "31"}

_TRACEBACK = "Traceback (most recent call last):\n"


class Logs:
    """Where the log of this run goes: nowhere, until it is `installed`.

    - (str) file: path of the log, None for stderr.
    - (str) xferlog_file: path of the xferlog, None for none.
    - (bool) json_lines: an object of JSON in each line, not text.
    - (int) level: of `logging`, for the loggers of LOGGERS.
    """

    def __init__(
        self,
        file: str | None = None,
        xferlog_file: str | None = None,
        json_lines: bool = False,
        level: int = logging.INFO,
    ) -> None:
        self._file = file
        self._xferlog_file = xferlog_file
        self._json_lines = json_lines
        self._level = level
        self._writers: list[Writer] = []
        self._xferlog: Writer | None = None

    @contextlib.contextmanager
    def installed(self, process: bool = False) -> Iterator[None]:
        """Open the files, and log to them; at the end wait up to FLUSH seconds for each, and close them.

        - (bool) process: whether several processes log: lines of text say which. (Those of JSON always do.)

        Changes settings of the `logging` module, and puts them back. Raises ConfigError.
        """
        colours = not self._file and coloured(sys.stderr)
        formatter = JsonFormatter() if self._json_lines else TextFormatter(process, colours)

        def notice(number: int) -> str:
            text = f"{_lines(number)} dropped here: they came faster than they could be written"
            return formatter.format(logging.LogRecord(log.name, logging.WARNING, __file__, 0, text, (), None))

        def xferlog_notice(number: int) -> None:
            log.warning("%s dropped from %s", _lines(number), self._xferlog_file)

        loggers = [logging.getLogger(name) for name in LOGGERS]
        levels = [logger.level for logger in loggers]
        with contextlib.ExitStack() as stack:
            writer = self._open("--log-file", self._file, notice)
            stack.callback(writer.close, FLUSH)
            if self._xferlog_file:
                self._xferlog = self._open("--xferlog", self._xferlog_file, xferlog_notice)
                stack.callback(self._xferlog.close, FLUSH)
            stack.callback(self._writers.clear)
            handler = LogHandler(writer, formatter)
            for logger, before in zip(loggers, levels, strict=True):
                stack.callback(logger.setLevel, before)
                stack.callback(logger.removeHandler, handler)
                logger.setLevel(self._level)
                logger.addHandler(handler)
            stack.enter_context(_quick_records())
            yield

    def _open(self, option: str, path: str | None, notice: Any) -> Writer:
        try:
            # An absolute path: a daemon may change its directory, and opens the file again.
            writer = Writer(None if path is None else os.path.abspath(path), notice=notice)
        except OSError as error:
            raise ConfigError(f"{option}: cannot append to {path!r}: {error.strerror}") from None
        self._writers.append(writer)
        return writer

    def reopen(self) -> None:
        """Go on in new files of the same names (logrotate). From everywhere; does not block."""
        for writer in self._writers:
            writer.reopen()

    def xferlog(self, line: str) -> None:
        """Log a transfer. From everywhere; does not block."""
        if self._xferlog is not None:
            self._xferlog.put(line)


def _lines(number: int) -> str:
    return "1 line was" if number == 1 else f"{number} lines were"


@contextlib.contextmanager
def _quick_records() -> Iterator[None]:
    """Let `logging` not find out what no line shows: its HOWTO's "Optimization", as pyftpdlib does."""
    names = ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile")
    before = {name: getattr(logging, name) for name in names if hasattr(logging, name)}
    for name in before:
        setattr(logging, name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(logging, name, value)


def coloured(stream: IO[str]) -> bool:
    """Whether *stream* is a terminal that takes colours, and whose user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


# --- runs wherever something is logged: must not block


class LogHandler(logging.Handler):
    """Formats records at once and leaves the lines to a `Writer`. Has no lock: nothing in it waits."""

    def __init__(self, writer: Writer, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = writer

    def createLock(self) -> None:
        """As logging's; none, so that it is no lock of gevent's that native threads would meet in."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """As logging's, without the lock."""
        if not self.filter(record):
            return False
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Queue its line."""
        try:
            self._writer.put(self.format(record))
        except Exception:
            self.handleError(record)


def _parts(record: logging.LogRecord) -> tuple[str, str]:
    """Message and traceback. pyftpdlib logs tracebacks as messages."""
    message = record.getMessage()
    trace = ""
    if record.exc_info:
        trace = record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
    elif message.startswith(_TRACEBACK):
        trace = message.rstrip("\n")
        message = trace.rpartition("\n")[2]
    return message, trace


def _session() -> str | None:
    """Whose turn logs this."""
    handler = current_session()
    return None if handler is None else getattr(handler, "session_id", None)


class TextFormatter(logging.Formatter):
    """pyftpdlib's lines, `[LEVEL TIME] MESSAGE`, with the session before the message.

    - (bool) process: add the process to what is in brackets.
    - (bool) coloured: colour the brackets by level.
    """

    def __init__(self, process: bool = False, coloured: bool = False) -> None:
        super().__init__()
        self._process = process
        self._coloured = coloured
        self._second = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        """The line or, with a traceback, the lines, all but the first of which are indented."""
        second, local = self._second  # in one step: other threads are here too
        if second != int(record.created):
            second = int(record.created)
            local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = (second, local)
        head = f"[{record.levelname[0]} {local}{f' {os.getpid()}' if self._process else ''}]"
        if self._coloured:
            head = f"\x1b[{_COLOURS.get(record.levelno, '31')}m{head}\x1b[0m"
        message, trace = _parts(record)
        fields = fields_of(record)
        session = _session() if fields is None else fields["session"]
        line = f"{head} {session} {printable(message)}" if session else f"{head} {printable(message)}"
        if trace:
            line = "\n    ".join((line, *map(printable, trace.split("\n"))))
        return line


class JsonFormatter(logging.Formatter):
    """An object of JSON in one line of ASCII. What is not known of a record is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._encode = json.JSONEncoder(separators=(",", ":"), default=str).encode

    def format(self, record: logging.LogRecord) -> str:
        """The line. Its keys: time, level, logger, pid, session, event, ... (records.py), message, exc."""
        created = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        message, trace = _parts(record)
        line: dict[str, Any] = {
            "time": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
        }
        fields = fields_of(record)
        if fields is None:
            error = record.levelno >= logging.ERROR
            fields = {"event": "error" if error else "log", "session": _session(), "message": message}
        line |= {key: _text(value) for key, value in fields.items() if value is not None and value != ""}
        if trace:
            line["exc"] = encodable(trace)
        return self._encode(line)


def _text(value: Any) -> Any:
    return encodable(value) if isinstance(value, str) else value
