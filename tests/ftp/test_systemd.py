"""What systemd is told, by playing systemd: a socket for messages, a port that is passed, a watchdog."""

from __future__ import annotations

import contextlib
import ftplib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.ftp.parts.workers import cores
from support.cli import LIMIT, Command, become_third, environment, log_in, run

pytestmark = pytest.mark.program


class Systemd:
    """Receives the messages of the command; a with block."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(LIMIT)
        self._socket.bind(path)

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def message(self) -> str:
        return self._socket.recv(4096).decode()

    def messages_until(self, pattern: str) -> list[str]:
        """All messages up to the first that matches *pattern*, included."""
        received = [self.message()]
        while not re.match(pattern, received[-1]):
            received.append(self.message())
        return received


@pytest.fixture
def systemd(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    with Systemd(str(short_path / "notify")) as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_path / "notify"))
        yield systemd


def watch(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(int(seconds * 1e6)))


# --- a life


@pytest.mark.parametrize("concurrency", ["async", "pre-fork"])
def test_ready_and_stopping(tmp_path: Path, systemd: Systemd, concurrency: str) -> None:
    with Command("--concurrency", concurrency, directory=tmp_path) as server:
        assert systemd.message() == (
            f"READY=1\nSTATUS=serving {tmp_path} (read-only) to anonymous on 0.0.0.0 port {server.port}"
        )
        with log_in(server):
            pass
        server.send(signal.SIGTERM)
        assert systemd.message().splitlines()[0] == "STOPPING=1"
        code, output = server.wait()
        assert code == 0, output


def test_sighup_is_a_reload(tmp_path: Path, systemd: Systemd) -> None:
    with Command(directory=tmp_path) as server:
        assert systemd.message().startswith("READY=1\n")
        server.send(signal.SIGHUP)
        reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", systemd.message())
        assert reloading is not None
        assert int(reloading[1]) > 0
        assert systemd.message().startswith("READY=1\n")
        with log_in(server):
            pass


def test_an_abstract_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"bridge-test-{os.getpid()}"
    with Systemd(f"\0{name}") as systemd:
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        with Command(directory=tmp_path):
            assert systemd.message().startswith("READY=1\n")


def test_a_systemd_that_is_gone_is_no_error(tmp_path: Path, systemd: Systemd) -> None:
    with Command(directory=tmp_path) as server:
        systemd.message()
        systemd.__exit__()
        code, output = server.stop()
        assert code == 0, output
        assert "Traceback" not in output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_after_a_chroot_and_as_another_user_too(tmp_path: Path, open_path: Path, systemd: Systemd) -> None:
    home = str(open_path)
    with Command("--user", "nobody", "--chroot", home, "-d", home, directory=tmp_path) as server:
        assert systemd.message().startswith(f"READY=1\nSTATUS=serving {home} ")
        server.stop()
        assert systemd.message().startswith("STOPPING=1")


def test_a_socket_that_is_not_there_is_an_error(
    tmp_path: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = str(short_path / "none")
    monkeypatch.setenv("NOTIFY_SOCKET", none)
    result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"python -m bridge.ftp: error: NOTIFY_SOCKET: cannot connect to {none!r}: "
        "No such file or directory; unset it outside of systemd\n"
    )


def test_check_tells_systemd_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    assert run(sys.executable, "-m", "bridge.ftp", "--check", directory=tmp_path).returncode == 0


FORKED = """
import os, sys
from bridge.ftp.parts.systemd import Notifier
notifier = Notifier(os.environ["NOTIFY_SOCKET"])
child = os.fork()
if child == 0:
    notifier.notify("stopping", str)
    os._exit(0)
