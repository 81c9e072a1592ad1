"""What takes too long: turns that wait, and code that blocks the hub. Names them in the log.

A leaf of the package. `LongWaits` is the ioloop's: it sees a turn begin to wait and arms one timer, so
nothing runs while nothing waits. `watch_hub` is for programs: it puts gevent's own monitor thread to work
and says which FTP session it caught. Both log to `bridge.monitor`, WARNING, once per episode.
"""

from __future__ import annotations

import linecache
import logging
import os
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent
import gevent.events

log = logging.getLogger(__name__)

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
                place(worker.gr_frame),
            )
        if longest >= 0:
            self._arm(self._limit - longest)


def place(frame: FrameType | None) -> str:
    """The innermost line that is neither gevent's nor the standard library's, for the log."""
    innermost = frame
    while frame is not None:
        name = frame.f_code.co_filename
        passing = name.startswith(_PASSING) or name.startswith("<frozen")
        if name.startswith(_STDLIB) and not name.startswith(_SITE_PACKAGES):
            passing = True
        if not passing:
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown line"
    name, line, function = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
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
    reporter = _Blocked(hub)
    thread.add_monitoring_function(reporter.looked, gevent.config.max_blocking_time)
    gevent.events.subscribers.append(reporter)

    def end() -> None:
        if reporter in gevent.events.subscribers:
            gevent.events.subscribers.remove(reporter)
            thread.kill()
            hub.periodic_monitoring_thread = None

    return end


class _Blocked:
    """Subscribes to gevent's events, which come again and again while the hub is blocked."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._looks = 0
        self._last = -2

    # --- runs in gevent's monitor thread: no gevent

    def looked(self, hub: object) -> None:
        """The thread has looked, and called us if there was something to see."""
        self._looks += 1

    def __call__(self, event: object) -> None:
        if not isinstance(event, gevent.events.EventLoopBlocked) or event.hub is not self._hub:
            return
        # An event each time the thread looks and has seen no switch since: one episode.
        goes_on = self._last == self._looks - 1
        self._last = self._looks
        if not goes_on:
            control = getattr(event.greenlet, "control", None)
            log.warning(
                "%s blocks the hub for more than %g s, at %s; everybody waits "
                "(hand blocking work to gevent.get_hub().threadpool)",
                repr(event.greenlet) if control is None else repr(control),
                event.blocking_time,
                place(sys._current_frames().get(self._hub.thread_ident)),
            )
