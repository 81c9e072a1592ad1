"""Brings shortages about for real: of descriptors, of ports, of room on the disk. No tests in here.

Everything is given back at the end of a `with` block. What only root may do says why it cannot be done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import cli
from support.fakes import RecordingHandler
from support.honesty import monitor_without_descriptors
from support.servers import Client, eventually, handler_class, users

TESTS = Path(__file__).parents[1]
#: Ephemeral ports in the small network.
PORTS = 51


class Descriptors:
    """This process has as many descriptors as it may have; a counted number is given back or taken again."""

    def __init__(self) -> None:
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._fillers: list[int] = []

    def take_all(self) -> None:
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                self._fillers.append(os.dup(self._null))

    def give(self, count: int) -> None:
        for _ in range(count):
            os.close(self._fillers.pop())

    def close(self) -> None:
        self.give(len(self._fillers))
        os.close(self._null)


@contextlib.contextmanager
def no_descriptors() -> Iterator[Descriptors]:
    """The limit goes down to little more than what is open, then all that is left is filled.

    The monitor's thread (honesty.py) neither gives one back nor takes one meanwhile.
    """
    with monitor_without_descriptors():
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        with contextlib.closing(Descriptors()) as descriptors, limited(resource.RLIMIT_NOFILE, highest + 8):
            descriptors.take_all()
            yield descriptors


@contextlib.contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """RLIMIT_NOFILE, or RLIMIT_FSIZE: writing beyond it is EFBIG, since Python ignores the signal."""
    before, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (before, hard))


def in_a_small_network(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a network of its own, which has PORTS ephemeral ports."""
    if os.geteuid() != 0:
        pytest.skip("only root may make a network namespace")
    low = 40000  # nobody else is there to have it
    prepare = f"ip link set lo up && echo {low} {low + PORTS - 1} >/proc/sys/net/ipv4/ip_local_port_range"
    shell = ("unshare", "-n", "sh", "-ec")
    possible = cli.run(*shell, prepare)
    if possible.returncode:
        pytest.skip(f"no network namespace here: {possible.stderr}")
    return cli.run(*shell, f'{prepare}; exec "$@"', "sh", *command, directory=TESTS)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """1 MB of disk, mounted there, with room for two files."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    directory.mkdir()
    mounted = cli.run("mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs", str(directory))
    if mounted.returncode:
        pytest.skip(f"no small disk here: {mounted.stderr}")
    try:
        yield directory
    finally:
        unmounted = cli.run("umount", str(directory))
        assert not unmounted.returncode, unmounted.stderr


# --- what the tests of shortages share


def handler_for(home: Path, base: Any = RecordingHandler, **attributes: Any) -> Any:
    return handler_class(users(home), base, events=[], **attributes)


def lines_of(caplog: pytest.LogCaptureFixture, name: str, level: int = logging.WARNING) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == name and each.levelno >= level]


def connected(server: Any, client: Client) -> Any:
    """A data connection that the server has accepted: no descriptor is needed for it any more."""
    data = client.data()
    (control,) = (each for each in server._sessions if each.remote_port == client.sock.getsockname()[1])
    eventually(lambda: control.data_channel)
    return data
