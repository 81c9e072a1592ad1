"""The guard of tests/honesty.py: what blocks the hub for 60 ms fails a test, and nothing else does.

Each case is a file of its own with one test, run by a pytest of its own under our conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli import environment

pytestmark = pytest.mark.program

HERE = Path(__file__).parent

TEST = """
import time
import gevent, gevent.event, gevent.pywsgi, gevent.socket, pytest
from pyftpdlib.handlers import FTPHandler
from support import Client, eventually, handler_class, started, users

def compute(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

class Handler(FTPHandler):
    def ftp_STAT(self, line):
        {stat}
        self.respond("211 Done.")

{mark}
def test_it(tmp_path):
    with started(handler_class(users(tmp_path), Handler)) as server, Client(server) as client:
        client.command("STAT", "211")
        {client}
"""


def outcome(directory: Path, stat: str = "pass", client: str = "pass", mark: str = "") -> tuple[int, str]:
    """Of a test whose handler does *stat*, and its client *client*: pytest's exit code and output."""
    file = directory / "test_case.py"
    file.write_text(TEST.format(stat=stat, client=client, mark=mark))
    options = ["-q", "-p", "conftest", "-p", "no:xdist", "-c", str(HERE.parent / "pyproject.toml")]
    inherited = environment()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(directory), str(file)],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(HERE), inherited["PYTHONPATH"]])},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


SLEEP = "time.sleep(0.06)"
COMPUTE = "compute(0.06)"


@pytest.mark.parametrize("stat", [SLEEP, COMPUTE], ids=["sleep", "compute"])
def test_a_handler_that_blocks_for_60_ms_fails_its_test(tmp_path: Path, stat: str) -> None:
    code, output = outcome(tmp_path, stat)
    assert code == 1, output
    # Who, how long, and where: the monitor looks every 12.5 ms.
    assert re.search(r"^<Handler\(.*user='u'.*\)> blocked the hub for \d+ ms, at$", output, re.M), output
    assert "in ftp_STAT\n" in output, output
    assert stat in output


@pytest.mark.parametrize(
    "stat",
    ["gevent.sleep(0.06)", "gevent.get_hub().threadpool.apply(time.sleep, (0.06,))", "time.sleep(0.03)"],
    ids=["wait", "thread", "short"],
)
def test_a_handler_that_waits_passes(tmp_path: Path, stat: str) -> None:
    code, output = outcome(tmp_path, stat)
    assert code == 0, output


def test_one_that_is_marked_passes(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, SLEEP, mark="@pytest.mark.blocks")
    assert code == 0, output


def test_a_client_may_block(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, client=SLEEP)
    assert code == 0, output


def test_a_callback_of_the_hub_counts(tmp_path: Path) -> None:
    code, output = outcome(tmp_path, client=f"gevent.get_hub().loop.run_callback({COMPUTE[:-6]}, 0.06); gevent.sleep(0)")
    assert code == 1, output
    assert re.search(r"^<Hub .*> blocked the hub for ", output, re.M), output
