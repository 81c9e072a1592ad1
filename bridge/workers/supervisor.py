"""The parent of worker processes: starts, replaces and stops them.

Of run.py, which says what a worker does. It runs in a plain process, without a hub or a greenlet, before
and between forks; its loop waits for signals (set_wakeup_fd) and for what workers say, and never blocks.

    parent --fork--> worker: starting --"+"--> serving --retire--> retiring --(last session)--> gone
       |                                          '---drain, or the parent is gone---> draining ---^
       '-- a socket to each worker: one byte is one order, its end is the parent's death

- **A worker that dies is replaced** after FIRST seconds, doubling to LAST; what it has counted in the shared
  tables is forgotten (`Parent.forget`). HOPELESS workers in a row that die before they serve end the parent
  with exit code 1.
- **SIGHUP replaces the workers one by one.** The successor reads again what can be read and serves before the
  old one retires; sessions stay where they are until they end, however long. There are two slots for each
  place: when none is free for a successor, the worker that retired first is drained (--stop-timeout).
- **SIGTERM, SIGINT** go to all: drain, cut, end. SIGUSR1: log files are reopened, here and in all workers.
"""

from __future__ import annotations

import collections
import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.server import signals

# --- outside of gevent's documented interface (tests/test_structure.py checks that it exists)
from gevent._hub_local import get_hub_if_exists  # isort: skip

log = logging.getLogger(__name__)

#: Seconds until a dead worker's successor starts; the longest; and what a worker must live to be the first
#: to die again.
FIRST, LAST, STEADY = 0.1, 10.0, 10.0

#: Workers in a row that die before they serve. With the pauses: about 1.5 s, if each dies at once.
HOPELESS = 5

# --- what a byte says
READY, KEEPS = b"+", b"k"  # it serves; it retires, but keeps sessions
DRAIN, CUT, RETIRE, ROTATE = b"d", b"c", b"r", b"u"

#: Signals that wait while a worker is forked: their handlers are the parent's.
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


# --- runs in the parent: no gevent


class WorkerProcess:
    """A child process, as its parent sees it. Owns the parent's end of its socket."""

    def __init__(self, place: _Place, slot: int, generation: int) -> None:
        self.place = place
        self.slot = slot
        self.generation = generation
        self.pid = 0
        self.serves = False
        self.retires = False
        self.keeps = False
        self.stops = False
        #: Whether it will say something: READY, or KEEPS once it retires.
        self.talks = True
        self.started = time.monotonic()
        self.channel, self.inner = socket.socketpair()
        self.channel.setblocking(False)
        self.inner.setblocking(False)

    def tell(self, order: bytes) -> None:
        """Send an order."""
        try:
            self.channel.send(order)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EAGAIN):
                raise
            # It is dead and not yet reaped; or it has not listened to hundreds of orders.


class _Place:
    """A listening socket (borrowed) and who accepts from it."""

    def __init__(self, number: int, listener: Any) -> None:
        self.number = number
        self.listener = listener
        self.worker: WorkerProcess | None = None
        self.due = 0.0
        self.delay = FIRST
        self.stale = False


