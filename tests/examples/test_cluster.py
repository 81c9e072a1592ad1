"""examples/cluster as it is: haproxy, two nodes, Redis; real clients with addresses of their own.

On the loopback interface every address of 127.0.0.0/8 is there: the balancer is 127.0.0.1, the nodes are
127.0.1.1 and 127.0.1.2, each client is another 127.0.2.x. What the example calls otherwise is set by the
variables that its files are made for. Ports are ones that nobody else has on these addresses.
"""

from __future__ import annotations

import contextlib
import csv
import ftplib
import io
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from support.cli import LIMIT, _Lines, environment, run
from support.servers import held_ports, short_directory

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
BALANCER = "127.0.0.1"
NODES = {"node1": "127.0.1.1", "node2": "127.0.1.2"}

MISSING = [
    *(f"{program} is not installed" for program in ("haproxy", "redis-server") if not shutil.which(program)),
    *(
        f"the {package} package is not installed"
        for package in ("redis", "proxyprotocol")
        if find_spec(package) is None
    ),
    *([] if sys.platform == "linux" else ["only Linux has all of 127.0.0.0/8"]),
]
pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(bool(MISSING), reason=" and ".join(MISSING)),
]


class Program:
    """A process with what it has printed, stderr included; killed and reaped when left."""

    def __init__(self, *command: str, directory: Path, **variables: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.lines = _Lines(self.process.stdout)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.lines.close()

    def kill(self) -> None:
        """SIGKILL, with its workers; returns when none of their threads holds a socket any more."""
        with contextlib.ExitStack() as stack:
            workers: list[int] = []
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                for worker in psutil.Process(self.process.pid).children():
                    with contextlib.suppress(ProcessLookupError):
                        workers.append(os.pidfd_open(worker.pid))
                        stack.callback(os.close, workers[-1])
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(LIMIT)
            for descriptor in workers:  # they are nobody's children now
                # Not `ps`: there a process is a zombie while threads of it still end, and listen.
                ended = select.poll()
                ended.register(descriptor, select.POLLIN)
                assert ended.poll(LIMIT * 1000)

    def wait_for(self, pattern: str, count: int = 1) -> str:
        line = self.lines.wait_for(pattern, count)
        assert line is not None, f"no {pattern!r} ({count} times) in:\n{self.lines.text}"
        return line


class Client(ftplib.FTP):
    """Goes where PASV tells it to, as most clients do."""

    trust_server_pasv_ipv4_address = True


class Cluster:
    """The example: users in Redis, files in a directory, two nodes and haproxy before them."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        sockets = stack.enter_context(short_directory())
        self.files = directory / "files"
        self.files.mkdir()
        first = stack.enter_context(held_ports(102, BALANCER, *NODES.values()))
        self.port, node_port = first, first + 1
        self.variables = {
            "FTP_ADDRESS": BALANCER,
            "FTP_PORT": str(self.port),
            "BALANCER": BALANCER,
            "NODE1": NODES["node1"],
            "NODE2": NODES["node2"],
            "NODE1_PORTS": f"{first + 2}-{first + 51}",
            "NODE2_PORTS": f"{first + 52}-{first + 101}",
            "NODE_PORT": str(node_port),
            "ADMIN_SOCKET": str(sockets / "haproxy.sock"),
            "REDIS": f"unix://{quote(str(sockets))}/redis.sock",
            "FILES": str(self.files),
            "PYTHON": sys.executable,
        }
        socket = ("--unixsocket", str(sockets / "redis.sock"))
        redis = self._start("redis-server", "--port", "0", *socket, "--save", "")
        redis.wait_for("ready to accept connections")
        added = run(
            sys.executable,
            str(CLUSTER.parent / "redis_authorizer.py"),
            *("--redis", self.variables["REDIS"], "add", "alice", "secret", str(self.files)),
        )
        assert added.returncode == 0, added.stderr
        self.nodes = {name: self._node(name) for name in NODES}
        for node in self.nodes.values():
            node.wait_for("Stop: ")
        self.haproxy = self._start("haproxy", "-db", "-f", str(CLUSTER / "haproxy.cfg"))
        self.until(lambda: bool(self.admin("show info")))

    def _start(self, *command: str, **variables: str) -> Program:
        program = Program(*command, directory=self._directory, **{**self.variables, **variables})
        return self._stack.enter_context(program)

    def _node(self, name: str) -> Program:
        ports = self.variables[f"{name.upper()}_PORTS"]
        return self._start(str(CLUSTER / "node"), NODE=NODES[name], NODE_PORTS=ports)

    def restart(self, name: str) -> None:
        """Start a node that has ended."""
        self.nodes[name] = self._node(name)
        self.nodes[name].wait_for("Stop: ")

    def admin(self, command: str) -> str:
        """What haproxy's admin socket answers."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(LIMIT)
            admin.connect(self.variables["ADMIN_SOCKET"])
            admin.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: admin.recv(65536), b"")).decode()

    def stat(self, name: str, field: str) -> str:
        """A number of haproxy's for a node, or a word ("status": UP, DOWN, DRAIN and so on)."""
        for row in csv.DictReader(io.StringIO(self.admin("show stat").removeprefix("# "))):
            if (row["pxname"], row["svname"]) == ("ftp", name):
                return row[field]
        raise AssertionError(f"no {name}")

    def until(self, condition: Callable[[], bool]) -> None:
        """haproxy has nothing that one could wait for: ask until it is so."""
        tick = threading.Event()
        for _ in range(int(LIMIT / 0.05)):
            with contextlib.suppress(OSError):  # not yet there
                if condition():
                    return
            tick.wait(0.05)
        raise AssertionError(f"never so; haproxy:\n{self.haproxy.lines.text}")

    def until_state(self, name: str, state: str) -> None:
        self.until(lambda: self.stat(name, "status").startswith(state))

    def end(self) -> dict[str, str]:
        """Stop the nodes; all that they have logged."""
        for node in self.nodes.values():
            node.process.send_signal(signal.SIGTERM)
        for node in self.nodes.values():
            assert node.process.wait(LIMIT) == 0, node.lines.text
            assert node.lines.join()
        return {name: node.lines.text for name, node in self.nodes.items()}

    # --- clients

    def connect(self, source: str) -> ftplib.FTP:
        """A session from this address that is not logged in."""
        ftp = Client(timeout=LIMIT, source_address=(source, 0))
        try:
            ftp.connect(BALANCER, self.port)
        except BaseException:
            ftp.close()
            raise
        return ftp

    def log_in(self, source: str) -> ftplib.FTP:
        ftp = self.connect(source)
        try:
            ftp.login("alice", "secret")
        except BaseException:
            ftp.close()
            raise
        return ftp

    def source_at(self, name: str) -> str:
        """A client's address that haproxy gives to this node."""
        for number in range(1, 100):
            source = f"127.0.2.{number}"
            before = self.stat(name, "stot")
            with self.log_in(source):
                if self.stat(name, "stot") != before:
                    return source
        raise AssertionError(f"nobody comes to {name}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path, stack)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that leave it as it is."""
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("cluster"), stack)


