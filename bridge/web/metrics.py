"""What the server tells of itself: each process its sessions, transfers, rates, lag and resources.

Between counts.py, where it is counted, and app.py, which serves it; exposition.py makes Prometheus' text of
it, page.py the status page. Everything is looked up when somebody asks, or once a second.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import gevent

from bridge.filesystems import THREADS, printable
from bridge.loop import seconds_until
from bridge.server import snapshot
from bridge.web.counts import DIRECTIONS, LAG, Counts

# --- private names of gevent this module stands on (tests/test_structure.py checks that they exist):
# Hub._threadpool.

if TYPE_CHECKING:
    from bridge.server import GeventFTPServer as _Server
else:  # a mix-in: what it extends is the class it is put before
    _Server = object

#: Seconds of the history that the page draws, one point each: what fits a chart at phone width.
HISTORY = 300

#: Sessions that a report lists, of each process: those that transfer first, then the latest. To list one
#: costs 4 us and 300 bytes of JSON; 5 000 would stop the hub for 40 ms.
LISTED = 200

#: Seconds between two beats, each of which notes the lag and a point of the history.
BEAT = 1.0


class ReportingMixin(_Server):
    """For a GeventFTPServer class."""

    def own_session_count(self) -> int:
        """How many sessions this process has."""
        return len(self._sessions)

    def session_handlers(self, first: dict[Any, Any], limit: int) -> list[Any]:
        """At most *limit* control connections: those in *first*, then the latest; in order of arrival."""
        chosen = [each for each in islice(first, limit) if each in self._sessions]
        others = (each for each in reversed(self._sessions) if each not in first)
        chosen += islice(others, limit - len(chosen))
        return sorted(chosen, key=lambda each: each.started)

    def session_of(self, session_id: str) -> Any:
        """The control connection that was reported with this id; None if it is gone."""
        for each in self._sessions:
            if each.__dict__.get("session_id") == session_id:
                return each
        return None


# --- runs in a greenlet of its own


class Sampler:
    """Beats once a second: the hub's lag, the rates, a point of the history. Owns a greenlet.

    The lag is how late the hub comes to a timer that is due, which is what every client then waits for.
    """

    def __init__(self, counts: Counts, server: Any) -> None:
        self._counts = counts
        self._server = server
        self._rests = 0
        self._before = self._bytes()
        #: (time.time() in whole seconds, bytes up and bytes down a second, sessions, lag in seconds)
        self.history: deque[tuple[int, int, int, int, float]] = deque(maxlen=HISTORY)
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """End it."""
        self._greenlet.kill()

    def _run(self) -> None:
        # In the middle of a second, so that no two beats fall into the same one.
        due = time.monotonic() + 1.5 - time.time() % 1.0
        last = time.monotonic()
        while True:
            gevent.sleep(seconds_until(due))
            now = time.monotonic()
            self.beat(now - last, max(now - due, 0.0))
            last = now
            due += BEAT * max(1.0, (now - due) // BEAT + 1)

    def beat(self, seconds: float, lag: float) -> None:
        """*seconds* have passed since the last one."""
        counts = self._counts
        for live in counts.live.values():
            live.beat(counts, seconds)
        LAG.observe(counts, lag)
        rests = self._server.ioloop.accept_rests
        counts.add("accept_rests", rests - self._rests)
        self._rests = rests
        before, self._before = self._before, self._bytes()
        up, down = (round((now - then) / seconds) for now, then in zip(self._before, before, strict=True))
        self.history.append((int(time.time()), up, down, self._server.own_session_count(), round(lag, 4)))

    def _bytes(self) -> list[int]:
        return [self._counts[f"bytes_{way}"] for way in DIRECTIONS]


# --- what one process tells of itself. runs in a greenlet; must not wait


class Reporter:
    """This process's part of the metrics and of the page, as what JSON can take.

    *shown* makes the path that is shown of one on this system.
    """

    def __init__(self, slot: int, counts: Counts, server: Any, shown: Callable[[str], str]) -> None:
        self.slot = slot
        self._counts = counts
        self._server = server
        self._shown = shown
        self._sampler = Sampler(counts, server)
        self._process = _this_process()
        self._resources: dict[str, float | None] = {"descriptors": None, "memory": None, "cpu": 0.0}

    def close(self) -> None:
        """End the sampler."""
        self._sampler.stop()

    def gauges(self) -> dict[str, Any]:
        """What is so now."""
        server, counts = self._server, self._counts
        live = list(counts.live.values())
        lags = [point[4] for point in islice(reversed(self._sampler.history), 60)]
        return {
            "slot": self.slot,
            "pid": os.getpid(),
            "state": server.state,
            "sessions": server.own_session_count(),
            "uploads": sum(each.channel.receive for each in live),
            "downloads": sum(not each.channel.receive for each in live),
            "waiting": server.ioloop.turns_waiting,
            "lag": lags[0] if lags else 0.0,
            "lag_max": max(lags, default=0.0),
            "threads": _threads(server.ioloop.hub),
            **self._look(),
        }

    def _look(self) -> dict[str, Any]:
        """What this process takes of the machine; while it has no descriptor to look with, what it took.

        Descriptors and memory are None where there is no /proc: in a chroot.
        """
        if self._process is None:
            spent = os.times()
            return {**self._resources, "cpu": spent.user + spent.system}
        try:
            with self._process.oneshot():
                times = self._process.cpu_times()
                self._resources = {
                    "descriptors": self._process.num_fds(),
                    "memory": self._process.memory_info().rss,
                    "cpu": times.user + times.system,
                }
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        return self._resources

    def status(self) -> dict[str, Any]:
        """The same, with sessions and history."""
        handlers = self._server.session_handlers(self._counts.live, LISTED)
        return {
            **self.gauges(),
            "history": list(self._sampler.history),
            "listed": [self._session(handler) for handler in handlers],
        }

    def _session(self, handler: Any) -> dict[str, Any]:
        session = snapshot(handler)
        live = self._counts.live.get(handler)
        transfer = session.transfer
        told: dict[str, Any] = {
            "id": handler.session_id,
            "user": printable(session.user) if handler.authenticated else "",
            "address": session.remote_address[0],
            "since": session.connected_since,
            "idle_since": session.idle_since,
            "command": session.command,
            "waiting_since": session.waiting_since,
            "transfer": None,
        }
        if transfer is not None:
            told["transfer"] = {
                "command": transfer.command,
                "path": None if transfer.path is None else printable(self._shown(transfer.path)),
                "direction": transfer.direction,
                "bytes": transfer.bytes,
                "seconds": round(transfer.seconds, 1),
                "rate": transfer.rate if live is None or live.rate is None else live.rate,
                "position": transfer.bytes + (0 if live is None else live.start),
                "size": None if live is None else live.size,
            }
        return told


def _this_process() -> Any:
    """psutil's, which reads /proc; None in a chroot (ftp/parts/privileges.py)."""
    try:
        import psutil  # the `metrics` extra, whose presence is checked at the start
    except ImportError:
        return None
    return psutil.Process()


def _threads(hub: Any) -> dict[str, dict[str, int]]:
    """Threads, how many of them are busy, and calls in line: of the hub's own pool and of ours."""
    loads = {"bridge": THREADS.load(hub)}
    pool = None if hub is None else hub._threadpool  # (`hub.threadpool` would make one)
    if pool is not None:
        waiting = pool.task_queue.qsize()
        loads["gevent"] = (pool.size, len(pool) - waiting, waiting)
    return {name: dict(zip(("size", "busy", "queued"), load, strict=True)) for name, load in loads.items()}
