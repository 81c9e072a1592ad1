"""Does the product block the hub? A trace of all switches says how long, gevent's monitor thread says where.

No tests in here. conftest.py holds a `Watch` over every test, honest/sitecustomize.py one over every hub of
the programs that tests start; test_honesty.py shows that both work.

**What counts** is the time from one switch to the next, as the hub's other greenlets see it, less the time in
which a thread of this process was ready to run and had no processor. The monitor alone goes by the clock: on
a busy machine it names greenlets that did nothing but stand in the kernel's queue.

| in one stretch of a greenlet | counts |
|---|---|
| its CPU time | yes |
| system calls that wait (sleep, a lock, a pipe), if the monitor saw where | yes |
| files that are not offloaded waiting for the disk (README says so): as slow as the machine's | no |
| the GIL while another thread runs with it: the hub stands still all the same | yes |
| Python's cycle collector in tests: what they and hypothesis have made is most of what it looks at | no |
| this thread in the kernel's queue for a processor | no |
| another thread in that queue, which may hold the GIL: nothing tells whether it does | no |
| a processor that the hypervisor lends to others (steal) | no |
| in a forked child, the stretch that began in its parent | no |

On a machine that is not busy the three before the last are next to nothing. On one that is, a block may go
unnoticed, but nothing is called a block that is none. Of a stretch of the hub only its CPU time counts, since
it waits for events: watchers' callbacks that sleep are not seen, those that compute are. CPU time alone
counts, too, where there is no /proc: on other systems than Linux.

**Who counts**: the hub, workers, and greenlets that somebody else than a test has spawned (servers, web
requests, ends of connections). The main greenlet and those that tests spawn are the clients; in a program,
the main greenlet starts up and then waits for the end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.hub
import greenlet
from gevent import monkey

from bridge.loop.monitor import calls_in

#: Seconds without a switch that are a block.
LIMIT = 0.05

#: Seconds between two looks of gevent's monitor thread at what runs: several in a block, if it gets the GIL.
LOOK = LIMIT / 4

#: Seconds until the monitor reports by itself.
NEVER = 1e9

#: Seconds for which a reading of the queues is good enough; one takes 0.15 ms. What was queued between it and
#: the beginning of a stretch is taken off, too.
FRESH = 0.005

#: Frames of a report: from the turn to the call that blocks.
DEPTH = 12

_TESTS = str(Path(__file__).parents[1]) + os.sep
#: Where pyftpdlib and bridge call the kernel for files, or for sockets that do not block.
_DISK = tuple(
    path.replace("/", os.sep)
    for path in (
        *("pyftpdlib/filesystems.py", "pyftpdlib/handlers/ftp/data.py"),
        *(
            "pyftpdlib/handlers/ftp/producers.py",
            "bridge/filesystems/splice.py",
            "bridge/filesystems/jail.py",
            "bridge/filesystems/local.py",
        ),
        *(
            "bridge/session/upload.py",
            "bridge/filesystems/replace.py",
            "bridge/session/data.py",
            "bridge/filesystems/atomic.py",
        ),
    )
)
_TICK = 1 / os.sysconf("SC_CLK_TCK")
#: Held while the monitor has a descriptor open.
_descriptor = monkey.get_original("_thread", "allocate_lock")()


class Block(NamedTuple):
    """Somebody kept the hub from everybody else."""

    seconds: float
    #: Of these, seconds of CPU.
    used: float
    who: str
    #: The stack when the monitor looked, innermost call last; '' if it did not.
    stack: str

    def __str__(self) -> str:
        milliseconds = f"{self.seconds * 1000:.0f} ms ({self.used * 1000:.0f} of CPU)"
        return f"{self.who} blocked the hub for {milliseconds}, at\n{self.stack or '  (not seen)'}"


def queued() -> dict[str, float]:
    """Seconds in which each thread of this process could have run and had no processor, and all steal.

    {} where Linux is not.
    """
    waited = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
                    waited[thread] = int(file.read().split()[1]) / 1e9
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended since
        with open("/proc/stat", "rb") as file:
            waited["steal"] = int(file.readline().split()[8]) * _TICK
    except OSError:
        return {}
    return waited


def queued_since(before: dict[str, float]) -> float:
    """The sum over all threads that have not ended meanwhile."""
    return sum(seconds - before.get(thread, 0.0) for thread, seconds in queued().items())


def counts(who: Any) -> bool:
    """Whether a greenlet is the product's."""
    if type(who).__name__ == "Worker" or isinstance(who, gevent.hub.Hub):
        return True
    frame = getattr(who, "spawning_stack", None)  # None: the main greenlet, or a plain one
    while frame is not None and frame.f_back and f"{os.sep}gevent{os.sep}" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_TESTS)


@contextlib.contextmanager
def monitor_without_descriptors() -> Iterator[None]:
    """The monitor takes no descriptor for its looks, and sees the innermost call only."""
    with _descriptor:
        yield