def read(ftp: ftplib.FTP, name: str) -> bytes:
    content = io.BytesIO()
    ftp.retrbinary(f"RETR {name}", content.write)
    return content.getvalue()


def test_clients_are_spread_stay_where_they_are_and_are_known_by_their_addresses(cluster: Cluster) -> None:
    sources = [f"127.0.2.{number}" for number in range(1, 13)]
    for number, source in enumerate(sources):
        with cluster.log_in(source) as ftp:
            content = os.urandom(50_000 + number)
            ftp.storbinary(f"STOR {number}", io.BytesIO(content))
            assert read(ftp, f"{number}") == content
            assert (cluster.files / f"{number}").read_bytes() == content
            assert len(ftp.nlst()) == number + 1  # whichever node has it
    for source in reversed(sources):
        with cluster.log_in(source) as ftp:
            assert ftp.pwd() == "/"
    logs = cluster.end()
    came = {
        name: Counter(re.findall(r"(127\S+):\d+-\[\] FTP session opened", log)) for name, log in logs.items()
    }
    assert came["node1"] + came["node2"] == dict.fromkeys(sources, 2)
    assert came["node1"].keys() & came["node2"].keys() == set()
    assert came["node1"]  # one of 12 is enough; which is always the same
    assert came["node2"]
    for name, log in logs.items():
        stored = re.findall(r"(127\S+):\d+-\[alice\] STOR .+ completed=1", log)
        assert sorted(stored) == sorted(came[name])
        assert f" {BALANCER}:" not in log


