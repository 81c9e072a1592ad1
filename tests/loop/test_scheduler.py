"""call_later and call_every on the hub."""

from __future__ import annotations

import gc
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.ioloop import AsyncChat

from bridge import GeventIOLoop
from support.fakes import RecordingHandler
from support.servers import Client, eventually, handler_class, serving, users

_native_sleep = monkey.get_original("time", "sleep")


@pytest.fixture(params=["before the loop", "on the hub"])
def ioloop(request: pytest.FixtureRequest) -> Iterator[GeventIOLoop]:
    """A loop that has not taken the hub yet when the test makes its calls, or one that has."""
    loop = GeventIOLoop()
    if request.param == "on the hub":
        loop._attach()
    yield loop
    loop.close()


def run(ioloop: GeventIOLoop, until: Event) -> None:
    ioloop._attach()
    assert until.wait(20), "the call did not come"


def test_calls_come_on_time_and_in_order(ioloop: GeventIOLoop) -> None:
    order: list[tuple[float, float]] = []
    done = Event()

    def came(delay: float) -> None:
        order.append((due[delay], time.monotonic()))
        if len(order) == len(due):
            done.set()

    # When each is due: what comes between two lines here may take longer than the calls are apart.
    due = {delay: ioloop.call_later(delay, came, delay).timeout for delay in (0.05, 0.04, 0.03, 0.02, 0.01)}
    run(ioloop, done)
    assert [when for when, _ in order] == sorted(due.values())
    assert all(at >= when for when, at in order), "a call came early"


def test_a_call_made_before_loop_comes_without_any_other_event() -> None:
    """pyftpdlib's first poll(None) waits for an event and lets calls be late."""
    ours, theirs = socket.socketpair()
    with theirs, GeventIOLoop() as ioloop:
        AsyncChat(ours, ioloop=ioloop)
        ioloop.call_later(0.01, ioloop.close)
        with gevent.Timeout(20):
            ioloop.loop()


def test_zero_delays_keep_their_order_and_cost_no_timer(ioloop: GeventIOLoop) -> None:
    order: list[int] = []
    done = Event()
    for number in range(50):
        ioloop.call_later(0, order.append, number)
    ioloop.call_later(0, done.set)
    if ioloop._hub is not None:
        assert ioloop.sched._timer is None
        assert ioloop.sched._tasks == []
    run(ioloop, done)
    assert order == list(range(50))
    assert ioloop.sched._timer is None


def test_a_zero_delay_that_makes_another_does_not_starve_the_hub(ioloop: GeventIOLoop) -> None:
    rounds = []

    def again() -> None:
        rounds.append(1)
        ioloop.call_later(0, again)

    ioloop._attach()
    ioloop.call_later(0, again)
    gevent.sleep(0.01)
    assert rounds


def test_cancelled_calls_do_not_come(ioloop: GeventIOLoop) -> None:
    order: list[str] = []
    done = Event()
    ioloop.call_later(0, order.append, "zero").cancel()
    ioloop.call_later(0.01, order.append, "one").cancel()
    ioloop.call_later(0.01, lambda: second.cancel())
    second = ioloop.call_later(0.02, order.append, "two")
    ioloop.call_later(0.03, done.set)
    run(ioloop, done)
    assert order == []
    assert second.cancelled


def test_cancelled_calls_are_freed_although_no_timer_fires(ioloop: GeventIOLoop) -> None:
    ioloop._attach()
    kept = [ioloop.call_later(300, len, "") for _ in range(100)]
    for _ in range(50_000):
        ioloop.call_later(300, len, "").cancel()
    assert len(ioloop.sched._tasks) <= 100 + 513
    for call in kept:
        call.cancel()
    assert ioloop.sched._tasks == []


def test_a_cancelled_call_keeps_neither_target_nor_owner(tmp_path: Path) -> None:
    handlers: weakref.WeakSet[Any] = weakref.WeakSet()

    class Handler(RecordingHandler):
        events: list[tuple[Any, ...]] = []

        def on_connect(self) -> None:
            handlers.add(self)

    with serving(handler_class(users(tmp_path), Handler, timeout=300)) as server, Client(server) as stays:
        for _ in range(3):
            Client(server).close()
        eventually(lambda: len(server.ioloop.socket_map) == 2)
        eventually(lambda: gc.collect() >= 0 and len(handlers) == 1)
        stays.command("NOOP", "200")


def test_one_timer_is_armed_for_the_soonest_and_kept_for_later_ones(ioloop: GeventIOLoop) -> None:
    ioloop._attach()
    ioloop.call_later(30, len, "")
    timer = ioloop.sched._timer
    for _ in range(10):
        ioloop.call_later(300, len, "")
    assert ioloop.sched._timer is timer
    ioloop.call_later(3, len, "")
    assert ioloop.sched._timer is not timer


def test_only_cancelled_calls_do_not_keep_the_hub_alive(ioloop: GeventIOLoop) -> None:
    ioloop._attach()
    call = ioloop.call_later(300, len, "")
    assert ioloop.sched._timer.ref
    call.cancel()
    assert not ioloop.sched._timer.ref
    ioloop.call_later(300, len, "")
    assert ioloop.sched._timer.ref


