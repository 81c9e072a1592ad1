"""System calls that fail: in every kind that the command makes, with every error that it can have.

    pytest tests/proof/test_faults.py [--proof | --long]

strace (injecting.py) is attached to a running `python -m bridge.ftp` and makes one call fail, the first, the
second, ... of its kind, or several in a row (a storm), while clients (fault_clients.py) log in, transfer
files and change them. What holds whatever fails:

- The server lives: when strace has left, a new session transfers a file there and back.
- Others do not notice: a session that is idle, one that downloads and one that uploads go on.
- Replies are true: 226 is for what is all there, an upload that was refused has left nothing.
- Every client hears something; the session goes on, unless the call was one of its own control connection.
- No descriptor is left, nothing spins, and nothing is logged as a traceback.
- No path leads out of the home, by a link that cannot be looked at either.

A fault that hits nothing fails the test. With `-s`, or when a test fails: what was injected and what the
client saw. The short form has one fault for each kind of call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge.users.file import Hash
from proof.fault_clients import CONTENT, OLD, SOURCE, Bystander, Client, Victim
from proof.injecting import Call, Tracer, unavailable
from support.cli import LIMIT, Command, certificate
from support.effort import Effort

pytestmark = pytest.mark.program

#: Calls in a row that a storm makes fail. The listener's rests add up to 0.3 s.
STORM = 5


@dataclass(frozen=True)
class Fault:
    """A kind of call that can fail."""

    call: str
    #: With these errors, the likeliest first.
    errors: str
    #: In which of the scripts of fault_clients.py.
    script: str = "transfers"
    #: What strace must print of those that are made to fail.
    only: str = ""
    #: Only those, of whatever thread, that have to do with this file.
    path: str = ""
    #: Of which servers (OPTIONS); the short form has the first.
    servers: str = "users"

    @property
    def varies(self) -> bool:
        """Whether there may be half as many of these calls the next time."""
        return self.script.startswith("tls") or self.call == "epoll_wait"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.call, self.script, Path(self.path).name)))


SOCKET = r"^\d+<TCP"
#: Any record of TLS.
RECORD = r'^\d+<TCP[^,]*, "\\'
#: TLS's application data, 16 KiB: a data connection.
FULL_RECORD = r"^\d+<TCP.*\\27\\3\\3@\\21"
FILE = r"^\d+</[^>]*/srv/"

FAULTS = [
    Fault("accept4", "EMFILE ENFILE ECONNABORTED EAGAIN EINTR ENOBUFS ENOMEM EPROTO", servers="users plain"),
    Fault("recvfrom", "ECONNRESET ETIMEDOUT EAGAIN EINTR EHOSTUNREACH", servers="users plain"),
    Fault("sendto", "EPIPE ECONNRESET ETIMEDOUT EAGAIN EINTR EHOSTUNREACH", servers="users plain"),
    Fault("sendfile", "EPIPE EIO ECONNRESET EAGAIN EINTR EINVAL ENOMEM", servers="users plain"),
    Fault("splice", "ECONNRESET ETIMEDOUT EAGAIN EINTR EINVAL EHOSTUNREACH", only=SOCKET, servers="plain"),
    Fault("splice", "ENOSPC EIO EDQUOT EFBIG EINTR EINVAL ENOMEM", only=r"^\d+<pipe", servers="plain"),
    Fault("pipe2", "EMFILE ENFILE", servers="plain"),
    # Over TLS, how many calls there are differs from run to run: so one script reads sockets only, and
    # the other writes to sockets only.
    Fault("read", "ECONNRESET EAGAIN EINTR ETIMEDOUT", "tls-up", SOCKET),
    Fault("write", "EPIPE ECONNRESET ETIMEDOUT", "tls-down", SOCKET),
    # (Before TLS's goodbye pyftpdlib writes nothing, to see if the client is there: no kernel says EAGAIN.)
    Fault("write", "EAGAIN EINTR", "tls-down", RECORD),
    Fault("write", "EPIPE ETIMEDOUT", "tls-down", FULL_RECORD),
    Fault("read", "EIO ESTALE EINTR", "tls-down", path="srv/ada/source"),
    Fault("write", "ENOSPC EIO EDQUOT EFBIG EINTR", only=FILE),
    Fault("write", "ENOSPC EIO EDQUOT EINTR", "files", path="log"),
    Fault("openat", "EMFILE ENFILE EIO ENOSPC EACCES EROFS EINTR ENOMEM", servers="users plain"),
    Fault("openat", "EMFILE EIO EACCES EROFS", "files"),
    # What is closed is closed, but strace cannot have a call made and fail. So only where NFS tells errors.
    Fault("close", "EIO ENOSPC EDQUOT EINTR", only=r"\.upload~>"),
    Fault("fcntl", "EMFILE", "transfers", "F_DUPFD"),
    Fault("flock", "ENOLCK EIO EINTR"),
    Fault("rename", "EIO ENOSPC EROFS EACCES", servers="users plain"),
    Fault("renameat", "EIO ENOSPC EROFS EACCES EXDEV", "files"),
    Fault("unlinkat", "EIO EROFS EACCES EBUSY", "files"),
    Fault("mkdirat", "ENOSPC EIO EROFS EDQUOT", "files"),
    Fault("newfstatat", "EIO ENOMEM ESTALE"),
    Fault("newfstatat", "EIO EACCES ENOMEM ESTALE", "files"),
    Fault("readlink", "EIO ENOMEM ESTALE"),
    Fault("getdents64", "EIO ENOMEM ESTALE"),
    Fault("lseek", "EIO", "transfers", FILE),
    Fault("socket", "EMFILE ENFILE ENOBUFS ENOMEM"),
    Fault("bind", "EADDRINUSE ENOBUFS ENOMEM"),
    Fault("listen", "EADDRINUSE ENOMEM"),
    Fault("connect", "ECONNREFUSED ETIMEDOUT ENETUNREACH EHOSTUNREACH EADDRNOTAVAIL EINTR EACCES"),
    Fault("setsockopt", "ENOBUFS EINVAL ENOMEM"),
    Fault("getsockopt", "ENOBUFS"),
    Fault("getsockname", "ENOBUFS"),
    Fault("getpeername", "ENOTCONN"),
    Fault("epoll_ctl", "ENOSPC ENOMEM"),
    Fault("epoll_wait", "EINTR"),
]

#: All of them, for strace.
CALLS = ",".join(dict.fromkeys(fault.call for fault in FAULTS))


class Target:
    """A running server, its bystanders, and what it was like before."""

    def __init__(self, server: Command, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.home = directory / "srv" / "ada"
        self._process = psutil.Process(server.pid)
        self._log = open(directory / "log")  # noqa: SIM115 (closed by close)
        self._checks = 0
        self._calls: dict[str, list[Call]] = {}
        self.bystander = Bystander(server.port, self.home)
        self.run("transfers")
        self.check()
        self._settle()
        self._descriptors = self._process.num_fds()

    def close(self) -> None:
        self.bystander.close()
        self._log.close()

    def _settle(self) -> None:
        """Wait until the bystander's download fills all buffers that it can."""
        same, unread = 0, -1
        while same < 30:
            before, unread = unread, self.bystander.unread()
            same = same + 1 if self._rests() and unread == before else 0

    # --- one fault

    def run(self, script: str) -> Victim:
        for name in ("new", "appended"):
            (self.home / name).unlink(missing_ok=True)
        shutil.rmtree(self.home / "d", ignore_errors=True)
        (self.home / "old").write_bytes(OLD)
        (self.home / "source").write_bytes(SOURCE)
        victim = Victim(self.server.port, self.home)
        victim.run(script)
        return victim

    def trace(self, fault: Fault, inject: str = "") -> tuple[Victim, Tracer]:
        log, path = self.directory / "strace", self.directory / fault.path if fault.path else None
        with Tracer(self.server.pid, log, fault.call, inject, path) as tracer:
            victim = self.run(fault.script)
            if fault.path == "log":  # by a thread of its own, at its leisure
                eventually(lambda: f"{fault.call}(" in log.read_text(), "nothing is logged")
        return victim, tracer

    def calls(self, fault: Fault) -> list[Call]:
        """Of its kind, those that its script makes while nothing fails."""
        if fault.path:
            return self._undisturbed(fault)
        if fault.script not in self._calls:
            of_all = replace(fault, call=CALLS)
            self._undisturbed(of_all)  # the first time there is more to do
            self._calls[fault.script] = self._undisturbed(of_all)
        return [call for call in self._calls[fault.script] if call.name == fault.call]

    def _undisturbed(self, fault: Fault) -> list[Call]:
        victim, tracer = self.trace(fault)
        assert not victim.refused(), victim.steps
        return tracer.calls

    def check(self) -> str:
        """The server works as before and is as before; what it has logged since the last check."""
        self._checks += 1
        with_it = f"check{self._checks}"
        client = Client(self.server.port)
        try:
            assert client.reply() == "220"
            client.log_in()
            assert client.command("TYPE I") == "200"
            data = client.data()
            assert data is not None
            assert client.command(f"STOR {with_it}")[0] == "1"
            data.sendall(CONTENT)
            data.close()
            assert client.reply() == "226"
            data = client.data()
            assert data is not None
            assert client.command(f"RETR {with_it}")[0] == "1"
            with data, data.makefile("rb") as file:
                assert file.read() == CONTENT
            assert client.reply() == "226"
            assert client.command(f"DELE {with_it}") == "250"
            assert client.command("QUIT") == "221"
        finally:
            client.close()
        self.bystander.go_on()
        return self._logged(rf"DELE .*/{with_it} 250")

    def _logged(self, last: str) -> str:
        """What was logged since, up to the line *last*."""
        text = ""

        def found() -> bool:
            nonlocal text
            text += self._log.read()
            return re.search(last, text) is not None

        eventually(found, f"no {last!r} in the log")
        return text

    def is_as_before(self, more: int = 0) -> None:
        """As many descriptors, and nothing to do; *more* descriptors that a fault has kept open."""
        self._descriptors += more
        eventually(
            lambda: self._process.num_fds() == self._descriptors,
            f"not {self._descriptors} descriptors any more",
            lambda: "\n".join(os.readlink(each) for each in Path(f"/proc/{self.server.pid}/fd").iterdir()),
        )
        eventually(self._rests, "never rests")

    def _rests(self) -> bool:
        """Whether the hub's thread has not run in 10 ms. (It looks at the users' file every 2 s.)"""
        before = self._ran()
        time.sleep(0.01)
        return self._ran() == before

    def _ran(self) -> str:
        """For how many nanoseconds the hub's thread has run."""
        return Path(f"/proc/{self.server.pid}/schedstat").read_text().split()[0]


