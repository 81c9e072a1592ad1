"""pyftpdlib's scheduler on one hub timer: `call_later` and `call_every` that fire without a poll loop.

A leaf of the package: it knows when a call is due, and asks the ioloop to run it (`run`) or to keep it
for a session that is busy (`defer`). It subclasses pyftpdlib's `_Scheduler` and `_CallLater`, so calls
keep their interface (`cancel`, `reset`, `cancelled`, `timeout`, `_errback`) and the heap stays visible
as `_tasks`. What differs:

- One hub timer is armed for the soonest call and re-armed only when a sooner one arrives. pyftpdlib's
  calls are nearly all idle timers of 30 s and 300 s that are cancelled before they are due, so a new one
  is later than the armed one and costs a push onto the heap.
- A zero delay touches neither heap nor timer: the call runs in the hub's next pass, or at the end of its
  session's turn when that is running. pyftpdlib makes one such call for every connection (on_disconnect).
- `reset` leaves a call's place in the heap alone until that place comes up. pyftpdlib changes the sort
  key of a call inside the heap, which can hide calls that are due behind one that was reset.
- Cancelled calls leave the heap when they are more than 512 and more than half of it (pyftpdlib's rule,
  applied at cancellation too, since our timer may not fire for minutes), or when nothing else is left.

Before the ioloop has a hub there is no timer: calls wait in the heap, and `poll()` runs those due in
the caller, as pyftpdlib does.
"""

from __future__ import annotations

import contextvars
import itertools
import math
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any

import gevent
from gevent import getcurrent
from pyftpdlib.ioloop import timer as monotonic
from pyftpdlib.log import logger as pyftpdlib_logger

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist)
from pyftpdlib.ioloop import _CallEvery, _CallLater, _Scheduler  # isort: skip

_counter = itertools.count()
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class Call(_CallLater):
    """What `call_later` returns: pyftpdlib's call, which also knows whose turn it will be."""

    __slots__ = ("context", "in_heap", "number", "owner", "when")

    _args: Any
    _kwargs: Any
    _errback: Any
    _sched: Any
    _target: Any
    owner: Any
    when: float

    def __init__(
        self,
        seconds: float,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        errback: Callable[[], Any] | None,
        scheduler: Scheduler,
        owner: Any,
    ) -> None:
        # Not by way of upstream's constructor: 0.57 of the time, and there are two calls for each connection.
        assert callable(target), f"{target} is not callable"
        assert sys.maxsize >= seconds >= 0, f"{seconds} is not greater than or equal to 0 seconds"
        self._delay = seconds  # type: ignore[misc]
        self._target = target
        self._args = args
        self._kwargs = kwargs or _NO_KWARGS  # 64 bytes less for each idle session's timer
        self._errback = errback
        self._sched = scheduler
        self._repush = False  # type: ignore[misc]
        self.cancelled = False  # type: ignore[misc]
        #: The channel this call belongs to, or None.
        self.owner = owner
        #: Where a call without owner runs: the context it was made in.
        self.context = contextvars.copy_context() if owner is None else None
        self.in_heap = False
        self.number = next(_counter)
        self.when = self.timeout = monotonic() + seconds if seconds else 0.0  # type: ignore[misc]
        scheduler.register(self)

    def __lt__(self, other: Any) -> bool:
        # `when` is the call's place in the heap; `timeout` may be later after a reset(). Equal places
        # keep the order in which the calls were made.
        mine: float = self.when
        its: float = other.when
        return mine < its if mine != its else bool(self.number < other.number)

    def __le__(self, other: Any) -> bool:
        return not other < self


class RepeatedCall(Call, _CallEvery):
    """What `call_every` returns."""

    __slots__ = ()