def test_limits_are_for_each_client(standing: Cluster) -> None:
    """`--max-cons-per-ip 20` of the example."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(standing.log_in("127.0.2.1"))
        with pytest.raises(ftplib.error_temp, match=r"^421 Too many connections from the same IP address"):
            standing.connect("127.0.2.1")
        for source in ("127.0.2.2", "127.0.2.3"):
            stack.enter_context(standing.log_in(source))


def test_users_are_the_same_everywhere(standing: Cluster) -> None:
    for name in NODES:
        with standing.connect(standing.source_at(name)) as ftp:
            with pytest.raises(ftplib.error_perm, match=r"^530 Wrong user name or password"):
                ftp.login("alice", "wrong")
            ftp.login("alice", "secret")


class Load(threading.Thread):
    """A client that uploads and downloads until told to stop; who is sent away by a 421 comes again."""

    def __init__(self, cluster: Cluster, source: str, stop: threading.Event) -> None:
        super().__init__()
        self.cluster = cluster
        self.source = source
        self.stop = stop
        self.transfers = 0
        self.sessions = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with contextlib.closing(self.cluster.log_in(self.source)) as ftp:
                    self.sessions += 1
                    for _ in range(5):
                        self._transfer(ftp)
                    ftp.quit()
            except (ftplib.error_temp, EOFError, ConnectionError) as error:
                # Sent away between two transfers; RFC 959: 421 may be the reply to any command.
                if isinstance(error, ftplib.error_temp) and not str(error).startswith("421"):
                    self.failures.append(repr(error))
            except Exception as error:
                self.failures.append(repr(error))

    def _transfer(self, ftp: ftplib.FTP) -> None:
        name = f"{self.source}-{self.transfers % 3}"
        content = os.urandom(random.randrange(1, 300_000))
        if self._complete(ftp, f"STOR {name}", lambda data: data.sendall(content)):
            received = bytearray()
            self._complete(ftp, f"RETR {name}", lambda data: receive_all(data, received))
            if received != content:
                self.failures.append(f"{name}: {len(received)} of {len(content)} bytes, or other ones")

    def _complete(self, ftp: ftplib.FTP, command: str, transfer: Callable[[Any], object]) -> bool:
        """From its 150 on, a transfer has to reach its 226."""
        ftp.voidcmd("TYPE I")
        data = ftp.transfercmd(command)
        try:
            with data:
                transfer(data)
            ftp.voidresp()
        except Exception as error:
            self.failures.append(f"{command}: {error!r}")
            return False
        self.transfers += 1
        return True


def receive_all(data: Any, received: bytearray) -> None:
    while chunk := data.recv(65536):
        received += chunk


@contextlib.contextmanager
def load(cluster: Cluster, clients: int) -> Iterator[list[Load]]:
    stop = threading.Event()
    threads = [Load(cluster, f"127.0.2.{number}", stop) for number in range(100, 100 + clients)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()


def stored(node: Program, count: int) -> None:
    """Wait for that many uploads more to one node."""
    before = len(re.findall(r"STOR .+ completed=1", node.lines.text))
    node.wait_for(r"STOR .+ completed=1", before + count)


def test_a_node_is_drained_under_load_and_comes_back_without_a_failed_transfer(cluster: Cluster) -> None:
    source = cluster.source_at("node1")
    with load(cluster, 6) as threads, cluster.log_in(source) as slow:
        for node in cluster.nodes.values():
            stored(node, 3)
        slow.voidcmd("TYPE I")
        upload = slow.transfercmd("STOR slow")  # runs through all of it
        upload.sendall(b"first half, ")

        assert cluster.admin("set server ftp/node1 state drain") == "\n"
        with cluster.log_in(source) as moved:
            assert moved.pwd() == "/"
            cluster.nodes["node2"].wait_for(rf"{re.escape(source)}:\d+-\[alice\] USER 'alice' logged in")
        sessions = cluster.stat("node1", "stot")
        node1 = cluster.nodes["node1"]
        node1.process.send_signal(signal.SIGTERM)
        node1.wait_for(r"session\(s\) to end, [1-9]\d* of them after their transfer")
        stored(cluster.nodes["node2"], 5)
        upload.sendall(b"second half")
        upload.close()
        assert slow.voidresp().startswith("226")
        slow.close()
        assert node1.process.wait(LIMIT) == 0
        assert node1.lines.join()
        reports = re.findall(r"stopped: .*", node1.lines.text)
        assert reports  # one for each process of the node
        assert all(re.search(r" 0 cut, .* 0 failed and 0 cut$", report) for report in reports), reports
        assert cluster.stat("node1", "stot") == sessions  # nobody came after `drain`
        assert (cluster.files / "slow").read_bytes() == b"first half, second half"

        cluster.restart("node1")
        assert cluster.admin("set server ftp/node1 state ready") == "\n"
        cluster.until_state("node1", "UP")
        stored(cluster.nodes["node1"], 3)  # its clients are back
    assert [thread.failures for thread in threads] == [[]] * len(threads)
    assert min(thread.transfers for thread in threads) > 0


def test_a_node_that_dies_takes_its_own_transfers_along_and_nothing_else(cluster: Cluster) -> None:
    dying, other = cluster.source_at("node1"), cluster.source_at("node2")
    with cluster.log_in(dying) as lost, cluster.log_in(other) as kept:
        kept.voidcmd("TYPE I")
        upload = kept.transfercmd("STOR kept")
        upload.sendall(b"before, ")
        lost.voidcmd("TYPE I")
        gone = lost.transfercmd("STOR gone")
        gone.sendall(b"half")
        cluster.nodes["node1"].kill()
        with pytest.raises((EOFError, ConnectionError)):
            lost.voidcmd("NOOP")
        gone.close()
        for _ in range(3):  # at once: haproxy tries the other node if one does not answer
            with cluster.log_in(dying) as again:
                again.storbinary("STOR again", io.BytesIO(b"content"))
        cluster.until_state("node1", "DOWN")
        upload.sendall(b"after")
        upload.close()
        assert kept.voidresp().startswith("226")
        lost.close()
    assert (cluster.files / "kept").read_bytes() == b"before, after"
    assert not (cluster.files / "gone").exists()


def test_health_checks_read_the_banner_and_are_not_logged(cluster: Cluster) -> None:
    cluster.until(lambda: all(cluster.stat(name, "check_status") == "L7OK" for name in NODES))
    for name, log in cluster.end().items():
        cluster.until_state(name, "DOWN")
        assert "FTP session" not in log, log
