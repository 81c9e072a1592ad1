"""Real clients that are programs: which of them are installed, and a transfer by one. No tests here."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import Command, environment


def needs(client: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(client) is None, reason=f"{client} is not installed")


needs_curl = needs("curl")
needs_lftp = needs("lftp")
needs_wget = needs("wget")


def quoted(path: Path) -> str:
    """*path* as one word of lftp's commands."""
    return '"' + re.sub(r'(["\\])', r"\\\1", str(path)) + '"'


CLIENTS = [pytest.param("curl", marks=needs_curl), pytest.param("lftp", marks=needs_lftp)]


@contextlib.contextmanager
def client(name: str, direction: str, server: Command, secure: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A program that downloads `file` to its stdout, or uploads its stdin as `file`."""
    url = f"ftp://127.0.0.1:{server.port}"
    commands = {
        ("curl", "down"): ["curl", "-sS", *secure.split(), f"{url}/file"],
        ("curl", "up"): ["curl", "-sS", *secure.split(), "-T", "-", f"{url}/file"],
        ("lftp", "down"): ["lftp", "--norc", "-c", f"set net:max-retries 1; cat {url}/file"],
        ("lftp", "up"): [
            *("lftp", "--norc", "-c"),
            f"set net:max-retries 1; set ftp:use-allo no; open {url}; put /dev/stdin -o file",
        ],
    }
    with subprocess.Popen(
        commands[name, direction],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()
