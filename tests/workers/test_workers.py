"""--workers: processes that share the port and the limits; their deaths, their successors and their end."""

from __future__ import annotations

import contextlib
import ftplib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge.server.shared_table import SharedTable
from bridge.workers.limits import ALL, SharedCounts
from support.cli import LIMIT, Command, run
from support.servers import PATIENCE

pytestmark = pytest.mark.program

MB = 1 << 20
TWO = ("--workers", "2")
#: Connections after which the kernel has surely given some to each of two sockets: it picks by a hash, so
#: with 100 all go to one of them once in 2**99 times.
MANY = 100


def serve(server: Command, count: int = 2) -> list[psutil.Process]:
    """The workers, once *count* of them serve (since the start)."""
    server.logged(r"\] passive ports: ", count)
    return server.children()


@contextlib.contextmanager
def session(server: Command) -> Iterator[ftplib.FTP]:
    with contextlib.closing(ftplib.FTP(timeout=LIMIT)) as client:
        client.connect("127.0.0.1", server.port)
        client.login()
        yield client


def owner(server: Command, client: ftplib.FTP) -> int:
    """The worker that serves *client*, by its log line."""
    port = client.sock.getsockname()[1]  # type: ignore[union-attr]
    line = server.logged(rf"127\.0\.0\.1:{port}-\[\] FTP session opened")
    match = re.match(r"\[I \S+ \S+ (\d+)\]", line)
    assert match is not None, line
    return int(match[1])


@contextlib.contextmanager
def one_in_each(server: Command, pids: set[int]) -> Iterator[dict[int, ftplib.FTP]]:
    """A session in each of the workers *pids*."""
    with contextlib.ExitStack() as stack:
        found: dict[int, ftplib.FTP] = {}
        for _ in range(MANY):
            client = stack.enter_context(session(server))
            found.setdefault(owner(server, client), client)
            if pids <= found.keys():
                break
        else:
            raise AssertionError(f"sessions only in {set(found)} of {pids}")
        for client in list(found.values()):
            assert client.pwd() == "/"
        yield found


def gone(process: psutil.Process) -> None:
    process.wait(LIMIT)


# --- the port


def test_workers_share_the_port_and_say_how_many_they_are(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path) as server:
        workers = serve(server)
        assert len(workers) == 2
        assert "Workers:  2\n" in server.stdout
        with one_in_each(server, {worker.pid for worker in workers}):
            pass


def test_each_worker_accepts_from_a_socket_of_its_own(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path) as server:
        serve(server)
        listening = [
            each
            for each in psutil.Process(server.pid).net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        ]
        assert [each.laddr.port for each in listening] == [server.port] * 2
        for worker in server.children():
            own = [each for each in worker.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            assert len(own) == 1


def test_without_so_reuseport_the_workers_share_one_socket(tmp_path: Path) -> None:
    forget = "import gevent.socket, socket; del socket.SO_REUSEPORT"
    code = f"{forget}; import runpy; runpy.run_module('bridge.ftp', None, '__main__')"
    with Command(*TWO, directory=tmp_path, program=("-c", code)) as server:
        first, second = serve(server)
        listening = Path(f"/proc/net/{'tcp6' if ':' in server.host else 'tcp'}").read_text()
        assert len(re.findall(rf":{server.port:04X} \S+ 0A ", listening)) == 1
        for number, (paused, serving) in enumerate(((first, second), (second, first)), 1):
            paused.suspend()
            try:
                with session(server) as client:
                    assert owner(server, client) == serving.pid
            finally:
                paused.resume()
            # Or the next that is suspended may hold the lock of the table that counts sessions.
            server.logged("FTP session closed", number)


def test_a_port_that_another_server_has_is_an_error_though_its_workers_share_it(tmp_path: Path) -> None:
    with Command(*TWO, "-i", "127.0.0.1", directory=tmp_path) as server:
        serve(server)
        second = run(
            *(sys.executable, "-m", "bridge.ftp", *TWO, "-i", "127.0.0.1", "-p", str(server.port)),
            directory=tmp_path,
        )
        assert second.returncode == 2
        assert "Address already in use" in second.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", "2", "--concurrency", "pre-fork"], "--concurrency pre-fork is --workers 0"),
        (["--workers", "-1"], "argument --workers: -1 is negative; 0 means one worker for each core"),
        (["--workers", "some"], "argument --workers: 'some' is no number"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], expected: str) -> None:
    result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", *options, directory=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[-1]


# --- limits