class Watch:
    """Measures all that runs on *hub*, which must be this thread's, between `start()` and `stop()`.

    *on_block* is called with each block that ends, in the greenlet that runs next; it must not switch.
    """

    def __init__(self, hub: Any, on_block: Callable[[Block], object], collector: bool = False) -> None:
        self._on_block = on_block
        #: Whether to be told of collections. (What a signal handler raises just then is lost.)
        self._collector = collector
        self._hub = hub
        self._previous: Any = None
        self._running: Any = None
        #: When the greenlet that runs was switched to (`time.perf_counter()`), and this thread's CPU seconds
        #: then.
        self._entered = self._used = 0.0
        #: The process that it was switched to in. A child's clocks and threads are others than its parent's.
        self._process = os.getpid()
        #: Seconds that were spent with collecting garbage since then, and when the last time began.
        self._collected = self._collecting = 0.0
        #: The last reading of `queued`, and when.
        self._queued: dict[str, float] = {}
        self._read = 0.0
        #: What the last look saw: `_entered` at that time, whose turn it was ('' if nobody's), and the stack.
        self._seen: tuple[float, str, list[traceback.FrameSummary]] = (0.0, "", [])

    def monitor(self) -> None:
        """Have gevent's monitor thread look at the hub; nothing changes if it does already.

        Its own reports are off. They go by the clock, come some ms late, when others may run, and list all
        threads: under patch_all() the lock for that may give the monitor's thread a hub, which looks like a
        leak.
        """
        before = gevent.config.monitor_thread
        gevent.config.monitor_thread = True  # for this hub; others would start theirs by themselves
        gevent.config.max_blocking_time = LOOK  # what the thread sleeps first
        try:
            self._hub.start_periodic_monitoring_thread().add_monitoring_function(self._look, LOOK)
        finally:
            gevent.config.monitor_thread = before
            gevent.config.max_blocking_time = NEVER

    def rest(self) -> None:
        """End the thread: for tests that set it to work themselves, at a pace of their own."""
        thread = self._hub.periodic_monitoring_thread
        if thread is not None:
            thread.kill()
            self._hub.periodic_monitoring_thread = None

    def start(self) -> None:
        """Watch from now on."""
        self._queued = queued()
        self._entered = self._read = time.perf_counter()
        self._used = time.thread_time()
        self._process = os.getpid()
        self._running = greenlet.getcurrent()
        self._previous = greenlet.settrace(self._on_switch)
        if self._collector:
            gc.callbacks.append(self._on_collection)

    def stop(self) -> None:
        """Watch no more."""
        greenlet.settrace(self._previous)
        if self._collector:
            gc.callbacks.remove(self._on_collection)
        self._running = None

    # --- runs in the hub's thread, in the greenlet that was switched to

    def _on_switch(self, event: str, args: tuple[Any, Any]) -> None:
        seen = self._seen  # before it sees this function
        if self._previous is not None:
            self._previous(event, args)  # the monitor's
        origin, target = args
        now = time.perf_counter()
        process = os.getpid()
        if now - self._entered > LIMIT and process == self._process and counts(origin):
            self._measure(origin, now, *seen)
        if target is not self._hub and now - self._read > FRESH:
            self._queued = queued()
            self._read = time.perf_counter()
        self._process = process
        self._running = target
        self._collected = 0.0
        self._used = time.thread_time()
        self._entered = time.perf_counter()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()  # (in whatever thread: it has the GIL)
        if phase == "start":
            self._collecting = now
        else:
            self._collected += now - self._collecting

    def _measure(
        self, origin: Any, now: float, entered: float, who: str, stack: list[traceback.FrameSummary]
    ) -> None:
        seconds = used = time.thread_time() - self._used
        # (Another hub than ours: a forked child gets one, and the trace stays.)
        if self._queued and not isinstance(origin, gevent.hub.Hub):
            seconds = max(used, now - self._entered - queued_since(self._queued))
        if entered != self._entered:
            who, stack = "", []
        if not stack or stack[-1].filename.endswith(_DISK):
            seconds = used
        seconds -= self._collected
        if seconds > LIMIT:
            self._on_block(Block(seconds, used, who or repr(origin), "".join(traceback.format_list(stack))))

    # --- runs in gevent's monitor thread: no gevent

    def _look(self, hub: Any) -> None:
        entered, running = self._entered, self._running
        since = time.perf_counter() - entered
        # The last look before LIMIT, or else the first one after it: what comes later may be innocent.
        if since > LOOK and (since < LIMIT or self._seen[0] != entered):
            if _descriptor.acquire(False):
                try:
                    calls = calls_in(hub.thread_ident)[:DEPTH]
                finally:
                    _descriptor.release()
            else:
                frame = sys._current_frames()[hub.thread_ident]
                calls = [(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)]
            stack = [traceback.FrameSummary(*call, lookup_line=False) for call in calls]
            # Not the repr of any greenlet: that of a patched thread takes a lock, for which this thread would
            # get a hub.
            control = getattr(running, "control", None)
            self._seen = (entered, repr(control) if control else "", stack[::-1])
