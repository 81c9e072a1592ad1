"""What the tests of examples/ find: `run`, to start a program."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.examples import Program, Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start a program in a directory of its own; it is killed and closed at the end."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def start(*command: str) -> Program:
            directory = tmp_path / f"run{next(numbers)}"
            directory.mkdir()
            program = Program(list(command), directory)
            stack.enter_context(program.process)  # closes stdout and waits
            stack.callback(program.process.kill)
            return program

        yield start
