"""A server's graceful end: who may finish, until when, and what became of it.

A leaf but for session/data.py, which knows who is in a transfer. server.py starts one `Drain` when it stops
and tells it what ends; the drain runs on a greenlet of its own, so it goes on when whoever asked for it is
killed. What a session does in a drain is `handlers.SessionMixin.finish` (421 now) and
`finish_soon` (after its 226).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import gevent
from gevent.event import Event

from bridge.loop import seconds_until
from bridge.session import transferring

log = logging.getLogger(__name__)

#: Seconds that sessions have to end once they were cut, before their channels are closed under them. As
#: in gevent.baseserver.BaseServer.stop: `self.pool.kill(block=True, timeout=1)`.
KILL_GRACE = 1.0

FAREWELL = "Service shutting down."


class StopReport(NamedTuple):
    """What became of the sessions and transfers there were when `stop()` was called."""

    #: Sessions that ended with a 421, or by themselves, in time.
    sessions_finished: int = 0
    #: Sessions that the timeout ended.
    sessions_cut: int = 0
    #: Transfers that got their 226 in time.
    transfers_finished: int = 0
    #: Transfers that failed or were aborted by their client meanwhile.
    transfers_failed: int = 0
    #: Transfers that the timeout ended with 426.
    transfers_cut: int = 0

    def __str__(self) -> str:
        return (
            f"{self.sessions_finished} session(s) finished and {self.sessions_cut} cut, "
            f"{self.transfers_finished} transfer(s) finished, {self.transfers_failed} failed "
            f"and {self.transfers_cut} cut"
        )


class Drain:
    """The end of the sessions that *sessions*, which shrinks as they end, holds at the start.

    *end_now* is called when sessions are left KILL_GRACE seconds after they were cut: a turn that swallows
    what is thrown into it. *timeout*: seconds until they are cut; None for no limit.
    """

    def __init__(
        self, sessions: Collection[Any], ioloop: Any, timeout: float | None, end_now: Callable[[], None]
    ) -> None:
        self._sessions = sessions
        self._ioloop = ioloop
        self._end_now = end_now
        self._deadline = _deadline(timeout)
        self._changed = Event()
        #: Each session of the start, and whether its transfer of then still runs.
        self._transfers = {control: transferring(control) for control in sessions}
        self._transfers_finished = self._transfers_failed = 0
        self._cutting = False
        self._greenlet = gevent.spawn(self._run)

    def hasten(self, timeout: float | None) -> None:
        """Cut what is left after *timeout* seconds from now, if that is sooner."""
        deadline = _deadline(timeout)
        if deadline is not None and (self._deadline is None or deadline < self._deadline):
            self._deadline = deadline
            self._changed.set()

    def session_ended(self) -> None:
        """One of the sessions is over."""
        if not self._sessions:
            self._changed.set()

    def transfer_ended(self, control: Any, completed: bool) -> None:
        """A transfer has had its last reply: so does its session, unless another one runs."""
        if self._transfers.get(control):
            self._transfers[control] = False
            if not self._cutting:
                self._transfers_finished += completed
                self._transfers_failed += not completed
        self._ioloop.submit(control.finish_soon, FAREWELL)

    def join(self) -> StopReport:
        """Wait for the end of the drain; what became of everybody."""
        self._greenlet.join()
        report: StopReport = self._greenlet.get()
        return report

    def _run(self) -> StopReport:
        log.info(
            "%d session(s) to end, %d of them after their transfer",
            len(self._transfers),
            sum(self._transfers.values()),
        )
        for control in self._transfers:
            self._ioloop.submit(control.finish, FAREWELL)
        while self._sessions:
            self._changed.clear()
            if self._deadline is not None and self._deadline <= time.monotonic():
                break
            self._changed.wait(None if self._deadline is None else seconds_until(self._deadline))
        left_over = list(self._sessions)
        cut = frozenset(control for control in left_over if not control.farewell)
        self._cutting = True
        transfers_cut = sum(transferring(control) for control in cut)
        for control in left_over:
            self._ioloop.submit(control.cut, FAREWELL, interrupt=True)
        if left_over:
            self._changed.clear()
            if not self._changed.wait(KILL_GRACE):
                log.error("%d turn(s) do not end; closing their channels", len(self._sessions))
                self._end_now()
        report = StopReport(
            sessions_finished=len(self._transfers.keys() - cut),
            sessions_cut=len(cut),
            transfers_finished=self._transfers_finished,
            transfers_failed=self._transfers_failed,
            transfers_cut=transfers_cut,
        )
        log.info("stopped: %s", report)
        return report


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
