"""System calls of a running server that fail: strace attached to it, with `--inject`. No tests in here.

A `Tracer` is a context manager: while its block runs, the server's system calls of one kind are logged and
some of them fail without having been made. `calls` tells afterwards which they were, and what of the server
they were for: the listener, a control connection, a data connection, a file.

Only the thread that runs the hub is traced, unless a path is given: then all calls of any thread that have to
do with that path, and no others. (A thread of a pool that cannot wake the hub, which no kernel refuses, would
look like a server that hangs.)
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from support.cli import LIMIT

_LINE = re.compile(r"(?:\d+ +)?(?P<name>\w+)\((?P<rest>.*)")


@dataclass(frozen=True)
class Call:
    """A line of strace's."""

    name: str
    #: Its arguments and its result, as strace prints them.
    text: str

    @property
    def injected(self) -> bool:
        return self.text.endswith("(INJECTED)")

    def target(self, port: int) -> str:
        """What it is for, of a server that listens on *port*."""
        first = self.text.split(",", 1)[0]
        if re.search(rf"<TCP:\[[\d.]+:{port}(->|\])", first):
            return "control" if "->" in first else "listener"
        return "data" if "<TCP" in first else "file" if "/" in self.text else "other"


class Tracer:
    """strace, attached to process *pid*: logs each *call* to *log*, and makes them fail as *inject* says."""

    def __init__(self, pid: int, log: Path, call: str, inject: str = "", path: Path | None = None) -> None:
        self._pid, self._log = pid, log
        self._options = ["-yy", "-e", "signal=none", "-e", f"trace={call}", "-o", str(log)]
        if inject:
            self._options += ["-e", f"inject={call}:{inject}"]
        if path is not None:
            self._options += ["-f", "-P", str(path)]
        self.calls: list[Call] = []

    def __enter__(self) -> Tracer:
        self._strace = subprocess.Popen(
            ["strace", *self._options, "-p", str(self._pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._strace.stderr is not None
        line = self._strace.stderr.readline()
        if " resolved into " in line:  # the path is a link
            line = self._strace.stderr.readline()
        if " attached" not in line:
            line += self._strace.stderr.read()
            self._end()
            raise OSError(line.strip())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._strace.send_signal(signal.SIGINT)  # detaches
        self._end()
        for line in self._log.read_text(errors="replace").splitlines():
            match = _LINE.match(line)
            if match is not None:
                self.calls.append(Call(match["name"], match["rest"]))

    def _end(self) -> None:
        assert self._strace.stderr is not None
        self._strace.stderr.read()  # nobody waits in a full pipe
        self._strace.wait(LIMIT)
        self._strace.stderr.close()

    @property
    def hits(self) -> list[Call]:
        return [each for each in self.calls if each.injected]


def unavailable(directory: Path) -> str:
    """Why this machine cannot do it; "" if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", str(LIMIT)]) as sleeping:
        try:
            with Tracer(sleeping.pid, directory / "probe", "nanosleep"):
                return ""
        except OSError as error:
            return f"strace may not trace here: {error}"
        finally:
            sleeping.kill()