def test_reset_starts_the_countdown_again(ioloop: GeventIOLoop) -> None:
    order: list[str] = []
    done = Event()

    def came() -> None:
        order.append("reset")
        done.set()

    call = ioloop.call_later(0.03, came)
    ioloop.call_later(0.04, order.append, "other")
    _native_sleep(0.02)  # the hub does not run: however long this takes, neither has come
    call.reset()
    run(ioloop, done)
    assert order == ["other", "reset"]


def test_a_call_may_reset_one_that_is_due_with_it(ioloop: GeventIOLoop) -> None:
    order: list[str] = []
    done = Event()
    ioloop.call_later(0.01, lambda: second.reset())
    second = ioloop.call_later(0.02, order.append, "second")
    ioloop.call_later(0.03, order.append, "third")
    ioloop.call_later(0.035, done.set)
    _native_sleep(0.04)  # all are due
    run(ioloop, done)
    assert order == ["third"]
    second.cancel()


def test_a_turn_may_reset_a_call_that_came_due_while_it_waited(tmp_path: Path) -> None:
    """As a transfer does with its idle timer, when a write has waited for longer than that."""
    calls: list[Any] = []

    class Handler(FTPHandler):
        def ftp_STAT(self, line: str) -> None:
            call: Any = self.ioloop.call_later(0.01, self.respond, "421 Too late.")
            calls.append(call)
            while call.in_heap:  # then it is due, and its turn comes after this one
                gevent.sleep(0.005)
            call._delay = 60
            call.reset()
            self.respond("211 Done.")

    with serving(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        client.command("STAT", "211")
        client.command("NOOP", "200")
        assert calls[0].in_heap
        assert not calls[0].cancelled


def test_a_reset_call_does_not_hide_one_that_is_due(ioloop: GeventIOLoop) -> None:
    """pyftpdlib changes the key of a call inside its heap: what lies behind it comes late."""
    done = Event()
    head = ioloop.call_later(0.02, len, "")
    ioloop.call_later(0.03, done.set)
    head._delay = 60  # type: ignore[misc]
    head.reset()
    run(ioloop, done)
    assert not head.cancelled


def test_call_every_comes_until_cancelled(ioloop: GeventIOLoop) -> None:
    times: list[int] = []
    done = Event()

    def tick() -> None:
        times.append(1)
        if len(times) == 3:
            call.cancel()
            ioloop.call_later(0.02, done.set)

    call = ioloop.call_every(0.003, tick)
    run(ioloop, done)
    assert len(times) == 3


def test_call_every_ends_when_it_raises(ioloop: GeventIOLoop, caplog: pytest.LogCaptureFixture) -> None:
    done = Event()
    call = ioloop.call_every(0.001, lambda: 1 / 0)
    ioloop.call_later(0.02, done.set)
    run(ioloop, done)
    assert call.cancelled
    assert caplog.text.count("Traceback") == 1


def test_an_exception_in_a_call_is_logged_and_the_next_comes(
    ioloop: GeventIOLoop, caplog: pytest.LogCaptureFixture
) -> None:
    done = Event()
    ioloop.call_later(0.001, lambda: 1 / 0)
    ioloop.call_later(0.002, done.set)
    run(ioloop, done)
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert record.name == "pyftpdlib"
    assert "ZeroDivisionError" in record.getMessage()


def test_errback_takes_the_exception(ioloop: GeventIOLoop, caplog: pytest.LogCaptureFixture) -> None:
    done = Event()
    ioloop.call_later(0.001, lambda: 1 / 0, _errback=done.set)
    run(ioloop, done)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_call_that_waits_does_not_hold_up_the_next(ioloop: GeventIOLoop) -> None:
    gate, done = Event(), Event()
    ioloop.call_later(0.001, gate.wait, 20)
    ioloop.call_later(0.002, done.set)
    run(ioloop, done)
    gate.set()
    gevent.sleep(0)


def test_what_call_later_refuses() -> None:
    with GeventIOLoop() as ioloop:
        with pytest.raises(AssertionError):
            ioloop.call_later(-1, len)
        with pytest.raises(AssertionError):
            ioloop.call_later(1, None)
        call = ioloop.call_later(1, len, "")
        call.cancel()
        call.cancel()
        with pytest.raises(AssertionError):
            call.reset()
        with pytest.raises(AssertionError):
            call.call()
        assert "cancelled=True" in repr(call)


def test_poll_of_the_scheduler_returns_the_time_to_the_next_call(ioloop: GeventIOLoop) -> None:
    assert ioloop.sched.poll() is None
    ran: list[int] = []
    ioloop.call_later(0, ran.append, 1)
    ioloop.call_later(60, ran.append, 2).cancel()
    call = ioloop.call_later(50, ran.append, 3)
    before = call.timeout - time.monotonic()
    delay = ioloop.sched.poll()
    assert delay is not None
    assert call.timeout - time.monotonic() <= delay <= before <= 50
    gevent.sleep(0)
    assert ran == [1]


def test_close_cancels_everything(ioloop: GeventIOLoop) -> None:
    ioloop._attach()
    calls = [ioloop.call_later(delay, pytest.fail, "called") for delay in (0, 0.001, 300)]
    ioloop.close()
    assert all(call.cancelled for call in calls)
    gevent.sleep(0.01)
