"""Who may run now, and on which greenlet: sessions, turns and their workers.

A leaf of the package: it knows greenlets and contexts, but no socket, no timer and no pyftpdlib. The
ioloop hands it jobs from the hub; it runs each as one *turn* of one *session* on a *worker* greenlet.

(Over 400 lines: a fifth of them is the argument why it is right, which belongs beside the code.)

The rules, and why they hold:

1. A session has one turn at a time. `Session.worker` names the worker that has it. `Turns.run` and `_work`
   set it, only when it is None; `Turns.session_of` sets it for what an accept's turn creates (rule 5);
   only the end of that worker's turn clears it. None of these switches in between, so no other greenlet
   sees a half-made change.
2. What becomes due for a busy session goes to its backlog (the ioloop asks `Session.worker` first). The
   worker empties the backlog before it gives the session up, so nothing is lost and order holds.
3. Channels that are ready together cost two switches together, unless one of them waits: hub to worker,
   worker to hub (`Turns.serve`; 0.91 of the CPU for a command of 50 sessions at once, against two switches
   for each). The worker that did not wait is kept as the *spare* for the next turn: a new greenlet costs
   10.9 us on CPython 3.11, a reused one 1.0 us, context included. A worker is told its job by an attribute
   and enters a context only when it is not in it: 0.97 for a command of one session.
4. A worker that has waited is not used again. While it waited, others could take hold of it: a
   `gevent.Timeout` nobody closed, a `kill()` somebody scheduled. Those must not strike the next session.
   (DESIGN.md kept these in the pool too; a turn that waits costs a trip through the hub and a timer
   anyway, and one spare is enough for turns that do not.)
5. An accept is the first turn of the session it creates: it runs in a fresh, *vacant* session, and the
   control connection registered during that turn takes the session over. So `on_connect` already runs in
   the session's context, and the client's commands wait until the accept's turn has ended: USER never
   overtakes the banner. Any further channel made in that turn is held the same way.

What follows, together with registration.py and scheduler.py (tests/proof/test_model.py tries it under every
order of events). All of it is in the hub's thread, and a change of state is made without a switch in it:

- No event is lost. The kernel keeps an event until it is used (it is level-triggered), and a channel is
  always one of: *watched*, so the kernel tells again; *ready*, in `Turns.ready`, which `serve` empties, or
  leaves to a pass that it has asked for; *parked*, its unparking in the backlog of its busy session, which
  rule 2 empties; *resting*, with a timer that ends it. (A channel that is watched may be in `ready`, too:
  handling it once more finds nothing.)
- Idle sessions are watched, busy ones do not spin. An event of a busy session parks its channel, so a turn is
  disturbed once by each channel, however long it waits; the end of the turn has every channel watched again.
- No call is lost or early. It is in the scheduler's heap, whose timer is never later than its head; or
  without delay in the list of the hub's next pass; or due, in the backlog of its busy session.
- No turn is lost. A switch to a worker returns when its turn has ended or waits; one that waits has a session
  and goes into `waiting`, which only its end takes it out of. So `close()` finds each, and with the
  registrations' watchers and the scheduler's timer that is all that could be left on the hub.
- Order holds in a session: `ready` is served in the order of arrival, a backlog from its front, calls by time
  and then by age. Only calls without delay have two queues, one for those made in a turn of the session and
  one for all others, and no order between the two.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet
from greenlet import error as GreenletError

#: One unit of work: called with its argument on a worker greenlet; must not raise, except what is meant
#: for the caller of `loop()` (KeyboardInterrupt, SystemExit, asyncore.ExitNow).
Job = Callable[[Any], None]

#: Seconds that channels which are ready together are served before others on the hub have their turn. Below
#: the 5 ms after which a request to a web application beside 50 transfers should be answered.
SLICE = 0.004

#: The same for each of them, if that is more: 1 000 commands at once are served at once, as pyftpdlib does.
#: What is left becomes ready again in each pass of the hub, which would make 5 000 commands 3 times as dear.
SLICE_EACH = 0.000025

#: Where a control connection keeps its session. An attribute, not a table: the two then live and die
#: together, also when user code makes the session's context point back at the handler.
_ATTRIBUTE = "_bridge_session"


class Interrupt(GreenletExit):
    """Thrown into a turn that waits, to end the turn but not its session.

    Whoever throws it has put into the session's backlog what is to happen instead. A plain GreenletExit
    ends the session.
    """


class Channel(Protocol):
    """What `Turns.serve` needs to know of a channel."""

    #: Whose turn an event of it is; None if it makes a session for each.
    session: Session | None
    control: Any
    #: None when the channel is not served any more.
    watcher: Any

    def admit(self) -> Session | None:
        """The idle session whose turn it is, when that is not `session`; None if there is no turn now."""

    def handle(self) -> None:
        """One turn."""


class Session:
    """A client's control connection with all its channels and timers: the unit that takes turns."""

    __slots__ = ("backlog", "context", "turns", "vacant", "worker")

    def __init__(self, turns: Turns, context: contextvars.Context, vacant: bool = False) -> None:
        #: The `Turns` this session belongs to: a handler that moves to another ioloop gets a new session.
        self.turns = turns
        #: Every turn of this session runs in this context.
        self.context = context
        #: Made for an accept and not yet taken over by the control connection it creates.
        self.vacant = vacant
        #: The worker that has the turn; None while the session is idle.
        self.worker: Worker | None = None
        #: (control, job, argument) that became due during a turn, oldest first.
        self.backlog: list[tuple[Any, Job, Any]] | None = None

    def defer(self, control: Any, job: Job, argument: Any) -> None:
        """Keep a job of a busy session for the end of its turn."""
        if self.backlog is None:
            self.backlog = []  # no deque: what waits is one or two jobs
        self.backlog.append((control, job, argument))


class Worker(greenlet):
    """A greenlet that runs turns; the hub is its parent."""

    __slots__ = ("argument", "control", "held", "job", "named", "session", "turns", "waited", "waiting_since")

    def __init__(self, turns: Turns) -> None:
        # Not a method: a suspended frame that refers to its own greenlet would keep it alive for ever.
        super().__init__(_work, turns.hub)
        self.turns = turns
        #: What to do when it is switched to: this; None for what is `Turns.ready`.
        self.job: Job | None = None
        self.argument: Any = None
        #: Whose turn runs; None between turns.
        self.session: Session | None = None
        #: The control connection whose turn runs, if the turn belongs to one.
        self.control: Any = None
        #: In an accept's turn, once its session is taken: further sessions created, busy until it ends.
        self.held: list[Session] | None = None
        #: This worker's turn went back to the hub before its end.
        self.waited = False
        #: When it first did: `time.monotonic()`, seconds.
        self.waiting_since = 0.0
        #: The log has named this wait as too long.
        self.named = False

    def throw(self, *args: Any) -> Any:
        """As `gevent.Greenlet.throw`: what comes for a worker that has ended is dropped.

        A plain greenlet would raise it in the hub (a Timeout nobody closed, a kill that came too late).
        """
        return None if self.dead else super().throw(*args)

    # --- runs in a worker greenlet: may wait

    def finish(self, session: Session) -> None:
        """Run what became due during the turn, for its session and for those it created."""
        for each in (session, *(self.held or ())):
            if each is not session:
                self.session = each
                self.gr_context = each.context
            while each.backlog:
                self.control, job, argument = each.backlog.pop(0)
                try:
                    job(argument)
                except BaseException as error:
                    self.turns.on_escape(error)
            each.worker = None
        self.held = None


