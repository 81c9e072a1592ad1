"""The programs in examples/, run as by their users. No tests here."""

from __future__ import annotations

import contextlib
import ftplib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bridge

ROOT = Path(bridge.__file__).parent.parent
EXAMPLES = Path(__file__).parents[2] / "examples"

#: Seconds that a program or a reply may take before the test fails. The slowest to start takes 3 on an idle
#: machine with 2 cores.
PATIENCE = 60.0

#: In the programs too, warnings are errors, and files and sockets left open show on stderr.
PYTHON = [
    *(sys.executable, "-X", "dev", "-W", "error"),
    *("-W", "ignore:The asyncore module:DeprecationWarning"),
    *("-W", "ignore:The asynchat module:DeprecationWarning"),
]


class Program:
    """A subprocess whose output so far is in `output` (stdout) and `errors` (stderr, a file)."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.output = ""
        self._errors = directory / "stderr"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": path},
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def expect(self, pattern: str) -> re.Match[str]:
        """Read stdout until *pattern* is in it."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.output)):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in time; stdout: {self.output!r}, stderr: {self.errors}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"no {pattern!r} before the end; stdout: {self.output!r}, stderr: {self.errors}"
            self.output += data.decode()
        return found

    def stop(self, number: int) -> int:
        """Send the signal and return the exit code."""
        self.process.send_signal(number)
        return int(self.process.wait(PATIENCE))


Run = Callable[..., Program]


def example(run: Run, name: str, *options: str) -> Program:
    return run(*PYTHON, str(EXAMPLES / name), *options)


@contextlib.contextmanager
def session(port: int, user: str = "", password: str = "") -> Iterator[ftplib.FTP]:
    """A client's session, logged in if a user is given. It ends without QUIT."""
    with contextlib.closing(ftplib.FTP(timeout=PATIENCE)) as ftp:
        ftp.connect("127.0.0.1", port)
        if user:
            ftp.login(user, password)
        yield ftp


def assert_clean_stop(program: Program, number: int) -> None:
    assert program.stop(number) == 0, program.errors
    assert not re.search("Traceback|Warning|Exception ignored", program.errors), program.errors
