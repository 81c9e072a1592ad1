"""What takes too long: turns that wait, and code that blocks the hub. Names them in the log.

A leaf of the package. `LongWaits` is the ioloop's: it sees a turn begin to wait and arms one timer, so
nothing runs while nothing waits. `watch_hub` is for programs: it puts gevent's own monitor thread to work
and says which FTP session it caught. Both log to `bridge.loop.monitor`, WARNING, once per episode.
"""

from __future__ import annotations

import faulthandler
import linecache
import logging
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import gevent

# --- private names of gevent this module stands on (tests/test_structure.py checks that they exist): of the
# monitor thread: _greenlet_tracer.

log = logging.getLogger(__name__)

#: A call that somebody is in: file, line, function.
Call = tuple[str, int, str]
_CALL = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
#: How faulthandler writes a character that is not ASCII (surrogates stay so: not every log can print them).
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u(?!d[89a-f])([0-9a-f]{4})|U([0-9a-f]{8}))")

#: Code that only passes a wait on: whose line it is stands further out.
_PASSING = (
    os.path.dirname(gevent.__file__) + os.sep,
    os.path.join(os.path.dirname(__file__), "turns.py"),
)
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_SITE_PACKAGES = tuple(os.path.join(_STDLIB, name) for name in ("site-packages", "dist-packages"))


class LongWaits:
    """Names each turn that has waited for *limit* seconds (0: none). Borrows *hub*, owns a timer."""

    def __init__(self, hub: Any, limit: float) -> None:
        self._hub = hub
        self._limit = limit
        self._timer: Any = None
        self._waiting: set[Any] = set()

    def close(self) -> None:
        """Release the timer."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    # --- runs in the hub: must not block

    def on_wait(self, waiting: set[Any]) -> None:
        """A turn begins to wait; *waiting* are all workers whose turn does."""
        if self._limit and self._timer is None:
            self._waiting = waiting
            self._arm(self._limit)

    def _arm(self, seconds: float) -> None:
        seconds = max(seconds, self._hub.loop.approx_timer_resolution)
        self._timer = self._hub.loop.timer(seconds, ref=False)
        self._timer.start(self._on_timer)

    def _on_timer(self) -> None:
        self.close()
        now = time.monotonic()
        longest = -1.0
        for worker in list(self._waiting):
            waited = now - worker.waiting_since
            if worker.named:
                continue
            if waited < self._limit:
                longest = max(longest, waited)
                continue
            worker.named = True
            log.warning(
                "%s has waited %.1f s in its turn, at %s",
                "a turn of no session" if worker.control is None else repr(worker.control),
                waited,
                place(calls_of(worker.gr_frame)),
            )
        if longest >= 0:
            self._arm(self._limit - longest)


def calls_of(frame: FrameType | None) -> Iterator[Call]:
    """Those that *frame*, of a greenlet of this thread, is in."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def calls_in(thread: int) -> list[Call]:
    """Those that another thread is in.

    faulthandler looks at them without giving up the GIL. Whoever goes from frame to frame in Python, as
    gevent's reports do, gives it up sometimes, and the thread goes on and switches greenlets meanwhile.
    If there is no descriptor for that, only the innermost.
    """
    try:
        dump = _dump()
    except OSError:
        dump = b""
    text = dump.decode("ascii", "replace")
    text = _ESCAPED.sub(lambda found: chr(int(found[found.lastindex or 0], 16)), text)
    for part in text.split("\n\n"):
        head, _, lines = part.partition("\n")
        calls = [(found[1], int(found[2]), found[3]) for found in _CALL.finditer(lines)]
        # (Who is about to start has its parent's number, and no calls.)
        if calls and f"0x{thread:016x} " in head:
            return calls
    frame = sys._current_frames().get(thread)  # faulthandler tells of 100 threads, the youngest
    return [] if frame is None else [(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)]


def _dump() -> bytes:
    """What faulthandler says of the threads. OSError if there is no descriptor for that."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("calls"), "w+b") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # what does not fit is left out
    with open(reader, "rb") as pipe, open(writer, "wb") as file:
        faulthandler.dump_traceback(file)
        file.close()
        return pipe.read()


def place(calls: Iterable[Call]) -> str:
    """The innermost of *calls* that is neither gevent's nor the standard library's, for the log."""
    innermost = None
    for call in calls:
        innermost = innermost or call
        name = call[0]
        passing = name.startswith(_PASSING) or name.startswith("<frozen")
        if name.startswith(_STDLIB) and not name.startswith(_SITE_PACKAGES):
            passing = True
        if not passing:
            break
    else:
        if innermost is None:
            return "an unknown line"
        call = innermost
    name, line, function = call
    source = linecache.getline(name, line).strip()
    return f"{name}:{line} in {function}" + (f": {source}" if source else "")


def watch_hub(hub: Any, limit: float | None = None) -> Callable[[], None]:
    """Name what blocks *hub*, which must be this thread's, for longer than *limit* seconds.

    None for gevent's own limit (GEVENT_MAX_BLOCKING_TIME, 0.1). Starts gevent's monitor thread for this hub
    if it does not run yet, and keeps it from printing reports of its own, which like the limit is gevent's
    setting for the whole process. Installs gevent's greenlet tracer in this thread, which costs a call for
    each switch.

    Returns a function that ends it.
    """
    gevent.config.print_blocking_reports = False
    if limit is not None:
        gevent.config.max_blocking_time = limit
    others = gevent.config.monitor_thread
    gevent.config.monitor_thread = True  # else nothing starts; left so, every new hub would start one
    try:
        with warnings.catch_warnings():
            # that psutil is missing, without which gevent cannot watch the memory (the `monitor` extra)
            warnings.simplefilter("ignore", RuntimeWarning)
            thread = hub.start_periodic_monitoring_thread()
    finally:
        gevent.config.monitor_thread = others
    # In place of gevent's own look, which makes its report whether it is printed or not (see calls_in).
    thread.monitoring_functions()[0].function = _Blocked(thread._greenlet_tracer).look

    def end() -> None:
        if hub.periodic_monitoring_thread is thread:
            thread.kill()
            hub.periodic_monitoring_thread = None

    return end


class _Blocked:
    """Looks at a hub again and again, and says so once when it is blocked. *tracer*: gevent's."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._blocked = False

    # --- runs in gevent's monitor thread: no gevent

    def look(self, hub: Any) -> None:
        """Whether there was a switch since the last look, and if not, where."""
        before, found = self._blocked, self._tracer.did_block_hub(hub)
        self._blocked = bool(found)
        if self._blocked and not before:  # one episode
            who = found[1]
            control = getattr(who, "control", None)
            log.warning(
                "%s blocks the hub for more than %g s, at %s; everybody waits "
                "(hand blocking work to gevent.get_hub().threadpool)",
                repr(who) if control is None else repr(control),
                gevent.config.max_blocking_time,
                place(calls_in(hub.thread_ident)),
            )
