"""Works the same unpatched, patched early, patched late, and on each of gevent's event loops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bridge

pytestmark = pytest.mark.program

HERE = Path(__file__).parent

PROGRAM = """
import logging, sys
mode = sys.argv[1]
if mode == "early":
    from gevent import monkey; monkey.patch_all()
import pyftpdlib.ioloop, pyftpdlib.handlers, pyftpdlib.servers
if mode == "late":
    from gevent import monkey; monkey.patch_all()
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
logging.getLogger("bridge").setLevel(logging.DEBUG)

import tempfile
import gevent
from support.fakes import Gate, WaitingAuthorizer
from support.servers import Client, handler_class, serving, users

with tempfile.TemporaryDirectory() as home:
    gate = Gate()
    with serving(handler_class(users(home, WaitingAuthorizer(gate), "slow"))) as server:
        with Client(server, login=False) as slow, Client(server) as other:
            slow.reply()
            slow.send("USER slow", "PASS p", "PWD")
            gate.arrived()
            assert other.store("a", b"x" * 300_000).startswith("226")
            assert other.retrieve("a") == b"x" * 300_000
            gate.open()
            assert [slow.reply()[:3] for _ in range(3)] == ["331", "230", "257"]
print("served")
"""


@pytest.mark.parametrize("loop", ["libev-cext", "libev-cffi", "libuv"])
@pytest.mark.parametrize("mode", ["unpatched", "early", "late"])
def test_a_server_whose_handler_waits(mode: str, loop: str) -> None:
    path = os.pathsep.join(
        [str(HERE), str(Path(bridge.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={**os.environ, "GEVENT_LOOP": loop, "PYTHONPATH": path},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "served" in result.stdout
    # One debug line at start says which of these it found.
    (line,) = [line for line in result.stdout.splitlines() if " runs on " in line]
    module = {"libev-cext": "libev.corecext", "libev-cffi": "libev.corecffi", "libuv": "libuv.loop"}[loop]
    assert module in line
    assert {"unpatched": ", unpatched", "early": "patched before", "late": "patched after"}[mode] in line
