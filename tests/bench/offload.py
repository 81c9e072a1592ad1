"""What OffloadedFS costs and what it gives: `python -m tests.bench.offload`, from the checkout.

1. **A slow file system**: every call sleeps 100 ms for real. 50 clients list, upload and download at once; a
   pywsgi application in the server's process is asked all the while. Clients and who asks are processes of
   their own.
2. **A fast one**: throughput of one big RETR and STOR on a local disk, and the server's CPU, inline and
   offloaded. Server and client are processes of their own; medians of ROUNDS rounds.
3. **A long listing**: LIST of a directory with 100 000 entries: seconds to the first bytes, how long the hub
   was held up at most, and what the process grew by.

Prints Markdown. The disk is the one of the temporary directory, and its cache is warm.
"""

from __future__ import annotations

import ftplib
import io
import logging
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import psutil
from gevent.pywsgi import WSGIServer
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer, OffloadedFS
from bridge.filesystems.threads import THREADS

DELAY = 0.1
CLIENTS = 50
ROUNDS = 5
SIZE = 512 << 20
ENTRIES = 100_000
METHODS = ("open", "chdir", "listdir", "stat", "lstat", "isfile", "isdir", "getsize", "realpath", "validpath")


class SlowFS(AbstractedFS):
    """Sleeps before every call, and the hub with it."""


def _sleeping(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY)
        return method(*args, **kwargs)

    return call


for _name in METHODS:
    setattr(SlowFS, _name, _sleeping(getattr(AbstractedFS, _name)))


class OffloadedSlowFS(OffloadedFS, SlowFS):
    """The same, on threads."""


def _handler(home: str, filesystem: Any) -> Any:
    authorizer = DummyAuthorizer()
    authorizer.add_user("u", "p", home, perm="elradfmwMT")
    return type("Handler", (FTPHandler,), {"authorizer": authorizer, "abstracted_fs": filesystem})


@contextmanager
def _started(home: str, filesystem: Any) -> Iterator[GeventFTPServer]:
    server = GeventFTPServer(("127.0.0.1", 0), _handler(home, filesystem))
    server.start()
    try:
        yield server
    finally:
        server.stop(0)
        THREADS.kill()


class Client:
    """As little of FTP as is needed, cooperative."""

    def __init__(self, address: Any) -> None:
        self._sock = gevent.socket.create_connection(address)
        self._file = self._sock.makefile("rb")
        self._reply()
        for line in ("USER u", "PASS p", "TYPE I"):
            self.command(line)

    def command(self, line: str) -> str:
        self._sock.sendall(f"{line}\r\n".encode())
        return self._reply()

    def _reply(self) -> str:
        return str(self._file.readline().decode())

    def transfer(self, line: str, content: bytes | None = None) -> Iterator[bytes]:
        port = int(self.command("EPSV").split("|")[3])
        with gevent.socket.create_connection(("127.0.0.1", port)) as data:
            self.command(line)
            if content is not None:
                data.sendall(content)
            else:
                while chunk := data.recv(1 << 16):
                    yield chunk
        assert self._reply().startswith("226")

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def _serve(home: str, filesystem: Any, ports: Any) -> None:
    """An FTP and a web server; says their ports."""
    logging.disable(logging.CRITICAL)
    server = GeventFTPServer(("127.0.0.1", 0), _handler(home, filesystem))
    http = WSGIServer(("127.0.0.1", 0), _application, log=None)
    http.start()
    ports.send(server.server_port)
    ports.send(http.server_port)
    server.serve_forever()