os.waitpid(child, 0)
notifier.notify("reloading", str)
"""


def test_a_child_process_tells_nothing(systemd: Systemd) -> None:
    result = run(sys.executable, "-c", FORKED)
    assert (result.returncode, result.stderr) == (0, "")
    assert systemd.message().startswith("RELOADING=1\n")


# --- the watchdog


@pytest.mark.parametrize("concurrency", ["async", "pre-fork"])
def test_the_watchdog_is_fed(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch, concurrency: str
) -> None:
    watch(monkeypatch, 0.1)
    processes = cores() if concurrency == "pre-fork" else 1
    with Command("--concurrency", concurrency, directory=tmp_path) as server:
        # (One process may feed it for long before all of them serve.)
        received = systemd.messages_until("READY=1")
        fed = len(received) + 5 * processes
        while len(received) < fed:
            received.append(systemd.message())
        assert {message.splitlines()[0] for message in received} == {"READY=1", "WATCHDOG=1"}
        code, output = server.stop()
        assert code == 0, output


BLOCKING = r"""
import os, socket, sys, time
import bridge.ftp
from pyftpdlib.handlers import FTPHandler

told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
told.connect(os.environ["NOTIFY_SOCKET"])

def on_login(self, username):
    told.send(f"X_ENVIRONMENT={ {'NOTIFY_SOCKET', 'WATCHDOG_USEC'} & os.environ.keys()}".encode())
    told.send(b"X_BLOCKED=1")
    time.sleep(0.5)  # ten feedings
    told.send(b"X_FREE=1")

FTPHandler.on_login = on_login
sys.exit(bridge.ftp.main())
"""


@pytest.mark.blocks  # the handler, for half a second
def test_a_hub_that_is_blocked_feeds_no_watchdog(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, 0.1)
    with Command(program=["-c", BLOCKING], directory=tmp_path) as server:
        systemd.messages_until("READY=1")
        with log_in(server):
            assert systemd.messages_until("X_ENVIRONMENT=")[-1] == "X_ENVIRONMENT=set()"
            assert systemd.messages_until("X_BLOCKED=1") == ["X_BLOCKED=1"]
            assert systemd.messages_until("X_FREE=1") == ["X_FREE=1"]
            systemd.messages_until("WATCHDOG=1")


@pytest.mark.parametrize(("usec", "pid"), [("100000", "1"), ("0", None), (None, None)])
def test_a_watchdog_that_is_not_for_this_process(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with Command(directory=tmp_path) as server:
        with log_in(server):
            pass
        server.stop()
        states = [message.splitlines()[0] for message in systemd.messages_until("STOPPING=1")]
        assert states == ["READY=1", "STOPPING=1"]


def test_a_watchdog_without_a_number_is_an_error(
    tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: WATCHDOG_USEC='soon'" in result.stderr


# --- socket activation

#: As systemd does it: the process that becomes the service is named in the environment.
ACTIVATED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "bridge.ftp"])
"""


@contextlib.contextmanager
def activated(directory: Path, listener: socket.socket) -> Iterator[subprocess.Popen[str]]:
    program = subprocess.Popen(
        [sys.executable, "-c", ACTIVATED],
        cwd=directory,
        env={**environment(), "LISTEN_FDS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: become_third(listener),  # (the child has no other descriptor)
        close_fds=False,
    )
    try:
        yield program
    finally:
        program.kill()
        program.wait(LIMIT)
        assert program.stdout is not None
        program.stdout.close()


def test_a_service_with_a_socket_starts_at_the_first_client_and_stops(
    tmp_path: Path, systemd: Systemd
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ftplib.FTP(timeout=LIMIT) as client:
        host, port = listener.getsockname()
        # Before there is a service: the client waits in systemd's queue.
        client.sock = socket.create_connection((host, port), LIMIT)
        client.af = client.sock.family
        client.host = host
        client.file = client.sock.makefile("r", encoding="utf-8")
        with activated(tmp_path, listener) as program:
            assert systemd.message().endswith(f"to anonymous on 127.0.0.1 port {port}")
            assert client.getresp().startswith("220")
            client.login()
            assert client.nlst() == []
            client.quit()
            program.terminate()
            assert systemd.message().startswith("STOPPING=1")
            assert program.wait(LIMIT) == 0