def _work() -> None:
    """A worker's life: turns, until one has waited. The first switch only brings it to its start."""
    worker: Any = getcurrent()
    turns: Turns = worker.turns
    hub = turns.hub
    ready = turns.ready
    hub_switch = greenlet.switch  # the hub's own switch() only adds a check for callbacks that block
    context = None  # this greenlet's; it keeps it anyway
    while True:
        # An idle worker must keep neither the last session alive nor itself.
        session = job = channel = worker = None
        try:
            worker = hub_switch(hub)
        except GreenletExit:  # with its ioloop, or by a late kill
            if turns.spare is getcurrent():
                turns.spare = None
            return
        job = worker.job
        if job is not None:  # one turn: `Turns.run` has set session, control and context
            context = None
            try:
                job(worker.argument)
            except BaseException as error:
                turns.on_escape(error)
            worker.job = worker.argument = None
            worker.finish(worker.session)
        else:
            while ready:  # a turn for each; all that is done for every event in one frame
                channel = ready.pop()
                session = channel.session
                if session is None or session.worker is not None or channel.watcher is None:
                    session = channel.admit()
                    if session is None:
                        continue
                session.worker = worker
                worker.session = session
                worker.control = channel.control
                if session.context is not context:
                    context = worker.gr_context = session.context
                try:
                    channel.handle()
                except BaseException as error:
                    turns.on_escape(error)
                if session.backlog or worker.held is not None:
                    context = None
                    worker.finish(session)
                else:
                    session.worker = None
                if worker.waited or (ready and monotonic() > turns.slice_ends):
                    break
        worker.session = worker.control = None
        if worker.waited:
            turns.ended(worker)
            return
        if turns.closed or turns.spare is not None:
            return
        turns.spare = worker


