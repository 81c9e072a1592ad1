"""What is counted, and where: a column of counters for each worker process, in memory that they all share.

Below metrics.py, which tells of them. Counting costs 0.7 us, in pyftpdlib's callbacks: a login has
two.

A process only ever adds to its own column (`Site.slot`). One that takes over the slot of a dead one goes on
where that one stopped. So no counter and no sum of counters ever falls, which Prometheus would take for a
restart: neither when a worker dies nor when one does not answer in time.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler

    from bridge.session import Events, Transfer

    class _Handler(_FTPHandler, Events): ...
else:  # a mix-in: what it extends is the class it is put before
    _Handler = object

DIRECTIONS = ("upload", "download")
OUTCOMES = ("completed", "failed")


#: How much of the rate is that of the last second: data passes in bursts as large as the sockets' buffers.
SMOOTHING = 0.3


class Histogram:
    """A histogram's counters: how many were at most a bound (seconds) and above the one before; the sum."""

    def __init__(self, name: str, *bounds: float) -> None:
        self.name = name
        self.bounds = bounds
        self.fields = (*(f"{name}:{bound:g}" for bound in bounds), f"{name}:inf", f"{name}:us")

    def observe(self, counts: Counts, seconds: float) -> None:
        """Count one."""
        counts.add(self.fields[bisect_left(self.bounds, seconds)])
        counts.add(self.fields[-1], round(seconds * 1e6))


#: From a small file on a local network to an image over a slow line.
DURATIONS = {each: Histogram(f"{each}_seconds", 0.01, 0.1, 1, 10, 60, 600, 3600) for each in DIRECTIONS}
#: From what nobody notices to what every client does.
LAG = Histogram("lag", 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)

#: Every counter. `us` are microseconds.
FIELDS = (
    *("starts", "connections", "refused_max_cons", "refused_max_cons_per_ip", "logins_ok", "logins_failed"),
    *("accept_rests", "disconnects", "bytes_upload", "bytes_download"),
    *(f"{what}_{way}_{how}" for what in ("transfers", "bytes") for way in DIRECTIONS for how in OUTCOMES),
    *(field for histogram in (*DURATIONS.values(), LAG) for field in histogram.fields),
)
_INDEX = {field: index for index, field in enumerate(FIELDS)}


class Counts:
    """The counters of all processes, made before they are forked; `take` chooses the column to add to.

    - (int) slots: processes that count at the same time.

    Owns its memory, which goes with the last process that has it.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._mine: Any = [0] * len(FIELDS)
        #: Transfers of this process that run, by their control connections.
        self.live: dict[Any, Live] = {}

    def make(self, slots: int) -> None:
        """Allocate the memory."""
        self._memory = mmap.mmap(-1, slots * len(FIELDS) * 8)

    def take(self, slot: int) -> None:
        """From now on this process adds to the column *slot*."""
        assert self._memory is not None
        size = len(FIELDS)
        self._mine = memoryview(self._memory).cast("q")[slot * size : (slot + 1) * size]

    def close(self) -> None:
        """Release the memory in this process; more than once is no harm."""
        self._mine = [0] * len(FIELDS)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def add(self, field: str, amount: int = 1) -> None:
        """Count."""
        self._mine[_INDEX[field]] += amount

    def __getitem__(self, field: str) -> int:
        value: int = self._mine[_INDEX[field]]
        return value

    def columns(self) -> dict[int, dict[str, int]]:
        """The counters of each slot that has ever had a process."""
        if self._memory is None:
            return {}
        size = len(FIELDS)
        with memoryview(self._memory).cast("q") as view:
            values = view.tolist()
        columns = (values[start : start + size] for start in range(0, len(values), size))
        return {slot: dict(zip(FIELDS, each, strict=True)) for slot, each in enumerate(columns) if each[0]}


class Live:
    """A file's transfer that runs: how much of it is counted, how fast it is now, how far it can go."""

    __slots__ = ("channel", "counted", "rate", "size", "start")

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.counted = 0
        #: Bytes a second, of the last seconds (`beat`); None before the first one.
        self.rate: float | None = None
        #: Of a download: the file's size and where it starts (REST), in bytes.
        self.size, self.start = (None, 0) if channel.receive else _extent(channel.file_obj)

    @property
    def direction(self) -> str:
        """ "upload" or "download", as the client sees it."""
        return "upload" if self.channel.receive else "download"

    def beat(self, counts: Counts, seconds: float) -> None:
        """Count what has passed in the last *seconds*, and what that makes of the rate."""
        now = self.count(counts) / seconds
        self.rate = now if self.rate is None else self.rate + SMOOTHING * (now - self.rate)

    def count(self, counts: Counts) -> int:
        """Add what has passed since the last time; how much."""
        moved: int = self.channel.get_transmitted_bytes() - self.counted
        self.counted += moved
        counts.add(f"bytes_{self.direction}", moved)
        return moved


def _extent(file: Any) -> tuple[int | None, int]:
    try:
        return os.fstat(file.fileno()).st_size, file.tell()
    except (AttributeError, OSError, ValueError):
        return None, 0  # not a file of this system


# --- mix-ins. runs in a worker greenlet: may wait


class CountingMixin(_Handler):
    """For a handler class with an attribute `counts`."""

    counts: Counts
    #: The transfer command (`SessionMixin._transfers`) whose transfer is counted already.
    _counted = 0
    _transfers: int

    def on_connect(self) -> None:
        """As before, counted."""
        self.counts.add("connections")
        super().on_connect()

    def handle_max_cons(self) -> None:
        """As before, counted."""
        self.counts.add("refused_max_cons")
        super().handle_max_cons()

    def handle_max_cons_per_ip(self) -> None:
        """As before, counted."""
        self.counts.add("refused_max_cons_per_ip")
        super().handle_max_cons_per_ip()

    def on_login(self, username: str) -> None:
        """As before, counted."""
        self.counts.add("logins_ok")
        super().on_login(username)

    def on_login_failed(self, username: str, password: str) -> None:
        """As before, counted."""
        self.counts.add("logins_failed")
        super().on_login_failed(username, password)

    def on_transfer_started(self, transfer: Transfer) -> None:
        """As before; it is watched from now on."""
        self.counts.live[self] = Live(self.data_channel)
        super().on_transfer_started(transfer)

    def log_transfer(
        self, cmd: str, filename: str, receive: bool, completed: bool, elapsed: float, bytes: int
    ) -> None:
        """As before, counted: called once for each transfer of a file that had its data connection."""
        counts = self.counts
        live = counts.live.pop(self, None)
        if live is not None:
            live.count(counts)
        self._counted = self._transfers
        way = "upload" if receive else "download"
        how = "completed" if completed else "failed"
        counts.add(f"transfers_{way}_{how}")
        counts.add(f"bytes_{way}_{how}", bytes)
        DURATIONS[way].observe(counts, elapsed)
        super().log_transfer(cmd, filename, receive, completed, elapsed, bytes)

    def on_incomplete_file_received(self, file: str) -> None:
        """As before; counts a transfer whose data connection never came."""
        self._count_failed("upload")
        super().on_incomplete_file_received(file)

    def on_incomplete_file_sent(self, file: str) -> None:
        """As before; counts a transfer whose data connection never came."""
        self._count_failed("download")
        super().on_incomplete_file_sent(file)

    def _count_failed(self, way: str) -> None:
        if self._counted != self._transfers:
            self._counted = self._transfers
            self.counts.add(f"transfers_{way}_failed")

    def on_disconnect(self) -> None:
        """As before; nothing of the session is kept."""
        self.counts.live.pop(self, None)
        super().on_disconnect()