@pytest.mark.parametrize("option", ["--max-cons", "--max-cons-per-ip"])
def test_limits_hold_for_all_workers_together(tmp_path: Path, option: str) -> None:
    with Command(*TWO, option, "4", directory=tmp_path) as server:
        serve(server)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(session(server))
            for _ in range(20):  # to whichever worker
                with pytest.raises(ftplib.error_temp, match=r"^421 Too many connections"):
                    stack.enter_context(session(server))
        server.logged(r"-\[anonymous\] FTP session closed", 4)
        with session(server) as client:
            assert client.pwd() == "/"


def test_a_full_table_counts_in_its_own_process(caplog: pytest.LogCaptureFixture) -> None:
    table = SharedTable(2, rows=1)
    try:
        counts = SharedCounts(table, 0, total=True, by_ip=True)
        for _ in range(3):
            counts.append("192.0.2.1")
        assert (counts.everywhere(), counts.count("192.0.2.1")) == (3, 3)
        assert len(caplog.records) == 1
        assert "no row for '192.0.2.1'" in caplog.text
        for _ in range(3):
            counts.remove("192.0.2.1")
        assert (counts.everywhere(), counts.count("192.0.2.1"), table.total(ALL)) == (0, 0, 0)
    finally:
        table.close()


# --- deaths


def test_a_killed_worker_is_replaced_and_what_it_counted_is_forgotten(tmp_path: Path) -> None:
    with Command(*TWO, "--max-cons", "60", directory=tmp_path) as server:
        workers = {worker.pid: worker for worker in serve(server)}
        with one_in_each(server, set(workers)) as clients:
            killed, other = sorted(workers)
            held = server.stderr.count("FTP session opened")
            workers[killed].kill()
            server.logged(rf"worker {killed} died \(killed by SIGKILL\): another starts in 0\.1 s")
            assert clients[other].pwd() == "/"  # others go on
            serve(server, 3)
            left = {each.pid for each in server.children()}
            assert len(left) == 2
            assert killed not in left
            with contextlib.ExitStack() as stack:
                # Only those of the other worker are still counted: there is room for as many as died.
                survivors = sum(
                    owner_pid == other
                    for owner_pid in map(int, re.findall(r" (\d+)\] .*opened", server.stderr))
                )
                assert survivors < held
                for _ in range(60 - survivors):
                    stack.enter_context(session(server))
                with pytest.raises(ftplib.error_temp, match=r"^421 Too many"):
                    stack.enter_context(session(server))


def test_no_connection_is_refused_while_a_worker_is_dead(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path) as server:
        workers = serve(server)
        for worker in workers:
            worker.suspend()
        clients = [socket.create_connection(("127.0.0.1", server.port), LIMIT) for _ in range(20)]
        for worker in workers:
            worker.kill()
        for client in clients:  # they wait in the queues of the dead
            with client, client.makefile("rb") as replies:
                assert replies.readline().startswith(b"220 ")


CRASHING = r"""
import sys, os
import bridge.ftp, bridge.ftp.parts.tls
configure = bridge.ftp.parts.tls.configure
def crash():
    os._exit(7)
def configure(site):
    site.services.append(crash)
bridge.ftp.parts.tls.configure = configure
print("Serving on 127.0.0.1 port 1", flush=True)
sys.exit(bridge.ftp.main())
"""


def test_workers_that_never_start_end_the_parent_with_1_after_longer_and_longer_pauses(
    tmp_path: Path,
) -> None:
    with Command(*TWO, directory=tmp_path, program=["-c", CRASHING]) as server:
        code, output = server.wait()
        assert code == 1, output
        assert "5 workers in a row died before they served: giving up" in output
        pauses = [
            float(pause) for pause in re.findall(r"exit code 7\): another starts in ([\d.]+) s", output)
        ]
        assert sorted(set(pauses))[:2] == [0.1, 0.2]
        assert "Stop: " not in output  # it never served


# --- signals


