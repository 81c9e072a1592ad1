"""The client of the benchmarks, a process of its own: does pieces of work, and counts what was really done.

    python -m tests.bench.load HOST PORT USER [--tls] [--implicit-tls]

Each line of its input is a job, `["name", argument, ...]`, one of the public methods of Load; each line of
its output an answer: `{"units": .., "seconds": ..}` or `{"failed": why}`. Sessions are opened by a job of
their own and stay, so that work which is measured does not contain logins.

It must be cheap and never the bottleneck: plain sockets, one epoll where several clients are at work at once,
no FTP library. What is not as expected (a reply code, a byte count, a missing 226) is a failure. Sits on
client.py, which is one session.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable

from .client import BUFFER, PATIENCE, Session, Unexpected

#: Sessions from one client address: fewer than Linux has ephemeral ports (28 232).
SESSIONS_PER_ADDRESS = 2000
#: Seconds between questions to the web application.
PAUSE = 0.005


class Load:
    """The jobs. Each returns the units of work done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.host: str = options.host
        self.port: int = options.port
        self.user: str = options.user
        self.tls: bool = options.tls or options.implicit_tls
        self.implicit_tls: bool = options.implicit_tls
        self._context = ssl.create_default_context()
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE
        # Who says goodbye and who just closes is no subject here.
        self._context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        self._sessions: list[Session] = []
        self._idle: list[Session] = []

    def encrypt(self, sock: socket.socket) -> ssl.SSLSocket:
        """A TLS connection; no certificate is checked."""
        return self._context.wrap_socket(sock)

    # --- before the measurement

    def open(self, count: int) -> float:
        """Sessions for the work to come."""
        self._sessions += [Session(self) for _ in range(count)]
        return count

    def hold(self, count: int) -> float:
        """Sessions that do nothing, from other addresses than those that work, as in life."""
        for number in range(count):
            self._idle.append(Session(self, f"127.0.1.{1 + number // SESSIONS_PER_ADDRESS}"))
        return count

    def alive(self) -> float:
        """Ask those that do nothing whether they are there still."""
        for session in self._idle:
            session.command("PWD", "257")
        return len(self._idle)

    # --- control connections

    def commands(self, count: int) -> float:
        """PWD from each session, again as soon as it is answered: *count* in all."""
        done, waiting = 0, count - len(self._sessions)
        with select.epoll() as poll:
            sockets = {session.sock.fileno(): session.sock for session in self._sessions}
            for descriptor, sock in sockets.items():
                poll.register(descriptor, select.EPOLLIN)
                sock.sendall(b"PWD\r\n")
            while done < count:
                for descriptor, _ in _ready(poll):
                    reply = sockets[descriptor].recv(4096)
                    if not reply.startswith(b"257 ") or not reply.endswith(b"\r\n"):
                        raise Unexpected(f"{reply[:80]!r} instead of 257")
                    done += 1
                    if waiting > 0:
                        waiting -= 1
                        sockets[descriptor].sendall(b"PWD\r\n")
        return done

    def logins(self, count: int, at_once: int) -> float:
        """*count* sessions that log in and go, *at_once* at a time."""
        # The reply that is waited for, and what is said then.
        script = [(b"220", b"USER %s\r\n" % self.user.encode()), (b"331", b"PASS p\r\n")]
        script += [(b"230", b"QUIT\r\n"), (b"221", b"")]
        clients: dict[int, tuple[socket.socket, int]] = {}
        started = done = 0
        with select.epoll() as poll:
            while done < count:
                while started < count and len(clients) < at_once:
                    sock = socket.create_connection((self.host, self.port), PATIENCE)
                    poll.register(sock.fileno(), select.EPOLLIN)
                    clients[sock.fileno()] = sock, 0
                    started += 1
                for descriptor, _ in _ready(poll):
                    sock, step = clients[descriptor]
                    reply = sock.recv(4096)
                    code, answer = script[step]
                    if not reply.startswith(code):
                        raise Unexpected(f"{reply[:80]!r} instead of {code.decode()}")
                    if not reply.endswith(b"\r\n") or reply[reply.rfind(b"\n", 0, -1) + 4 :][:1] == b"-":
                        continue  # a greeting of several lines, which is not over (never seen split)
                    if answer:
                        sock.sendall(answer)
                        clients[descriptor] = sock, step + 1
                    else:
                        poll.unregister(descriptor)
                        sock.close()
                        del clients[descriptor]
                        done += 1
        return done

    def logins_in_turn(self, count: int) -> float:
        """*count* sessions that log in, by TLS if so, and go, one after the other."""
        for _ in range(count):
            session = Session(self)
            session.command("QUIT", "221")
            session.close()
        return count

    # --- one transfer at a time

    def retr(self, name: str, size: int, count: int) -> float:
        """RETR *name*, of *size* bytes, *count* times; bytes."""
        for _ in range(count):
            _expect(self._sessions[0].download(f"RETR {name}"), size)
        return size * count

    def stor(self, size: int, count: int) -> float:
        """STOR *count* new files; bytes."""
        return sum(self._sessions[0].upload(f"up/{number}", size) for number in range(count))

    def listing(self, name: str, entries: int, count: int) -> float:
        """LIST a directory *count* times; entries."""
        session = self._sessions[0]
        for _ in range(count):
            data, lines = session.data(), 0
            session.command(f"LIST {name}", "1")
            with data, data.makefile("rb") as file:
                lines = sum(1 for line in file if line.startswith(b"-"))
            session.reply("226")
            _expect(lines, entries)
        return entries * count

    # --- transfers of all sessions at once

    def retr_all(self, name: str, size: int) -> float:
        """Each session RETRs *name* at once; bytes."""
        count, buffer = 0, bytearray(BUFFER)
        with select.epoll() as poll:
            connections = self._connections(poll, select.EPOLLIN, lambda number: f"RETR {name}")
            while connections:
                for descriptor, _ in _ready(poll):
                    got = connections[descriptor].recv_into(buffer)
                    count += got
                    if not got:
                        poll.unregister(descriptor)
                        connections.pop(descriptor).close()
        self._completed()
        _expect(count, size * len(self._sessions))
        return count

    def stor_all(self, size: int) -> float:
        """Each session STORs a new file of *size* bytes at once; bytes."""
        chunk = memoryview(bytes(BUFFER))
        with select.epoll() as poll:
            connections = self._connections(poll, select.EPOLLOUT, lambda number: f"STOR up/{number}")
            left = dict.fromkeys(connections, size)
            while connections:
                for descriptor, _ in _ready(poll):
                    left[descriptor] -= connections[descriptor].send(chunk[: left[descriptor]])
                    if not left[descriptor]:
                        poll.unregister(descriptor)
                        connections.pop(descriptor).close()
        self._completed()
        return size * len(self._sessions)

    def _connections(
        self, poll: select.epoll, event: int, line: Callable[[int], str]
    ) -> dict[int, socket.socket]:
        """A data connection for each session, on which what *line* says has begun or soon will."""
        connections = {}
        for number, session in enumerate(self._sessions):
            data = session.data()
            data.setblocking(False)
            session.sock.sendall(f"{line(number)}\r\n".encode())
            connections[data.fileno()] = data
        for descriptor in connections:
            poll.register(descriptor, event)
        return connections

    def _completed(self) -> None:
        for session in self._sessions:
            session.reply("1")
            session.reply("226")

    # --- a web application beside transfers

    def busy(self, name: str, size: int, seconds: float) -> float:
        """RETR by all sessions, for at least so many *seconds*; bytes. Gives way to who asks the web page."""
        os.setpriority(os.PRIO_PROCESS, 0, 19)
        end, count = time.monotonic() + seconds, 0.0
        while time.monotonic() < end:
            count += self.retr_all(name, size)
        return count

    def web(self, port: int, seconds: float) -> list[float]:
        """Ask the web application for its page, one connection each; the seconds that each answer took."""
        end, answers = time.monotonic() + seconds, []
        while time.monotonic() < end:
            start, page = time.perf_counter(), b""
            with socket.create_connection((self.host, port), PATIENCE) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                while received := sock.recv(4096):
                    page += received
            answers.append(time.perf_counter() - start)
            if not page.endswith(b"page"):
                raise Unexpected(f"{page[:80]!r} instead of the page")
            time.sleep(PAUSE)
        return answers


def _ready(poll: select.epoll) -> list[tuple[int, int]]:
    return poll.poll(PATIENCE) or _hangs()


def _hangs() -> list[tuple[int, int]]:
    raise Unexpected(f"nothing for {PATIENCE:g} s")


def _expect(got: int, expected: int) -> None:
    if got != expected:
        raise Unexpected(f"got {got}, not {expected}")


def main() -> None:
    """Do the jobs that come."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("user")
    parser.add_argument("--tls", action="store_true", help="AUTH TLS and PROT P")
    parser.add_argument("--implicit-tls", action="store_true", help="from the first byte on")
    load = Load(parser.parse_args())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        start = time.perf_counter()
        try:
            answer = {"units": getattr(load, name)(*arguments), "seconds": time.perf_counter() - start}
        except Exception as error:  # whatever it is: the table says so
            answer = {"failed": f"{name}: {str(error) or type(error).__name__}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
