"""The turns and the scheduler under every order of events: the real loop on a hub with virtual time.

Hypothesis chooses what happens next: bytes arrive, a turn begins to wait, goes on or is killed, calls become
due, channels open and close. Nothing but the hub, the clock and the channels is made for the test, and
there is no system call, so thousands of interleavings are tried in seconds. What must hold at every step is
in `check` and in `Channel.turn`; what must hold at the end, in `teardown`.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import hypothesis.strategies as st
import pyftpdlib.ioloop
import pytest
from gevent import GreenletExit, Timeout, monkey
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pyftpdlib.ioloop import AsyncChat

import bridge.loop.registration
import bridge.loop.scheduler
import bridge.loop.turns
from bridge import GeventIOLoop
from bridge.loop import hubs
from bridge.loop.turns import Interrupt
from support.effort import Effort

READ = 1

#: Whose context it is.
owner: contextvars.ContextVar[Any] = contextvars.ContextVar("owner")

#: The machine that runs; what stands for gevent asks it for the time.
machine: Machine


# --- what stands for gevent


class Watcher:
    """An io, timer, check or async watcher."""

    def __init__(self, loop: Loop, kind: str, what: float = 0, events: int = 0) -> None:
        self.loop, self.kind, self.what, self.events = loop, kind, what, events
        self.ref = True
        self.due = 0.0
        self.closed = False
        self.callback: Callable[[], object] | None = None

    @property
    def active(self) -> bool:
        return self.callback is not None

    def start(self, callback: Any, *args: Any, pass_events: bool = False, update: bool = False) -> None:
        assert not self.closed
        assert self.callback is None, "started twice"
        self.due = self.loop.now + self.what
        self.callback = lambda: callback(self.events, *args) if pass_events else callback(*args)
        self.loop.active.append(self)

    def stop(self) -> None:
        if self.callback is not None:
            self.callback = None
            self.loop.active.remove(self)

    def close(self) -> None:
        assert self.callback is None
        self.closed = True


class Loop:
    """One pass at a time, when it is told to."""

    MINPRI = -2
    backend = "virtual"
    approx_timer_resolution = 0.001
    #: In which order watchers call that became ready one after the other.
    last_comes_first = False

    def __init__(self) -> None:
        self.now = 1000.0
        self.active: list[Watcher] = []
        self.callbacks: list[Callable[[], object]] = []

    def io(self, fd: int, events: int) -> Watcher:
        return Watcher(self, "io", fd, events)

    def timer(self, after: float, ref: bool = True) -> Watcher:
        return Watcher(self, "timer", after)

    def check(self, ref: bool = True, priority: int = 0) -> Watcher:
        return Watcher(self, "check")

    def async_(self, ref: bool = True) -> Watcher:
        return Watcher(self, "async")

    def run_callback(self, function: Callable[..., object], *args: Any) -> None:
        self.callbacks.append(lambda: function(*args))

    def one_pass(self, ready: list[int]) -> None:
        """*ready*: descriptors, the one that became ready first before the others."""
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()
        found = [each for fd in ready for each in self.active if each.kind == "io" and each.what == fd]
        if self.last_comes_first:
            found.reverse()
        due = [each for each in self.active if each.kind == "timer" and each.due <= self.now]
        for watcher in (*found, *sorted(due, key=lambda each: each.due)):
            if watcher.callback is not None:
                callback = watcher.callback
                if watcher.kind == "timer":
                    watcher.stop()
                callback()
        for watcher in [each for each in self.active if each.kind == "check"]:
            assert watcher.callback is not None
            watcher.callback()


#: The name by which GeventIOLoop knows the loop that has check watchers, and calls the last one first.
Libev = type("Libev", (Loop,), {"__module__": "gevent.libev.corecext", "last_comes_first": True})


class Hub(greenlet):
    """Runs what it is told to, and returns to the test."""

    main_hub = True
    thread_ident = monkey.get_original("_thread", "get_ident")()

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def run(self, function: Callable[[], object]) -> None:
        while True:
            result: object = None
            try:
                function()
            except BaseException as error:
                result = error
            assert self.parent is not None
            function = self.parent.switch(result)

    def do(self, function: Callable[..., object], *args: Any) -> None:
        error = self.switch(lambda: function(*args))
        if error is not None:
            raise error

    def handle_error(self, *args: Any) -> None:
        raise args[2]


# --- what stands for pyftpdlib's channels


def expect(holds: bool, otherwise: str) -> None:
    """What is raised in a turn ends in a log."""
    if not holds:
        machine.broken.append(otherwise)


class Channel(AsyncChat):
    """A control connection, or with *control* one of its data connections. What arrives says what to do."""

    numbers: ClassVar[Iterator[int]]

    def __init__(self, ioloop: GeventIOLoop, control: Channel | None = None) -> None:
        super().__init__(None, ioloop)
        if control is not None:
            self.cmd_channel = control
        self.session_name = self if control is None else control
        self._fileno = next(self.numbers)
        self.arrived: list[tuple[int, str]] = []
        self.sent = self.handled = 0
        self.turns = 0  # of the session, at this moment
        #: The last call without delay that was made outside of a turn, and in one: which runs at its end.
        self.last_calls = [-1, -1]
        self.add_channel()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def handle_read_event(self) -> None:
        number, action = self.arrived.pop(0)
        expect(number == self.handled, "out of order")
        self.handled += 1
        self.turn(action)

    def turn(self, action: str) -> None:
        control = self.session_name
        expect(control.turns == 0, "two turns of one session at once")
        expect(bridge.loop.turns.current_session() is control, "the turn of another session")
        expect(owner.get(control) is control, "the context of another session")
        owner.set(control)
        control.turns += 1
        try:
            self.act(action)
        finally:
            control.turns -= 1

    def act(self, action: str) -> None:
        if action == "wait":
            worker = getcurrent()
            machine.waiting.append(worker)
            try:
                machine.hub.switch()
            finally:
                machine.waiting.remove(worker)
        elif action == "raise":
            raise ValueError(action)
        elif action == "close":
            self.close()
        elif action == "open":
            machine.open_data_channel(self.session_name)
        elif action == "call":
            machine.call_later(self, 0.0, "nothing")
        elif action == "call and wait":
            machine.call_later(self, 0.0, "nothing")
            self.act("wait")

    def due(self, call: dict[str, Any], action: str) -> None:
        expect(not call["done"], "called twice")
        expect(machine.hub.loop.now >= call["when"], "called too early")
        call["done"] = True
        if call["number"] is not None:  # of calls without delay
            last = self.session_name.last_calls
            expect(call["number"] >= last[call["in_turn"]], "calls in another order")
            last[call["in_turn"]] = call["number"]
        if not self._closed:
            self.turn(action)

    def respond(self, reply: str) -> None:
        expect(reply.startswith("421"), reply)

    def handle_error(self) -> None:
        self.close()

    def close(self) -> None:
        if not self._closed:
            for data in machine.channels:
                if getattr(data, "cmd_channel", None) is self:
                    data.close()
        super().close()


# --- the machine

ACTIONS = ["nothing"] * 3 + ["wait"] * 2 + ["raise", "close", "open", "call", "call and wait"]


class Machine(RuleBasedStateMachine):
    loop_class: type[Loop] = Loop
    slices = False

    channels_bundle: Bundle[Channel] = Bundle("channels")
    calls_bundle: Bundle[dict[str, Any]] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        global machine
        machine = self
        self.patch = pytest.MonkeyPatch()
        self.hub = Hub(self.loop_class())
        for module in (bridge.loop.turns, bridge.loop.scheduler):
            self.patch.setattr(module, "monotonic", lambda: self.hub.loop.now)
        self.patch.setattr(pyftpdlib.ioloop, "timer", lambda: self.hub.loop.now)
        self.patch.setattr(hubs, "current", lambda: self.hub)
        self.patch.setattr(bridge.loop.registration, "fcntl", lambda fd, command: 0)  # all are open
        if self.slices:  # a worker leaves what is ready to the next pass after each turn
            self.patch.setattr(bridge.loop.turns, "SLICE", -1.0)
            self.patch.setattr(bridge.loop.turns, "SLICE_EACH", -1.0)
        logging.disable()
        Channel.numbers = iter(range(10_000_000, 20_000_000))
        self.waiting: list[Any] = []
        self.broken: list[str] = []
        self.channels: list[Channel] = []
        self.calls: list[dict[str, Any]] = []
        self.ready: list[int] = []  # descriptors, in the order in which something arrived
        self.ioloop = GeventIOLoop()
        self.ioloop.long_wait = 0
        self.hub.do(self.ioloop.attach)
        self.connect()

    # --- what happens

    @rule(target=channels_bundle)
    def connect(self) -> Channel:
        made: list[Channel] = []
        self.hub.do(lambda: made.append(Channel(self.ioloop)))
        self.channels += made
        return made[0]

    def open_data_channel(self, control: Channel) -> None:
        if not control._closed:
            self.channels.append(Channel(self.ioloop, control))

    @rule(which=st.integers(0, 30), actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3))
    def arrives(self, which: int, actions: list[str]) -> None:
        channel = self.channels[which % len(self.channels)]
        if channel._closed:
            return
        for action in actions:
            channel.arrived.append((channel.sent, action))
            channel.sent += 1
        if channel._fileno not in self.ready:
            self.ready.append(channel._fileno)

    @rule(times=st.integers(1, 3))
    def hub_runs(self, times: int) -> None:
        for _ in range(times):
            self.hub.do(self.hub.loop.one_pass, list(self.ready))
            still = {each._fileno for each in self.channels if each.arrived and not each._closed}
            self.ready = [fd for fd in self.ready if fd in still]

    @rule(seconds=st.sampled_from([0.001, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.hub.loop.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 30), how=st.sampled_from(["on", "on", "kill", "timeout", "interrupt"]))
    def a_wait_ends(self, which: int, how: str) -> None:
        worker = self.waiting[which % len(self.waiting)]
        if how == "on":
            self.hub.do(worker.switch)
        else:
            error: Any = {"kill": GreenletExit, "timeout": Timeout, "interrupt": Interrupt}[how]
            self.hub.do(worker.throw, error)

    @rule(
        target=calls_bundle,
        which=st.integers(0, 30),
        seconds=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]),
        action=st.sampled_from(ACTIONS),
    )
    def call(self, which: int, seconds: float, action: str) -> dict[str, Any]:
        made: list[Any] = []
        channel = self.channels[which % len(self.channels)]
        self.hub.do(lambda: made.append(self.call_later(channel, seconds, action)))
        return made[0]  # type: ignore[no-any-return]

    def call_later(self, channel: Channel, seconds: float, action: str) -> dict[str, Any]:
        call: dict[str, Any] = {"channel": channel, "when": self.hub.loop.now + seconds, "done": False}
        call["number"] = None if seconds else len(self.calls)
        call["in_turn"] = channel.session_name.turns > 0
        call["call"] = self.ioloop.call_later(seconds, channel.due, call, action)
        self.calls.append(call)
        return call

    @rule(call=consumes(calls_bundle))
    def cancel(self, call: dict[str, Any]) -> None:
        if not (call["done"] or call["call"].cancelled):
            self.hub.do(call["call"].cancel)

    @rule(call=calls_bundle)
    def reset(self, call: dict[str, Any]) -> None:
        if call["call"]._delay and not (call["done"] or call["call"].cancelled):
            call["when"] = self.hub.loop.now + call["call"]._delay
            self.hub.do(call["call"].reset)

    @rule(which=st.integers(0, 30), interrupt=st.booleans())
    def submit(self, which: int, interrupt: bool) -> None:
        channel = self.channels[which % len(self.channels)]
        if channel._closed:
            return
        call: dict[str, Any] = {"channel": channel, "when": 0.0, "done": False, "call": None, "number": None}
        self.calls.append(call)
        self.hub.do(lambda: self.ioloop.submit(channel.due, call, "nothing", interrupt=interrupt))

    # --- what must hold

    @invariant()
    def check(self) -> None:
        assert not self.broken
        ioloop = self.ioloop
        io = {each.what: each for each in self.hub.loop.active if each.kind == "io"}
        busy = {worker.session for worker in self.waiting}
        turns = ioloop._turns
        assert turns.waiting == set(self.waiting)
        assert {worker.session for worker in turns.waiting} == busy
        for registration in ioloop._registrations.values():
            session = registration.session
            assert session is not None
            assert (session.worker is not None) == (session in busy), "a session is busy without a turn"
            if session not in busy:
                assert registration.fd in io, "nobody watches an idle session"
                assert not session.backlog, "something waits for the end of no turn"
            else:
                assert registration.parked == (registration.fd not in io)
        assert set(io) <= {registration.fd for registration in ioloop._registrations.values()}
        timers = [each for each in self.hub.loop.active if each.kind == "timer"]
        assert len(timers) <= 1
        heap = [call.when for call in ioloop.sched._tasks if not call.cancelled]
        assert not heap or timers[0].due <= min(heap) + Loop.approx_timer_resolution, "a call is forgotten"

    def settle(self) -> None:
        """Let the hub run until there is nothing to do now."""
        for _ in range(10_000):
            before = self.state()
            self.hub_runs(1)
            self.check()
            if self.state() == before and not self.hub.loop.callbacks:
                return
        raise AssertionError("the hub does not come to rest")

    def state(self) -> Any:
        handled = [channel.handled for channel in self.channels]
        return (
            handled,
            [call["done"] for call in self.calls],
            len(self.waiting),
            len(self.ioloop._turns.ready),
        )

    def teardown(self) -> None:
        try:
            self.settle()
            for channel in self.channels:
                if channel.arrived and not channel._closed:
                    busy = self.ioloop._turns.waiting_turn_of(channel.session_name)
                    assert busy is not None, "an event is lost"
                    io = [each for each in self.hub.loop.active if each.what == channel._fileno]
                    assert not io, "a busy session is watched: a spin"
            for _ in range(10_000):
                if not self.waiting:
                    break
                self.hub.do(self.waiting[0].switch)
                self.settle()
            self.hub.loop.now += 10
            self.settle()
            while self.waiting:  # calls that wait
                self.hub.do(self.waiting[0].switch)
                self.settle()
            for channel in self.channels:
                assert channel._closed or not channel.arrived, "an event is lost"
            for call in self.calls:
                cancelled = call["call"] is not None and call["call"].cancelled
                assert call["done"] or cancelled or call["channel"]._closed, "a call is lost"
            self.hub.do(self.ioloop.close)  # in the hub, which only asks for it
            self.hub.do(self.hub.loop.one_pass, [])
            assert self.ioloop.closed
            assert not self.broken
            assert not self.hub.loop.active, "left on the hub"
            assert self.ioloop._turns.spare is None
        finally:
            logging.disable(logging.NOTSET)
            self.patch.undo()
            for worker in list(self.waiting):
                worker.throw()


#: Sequences of 40 steps, each shrunk if it fails; the same each time in the short form.
EXAMPLES = {"short": 25, "proof": 500, "long": 50_000}


@pytest.mark.parametrize("slices", [False, True], ids=["", "slices"])
@pytest.mark.parametrize("loop_class", [Libev, Loop], ids=["libev", "others"])
def test_invariants(loop_class: type[Loop], slices: bool, effort: Effort) -> None:
    machine_class: Any = type("Machine", (Machine,), {"loop_class": loop_class, "slices": slices})
    run_state_machine_as_test(
        machine_class,
        settings=settings(
            max_examples=EXAMPLES[effort],
            stateful_step_count=40,
            deadline=None,
            derandomize=effort == "short",
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )
