"""Soak: an operator's server with two workers, mixed clients, and everybody is killed at times.

    pytest tests/proof/test_soak.py              # 2 minutes
    pytest tests/proof/test_soak.py --proof      # 10 minutes
    pytest tests/proof/test_soak.py --long       # 2 hours; BRIDGE_SOAK_MINUTES=N for other times

It goes in rounds. In each, client processes (soak_client.py) do a fixed number of sessions; meanwhile one of
them is killed, the logs are rotated (SIGUSR1), and in some rounds the server is reloaded (SIGHUP) and workers
are killed. Then all clients have gone, the server is at rest, and this must hold:

- every upload answered with 226 is there, byte for byte, and every download answered with 226 was;
- one that was not answered so is not there; if the reply may have been lost, all of it is there or nothing;
  only a client without TLS that was killed may have left the beginning of a file (README, "Cut uploads");
- no session was refused, cut or answered otherwise than it had to be, except by the death of its worker;
- /metrics counts the transfers that the clients have counted, and xferlog has a line for each;
- no process has more descriptors than at the start, and the log has no traceback.

In the first half of the rounds no worker is replaced: what these take at rest may not grow, see EACH.
At the end the server stops and starts again, and nothing is left of the uploads that its crashes cut.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge.filesystems.atomic import is_hidden
from proof.soak_records import Records, logged_uploads
from proof.soak_site import make_site
from support.cli import Command, environment
from support.effort import Effort

# (`blocks`: workers wait for each other to change a limit's count, and on a busy machine the one that has the
# lock may not run for 0.1 s.)
pytestmark = [pytest.mark.program, pytest.mark.blocks]

#: Client processes of a round, threads of each, sessions of each thread: 5 s on an idle machine.
PROCESSES, THREADS, SESSIONS = 3, 4, 8

#: Minutes of rounds. Half of them are steady.
MINUTES = {"short": 2.0, "proof": 10.0, "long": 120.0}

#: kB that a worker may grow in the steady rounds but their first third: what there is once, and what there
#: may be of each session. Without a leak 490 and 1070 in 1100 and 1200 sessions (measured): malloc's, for
#: nothing is left when it has given back what is free (test_soak_memory.py). In the short form there are too
#: few sessions.
ONCE, EACH = 600.0, 0.75

#: kB that the master may grow in the whole run, in which it forks up to 700 workers. 24 after 60 (measured).
MASTER = 1000.0

#: Seconds for anything one waits for here, on a machine that does much else.
PATIENCE = 90.0


def eventually(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.02)
    return value


def none(wrong: list[str]) -> None:
    """There must be nothing; all that is goes into the failure."""
    assert not wrong, "\n".join(wrong)


def growth(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Sessions, and the kB that a worker grew in them, when the first third of the *points* has passed.

    The median over all pairs of points (Theil and Sen), which outliers do not move.
    """
    points = points[len(points) // 3 :]
    pairs = [((x0, y0), (x, y)) for (x0, y0), (x, y) in itertools.combinations(points, 2) if x > x0]
    sessions = points[-1][0] - points[0][0]
    return sessions, sessions * statistics.median((y - y0) / (x - x0) for (x0, y0), (x, y) in pairs)


def anonymous(process: psutil.Process) -> float:
    """kB of its memory that are no file's. (In USS, what a worker shares with the master is nothing.)"""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return float(found[1])


@dataclass
class Soak:
    """The server, and what was seen of it."""

    directory: Path
    server: Command
    seed: int
    rounds: int = 0
    sessions: int = 0
    transfers: int = 0
    #: Bytes of completed transfers.
    volume: int = 0
    kills: int = 0
    deaths: int = 0
    reloads: int = 0
    rotations: int = 0
    #: For each worker (connections that its slot had, kB) at rest.
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    records: Records | None = None

    def __post_init__(self) -> None:
        self.home = self.directory / "srv"
        found = re.search(r"http://\S+/", self.server.printed("http://"))
        assert found is not None
        self.url = found[0]
        self.at_rest()
        self.descriptors = max(each.num_fds() for each in self.server.children())
        self.master = psutil.Process(self.server.pid)
        self.master_descriptors = self.master.num_fds()
        self.master_memory = anonymous(self.master)

    # --- the server

    def metrics(self) -> dict[str, float]:
        """Empty when the worker that was asked has died meanwhile."""
        try:
            with urllib.request.urlopen(f"{self.url}metrics", timeout=PATIENCE) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, ValueError):
            return {}
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def at_rest(self) -> dict[str, float]:
        """Wait until no session is left, two workers serve and no other is there; what /metrics says then."""

        def rests() -> dict[str, float] | None:
            told = self.metrics()
            quiet = told.get("bridge_sessions") == 0 and told.get('bridge_workers{state="started"}') == 2
            return told if quiet and len(self.server.children()) == 2 else None

        told: dict[str, float] = eventually(rests, "the server at rest")
        return told

    def rotate(self) -> None:
        """As logrotate does it."""
        self.rotations += 1
        for name in ("log", "xferlog"):
            (self.directory / name).rename(self.directory / f"{name}.{self.rotations}")
        self.server.send(signal.SIGUSR1)

    def reload(self) -> None:
        self.reloads += 1
        self.server.send(signal.SIGHUP)

    def kill_worker(self) -> None:
        self.deaths += 1
        workers = eventually(self.server.children, "a worker")
        self.random.choice(workers).kill()

    def slots_of(self, worker: psutil.Process) -> list[int]:
        """Its slot; nothing if it was too slow to tell the one that was asked."""
        with urllib.request.urlopen(f"{self.url}status.json", timeout=PATIENCE) as answer:
            workers = json.load(answer)["workers"]
        return [each["slot"] for each in workers if each["pid"] == worker.pid]

    # --- a round

    def round(self, *, reload: bool = False, deaths: int = 0) -> None:
        number = self.rounds
        self.rounds += 1
        self.random = random.Random(f"{self.seed} {number}")
        self.began = time.monotonic()
        self.before = self.at_rest()
        clients = [self.client(number, each) for each in range(PROCESSES)]
        victim = self.random.randrange(PROCESSES)
        try:
            actions: list[Callable[[], None]] = [self.rotate, clients[victim][0].kill]
            actions += [self.reload] * reload + [self.kill_worker] * deaths
            self.random.shuffle(actions)
            self.act(actions, clients)
            for process, _ in clients:
                process.wait(PATIENCE)
        finally:
            for process, _ in clients:
                process.kill()
                process.wait(PATIENCE)
        killed = clients[victim][0].returncode == -signal.SIGKILL
        self.kills += killed
        files = [(path, killed and each == victim) for each, (_, path) in enumerate(clients)]
        self.check(number, Records(files), deaths)

    def client(self, number: int, which: int) -> tuple[subprocess.Popen[bytes], Path]:
        for thread in range(THREADS):
            (self.home / f"{number}/{which}/{thread}").mkdir(parents=True)
        records = self.directory / f"records.{which}"
        records.unlink(missing_ok=True)
        records.touch()
        told = {
            "port": self.server.port,
            "directory": f"{number}/{which}",
            "threads": THREADS,
            "sessions": SESSIONS,
            "seed": f"{self.seed} {number} {which}",
            "records": str(records),
        }
        script = str(Path(__file__).with_name("soak_client.py"))
        return subprocess.Popen([sys.executable, script, json.dumps(told)], env=environment()), records

    def act(
        self, actions: list[Callable[[], None]], clients: list[tuple[subprocess.Popen[bytes], Path]]
    ) -> None:
        """Each when the clients have written so much, or when they are done."""
        whole = 220 * PROCESSES * THREADS * SESSIONS  # bytes of records of a round, at least
        at = sorted(self.random.randrange(whole) for _ in actions)
        for size, action in zip(at, actions, strict=True):

            def far(size: int = size) -> bool:
                written = sum(path.stat().st_size for _, path in clients)
                return written >= size or all(process.poll() is not None for process, _ in clients)

            eventually(far, "the clients' progress")
            action()

    # --- what must hold

    def check(self, number: int, records: Records, deaths: int) -> None:
        told = self.at_rest()
        self.sessions += records.sessions
        self.transfers += sum(map(records.completed, ("upload", "download")))
        self.volume += sum(each.size for each in records.transfers.values() if each.completed)
        took = time.monotonic() - self.began
        print(
            f"round {number} of seed {self.seed}: {records.sessions} sessions, {len(records.lost)} lost, "
            f"{took:.1f} s"
        )
        none(records.problems)
        if records.lost and not deaths:
            none([*records.lost, *self.told_of_workers()])
        directory = self.home / str(number)
        none(records.wrong_files(self.home, directory))
        none(records.wrong_downloads())
        hidden = [path for path in directory.rglob("*") if is_hidden(path.name)]
        assert deaths or not hidden, "left by uploads that failed"
        counted = {}
        for way in ("upload", "download"):
            name = f'bridge_transfers_total{{direction="{way}",outcome="completed"}}'
            counted[way] = told[name] - self.before[name]
            least = records.completed(way) - deaths * PROCESSES * THREADS  # 226, and dead before it counts
            most = records.completed(way) + records.unknown(way)
            assert least <= counted[way] <= most, (way, least, counted, most)
        if not deaths:  # or lines that were not yet written are lost

            def uploads() -> list[str]:
                return logged_uploads(self.xferlog(), directory)

            eventually(lambda: len(uploads()) == counted["upload"], "a line for each upload that was counted")
            none(records.not_logged(uploads(), self.home))
        self.check_logs(records)
        for path in directory.rglob("*"):
            if path.is_file() and not is_hidden(path.name):
                path.unlink()
        for worker in self.server.children():
            self.look(worker, told)
        self.check_descriptors(self.master, self.master_descriptors)
        self.master_grown = anonymous(self.master) - self.master_memory
        assert self.master_grown < MASTER

    def look(self, worker: psutil.Process, told: dict[str, float]) -> None:
        self.check_descriptors(worker, self.descriptors)
        slots = eventually(lambda: self.slots_of(worker), f"{worker} in /status.json")
        connections = told[f'bridge_worker_connections_total{{worker="{slots[0]}"}}']
        self.memory.setdefault(worker.pid, []).append((connections, anonymous(worker)))

    def check_descriptors(self, process: psutil.Process, most: int) -> None:
        """In the end: a connection that has asked for /metrics is not closed at once."""
        files = Path(f"/proc/{process.pid}/fd")
        try:
            eventually(lambda: len(os.listdir(files)) <= most, "descriptors as before", 20.0)
        except AssertionError:
            left = [os.readlink(file) for file in files.iterdir() if os.path.lexists(file)]
            raise AssertionError(f"more than {most} descriptors: {left}") from None

    def xferlog(self) -> list[str]:
        """Its lines; the last one may be about to be written."""
        texts = [path.read_text().rpartition("\n")[0] for path in self.directory.glob("xferlog*")]
        return [line for text in texts for line in text.splitlines()]

    def told_of_workers(self) -> list[str]:
        """What the log says of workers: who of them came, retired or died, and when."""
        texts = [path.read_text() for path in sorted(self.directory.glob("log*"), reverse=True)]
        return [line for text in texts for line in text.splitlines() if "] worker " in line]

    def check_logs(self, records: Records) -> None:
        """Of the log that was in use until the round's rotation, and of this one."""
        for path in self.directory.glob("log*"):
            assert "Traceback" not in path.read_text(), path
        none(records.wrong_lines(self.xferlog(), self.home))
        for name in ("log", "xferlog"):  # nobody writes to them any more
            (self.directory / f"{name}.{self.rotations - 1}").unlink(missing_ok=True)


