"""Counters that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bridge.server.shared_table import KEY, Full, SharedTable
from support.servers import FORKS_BESIDE_THREADS


@pytest.fixture
def table() -> Iterator[SharedTable]:
    table = SharedTable(slots=3, rows=64)
    yield table
    table.close()


def in_a_child(function: object) -> None:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings(FORKS_BESIDE_THREADS)
def test_what_a_process_adds_the_others_see(table: SharedTable) -> None:
    assert table.add("192.0.2.1", 1, slot=0) == 1
    in_a_child(lambda: table.add("192.0.2.1", 2, slot=1))
    assert table.total("192.0.2.1") == 3
    assert table.add("192.0.2.1", -1, slot=0) == 2
    assert table.total("192.0.2.2") == 0
    assert list(table.items()) == [("192.0.2.1", (0, 2, 0))]


@pytest.mark.filterwarnings(FORKS_BESIDE_THREADS)
def test_nothing_is_lost_between_processes(table: SharedTable) -> None:
    def count(slot: int) -> None:
        for _ in range(2000):
            for key in ("a", "b", "c"):
                table.add(key, 1, slot)

    pids = []
    for slot in range(3):
        pid = os.fork()
        if not pid:
            try:
                count(slot)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert dict(table.items()) == dict.fromkeys("abc", (2000, 2000, 2000))


def test_what_a_dead_process_has_counted_is_cleared(table: SharedTable) -> None:
    table.add("a", 1, slot=0)
    table.add("a", 5, slot=1)
    table.add("b", 5, slot=1)
    table.clear_column(1)
    assert dict(table.items()) == {"a": (1, 0, 0)}


def test_a_row_of_zeros_is_used_again(table: SharedTable) -> None:
    for number in range(1000):
        table.add(str(number), 1, slot=0)
        table.add(str(number), -1, slot=0)
    assert list(table.items()) == []


def test_a_full_table_says_so_and_keeps_what_it_has(table: SharedTable) -> None:
    keys = [str(number) for number in range(100)]

    def fill() -> None:
        for key in keys:
            table.add(key, 1, slot=0)

    with pytest.raises(Full):
        fill()
    kept = [key for key, _ in table.items()]
    assert sorted(kept) == sorted(keys[: len(kept)])
    assert table.total("0") == 1


def test_a_counter_can_be_set(table: SharedTable) -> None:
    table.put("a", 10, slot=2)
    table.put("a", 7, slot=2)
    assert table.columns("a") == (0, 0, 7)
    table.put("b", 0, slot=2)
    assert table.columns("b") == ()


def test_keys_may_have_any_length(table: SharedTable) -> None:
    for key in ("x" * KEY, "x" * (KEY + 1), "x" * 1000, "\udcff\0", ""):
        assert table.add(key, 1, slot=0) == 1
        assert table.total(key) == 1
