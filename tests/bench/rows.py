"""What is measured: the rows of the tables, and how one value of a row comes about.

A Row says which work is done and in which unit; a Stand is one row of one column: a server, its client, and
what must be there before (sessions, idle or not). Sits on processes.py; __main__.py goes through the rows.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from .processes import Child, Failed, Server

#: A number of full size, and with --quick.
Amount = tuple[int, int]

#: Sizes in bytes. 256 MB take some 0.1 s of CPU time, a thousand times what asking for it costs.
SMALL, MEDIUM, BIG = 4096, (4_000_000, 200_000), (256_000_000, 2_000_000)
ENTRIES = (10_000, 200)
THOUSAND, FIVE_THOUSAND = (1_000, 20), (5_000, 50)
TEN_THOUSAND = (10_000, 50)
ALL = (100, 5)
#: Seconds nobody does anything, and that the web application is asked.
IDLE_SECONDS, WEB_SECONDS = (2, 1), (2, 1)
#: Seconds that transfers run before the web application is asked, and how much longer than that.
LEAD = 0.3
#: Seconds from start until a daemon listens.
LISTENS = 10.0


@dataclass(frozen=True)
class Row:
    """One row.

    - (str) key, title: on the command line and in the table.
    - (tuple) job: of load.Load: name and arguments; an Amount in it is a number for each size.
    - (str) unit, (float) of: what is counted, and how many units of the job that is (1e6 bytes are 1 MB).
    - (Amount) sessions, idle: opened before the measurement; those that work, and those that do nothing.
    - (bool) alone: also measured with a core for the server and one for the client.
    """

    key: str
    title: str
    job: tuple[Any, ...] = ()
    unit: str = ""
    of: float = 1
    sessions: Amount = (0, 0)
    idle: Amount = (0, 0)
    tls: bool = False
    alone: bool = True


ROWS = (
    Row("command", "command, 1 session", ("commands", (5_000, 100)), "command", sessions=(1, 1)),
    Row("command-10", "command, 10 sessions", ("commands", (10_000, 200)), "command", sessions=(10, 10)),
    Row("command-50", "command, 50 sessions", ("commands", (10_000, 200)), "command", sessions=(50, 50)),
    Row(
        "all-1000",
        "command, 1 000 sessions",
        ("commands", (20_000, 200)),
        "command",
        sessions=THOUSAND,
        alone=False,
    ),
    Row(
        "all-5000",
        "command, 5 000 sessions",
        ("commands", (20_000, 200)),
        "command",
        sessions=FIVE_THOUSAND,
        alone=False,
    ),
    Row(
        "command-1000",
        "command, 50 sessions beside 1 000 idle",
        ("commands", (5_000, 200)),
        "command",
        sessions=(50, 50),
        idle=THOUSAND,
        alone=False,
    ),
    Row(
        "command-5000",
        "command, 50 sessions beside 5 000 idle",
        ("commands", (5_000, 200)),
        "command",
        sessions=(50, 50),
        idle=FIVE_THOUSAND,
        alone=False,
    ),
    Row("login", "login, 50 at once", ("logins", (500, 50), (50, 10)), "login"),
    Row(
        "login-1000",
        "login, 50 at once beside 1 000 idle",
        ("logins", (300, 50), (50, 10)),
        "login",
        idle=THOUSAND,
        alone=False,
    ),
    Row("small", "4 KB file over EPSV", ("retr", "small", SMALL, (300, 10)), "file", SMALL, sessions=(1, 1)),
    Row("retr", "one big RETR", ("retr", "big", BIG, (1, 1)), "MB", 1e6, sessions=(1, 1)),
    Row("stor", "one big STOR", ("stor", BIG, (1, 1)), "MB", 1e6, sessions=(1, 1)),
    Row("retr-100", "100 RETR at once", ("retr_all", "medium", MEDIUM), "MB", 1e6, sessions=ALL),
    Row("stor-100", "100 STOR at once", ("stor_all", MEDIUM), "MB", 1e6, sessions=ALL),
    Row("tls-retr", "FTPS RETR", ("retr", "big", BIG, (1, 1)), "MB", 1e6, sessions=(1, 1), tls=True),
    Row("tls-stor", "FTPS STOR", ("stor", BIG, (1, 1)), "MB", 1e6, sessions=(1, 1), tls=True),
    Row("tls-login", "TLS login", ("logins_in_turn", (100, 5)), "login", tls=True),
    Row("list", "LIST of 10 000 entries", ("listing", "many", ENTRIES, (2, 1)), "entry", sessions=(1, 1)),
    Row("memory", "memory of an idle session, kB", idle=THOUSAND, alone=False),
    Row("idle", "CPU in 1 s with 1 000 idle sessions, ms", idle=THOUSAND, alone=False),
    Row("idle-10000", "CPU in 1 s with 10 000 idle sessions, ms", idle=TEN_THOUSAND, alone=False),
    Row("web", "pywsgi beside 50 RETR", sessions=(50, 5), alone=False),
)


def make_home(home: Path, quick: bool) -> None:
    """The files that are served; whoever the server's user is may write to up/."""
    home.chmod(0o755)
    Path(home, "up").mkdir()
    Path(home, "up").chmod(0o777)
    many = Path(home, "many")
    many.mkdir()
    for number in range(ENTRIES[quick]):
        Path(many, f"file-{number:05}.txt").touch()
    for name, size in (("small", SMALL), ("medium", MEDIUM[quick]), ("big", BIG[quick])):
        Path(home, name).write_bytes(bytes(size))