def plan(effort: Effort) -> Iterator[tuple[str, bool, int]]:
    """Of each round its half, whether the server is reloaded, and how many workers are killed."""
    started = time.monotonic()
    minutes = float(os.environ.get("BRIDGE_SOAK_MINUTES", MINUTES[effort]))
    number = 0
    while time.monotonic() - started < 30 * minutes or number < 3:  # (growth needs a few)
        yield "steady", False, 0
        number += 1
    while time.monotonic() - started < 60 * minutes:
        yield "storm", number % 3 != 2, number % 3
        number += 1


@pytest.fixture
def begin_round(_watchdog: Any, _no_hang: None) -> Callable[[int], None]:
    """It is a round that hangs after the time conftest.py gives a test; all of them may take hours."""
    return lambda number: _watchdog.test(f"test_soak, round {number}")


def test_soak(tmp_path: Path, effort: Effort, begin_round: Callable[[int], None]) -> None:
    pytest.importorskip("OpenSSL")
    pytest.importorskip("prometheus_client")
    options = [*make_site(tmp_path), "--workers", "2", "--http", "0"]
    with Command(*options, directory=tmp_path) as server:
        soak = Soak(tmp_path, server, seed=int(os.environ.get("BRIDGE_SOAK_SEED", time.time())))
        steady: dict[int, list[tuple[float, float]]] = {}
        for half, reload, deaths in plan(effort):
            begin_round(soak.rounds)
            soak.round(reload=reload, deaths=deaths)
            if half == "steady":
                steady = {pid: list(points) for pid, points in soak.memory.items()}
        code, output = server.stop()
    assert code == 0, output
    assert "Traceback" not in output
    growths = [growth(points) for points in steady.values()]
    left = [path for path in tmp_path.rglob("*") if is_hidden(path.name)]
    print(
        f"{soak.sessions} sessions, {soak.transfers} transfers of {soak.volume / 1e9:.2f} GB completed, "
        f"{soak.kills} clients and {soak.deaths} workers killed, "
        f"{soak.reloads} SIGHUP, {soak.rotations} SIGUSR1, {len(left)} uploads cut by crashes; "
        f"{' and '.join(f'{grown:.0f} kB in {sessions:.0f} sessions' for sessions, grown in growths)} of a "
        f"worker, master {soak.master_grown:+.0f} kB"
    )
    assert len(steady) == 2
    # (A leak is in both.)
    assert effort == "short" or any(grown <= ONCE + EACH * sessions for sessions, grown in growths), steady
    with Command(*options, directory=tmp_path) as server:
        server.printed("http://")
        assert server.stop()[0] == 0
    assert not [path for path in tmp_path.rglob("*") if is_hidden(path.name)]
