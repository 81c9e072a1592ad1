"""How many transfers in a row one address gets from one server, when each leaves a port in TIME_WAIT.

    python -m tests.bench.passive_ports [--transfers 60000]

Run it from the checkout, on Linux. One client keeps one session and gets a small file by EPSV and RETR, over
and over. The server closes the data connection, so its port stays in TIME_WAIT for 60 s; Linux has 28 232
such ports (ip_local_port_range). Where the session ends, the client logs in again and goes on.

What is counted: transfers that were complete, refused (425) and cut off with their session; how long all
took; and how many a second there were in the first and in the last tenth. Server and client have a core
each, if there are two. Before each column all ports in TIME_WAIT are waited for.

The client connects from addresses and ports that are none of the server's: in life it is another machine.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: What is compared; `serve` makes them.
COLUMNS = ("pyftpdlib epoll", "GeventFTPServer")
#: Where the client connects from: ports below the ephemeral ones, again after as many transfers.
CLIENT, CLIENT_PORTS = "127.0.0.2", range(1024, 32768)
CONTENT = b"content"
#: Seconds a port stays in TIME_WAIT (Linux's TCP_TIMEWAIT_LEN), and that the client waits for a reply.
TIME_WAIT, PATIENCE = 60.0, 60.0


# --- the server's process


def serve(column: str) -> None:
    """Say the port and serve, until killed."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import FTPServer

    logging.disable()
    authorizer = DummyAuthorizer()
    authorizer.add_user("u", "p", os.curdir)
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server_class = FTPServer
    if column == "GeventFTPServer":
        from bridge import GeventFTPServer as server_class
    server = server_class(("127.0.0.1", 0), handler)
    print(server.socket.getsockname()[1], flush=True)
    server.serve_forever()


# --- the client's process


class Session:
    """A session that is logged in."""

    _data_ports = itertools.cycle(CLIENT_PORTS)

    def __init__(self, port: int) -> None:
        self._control = socket.create_connection(("127.0.0.1", port), PATIENCE, (CLIENT, 0))
        self._replies = self._control.makefile("rb")
        for line in ("", "USER u", "PASS p", "TYPE I"):
            self._command(line)

    def close(self) -> None:
        self._replies.close()
        self._control.close()

    def _command(self, line: str) -> str:
        """The reply to *line*, if there is one, else the next. Raises EOFError if the session has ended."""
        if line:
            self._control.sendall(f"{line}\r\n".encode())
        reply = self._replies.readline().decode()
        if not reply or reply.startswith("421"):
            raise EOFError
        return reply

    def _data(self, port: int) -> socket.socket:
        while True:
            try:
                return socket.create_connection(
                    ("127.0.0.1", port), PATIENCE, (CLIENT, next(self._data_ports))
                )
            except OSError as error:
                if "in use" not in str(error):
                    raise

    def transfer(self) -> str:
        """`complete` or `refused`."""
        reply = self._command("EPSV")
        if not reply.startswith("229"):
            return "refused"
        with self._data(int(reply.split("|")[3])) as data:
            self._command("RETR file")
            content = data.recv(100)
            complete = content == CONTENT and not data.recv(100)
        return "complete" if self._command("").startswith("226") and complete else "refused"


def measure(column: str, transfers: int) -> dict[str, float]:
    """One column: a value for each row."""
    counts = {"complete": 0, "refused": 0, "cut off": 0}
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.bench.passive_ports", "--serve", column]
    with tempfile.TemporaryDirectory() as home:
        Path(home, "file").write_bytes(CONTENT)
        with subprocess.Popen(
            command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(process.pid, cores[:1])
                os.sched_setaffinity(0, cores[1:] or cores)
                assert process.stdout is not None
                port = int(process.stdout.readline() or sys.exit("the server's process ended; see above"))
                session = Session(port)
                times = [time.monotonic()]
                for _ in range(transfers):
                    try:
                        counts[session.transfer()] += 1
                    except (EOFError, ConnectionError):
                        counts["cut off"] += 1
                        session.close()
                        session = Session(port)
                    times.append(time.monotonic())
                session.close()
            finally:
                process.kill()
    tenth = transfers // 10
    return {
        **{f"transfers {name}": count for name, count in counts.items()},
        "seconds": times[-1] - times[0],
        "transfers a second, first tenth": tenth / (times[tenth] - times[0]),
        "transfers a second, last tenth": tenth / (times[-1] - times[-1 - tenth]),
    }


def table(columns: dict[str, dict[str, float]]) -> Iterator[str]:
    """Markdown, line by line."""
    yield f"| | {' | '.join(columns)} |"
    yield "|---" + "|---:" * len(columns) + "|"
    for row in next(iter(columns.values())):
        yield f"| {row} | {' | '.join(f'{values[row]:,.0f}' for values in columns.values())} |"


def main() -> None:
    """Measure every column, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transfers", type=int, default=60_000, help="for each column (%(default)s)")
    parser.add_argument("--serve", choices=COLUMNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    columns: dict[str, dict[str, float]] = {}
    for column in COLUMNS:
        if columns:
            time.sleep(TIME_WAIT + 1)
        columns[column] = measure(column, options.transfers)
    print(*table(columns), sep="\n")


if __name__ == "__main__":
    main()