class Turns:
    """The turns of all sessions of one ioloop on one hub.

    *hub* is borrowed. *on_escape* is called in the worker with what a job raised. *on_quiet* is called
    in the worker when the last waiting turn has ended. *on_wait* is called in the hub with the
    workers whose turns wait, when one begins to. *on_pass* is called in the hub when channels are `ready`;
    *on_accept_error* in the worker when a listener begins to rest.
    """

    __slots__ = (
        *(
            "_left",
            "closed",
            "enqueue",
            "has_check_watcher",
            "hub",
            "on_accept_error",
            "on_escape",
            "on_pass",
        ),
        *("on_quiet", "on_wait", "ready", "slice_ends", "spare", "waiting"),
    )

    def __init__(
        self,
        hub: Any,
        on_escape: Callable[[BaseException], None],
        on_quiet: Callable[[], None],
        on_wait: Callable[[set[Worker]], None],
        on_pass: Callable[[], None],
        on_accept_error: Callable[[], None],
    ) -> None:
        self.hub = hub
        self.on_escape = on_escape
        self.on_quiet = on_quiet
        self.on_wait = on_wait
        self.on_pass = on_pass
        self.on_accept_error = on_accept_error
        #: Whether a watcher of the ioloop's calls *on_pass* after each pass of the hub, without being asked.
        self.has_check_watcher = False
        #: The one idle worker kept for the next turn.
        self.spare: Worker | None = None
        #: Workers whose turn waits.
        self.waiting: set[Worker] = set()
        self.closed = False
        #: Channels with events to be served, the next one last.
        self.ready: list[Channel] = []
        #: A watcher's callback: the channel has events.
        self.enqueue = self.ready.append
        #: When a worker leaves the rest of them to the hub's next pass (`time.monotonic()`).
        self.slice_ends = 0.0
        #: How many of `ready`, its first ones, the last slice has left.
        self._left = 0

    # --- runs in the hub: must not block

    def expect_pass(self) -> None:
        """Something is about to be ready, perhaps the first in this pass."""
        if not self.has_check_watcher and not self.ready:
            self.hub.loop.run_callback(self.on_pass)

    def run(self, session: Session, control: Any, job: Job, argument: Any) -> None:
        """Give an idle *session* its turn; return when the turn has ended or waits."""
        worker = self.spare
        if worker is None:
            worker = Worker(self)
            # Not yet with the job: what a greenlet is started with, it keeps until its end.
            worker.switch()
        else:
            self.spare = None
        session.worker = worker
        worker.session = session
        worker.control = control
        worker.gr_context = session.context
        worker.job = job
        worker.argument = argument
        worker.switch(worker)
        if worker.session is not None:
            self._waits(worker)

    def serve(self, oldest_last: bool) -> None:
        """Give every channel that is `ready` its turn, the oldest first; *oldest_last*: how they are ordered.

        One worker goes from one to the next, until a turn waits; then the next worker goes on. After
        SLICE seconds, or SLICE_EACH for each, the rest stays in `ready`, for others on the hub.
        """
        ready = self.ready
        if len(ready) > 1:
            if self._left or not oldest_last:
                self._arrange(oldest_last)
            self.slice_ends = monotonic() + max(SLICE, len(ready) * SLICE_EACH)
        self._left = 0
        if self.closed:
            ready.clear()
        while ready:
            worker = self.spare
            if worker is None:
                worker = Worker(self)
                worker.switch()
            else:
                self.spare = None
            worker.switch(worker)
            if worker.session is not None:
                self._waits(worker)
            elif ready:
                self._left = len(ready)
                return

    def again(self, channel: Channel, times: int) -> None:
        """Called in a turn of *channel*: give it so many more, behind all that is ready now."""
        if not self.ready:
            self.slice_ends = monotonic() + SLICE
        self.ready[:0] = [channel] * times

    def _arrange(self, oldest_last: bool) -> None:
        """Put what the last slice has left before what became ready since, and each channel only once."""
        ready = self.ready
        left, new = ready[: self._left], ready[self._left :]
        if not oldest_last:
            new.reverse()
        known = set(map(id, left))
        ready[:] = [channel for channel in new if id(channel) not in known] + left

    def _waits(self, worker: Worker) -> None:
        worker.waited = True
        worker.waiting_since = monotonic()
        self.waiting.add(worker)
        self.on_wait(self.waiting)

    # --- runs in a worker greenlet: may wait

    def ended(self, worker: Worker) -> None:
        """A turn that had waited has ended."""
        self.waiting.discard(worker)
        if not self.waiting:
            self.on_quiet()

    # --- runs anywhere in the hub's thread

    def session_of(self, control: Any, context: contextvars.Context | None = None) -> Session:
        """The session of a control connection; made, taken over or held when seen for the first time.

        One that is made runs in a copy of *context*, or of the caller's.
        """
        known: Session | None = getattr(control, _ATTRIBUTE, None)
        if known is not None and known.turns is self:
            return known
        worker = getcurrent()
        session: Session
        if type(worker) is Worker and worker.turns is self and worker.session is not None:
            session = worker.session
            if session.vacant:
                session.vacant = False
                worker.control = control
                worker.held = []
            else:
                session = Session(self, contextvars.copy_context())
                if worker.held is not None:
                    session.worker = worker
                    worker.held.append(session)
        elif known is not None:
            session = Session(self, known.context.copy())
        else:
            session = Session(self, contextvars.copy_context() if context is None else context.copy())
        try:
            setattr(control, _ATTRIBUTE, session)
        except AttributeError:  # an object with __slots__: each of its channels is a session of its own
            pass
        return session

    def waiting_turn_of(self, control: Any) -> Worker | None:
        """The worker whose turn waits in the session of *control*, if there is one."""
        session: Session | None = getattr(control, _ATTRIBUTE, None)
        worker = None if session is None else session.worker
        return worker if worker in self.waiting else None

    def close(self) -> None:
        """End the idle worker and use no other again. Waiting turns are the caller's to kill."""
        self.closed = True
        self.ready.clear()
        spare, self.spare = self.spare, None
        if spare is not None:
            try:
                spare.parent = getcurrent()  # where it ends, instead of in the hub
                spare.throw()
            except (GreenletError, ValueError):
                pass  # in another thread: it ends when that one next runs, or is freed with it


def current_session() -> Any:
    """The handler (control connection) whose turn runs in this greenlet, or None outside of turns.

    Meant for log filters and for code that is called from handlers, authorizers and file systems. A
    greenlet spawned by a turn is outside; it inherits the session's `contextvars` as all greenlets do.
    """
    worker = getcurrent()
    return worker.control if isinstance(worker, Worker) else None


def waiting_since(control: Any) -> float | None:
    """Since when the turn of *control*'s session waits (`time.monotonic()`); None if it does not."""
    session: Session | None = getattr(control, _ATTRIBUTE, None)
    worker = None if session is None else session.worker
    return worker.waiting_since if worker is not None and worker.waited else None
