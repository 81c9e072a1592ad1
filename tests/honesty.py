"""Does the product block the hub? A trace of all switches says how long, gevent's monitor thread says where.

No tests in here; conftest.py holds a `Watch` over every test, test_honesty.py shows that it works.

**What counts** is the time from one switch to the next, as the hub's other greenlets see it, less the time in
which a thread of this process was ready to run and had no processor. The monitor alone goes by the clock: on a
busy machine it names greenlets that did nothing but stand in the kernel's queue.

| in one stretch of a greenlet | counts |
|---|---|
| its CPU time; system calls that wait (sleep, a lock, a pipe, the disk) | yes |
| the GIL while another thread runs with it: the hub stands still all the same | yes |
| this thread in the kernel's queue for a processor | no |
| any other thread there: it may hold the GIL, and nothing tells which one does | no |
| a processor that the hypervisor lends to others (steal) | no |

On a machine that is not busy the last three are next to nothing; on one that is, a block may go unnoticed, but
nothing is called a block that is none. The hub itself waits for events, so of a stretch of the hub only its CPU
time counts: watchers' callbacks that sleep are not seen, those that compute are.

**Who counts**: the hub, workers, and greenlets that somebody else than a test has spawned (servers, web
requests, ends of connections). The main greenlet and those that tests spawn are the clients.

Linux only, as far as queues go; elsewhere the clock counts.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.hub
import greenlet

from bridge.turns import Worker

#: Seconds without a switch that are a block.
LIMIT = 0.05

#: Seconds between two looks of gevent's monitor thread at what runs: several in a block, if it gets the GIL.
LOOK = LIMIT / 4

#: Seconds for which a reading of the queues is good enough. One takes 0.2 ms; how far it is off for the next
#: stretch is in favour of who is watched.
FRESH = 0.01

#: Frames of a report: from the turn to the call that blocks.
DEPTH = 12

_HERE = str(Path(__file__).parent) + os.sep
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Block(NamedTuple):
    """Somebody kept the hub from everybody else."""

    seconds: float
    who: str
    #: The stack when the monitor looked, innermost call last; '' if it did not.
    stack: str

    def __str__(self) -> str:
        return f"{self.who} blocked the hub for {self.seconds * 1000:.0f} ms, at\n{self.stack or '  (not seen)'}"


def queued() -> float:
    """Seconds that threads of this process could have run and had no processor; 0 where Linux is not."""
    nanoseconds = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
                    nanoseconds += int(file.read().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended since
        with open("/proc/stat", "rb") as file:
            stolen = int(file.readline().split()[8])
    except (OSError, IndexError):
        return 0.0
    return nanoseconds / 1e9 + stolen * _TICK


def of_the_product(who: Any) -> bool:
    """Whether a greenlet counts."""
    if isinstance(who, (Worker, gevent.hub.Hub)):
        return True
    frame = getattr(who, "spawning_stack", None)  # None: the main greenlet's, or a plain greenlet
    while frame is not None and f"{os.sep}gevent{os.sep}" in frame.f_code.co_filename and frame.f_back:
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_HERE)


class Watch:
    """Measures all that runs on *hub*, which must be this thread's.

    `blocks`: those of LIMIT or longer, of the product, that ended between the last `start()` and `stop()`.
    """

    def __init__(self, hub: Any) -> None:
        self.blocks: list[Block] = []
        self._hub = hub
        self._previous: Any = None
        self._running: Any = None
        #: When the greenlet that runs was switched to (`time.perf_counter()`), and the hub's CPU seconds then.
        self._entered = self._used = 0.0
        #: The last reading of `queued`, and when.
        self._queued = self._read = 0.0
        #: What the last look saw: `_entered` at that time, who ran, and the stack.
        self._seen: tuple[float, str, list[traceback.FrameSummary]] = (0.0, "", [])

    def monitor(self) -> None:
        """Have gevent's monitor thread look at the hub; nothing changes if it does already.

        Its own reports go by the clock, and come some ms late, when another greenlet may run: `_look` is quick.
        """
        before = gevent.config.monitor_thread
        gevent.config.monitor_thread = True  # for this hub; others would start theirs by themselves
        gevent.config.print_blocking_reports = False
        gevent.config.max_blocking_time = LIMIT
        try:
            self._hub.start_periodic_monitoring_thread().add_monitoring_function(self._look, LOOK)
        finally:
            gevent.config.monitor_thread = before

    def start(self) -> None:
        """Watch from now on."""
        self.blocks = []
        self._queued = queued()
        self._entered = self._read = time.perf_counter()
        self._running = greenlet.getcurrent()
        self._previous = greenlet.settrace(self._on_switch)

    def stop(self) -> None:
        """Watch no more."""
        greenlet.settrace(self._previous)
        self._running = None

    # --- runs in the hub's thread, in the greenlet that was switched to

    def _on_switch(self, event: str, args: tuple[Any, Any]) -> None:
        if self._previous is not None:
            self._previous(event, args)  # the monitor's
        origin, target = args
        now = time.perf_counter()
        if now - self._entered > LIMIT and of_the_product(origin):
            self._measure(origin, now)
        if target is self._hub:
            self._used = time.thread_time()
        elif now - self._read > FRESH:
            self._queued = queued()
            self._read = time.perf_counter()
        self._running = target
        self._entered = time.perf_counter()

    def _measure(self, origin: Any, now: float) -> None:
        if origin is self._hub:
            seconds = time.thread_time() - self._used
        else:
            seconds = now - self._entered - (queued() - self._queued)
        if seconds > LIMIT:
            entered, who, stack = self._seen
            if entered != self._entered:
                who, stack = repr(origin), []
            self.blocks.append(Block(seconds, who, "".join(traceback.format_list(stack))))

    # --- runs in gevent's monitor thread: no gevent

    def _look(self, hub: Any) -> None:
        entered, running = self._entered, self._running
        frame = sys._current_frames().get(hub.thread_ident)
        if time.perf_counter() - entered > LOOK and frame is not None:
            lines = itertools.islice(traceback.walk_stack(frame), DEPTH)
            stack = [
                traceback.FrameSummary(each.f_code.co_filename, line, each.f_code.co_name, lookup_line=False)
                for each, line in lines
            ]
            who = repr(getattr(running, "control", None) or running)
            self._seen = (entered, who, stack[::-1])
