"""The guard of tests/support/honesty.py: what blocks the hub for 60 ms fails a test, and nothing else does.

The cases stand in a file of their own, which a pytest of its own runs under our conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import gevent
import pytest

from bridge.loop.turns import Turns, Worker
from support.cli import environment
from support.honesty import counts, queued_since

HERE = Path(__file__).parent

COMPUTE = """
import time

def compute(seconds, enough=lambda: True):
    end = time.thread_time() + seconds
    while time.thread_time() < end or not enough():
        pass
"""

CASES = """
import gc, subprocess, sys
import conftest, gevent, pytest
from support.honesty import queued_since
from pyftpdlib.handlers import FTPHandler
from support.servers import Client, handler_class, started, users

watch = conftest._watch

def named():
    # the monitor has looked: on a busy machine it comes late
    return watch._seen[0] == watch._entered

def block(seconds):
    # by the guard's own count: on a busy machine no more than that is sure
    while time.perf_counter() - watch._entered - queued_since(watch._queued) < seconds or not named():
        time.sleep(0.005)

def stat(home, function, *args):
    class Handler(FTPHandler):
        def ftp_STAT(self, line):
            function(*args)
            self.respond("211 Done.")
    with started(handler_class(users(home), Handler)) as server, Client(server) as client:
        client.command("STAT", "211")

def test_sleeps(tmp_path):
    stat(tmp_path, block, 0.06)

def test_computes(tmp_path):
    stat(tmp_path, compute, 0.06, named)

def test_blocks_in_a_greenlet_of_its_own(tmp_path):
    stat(tmp_path, lambda: gevent.spawn(block, 0.06).join())

def test_computes_in_the_hub(tmp_path):
    gevent.get_hub().loop.run_callback(compute, 0.06, named)
    gevent.sleep(0)

def test_program_blocks(tmp_path):
    subprocess.run([sys.executable, "program.py"], check=True, timeout=60)

@pytest.mark.blocks
def test_is_marked(tmp_path):
    stat(tmp_path, compute, 0.06)

def test_waits(tmp_path):
    stat(tmp_path, gevent.sleep, 0.06)

def test_waits_for_a_thread(tmp_path):
    stat(tmp_path, gevent.get_hub().threadpool.apply, time.sleep, (0.06,))

def test_takes_half_as_long(tmp_path):
    stat(tmp_path, time.sleep, 0.03)

def test_collects_garbage(tmp_path):
    def collect():
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            gc.collect()
    stat(tmp_path, collect)

def test_client_blocks(tmp_path):
    stat(tmp_path, gevent.sleep, 0)
    time.sleep(0.06)

def test_program_waits(tmp_path):
    code = "import gevent; gevent.spawn(gevent.sleep, 0.06).join()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

def test_program_forks(tmp_path):
    subprocess.run([sys.executable, "forks.py"], check=True, timeout=60)
"""

#: Parent and child block for 30 ms each.
FORKS = """
import os, time
import gevent, gevent.socket

def fork():
    for _ in range(10):  # the monitor does not see each of them
        reader, writer = os.pipe()
        time.sleep(0.03)
        if os.fork() == 0:
            time.sleep(0.03)
            gevent.sleep(0)
            os._exit(0)
        os.close(writer)
        gevent.socket.wait_read(reader)
        os.wait()

gevent.spawn(fork).join()
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What pytest says of each case; '' for one that passed."""
    directory = tmp_path_factory.mktemp("cases")
    (directory / "test_cases.py").write_text(COMPUTE + CASES)
    (directory / "program.py").write_text(f"{COMPUTE}\nimport gevent\ngevent.spawn(compute, 0.06).join()\n")
    (directory / "forks.py").write_text(FORKS)
    options = ["-c", str(HERE.parent / "pyproject.toml"), "--rootdir", ".", "-p", "conftest"]
    options += ["-p", "no:xdist", "--junitxml", "junit.xml"]
    inherited = environment()
    del inherited["BRIDGE_TEST_BLOCKS"]  # what that pytest is to find, ours is not
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_cases.py"],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(HERE), inherited["PYTHONPATH"]])},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout
    found: dict[str, str] = {}
    for case in xml.etree.ElementTree.parse(directory / "junit.xml").iter("testcase"):
        found[case.attrib["name"]] = "".join(each.text or "" for each in case)
    return found


@pytest.mark.program
@pytest.mark.parametrize(
    ("case", "who", "place"),
    [
        ("test_sleeps", r"<Handler\(.*user='u'.*\)>", "in block"),
        ("test_computes", r"<Handler\(.*user='u'.*\)>", "in compute"),
        ("test_blocks_in_a_greenlet_of_its_own", r"<Greenlet .*>", ""),
        ("test_computes_in_the_hub", r"<Hub .*>", "in compute"),
        ("test_program_blocks", r".*program.py: <Greenlet .*>", ""),
    ],
)
def test_what_blocks_for_60_ms_fails(outcomes: dict[str, str], case: str, who: str, place: str) -> None:
    assert re.search(rf"^{who} blocked the hub for \d+ ms .*, at$", outcomes[case], re.M), outcomes[case]
    assert place in outcomes[case]


@pytest.mark.program
@pytest.mark.parametrize(
    "case",
    [
        "test_is_marked",
        "test_waits",
        "test_waits_for_a_thread",
        "test_takes_half_as_long",
        "test_collects_garbage",
        "test_client_blocks",
        "test_program_waits",
        "test_program_forks",
    ],
)
def test_what_does_not_passes(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""


def test_who_counts() -> None:
    hub = gevent.get_hub()
    ours = gevent.spawn(gevent.sleep, 0)
    foreign: dict[str, gevent.Greenlet] = {}
    code = "import gevent; spawned = gevent.spawn(gevent.sleep, 0)"
    exec(compile(code, "/srv/program.py", "exec"), foreign)
    gevent.joinall([ours, foreign["spawned"]])
    worker = Worker(Turns(hub, print, print, print, print, print))
    assert all(map(counts, [hub, worker, foreign["spawned"]]))
    assert not any(map(counts, [ours, gevent.getcurrent()]))


def test_what_a_thread_that_has_ended_had_queued_is_no_debt() -> None:
    assert queued_since({"of a thread that ended": 5.0}) >= 0
