"""How hypothesis makes up sequences, and each is run. No tests here."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from hypothesis import HealthCheck, Phase, settings

from support.effort import Effort
from support.servers import eventually


@contextlib.contextmanager
def sequences(watchdog: Any, name: str) -> Iterator[Callable[[], None]]:
    """Gives what is to be called when a sequence begins: each has the watchdog's time for itself, and none is
    interrupted by the collector, which needs 60 ms for what hypothesis has, while a turn may block for 50."""

    def begin() -> None:
        watchdog.test(f"{name}, a sequence")
        gc.collect()

    gc.disable()
    try:
        yield begin
    finally:
        gc.enable()


def await_or_fail(condition: Callable[[], object], otherwise: Callable[[], str]) -> None:
    """As `eventually`; hypothesis prints the steps that led to an AssertionError, but not to a Timeout."""
    try:
        eventually(condition)
    except gevent.Timeout:
        raise AssertionError(otherwise()) from None


def no_more(now: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Whether of all that is counted no more is there; less may be: a thread of passwords has ended."""
    return all(count <= then for count, then in zip(now, before, strict=True))


def settings_of(effort: Effort, examples: dict[str, int], steps: int = 30) -> settings:
    """The same sequences each time in the short form; others with each run of the rest.

    Minutes go by until a sequence is as short as it can be: only who has hours waits for that.
    """
    return settings(
        max_examples=examples[effort],
        stateful_step_count=steps,
        deadline=None,
        derandomize=effort == "short",
        database=None,
        phases=[Phase.generate, Phase.shrink] if effort == "long" else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
