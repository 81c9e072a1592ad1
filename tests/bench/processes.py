"""The processes of a measurement: a server with its children, its clients, and what the kernel says of them.

Knows Linux's /proc and nothing of FTP. Neighbours: servers.py and load.py, which run in these processes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Seconds for any one piece of work; the slowest takes some 10.
LIMIT = 60.0
#: Seconds between SIGCONT and the measurement, in which a server does what became due while it was stopped.
SETTLE = 0.05
#: Seconds for the children of a server to end and be reaped, after the last client has gone.
REAPED = 2.0
#: Bytes of a child's output that are read at once.
CHUNK = 1 << 20


class CannotRun(Exception):
    """There is no such server here, or it cannot do this; says why."""


class Failed(Exception):
    """It runs, but did not do its work; says how."""


class Child:
    """A Python module as a process that speaks lines of JSON. Killed by `close`."""

    def __init__(self, module: str, *arguments: str, work: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        self._errors = Path(work, "errors")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"tests.bench.{module}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
            )
        self.pid = self._process.pid

    def tell(self, *job: Any) -> None:
        """Start a job."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told by hear()

    def hear(self, limit: float = LIMIT) -> dict[str, Any]:
        """The next answer. Raises Failed if the process ends, or says so, or takes longer than *limit* s."""
        assert self._process.stdout is not None
        descriptor, line, end = self._process.stdout.fileno(), b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Failed(f"no answer for {limit:g} s")
            got = os.read(descriptor, CHUNK)
            if not got:
                raise Failed(f"ended; {self.last_words()}")
            line += got
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def last_words(self) -> str:
        """The last line it wrote to its standard error."""
        lines = self._errors.read_text(errors="replace").splitlines()
        return lines[-1][:100] if lines else "said nothing"

    def ended(self) -> bool:
        """Whether it is no longer there."""
        return self._process.poll() is not None

    def pin(self, core: int) -> None:
        """Let it run on *core* only. For a process with one thread."""
        os.sched_setaffinity(self.pid, {core})

    def close(self) -> None:
        """Kill it and its children."""
        for pid in reversed(family(self.pid)):
            _signal(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what was to be told to it


class Server(Child):
    """The server of a column. Raises CannotRun or Failed."""

    def __init__(self, column: str, home: Path, host: str, core: int, tls: str | None, web: bool) -> None:
        self._work = tempfile.TemporaryDirectory(prefix="bench-")
        options = ["--host", host, "--work", self._work.name, "--core", str(core)]
        options += ["--tls", tls] if tls else []
        options += ["--web"] if web else []
        super().__init__("servers", column, str(home), *options, work=self._work.name)
        try:
            self.facts = self.hear(LIMIT)
            if "cannot" in self.facts:
                raise CannotRun(self.facts["cannot"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._work.cleanup()

    def pause(self) -> None:
        """Stop: while others are measured, it uses no CPU at all."""
        for pid in family(self.pid):
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        for pid in reversed(family(self.pid)):
            _signal(pid, signal.SIGCONT)
        time.sleep(SETTLE)

    def cpu(self) -> float:
        """CPU time so far, user and system, of it and all its children, also those that ended; seconds.

        Those that run by their clock, in nanoseconds; those that were reaped by /proc, in ticks of 10 ms: of
        their sum, not of each.
        """
        table = _processes()
        total = 0.0
        for pid in _family(self.pid, table):
            total += _clock(pid, table[pid][1]) + table[pid][2]
        return total

    def children(self) -> int:
        """How many processes it has beside its first."""
        return len(family(self.pid)) - 1

    def settled(self, children: int = 0) -> None:
        """Return when it has no more than so many *children*, or after REAPED seconds."""
        end = time.monotonic() + REAPED
        while self.children() > children and time.monotonic() < end:
            time.sleep(0.01)

    def memory(self) -> int:
        """Anonymous memory of it and its children, a page that n of them share as 1/n in each; bytes."""
        total = 0
        for pid in family(self.pid):
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
                if line.startswith("Pss_Anon:"):
                    total += int(line.split()[1]) * 1024
        return total


# --- what /proc says


def family(pid: int) -> list[int]:
    """*pid* and its descendants, parents first."""
    return _family(pid, _processes())


def _family(pid: int, table: dict[int, tuple[int, float, float]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(child)
    found = [pid] if pid in table else []
    for each in found:  # grows meanwhile
        found += children.get(each, [])
    return found


def _processes() -> dict[int, tuple[int, float, float]]:
    """Of each process: its parent, its CPU time, and that of its children which were reaped; seconds."""
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (text := _read(f"/proc/{name}/stat")):
            # proc(5): after the name, state and ppid; fields 14 to 17 are utime, stime, and the children's.
            fields = text[text.rindex(")") + 2 :].split()
            user, system, children_user, children_system = (int(field) / tick for field in fields[11:15])
            found[int(name)] = int(fields[1]), user + system, children_user + children_system
    return found


def _clock(pid: int, otherwise: float) -> float:
    """The CPU time of *pid*, all threads, also those that ended."""
    try:
        # clock_getcpuclockid(3): the complement of the pid, and 2 for the scheduler's time of a process.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return otherwise  # a process that waits to be reaped


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""  # the process has ended


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # ended meanwhile


def _python_path() -> list[str]:
    return list(filter(None, [os.environ.get("PYTHONPATH")]))
