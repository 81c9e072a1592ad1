"""The benchmarks run: every number is there, and a column that cannot run says why. None is judged."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.cli import run

pytestmark = pytest.mark.program

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read Linux's /proc")
def test_a_table_of_two_columns_and_two_rows(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    columns = ["pyftpdlib epoll", "GeventFTPServer"]
    options = ["--quick", "--same-core", "--rows", "command", "stor", "--columns", *columns]
    done = run(sys.executable, "-m", "tests.bench", *options, "--output", str(output), directory=CHECKOUT)
    assert done.returncode == 0, done.stderr
    header, _, *lines = [line for line in output.read_text().splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == columns
    cell = r"[\d .]+ \([\d .]+ to [\d .]+\)"
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(rf"\| [^|]+ \| {cell} \| {cell}, x[\d.]+ \|", line)
        assert line in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read Linux's /proc")
def test_a_column_that_cannot_run_says_why() -> None:
    options = ["--quick", "--rows", "web", "--columns", "pyftpdlib epoll"]
    done = run(sys.executable, "-m", "tests.bench", *options, directory=CHECKOUT)
    assert done.returncode == 0, done.stderr
    assert "| pywsgi beside 50 RETR | no hub in its process |" in done.stdout