def eventually(condition: Callable[[], bool], otherwise: str, details: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise}\n{details()}"
        time.sleep(0.001)


OPTIONS = {
    "users": ("-d", "srv", "--users", "users", "--tls", "--certfile", "certificate.pem", "--hash"),
    # Without TLS and accounts, uploads are spliced.
    "plain": ("-d", "srv/ada", "-w", "-u", "ada", "-P", "p", "--hash"),
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """A server for each of OPTIONS."""
    pytest.importorskip("OpenSSL")
    reason = unavailable(tmp_path_factory.mktemp("probe"))
    if reason:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        targets = {
            name: stack.enter_context(serving(tmp_path_factory.mktemp(name), name)) for name in OPTIONS
        }
        yield targets
        for target in targets.values():
            target.bystander.end()


@contextlib.contextmanager
def serving(directory: Path, name: str) -> Iterator[Target]:
    with command(directory, name) as server, contextlib.closing(Target(server, directory)) as target:
        yield target


@contextlib.contextmanager
def command(directory: Path, name: str) -> Iterator[Command]:
    (directory / "srv" / "ada").mkdir(parents=True)
    cost = {"n": 1 << 4, "r": 1, "p": 1}
    cheap = Hash(4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"p", salt=b"0123456789abcdef", **cost))
    (directory / "users").touch(0o600)
    (directory / "users").write_text(f"ada:{cheap}:ada:write:\n")
    certificate(directory)
    # Bystanders rest for longer than anybody may; and on a machine with much else to do the hub is blocked
    # for longer than the monitor allows.
    options = ("--atomic-uploads", "--log-file", "log", "--timeout", "0", "--max-blocking-time", "0")
    with pytest.MonkeyPatch.context() as environment:
        # Nobody watches for blocks (conftest.py): who does makes calls, too, and what is traced stops at each
        # call until strace has looked at it.
        environment.delenv("BRIDGE_TEST_BLOCKS", raising=False)
        server = Command(*OPTIONS[name], *options, directory=directory)
    with server:
        yield server
        assert "Traceback" not in server.output, server.output