class Scheduler(_Scheduler):
    """The calls of one ioloop.

    *run* starts a due call's turn; *defer* keeps a call for the end of its session's running turn and
    tells whether there was one. Both are called in the hub's thread.
    """

    def __init__(self, run: Callable[[Call], None], defer: Callable[[Call], bool]) -> None:
        super().__init__()
        self._tasks: list[Call] = []
        self._cancellations = 0
        self._run = run
        self._defer = defer
        self._hub: Any = None
        self._timer: Any = None
        self._armed_for = math.inf
        self._soon: deque[Call] = deque()

    # --- which hub

    def attach(self, hub: Any) -> None:
        """Fire on *hub* (borrowed) from now on."""
        self.detach()
        self._hub = hub
        if self._tasks:
            # A zero delay made earlier is due at once; everything else has its timer.
            if self._tasks[0].when <= monotonic():
                hub.loop.run_callback(self._on_due)
            else:
                self._arm()

    def detach(self) -> None:
        """Stop firing; calls stay in the heap."""
        self._disarm()
        self._hub = None
        while self._soon:
            self._push(self._soon.popleft())

    def close(self) -> None:
        """Cancel everything."""
        self.detach()
        super().close()

    # --- pyftpdlib's interface

    def register(self, what: Call) -> None:
        """Called by a call's constructor, and by `call_every` after each run."""
        if self._hub is None:
            self._push(what)
        elif what.timeout:
            self._push(what)
            if what.when < self._armed_for:
                self._arm()
            elif not self._timer.ref:
                self._timer.ref = True
        elif not self._defer(what):
            if not self._soon:
                self._hub.loop.run_callback(self._on_soon)
            self._soon.append(what)

    def unregister(self, what: Call) -> None:
        """Called by `cancel()`."""
        what.owner = None  # as pyftpdlib drops the target: a dead idle timer must not keep its handler
        if not what.in_heap:
            return
        self._cancellations += 1
        if self._cancellations >= len(self._tasks):
            # Only dead calls are left. The timer may stay, since the next call is likely to want it,
            # but must not keep the program alive.
            self._tasks = []
            self._cancellations = 0
            if self._timer is not None:
                self._timer.ref = False
        elif self._cancellations > 512 and self._cancellations > len(self._tasks) >> 1:
            self.reheapify()

    def put_back(self, call: Call) -> bool:
        """Whether *call*, which was due, has been `reset()` since; then it is in the heap again."""
        if not call._repush or call.timeout <= monotonic():
            return False
        self.register(call)
        return True

    def poll(self) -> float | None:
        """Run what is due and return the seconds to the next call, or None if there is none.

        On a hub the calls run as turns; one that waits does not hold up the caller.
        """
        hub = self._hub
        if hub is None:
            for call in self._due():
                try:
                    call.call()
                except Exception:
                    pyftpdlib_logger.error(traceback.format_exc())
        elif self._tasks and self._tasks[0].when <= monotonic():
            if getcurrent() is hub:
                self._on_due()
            else:
                hub.loop.run_callback(self._on_due)
                gevent.sleep(0)
        return self.next_delay()

    def next_delay(self) -> float | None:
        """Seconds to the next call, or None."""
        while self._tasks and self._tasks[0].cancelled:
            self._pop()
        if not self._tasks:
            return None
        return float(max(0.0, self._tasks[0].timeout - monotonic()))

    # --- the heap

    def _push(self, call: Call) -> None:
        call.when = call.timeout
        call.in_heap = True
        heappush(self._tasks, call)

    def _pop(self) -> Call:
        call = heappop(self._tasks)
        call.in_heap = False
        if call.cancelled:
            self._cancellations -= 1
        return call

    def _due(self) -> list[Call]:
        """Take what is due now off the heap. A repeated call made due again waits for the next round."""
        now = monotonic()
        due = []
        while self._tasks and self._tasks[0].when <= now:
            call = self._pop()
            if call.cancelled:
                continue
            if call.timeout > now:  # reset() moved it; this is where it learns its new place
                self._push(call)
            else:
                due.append(call)
        return due

    # --- the timer

    def _arm(self) -> None:
        """Set the hub timer for the head of the heap."""
        self._disarm()
        self._armed_for = self._tasks[0].when
        delay = self._armed_for - monotonic()
        # libuv counts whole milliseconds, rounding down: without the floor an early timer would be
        # armed with zero again and again until the millisecond has passed.
        timer = self._hub.loop.timer(max(delay, self._hub.loop.approx_timer_resolution))
        timer.start(self._on_due, update=True)
        self._timer = timer

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        self._armed_for = math.inf

    # --- runs in the hub: must not block

    def _on_due(self) -> None:
        if self._hub is None:  # detached since this was asked for
            return
        self._disarm()
        for call in self._due():
            if call.cancelled:  # by one before it
                continue
            if not self.put_back(call):  # (reset by one before it)
                self._run(call)
        if self._hub is not None and self._timer is None and self.next_delay() is not None:
            self._arm()

    def _on_soon(self) -> None:
        # Only what is there now: a call that makes another must let the hub look at its sockets first.
        for _ in range(len(self._soon)):
            if not self._soon:  # closed by one before it
                return
            call = self._soon.popleft()
            if not call.cancelled:
                self._run(call)
        if self._soon:
            self._hub.loop.run_callback(self._on_soon)
