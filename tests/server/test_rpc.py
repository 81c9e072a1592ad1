"""Asking other processes, and those that do not answer."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest

from bridge.server import rpc
from support.fakes import Gate

Serve = Callable[[int, rpc.Answer], None]


@pytest.fixture
def serve(short_path: Path) -> Iterator[Serve]:
    endings: list[Callable[[], None]] = []
    yield lambda slot, answer: endings.append(rpc.serve(str(short_path), slot, answer))
    for end in endings:
        end()


def test_all_but_oneself_are_asked_and_each_answers(short_path: Path, serve: Serve) -> None:
    for slot in range(3):
        serve(slot, lambda question, slot=slot: [slot, question])  # type: ignore[misc]
    answers = rpc.ask_all(str(short_path), 1, {"ask": "snow ☃"})
    assert answers == [[0, {"ask": "snow ☃"}], [2, {"ask": "snow ☃"}]]


def test_an_answer_may_be_long(short_path: Path, serve: Serve) -> None:
    serve(0, lambda question: "x" * 5_000_000)
    assert rpc.ask_all(str(short_path), 1, {}) == ["x" * 5_000_000]


def test_who_has_died_is_not_counted_and_his_successor_is(short_path: Path, serve: Serve) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(short_path / "0.sock"))
    dead.listen()
    dead.close()
    serve(1, lambda question: "alive")
    assert rpc.ask_all(str(short_path), 2, {}) == ["alive"]
    serve(0, lambda question: "again")
    assert rpc.ask_all(str(short_path), 2, {}) == ["again", "alive"]


def test_nobody_waits_for_one_who_does_not_answer(
    short_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "ANSWER_TIMEOUT", 0.05)
    blocked = socket.socket(socket.AF_UNIX)
    blocked.bind(str(short_path / "0.sock"))
    blocked.listen()
    serve(1, lambda question: "alive")
    with blocked:
        assert rpc.ask_all(str(short_path), 2, {}) == ["alive"]


def test_all_are_asked_at_once(short_path: Path, serve: Serve) -> None:
    """Each waits until the other is asked too."""
    gate, other = Gate(), Gate()

    def answer(mine: Gate, his: Gate) -> str:
        mine.open()
        his.wait()
        return "met"

    serve(0, lambda question: answer(gate, other))
    serve(1, lambda question: answer(other, gate))
    assert rpc.ask_all(str(short_path), 2, {}) == ["met", "met"]


def test_one_who_fails_costs_his_answer_only(short_path: Path, serve: Serve) -> None:
    def fail(question: dict[str, Any]) -> Any:
        raise ValueError(question)

    serve(0, fail)
    serve(1, lambda question: "fine")
    assert rpc.ask_all(str(short_path), 2, {}) == ["fine"]


def test_a_directory_that_is_gone_has_nobody(short_path: Path) -> None:
    assert rpc.ask_all(str(short_path / "gone"), 0, {}) == []


def test_the_socket_goes_with_its_end(short_path: Path) -> None:
    end = rpc.serve(str(short_path), 3, lambda question: "here")
    assert os.listdir(short_path) == ["3.sock"]
    end()
    assert os.listdir(short_path) == []


def test_what_is_no_question_gets_no_answer_and_does_no_harm(short_path: Path, serve: Serve) -> None:
    asked: list[Any] = []

    def answer(question: dict[str, Any]) -> str:
        asked.append(question)
        return "fine"

    serve(0, answer)
    for rubbish in (b"", b"\n", b"{" * 10_000):
        with gevent.socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(short_path / "0.sock"))
            sock.sendall(rubbish)
            sock.shutdown(socket.SHUT_WR)
            try:
                assert sock.recv(10) == b""
            except ConnectionResetError:
                pass  # what it did not read
    assert asked == []
    assert rpc.ask_all(str(short_path), 1, {"ask": 1}) == ["fine"]
    assert json.dumps(asked) == '[{"ask": 1}]'