class Forked(BaseException):
    """This process is the worker: leave the parent's frames."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker


@dataclass(frozen=True)
class Parent:
    """What the program does in the parent when something happens to its workers."""

    #: All workers serve, for the first time.
    announce: Callable[[], object]
    #: The state is now `ready`, `reloading` or `stopping`; also called in signal handlers.
    report_state: Callable[[str], object]
    #: SIGUSR1: reopen log files.
    rotate: Callable[[], object]
    #: The worker in this slot is gone: clear what it has counted.
    forget: Callable[[int], object]


class Supervisor:
    """Starts, replaces and stops workers; `run` returns when the last is gone.

    - listeners: a listening socket for each worker, borrowed.
    - (int) slots: how many workers there may be at once, with those that retire.
    """

    def __init__(self, listeners: Sequence[Any], slots: int, parent: Parent) -> None:
        self._parent = parent
        self._slots = slots
        self._announced = False
        self._places = [_Place(number, each) for number, each in enumerate(listeners)]
        self._workers: dict[int, WorkerProcess] = {}
        self._successor: WorkerProcess | None = None
        self._generation = 0
        self._reloads = False
        self._failed = 0
        self._orders: collections.deque[bytes] = collections.deque()
        self._stopping: bytes | None = None
        self.exit_code = 0

    def run(self) -> None:
        """Raises Forked in each child."""
        wakeup, bell = socket.socketpair()
        wakeup.setblocking(False)
        bell.setblocking(False)
        signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
        signals.whenever(signal.SIGCHLD, lambda: None)  # (to be woken)
        signals.whenever(signal.SIGHUP, lambda: self._orders.append(RETIRE))
        signals.whenever(signal.SIGUSR1, lambda: self._orders.append(ROTATE))
        signals.on_signals(self._drain, lambda: self._orders.append(CUT))
        try:
            while True:
                self._reap()
                while self._orders:
                    self._obey(self._orders.popleft())
                if self._stopping is None:
                    self._start_due()
                    self._replace()
                elif not self._workers:
                    return
                self._wait(wakeup)
        finally:
            signal.set_wakeup_fd(-1)
            wakeup.close()
            bell.close()
            for worker in self._workers.values():  # in a child; its own is not yet among them
                worker.channel.close()

    def _drain(self) -> None:
        self._orders.append(DRAIN)
        self._parent.report_state("stopping")

    def _wait(self, wakeup: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(wakeup, selectors.EVENT_READ)
            for worker in self._workers.values():
                if worker.talks:
                    selector.register(worker.channel, selectors.EVENT_READ, worker)
            dues = [place.due for place in self._places if place.worker is None]
            idle = self._stopping is not None or not dues
            timeout = None if idle else max(0.0, min(dues) - time.monotonic())
            for key, _ in selector.select(timeout):
                if key.data is None:
                    wakeup.recv(4096)
                else:
                    self._heard(key.data)

    def _heard(self, worker: WorkerProcess) -> None:
        worker.talks = False
        try:
            said = worker.channel.recv(1)
        except ConnectionResetError:
            said = b""
        if said == KEEPS:
            worker.keeps = True
        if said != READY:  # else it ends; SIGCHLD tells
            return
        worker.serves = True
        self._failed = 0
        if worker is self._successor:
            old, self._successor = worker.place.worker, None
            worker.place.worker = worker
            if old is not None:
                old.retires = old.talks = True
                old.tell(RETIRE)
                log.info("worker %d serves, worker %d retires", worker.pid, old.pid)
        if not self._announced and all(p.worker and p.worker.serves for p in self._places):
            self._announced = True
            self._parent.announce()

    def _obey(self, order: bytes) -> None:
        if order in (DRAIN, CUT):
            self._stopping = order
        elif order == RETIRE:
            self._generation += 1
            self._reloads = True
            self._parent.report_state("reloading")
            for place in self._places:
                place.stale = True
            return
        else:
            self._parent.rotate()
        for worker in list(self._workers.values()):
            worker.tell(order)

    # --- births

    def _start_due(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.worker is None and place.due <= now:
                slot = self._free_slot()
                if slot is None:
                    place.due = now + FIRST
                    return
                place.worker = self._fork(place, slot)
                place.stale = False

    def _replace(self) -> None:
        """Start the next successor, if it is time."""
        if self._successor is not None:
            return
        for place in self._places:
            if place.stale and place.worker is not None and place.worker.serves:
                slot = self._free_slot()
                if slot is not None:
                    self._successor = self._fork(place, slot)
                    place.stale = False
                return
        if self._reloads and not any(place.stale for place in self._places):
            self._reloads = False
            self._parent.report_state("ready")

    def _free_slot(self) -> int | None:
        used = {worker.slot for worker in self._workers.values()}
        for slot in range(self._slots):
            if slot not in used:
                return slot
        retired = [worker for worker in self._workers.values() if worker.retires]
        if all(worker.keeps and not worker.stops for worker in retired):  # else a slot is about to be free
            oldest = min(retired, key=lambda worker: worker.started)
            oldest.stops = True
            oldest.tell(DRAIN)
            log.info("worker %d stops: its slot is needed", oldest.pid)
        return None

    def _fork(self, place: _Place, slot: int) -> WorkerProcess:
        if get_hub_if_exists() is not None:
            raise RuntimeError("the hub is used before the fork of workers: do it in the worker")
        worker = WorkerProcess(place, slot, self._generation)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        pid = os.fork()
        if pid == 0:
            raise Forked(worker)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        worker.pid = pid
        worker.inner.close()
        self._workers[pid] = worker
        return worker

    # --- deaths

    def _reap(self) -> None:
        for worker in list(self._workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                self._on_worker_gone(worker, status)

    def _on_worker_gone(self, worker: WorkerProcess, status: int) -> None:
        del self._workers[worker.pid]
        worker.channel.close()
        self._parent.forget(worker.slot)
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if worker.retires or self._stopping is not None:
            log.log(logging.WARNING if code else logging.INFO, "worker %d is gone (%s)", worker.pid, how)
            return
        place = worker.place
        if not worker.serves:
            self._failed += 1
        if worker is self._successor:
            self._successor = None
            log.error("worker %d did not start (%s): SIGHUP changes nothing here", worker.pid, how)
        elif self._successor is not None and self._successor.place is place:
            log.warning("worker %d died (%s) as its successor starts", worker.pid, how)
            place.worker, self._successor = self._successor, None
        else:
            place.worker = None
            now = time.monotonic()
            if worker.serves and now - worker.started >= STEADY:
                place.delay = FIRST
            log.warning("worker %d died (%s): another starts in %g s", worker.pid, how, place.delay)
            place.due = now + place.delay
            place.delay = min(2 * place.delay, LAST)
        if self._failed >= HOPELESS and not any(each.serves for each in self._workers.values()):
            log.error("%d workers in a row died before they served: giving up", self._failed)
            self.exit_code = 1
            self._obey(DRAIN)