def test_sighup_replaces_all_workers_and_nobody_notices(tmp_path: Path) -> None:
    content = bytes(range(256)) * (24 * MB // 256)
    (tmp_path / "file").write_bytes(content)
    with Command(*TWO, directory=tmp_path) as server:
        old = serve(server)
        stop = threading.Event()
        problems: list[BaseException] = []
        connected = [0]

        def connect() -> None:
            while not stop.is_set():
                try:
                    with session(server) as client:
                        assert client.pwd() == "/"
                        client.quit()
                    connected[0] += 1
                except BaseException as error:
                    problems.append(error)
                    return

        threads = [threading.Thread(target=connect) for _ in range(4)]
        with session(server) as client:
            pid = owner(server, client)
            client.voidcmd("TYPE I")
            with client.transfercmd("RETR file") as data:
                received = data.recv(MB, socket.MSG_WAITALL)
                for thread in threads:
                    thread.start()
                try:
                    server.send(signal.SIGHUP)
                    server.logged(r"worker \d+ serves, worker \d+ retires", 2)
                    for worker in old:
                        if worker.pid != pid:
                            gone(worker)
                    assert psutil.pid_exists(pid)
                    before = connected[0]
                    deadline = time.monotonic() + PATIENCE
                    while connected[0] < before + 20 and not problems and time.monotonic() < deadline:
                        threads[0].join(0.01)
                finally:
                    stop.set()
                    for thread in threads:
                        thread.join()
                assert problems == []
                assert connected[0] >= before + 20
                while chunk := data.recv(MB):
                    received += chunk
            assert client.voidresp().startswith("226")
            assert received == content
            assert client.pwd() == "/"  # the session stays where it is
            assert owner(server, client) == pid
        for worker in old:
            gone(worker)
        assert len(server.children()) == 2
        assert server.stop()[0] == 0
        assert "Traceback" not in server.output


def test_without_a_free_slot_the_worker_that_retired_first_is_drained(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path) as server, contextlib.ExitStack() as stack:
        serve(server)
        clients = []
        for number in (1, 2):  # two slots more than places, and a session in each
            clients.append(stack.enter_context(session(server)))
            server.send(signal.SIGHUP)
            server.logged(r"worker \d+ serves, worker \d+ retires", 2 * number)
        first, second = clients
        pid = owner(server, first)
        server.send(signal.SIGHUP)
        server.logged(rf"worker {pid} stops: its slot is needed")
        with pytest.raises(ftplib.error_temp, match=r"^421 Service shutting down"):
            first.voidresp()
        server.logged(r"worker \d+ serves, worker \d+ retires", 6)
        assert second.pwd() == "/"
        assert server.stderr.count("its slot is needed") == 1


RELOADING = r"""
import os, sys
import bridge.ftp, bridge.ftp.parts.tls
def configure(site):
    site.reload.append(lambda: os.write(1, b"reloaded\n"))
    site.rotate.append(lambda: os.write(1, b"rotated\n"))
bridge.ftp.parts.tls.configure = configure
sys.exit(bridge.ftp.main())
"""


def test_successors_reload_and_everybody_rotates(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path, program=["-c", RELOADING]) as server:
        serve(server)
        server.send(signal.SIGUSR1)
        server.printed("^rotated$", 3)
        assert "reloaded" not in server.stdout
        server.send(signal.SIGHUP)
        server.printed("^reloaded", 2)
        server.logged("retires", 2)
        assert server.stdout.count("rotated") == 3


def test_a_successor_that_cannot_start_leaves_the_old_one_serving(tmp_path: Path) -> None:
    program = RELOADING.replace('os.write(1, b"reloaded\\n")', "os._exit(3)")
    assert program != RELOADING
    with Command(*TWO, directory=tmp_path, program=["-c", program]) as server:
        old = {worker.pid for worker in serve(server)}
        server.send(signal.SIGHUP)
        server.logged(r"did not start \(exit code 3\): SIGHUP changes nothing here", 2)
        assert {worker.pid for worker in server.children()} == old
        with session(server) as client:
            assert client.pwd() == "/"


def test_a_signal_drains_all_workers_those_that_retire_too(tmp_path: Path) -> None:
    with Command(*TWO, directory=tmp_path) as server:
        serve(server)
        with session(server) as old:
            server.send(signal.SIGHUP)
            server.logged("retires", 2)
            with session(server) as new:
                code, output = server.stop()
                assert code == 0, output
                for client in (old, new):
                    with pytest.raises(ftplib.error_temp, match=r"^421 Service shutting down"):
                        client.voidresp()


def test_the_runtime_directory_is_private_and_goes_with_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "home").mkdir()
    with Command(*TWO, "-d", "home", directory=tmp_path) as server:
        serve(server)
        (found,) = tmp_path.glob("bridge-*")
        assert found.stat().st_mode & 0o777 == 0o700
        server.stop()
        assert not found.exists()


def test_the_parent_has_no_hub(tmp_path: Path) -> None:
    program: Any = r"""
import sys
import bridge.ftp
from gevent._hub_local import get_hub_if_exists
try:
    bridge.ftp.main()
finally:
    sys.stdout.write(f"hub: {get_hub_if_exists()}\n")
"""
    with Command(*TWO, directory=tmp_path, program=["-c", program]) as server:
        serve(server)
        server.stop()
        assert server.stdout.count("hub: None") == 1  # the parent's
        assert server.stdout.count("hub: <Hub") == 2