def times(numbers: list[int], effort: Effort, storms: bool) -> list[str]:
    """Which of the calls *numbers* are to fail: strace's `when`."""
    if effort == "short":
        return [str(numbers[0])]
    if effort == "proof":
        third = len(numbers) // 3
        singles = dict.fromkeys(str(numbers[each]) for each in (0, third, 2 * third))
        return [*singles, *([storm(numbers[0])] if storms else [])]
    # How many there are differs by a few from run to run (TLS, most of all), so the last ones may not come.
    numbers = numbers[: max(1, len(numbers) * 9 // 10)]
    return [*map(str, numbers), *(map(storm, numbers) if storms else [])]


def storm(number: int) -> str:
    return f"{number}..{number + STORM - 1}"


def earlier(when: str) -> str:
    """Half of the way to *when*."""
    first, *rest = when.split("..")
    number = max(1, int(first) // 2)
    return storm(number) if rest else str(number)


def fail(target: Target, fault: Fault, error: str, when: str) -> None:
    """Make it fail; all that must be true then."""
    victim, tracer = target.trace(fault, f"error={error}:when={when}")
    while not tracer.hits and fault.varies and when != earlier(when):
        when = earlier(when)
        victim, tracer = target.trace(fault, f"error={error}:when={when}")
    hits = [call.target(target.server.port) for call in tracer.hits]
    came = f"{fault.call} {error} {when}: {len(hits)} failed ({', '.join(dict.fromkeys(hits))}); "
    came += ", ".join(victim.refused()) or ("the end of the session" if victim.lost else "nobody noticed")
    print(came, flush=True)
    assert hits, f"nothing was hit in {len(tracer.calls)} calls: {came}"
    log = target.check()
    target.is_as_before(len(hits) if fault.call == "close" else 0)
    assert not victim.lost or "control" in hits, f"the session ended: {came}\n{victim.steps}"
    left = [each.name for each in target.home.iterdir() if re.match(r"\.(new|old|appended)\.", each.name)]
    assert not left, f"{left} are left: {came}"
    assert "Traceback" not in log, f"{came}\n{log}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    short = not (option.proof or option.long)
    if "fault" in metafunc.fixturenames:
        cases = [
            pytest.param(server, fault, id=f"{server}-{fault}")
            for server in OPTIONS
            for fault in FAULTS
            if server in (fault.servers.split()[:1] if short else fault.servers.split())
        ]
        metafunc.parametrize(("server", "fault"), cases)
    elif "no_thread" in metafunc.fixturenames:
        metafunc.parametrize("no_thread", ["EAGAIN"] if short else ["EAGAIN", "ENOMEM"])


def test_a_call_that_fails(
    targets: dict[str, Target], server: str, fault: Fault, effort: Effort, request: pytest.FixtureRequest
) -> None:
    watchdog: Any = request.getfixturevalue("_watchdog")
    target = targets[server]
    calls = target.calls(fault)
    numbers = [number for number, call in enumerate(calls, 1) if re.search(fault.only, call.text)]
    assert numbers, f"no such call in {len(calls)}"
    if fault.path == "log":  # how many lines are written at once depends on time
        del numbers[1:]
    for error in fault.errors.split()[: 1 if effort == "short" else None]:
        for when in times(numbers, effort, storms=not fault.only):  # which would hit others, too
            watchdog.test(f"{server} {fault} {error} {when}")  # which has its time for itself
            fail(target, fault, error, when)


#: Of what is behind a link out of the home.
OUTSIDE = (
    *("RETR out/secret", "STOR out/new", "STOU out/new", "APPE out/secret", "DELE out/secret", "MKD out/new"),
    *("RNFR out/secret", "SIZE out/secret", "MDTM out/secret", "MLST out/secret", "STAT out/secret"),
    *("SITE CHMOD 777 out/secret", "MFMT 20200101000000 out/secret", "XMD5 out/secret"),
    *("NLST out", "LIST out", "MLSD out", "CWD out", "RMD out"),
)


@pytest.mark.parametrize("call", ["newfstatat", "readlink"])
@pytest.mark.parametrize("server", OPTIONS)
def test_no_link_leads_out(targets: dict[str, Target], server: str, call: str, effort: Effort) -> None:
    """Though the server cannot find out that it is one: all calls about the link itself fail."""
    target = targets[server]
    outside, link = target.directory / "outside", target.home / "out"
    outside.mkdir(exist_ok=True)
    (outside / "secret").write_bytes(b"secret")
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    before = (outside / "secret").stat()
    changes = ("st_mode", "st_size", "st_mtime_ns", "st_ctime_ns")
    for error in ("EIO", "ESTALE", "ENOMEM", "EACCES")[: 1 if effort == "short" else None]:
        client = Client(target.server.port)
        with contextlib.closing(client):
            assert client.reply() == "220"
            client.log_in()
            log = target.directory / "strace"
            with Tracer(target.server.pid, log, call, f"error={error}", link) as tracer:
                replies = {command: client.command(command) for command in OUTSIDE}
        print(f"{call} {error}: {len(tracer.hits)} failed; {', '.join(map(' '.join, replies.items()))}")
        assert tracer.hits
        allowed = {command: code for command, code in replies.items() if code[0] not in "45"}
        assert not allowed, f"{call} {error}: {allowed}"
        assert os.listdir(outside) == ["secret"]
        assert all(getattr((outside / "secret").stat(), each) == getattr(before, each) for each in changes)
        assert "Traceback" not in target.check()
    link.unlink()


def test_no_thread_can_be_started(targets: object, tmp_path: Path, no_thread: str) -> None:
    """The first logins of a server, whose passwords are checked on threads: 451, and later they work."""
    with command(tmp_path, "users") as server:
        home = tmp_path / "srv" / "ada"
        for name, content in (("source", SOURCE), ("old", OLD)):
            (home / name).write_bytes(content)
        with Tracer(server.pid, tmp_path / "strace", "clone,clone3", f"error={no_thread}") as tracer:
            for _ in range(3):
                victim = Victim(server.port, home)
                victim.run("files")
                assert victim.refused() == ["PASS p 451"]
        assert len(tracer.hits) >= 3
        victim = Victim(server.port, home)
        victim.run("files")
        assert not victim.refused(), victim.steps
        assert "Traceback" not in (tmp_path / "log").read_text()