@contextmanager
def _process(function: Callable[..., None], *args: Any) -> Iterator[tuple[Any, int | None]]:
    """*function* in a process of its own, until the block ends: the pipe, which it gets last, and its pid."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*args, theirs))
    process.start()
    try:
        yield ours, process.pid
    finally:
        process.kill()
        process.join()


def _row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


# --- 1. a slow file system


def _job(address: Any, number: int) -> None:
    client = Client(address)
    for line, content in (("LIST", None), (f"STOR {number}", b"x" * 100_000), (f"RETR {number}", None)):
        for _ in client.transfer(line, content):
            pass
    client.close()


def _seconds(function: Callable[..., object], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _application(_: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"page"]


def _asked(port: int, pipe: Any) -> None:
    """Ask the web server every 10 ms until told to stop; say how long each answer took."""
    latencies: list[float] = []

    def ask() -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while sock.recv(1000):
                pass

    while not pipe.poll(0.01):
        latencies.append(_seconds(ask))
    pipe.send(latencies)


def _everybody(address: Any, clients: int) -> None:
    jobs = [gevent.spawn(_job, address, number) for number in range(clients)]
    gevent.joinall(jobs, raise_error=True)


def slow_file_system() -> None:
    _row(f"every call sleeps {DELAY:g} s", "1 client, s", "all, s", "clients", "pywsgi p50, ms", "p99, ms")
    _row("---", *["---:"] * 5)
    for name, filesystem, clients in (("offloaded", OffloadedSlowFS, CLIENTS), ("inline", SlowFS, 5)):
        with tempfile.TemporaryDirectory() as home, _process(_serve, home, filesystem) as (server, _):
            address, http = ("127.0.0.1", server.recv()), server.recv()
            one = _seconds(_job, address, 0)
            with _process(_asked, http) as (prober, _):
                everybody = _seconds(_everybody, address, clients)
                prober.send("stop")
                latencies = prober.recv()
        p50, p99 = (statistics.quantiles(latencies, n=100)[at] * 1000 for at in (49, 98))
        _row(name, f"{one:.2f}", f"{everybody:.2f}", str(clients), f"{p50:.1f}", f"{p99:.1f}")


# --- 2. a fast one


class _Zeros(io.RawIOBase):
    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size, self._left)
        self._left -= size
        return bytes(size)


def _round(home: str, filesystem: Any, command: str) -> tuple[float, float]:
    """MB per second, and CPU milliseconds per 100 MB of the server."""
    with _process(_serve, home, filesystem) as (pipe, pid), ftplib.FTP() as client:
        client.connect("127.0.0.1", pipe.recv())
        client.login("u", "p")
        server = psutil.Process(pid)
        before = sum(server.cpu_times()[:2])
        if command == "RETR":
            seconds = _seconds(client.retrbinary, "RETR big", len, 1 << 20)
        else:
            seconds = _seconds(client.storbinary, "STOR new", _Zeros(SIZE), 1 << 20)
        cpu = sum(server.cpu_times()[:2]) - before
    return SIZE / 1e6 / seconds, cpu / SIZE * 1e8 * 1000


def fast_file_system() -> None:
    print(f"\n| {SIZE >> 20} MiB, median | inline, MB/s | offloaded, MB/s | ratio | CPU per MB, ratio |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as home:
        with (Path(home) / "big").open("wb") as file:
            file.truncate(SIZE)
        for command in ("RETR", "STOR"):
            results: dict[Any, list[tuple[float, float]]] = {AbstractedFS: [], OffloadedFS: []}
            for _ in range(ROUNDS):
                for filesystem, rounds in results.items():
                    rounds.append(_round(home, filesystem, command))
            (inline, cpu), (threads, threads_cpu) = (
                [statistics.median(each) for each in zip(*rounds, strict=True)] for rounds in results.values()
            )
            ratios = threads / inline, threads_cpu / cpu
            _row(command, f"{inline:.0f}", f"{threads:.0f}", *(f"{ratio:.2f}" for ratio in ratios))


# --- 3. a long listing


def long_listing() -> None:
    print(f"\n| LIST of {ENTRIES} entries | first bytes, ms | all, s | hub held up, ms | memory, MB |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as home:
        for number in range(ENTRIES):
            (Path(home) / f"{number * 7919 % ENTRIES:06}").touch()
        for name, filesystem in (("offloaded", OffloadedFS), ("inline", AbstractedFS)):
            with _started(home, filesystem) as server:
                client = Client(server.address)
                held_up = 0.0
                last = time.perf_counter()

                def tick() -> None:
                    nonlocal held_up, last
                    now = time.perf_counter()
                    held_up, last = max(held_up, now - last - 0.001), now

                ticker = gevent.get_hub().loop.timer(0.001, 0.001)
                memory = psutil.Process().memory_info().rss
                gevent.sleep(0.05)
                ticker.start(tick)
                last = start = time.perf_counter()
                first = grown = 0.0
                for _ in client.transfer("LIST"):
                    first = first or time.perf_counter() - start
                    grown = max(grown, psutil.Process().memory_info().rss - memory)
                seconds = time.perf_counter() - start
                ticker.stop()
                ticker.close()
                client.close()
            milliseconds = f"{first * 1000:.0f}", f"{held_up * 1000:.1f}"
            _row(name, milliseconds[0], f"{seconds:.2f}", milliseconds[1], f"{grown / 1e6:.0f}")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    slow_file_system()
    fast_file_system()
    long_listing()