class Stand:
    """One row of one column, ready for its rounds. Raises CannotRun or Failed, like all its methods."""

    def __init__(
        self, row: Row, column: str, home: Path, host: str, cores: tuple[int, int], tls: str, quick: bool
    ) -> None:
        self._row, self._home, self._cores, self._quick = row, home, cores, quick
        self._arguments = column, home, host, cores[0], tls if row.tls else None, row.key == "web"
        self._clients: list[Child] = []
        self._work = tempfile.TemporaryDirectory(prefix="bench-")
        self._host = host
        self._server: Server | None = None
        try:
            if row.key != "memory":  # which starts one for each round
                self._ready(self._start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._work.cleanup()

    def _start(self) -> Server:
        """A server with a client."""
        server = self._server = Server(*self._arguments)
        end = time.monotonic() + LISTENS
        while True:
            try:
                socket.create_connection((self._host, server.facts["port"]), 1).close()
                break
            except OSError as error:
                if server.ended() or time.monotonic() > end:
                    raise Failed(f"does not listen: {server.last_words()}") from error
                time.sleep(0.02)
        self._client()
        return server

    def _client(self) -> Child:
        assert self._server is not None
        facts = self._server.facts
        options = ["--tls"] if self._row.tls else []
        options += ["--implicit-tls"] if facts.get("implicit_tls") else []
        client = Child("load", self._host, str(facts["port"]), facts["user"], *options, work=self._work.name)
        self._clients.append(client)
        client.pin(self._cores[0])
        return client

    def _ready(self, server: Server) -> None:
        """Open what the row needs, and do a little of its work: then all code has run."""
        self._do("hold", self._row.idle[self._quick])
        self._do("open", self._row.sessions[self._quick])
        self._children = server.children()
        if self._row.job:
            self._do(*self._job(quick=True, real=self._job(self._quick)))

    def _do(self, *job: Any) -> dict[str, Any]:
        """Have the first client do a job."""
        self._clients[0].tell(*job)
        try:
            return self._clients[0].hear()
        finally:
            for upload in Path(self._home, "up").iterdir():
                upload.unlink()  # here, since the next server may have another user

    def _job(self, quick: bool, real: list[Any] | None = None) -> list[Any]:
        """The row's job with its amounts. The files have their *real* sizes also when little is asked."""
        job = [each[quick] if isinstance(each, tuple) else each for each in self._row.job]
        if real is not None and job[0] in ("retr", "retr_all", "listing"):
            job[2] = real[2]
        return job

    # --- a round

    def pause(self) -> None:
        """Stop the server until its turn comes."""
        if self._server is not None:
            self._server.pause()

    def measure(self, together: bool) -> dict[str, float]:
        """One round: a value for each line of the table. *together*: server and client share a core."""
        if self._row.key == "memory":
            return self._memory()
        server = self._server
        assert server is not None
        server.resume()
        self._clients[0].pin(self._cores[0 if together else 1])
        special = {"idle": self._idle, "idle-10000": self._idle, "web": self._web}.get(self._row.key)
        if special is not None:
            return special(server)
        before = server.cpu()
        answer = self._do(*self._job(self._quick))
        server.settled(self._children)
        used = server.cpu() - before
        if server.ended():
            raise Failed(f"ended: {server.last_words()}")
        units = answer["units"] / self._row.of
        if together:
            return {f"{self._row.title}, us/{self._row.unit}": used / units * 1e6}
        return {f"{self._row.title}, {self._row.unit}/s": units / answer["seconds"]}

    def _memory(self) -> dict[str, float]:
        """A new server, since memory that was once used is kept. Some sessions come and go first."""
        server = self._start()
        try:
            self._do("logins", 50, 10)
            server.settled()
            before = server.memory()
            count = self._do("hold", self._row.idle[self._quick])["units"]
            after = server.memory()
            self._do("alive")
            return {self._row.title: (after - before) / count / 1000}
        finally:
            for client in self._clients:
                client.close()
            self._clients.clear()
            server.close()
            self._server = None

    def _idle(self, server: Server) -> dict[str, float]:
        seconds, before = IDLE_SECONDS[self._quick], server.cpu()
        time.sleep(seconds)
        used = server.cpu() - before
        self._do("alive")
        return {self._row.title: used / seconds * 1000}

    def _web(self, server: Server) -> dict[str, float]:
        """Transfers and questions from the other core; the one who transfers has the lowest priority."""
        transfers = self._clients[0]
        questions = self._clients[1] if len(self._clients) > 1 else self._client()
        for client in (transfers, questions):
            client.pin(self._cores[1])
        seconds = WEB_SECONDS[self._quick]
        transfers.tell("busy", "medium", MEDIUM[self._quick], seconds + 2 * LEAD)
        time.sleep(LEAD)
        questions.tell("web", server.facts["web"], seconds)
        answers = questions.hear()["units"]
        transferred = transfers.hear()
        hundredths = quantiles(answers, n=100, method="inclusive")
        return {
            f"{self._row.title}: p50 of an answer, ms": hundredths[49] * 1000,
            f"{self._row.title}: p99 of an answer, ms": hundredths[98] * 1000,
            f"{self._row.title}: transferred meanwhile, MB/s": transferred["units"]
            / 1e6
            / transferred["seconds"],
        }


def enough_space(directory: Path) -> bool:
    """Whether files of these sizes, and uploads, fit in there."""
    return shutil.disk_usage(directory).free > 2 * BIG[0] + ALL[0] * MEDIUM[0] + 100_000_000
