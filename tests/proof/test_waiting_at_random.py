"""A program that waits, raises and is killed anywhere: sessions keep their order, and leave others alone.

Hypothesis makes up what up to three clients do at the same time, and a seed. From that waits.py knows what
each call does that pyftpdlib makes of the program (authorizer, file system, files, callbacks): it waits for a
timer, another greenlet or another session, raises, or its turn is killed, times out or is disconnected, in
the middle and while it ends. Beside them a witness, whose calls only wait, does always the same. Then:

- a session has one turn at a time, in the order of its commands, and none after its `on_disconnect`;
- every command has a legal reply (legal.py), or the session ends, with a 421 if the program did not raise;
- the witness hears the same, to the byte, as without the others;
- all comes to its end; a hub whose sessions wait does not spin; nothing is left; no other error is logged.

With GeventFTPServer, as the command serves it, and with pyftpdlib's FTPServer on GeventIOLoop.

A failure prints the clients, the seed, and what was said. `--hypothesis-seed` repeats a run of --proof.

(Over 400 lines: the clients, the two servers and what must hold of both are read together.)
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import hypothesis.strategies as st
import psutil
import pytest
from gevent.event import Event
from hypothesis import HealthCheck, Phase, given, settings
from pyftpdlib.handlers import FTPHandler

from bridge.filesystems.threads import THREADS
from bridge.session.data import REPLY_CODES
from bridge.users.authorizer import PASSWORD_THREADS
from proof.driver import LATE, TRANSFERS, Driver, Illegal, Reply
from proof.grammar import NAMES
from proof.legal import GOING, first_codes, name_of
from proof.sequences import no_more
from proof.served import fill, served
from proof.tree import Tree
from proof.waits import MARK, WITNESS, Hooks, Mischief, Seen
from support.effort import Effort
from support.servers import Client, eventually, handler_class, serving, users

_this = psutil.Process()

#: Clients at once, beside the witness.
CLIENTS = 3
#: Of the calls for one client, how many fail.
RATES = (0.0, 0.01, 0.04, 0.15)

#: Seconds in which a hub with nothing to do is watched, and the passes it may make then. A spin makes
#: thousands; a timer of pyftpdlib's or of a channel that rests makes one.
SPAN, SPIN = 0.01, 30


#: What an error of the program may be to the client, whatever the command: pyftpdlib's, and bridge's.
FAILURES = {450, 550, *map(int, REPLY_CODES.values())}

# --- what clients do

Step = tuple[Any, ...]

names = st.sampled_from(NAMES)
_bare = b"CDUP FEAT LIST MLSD NLST NOOP PWD REIN STAT STOU SYST ABOR EPSV PASV".split()
_formed = [b"TYPE A", b"TYPE I", b"REST 3", b"USER u", b"USER nobody", b"PASS p", b"PASS wrong", b"CWD /"]
_formed += [b"MFMT 20200101000000 a", b"SITE CHMOD 644 a", b"XPWD", b"ALLO 10", b"QUERY"]
_pathed = b"APPE CWD DELE LIST MDTM MKD MLSD MLST NLST RETR RMD RNFR RNTO SIZE STAT STOR STOU".split()
lines = st.one_of(
    st.sampled_from(_bare),
    st.sampled_from(_formed),
    st.builds(lambda name, path: name + b" " + path, st.sampled_from(_pathed), names),
)
#: What is uploaded, and how often: nothing, one packet, several blocks.
contents, times = st.sampled_from([b"z", b"\r\n", b"\x00\xff\r"]), st.sampled_from([0, 1, 70_000])
endings = st.sampled_from(["close", "read", "read", "half", "reset"])


def in_order(line: bytes) -> bool:
    """Whether it may come at any time: pyftpdlib mixes transfers up (see bridge.session.control)."""
    return name_of(line) not in TRANSFERS | {"ABOR", "USER", "REIN"}


def clients_of(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[tuple[float, list[Step]]]]:
    """Clients that send *lines* in whatever order, and what else may happen to a session."""
    steps: st.SearchStrategy[Step] = st.one_of(
        st.tuples(
            st.just("say"),
            st.lists(lines, min_size=1, max_size=6),
            st.lists(st.integers(0, 200), max_size=3),
        ),
        st.tuples(st.just("upload"), st.sampled_from([b"STOR ", b"APPE "]), names, contents, times, endings),
        st.tuples(
            st.just("download"),
            st.sampled_from([b"RETR a", b"RETR dir/c", b"LIST", b"MLSD dir", b"NLST", b"STAT dir"]),
            endings,
        ),
        st.tuples(st.just("active"), st.sampled_from([b"PORT %s", b"EPRT %s"])),
        st.tuples(
            st.just("hang_up"),
            st.sampled_from(["quit", "close", "reset"]),
            st.sampled_from([b"", b"STOR a"]),
        ),
    )
    client = st.tuples(st.sampled_from(RATES), st.lists(steps, min_size=1, max_size=6))
    return st.lists(client, min_size=1, max_size=CLIENTS)


class AnyTree(Tree):
    """Of files nothing is said here."""

    def make_directory(self, path: str) -> None:
        pass

    def remove(self, path: str) -> None:
        pass

    def rename(self, old: str, new: str) -> None:
        pass


class Victim(Driver):
    """A session whose calls may fail; *mischief* knows whether they did."""

    def __init__(self, address: tuple[str, int], source: str, mischief: Mischief) -> None:
        self.mischief = mischief
        self.seen: Seen | None = None
        self.fences: list[str] = []
        super().__init__(address, AnyTree(), source)

    def expect(self, reply: Reply | None, codes: set[int]) -> Reply:
        if codes == GOING and reply is not None and reply[0] in FAILURES and self.has_failed():
            self.sock.shutdown(socket.SHUT_RDWR)  # QUIT was refused: the client goes all the same
            return reply
        if codes != {220}:
            return super().expect(reply, codes)
        self.seen = self.mischief.of(*self.sock.getsockname()[:2])
        if reply is None or reply[0] == 421:
            self.ended = True
            self.check_end(b"(connect)")
            return 421, ""
        return super().expect(reply, codes)

    def reply(self) -> Reply | None:
        try:
            return super().reply()
        except Illegal as error:  # STAT's listing is sent line by line
            if "within a reply" not in str(error) or self.seen is None or not self.seen.faults:
                raise
            self.ended = True
            return None

    def until(self, fence: bytes) -> list[Reply]:
        self.fences.append(fence.decode())
        return super().until(fence)

    def understand(self, line: bytes, replies: list[Reply]) -> None:
        if self.ended:
            replies = [each for each in replies if each[0] not in GOING]
        if self.seen is not None and "abort" in self.seen.faults:
            replies = self.without_aborts(line, replies)
        if self.has_failed() and self.takes_failure(line, replies):
            return
        super().understand(line, replies)

    def takes_failure(self, line: bytes, replies: list[Reply]) -> bool:
        """Whether one of *replies* is an error of the program, and the command's; the others were owed."""
        if any(code in first_codes(line) for code, _ in replies) or (name_of(line) in LATE and self.owed):
            return False
        for index, (code, _) in enumerate(replies):
            others = [*replies[:index], *replies[index + 1 :]]
            if code in FAILURES and self.all_owed(others):
                self.settle(others)
                return True
        return False

    def all_owed(self, replies: list[Reply], transfer: set[int] | None = None) -> bool:
        return super().all_owed([each for each in replies if each[0] not in GOING], transfer)

    def settle(self, replies: list[Reply]) -> None:
        super().settle([each for each in replies if each[0] not in GOING])  # the end comes next

    def without_aborts(self, line: bytes, replies: list[Reply]) -> list[Reply]:
        """What tells that `abort_transfer` has ended a command's turn becomes what every command may have."""
        begun = "transfer" in self.owed or any(code in (125, 150) for code, _ in replies)
        aborts = [index for index, (_, text) in enumerate(replies) if text == f"426 {MARK}"]
        if name_of(line) not in TRANSFERS or (begun and len(aborts) < 2):
            aborts = []  # that of the transfer before; of two, the first is the command's
        own = {*aborts[:1], *(index for index, (_, text) in enumerate(replies) if text == f"451 {MARK}")}
        return [(500 if index in own else code, text) for index, (code, text) in enumerate(replies)]

    def check_end(self, line: bytes) -> None:
        """Without a word only if the program has raised."""
        if not self.has_failed():
            super().check_end(line)

    def has_failed(self) -> bool:
        """Whether the program has raised what it may raise."""
        return self.seen is not None and "error" in self.seen.faults

    def succeeded(self, name: str, argument: str, path: str, text: str) -> None:
        if name != "RNTO":  # what it renames depends on what has failed
            super().succeeded(name, argument, path, text)

    def close(self) -> None:
        self.close_data()
        self.close_control()


class Player:
    """Does a client's steps, in as many sessions as it takes."""

    def __init__(self, address: tuple[str, int], source: str, mischief: Mischief) -> None:
        self.address, self.source, self.mischief = address, source, mischief
        self.sessions: list[Victim] = []

    @property
    def session(self) -> Victim:
        if not self.sessions or self.sessions[-1].ended:
            if self.sessions:
                self.sessions[-1].close()
            session = Victim(self.address, self.source, self.mischief)
            self.sessions.append(session)
            if not session.ended:
                session.log_in()
        return self.sessions[-1]

    def play(self, steps: list[Step]) -> None:
        for name, *arguments in steps:
            getattr(self, name)(*arguments)

    def say(self, lines: list[bytes], cuts: list[int]) -> None:
        self.session.say(lines, cuts)

    def upload(self, command: bytes, name: bytes, content: bytes, times: int, how: str) -> None:
        session = self.session
        self.transfer(session, command + name, lambda: session.send_data(content * times), how)

    def download(self, line: bytes, how: str) -> None:
        self.transfer(self.session, line, lambda: None, how)

    def transfer(self, session: Victim, line: bytes, send: Callable[[], None], how: str) -> None:
        for act in (
            lambda: session.say([b"EPSV"]),
            session.connect,
            lambda: session.say([line]),
            send,
            lambda: session.end_data(how),
            lambda: session.next_owed("transfer"),
        ):
            if not session.ended:
                act()

    def active(self, line: bytes) -> None:
        self.session.active(line)

    def hang_up(self, how: str, partial: bytes) -> None:
        if self.sessions and not self.sessions[-1].ended:
            self.sessions[-1].hang_up(how, partial)

    def story(self) -> str:
        return "\n\n".join(f"{self.source}\n{each.story()}" for each in self.sessions)


def witness(address: Any) -> list[Any]:
    """What a client hears who always does the same."""
    server = type("Server", (), {"address": address})
    heard: list[Any] = []

    def command(line: str, code: str = "") -> None:
        heard.append((line, client.command(line, code)))

    with Client(server) as client:
        for line in ("TYPE I", "CWD witness", "PWD", "MKD made", "RNFR made", "RNTO moved", "NOOP"):
            command(line)
        for content in (b"", b"some of it\r\n" * 7000, b"short"):
            heard.append(client.store("file", content))
            heard.append(client.retrieve("file") == content)
            command("SIZE file")
        with client.data() as data:
            client.command("NLST", "1")
            heard.append(sorted(data.makefile("rb").read().split()))
        heard.append(client.reply())
        for line in ("DELE nothing", "DELE file", "RMD moved", "PASS p", "BAD", "CWD /", "QUIT"):
            command(line)
        client.ended()
    return heard


# --- servers


class Target:
    """A server to be abused: its `address`, its `ioloop`, what it logs."""

    def __init__(self, server: Any, hooks: Hooks, home: Path, log: Callable[[], str]) -> None:
        self.server, self.hooks, self.home, self.log = server, hooks, home, log
        self.address = server.address[:2]
        self.ioloop = server.ioloop
        #: How often a session did something while another waited, and waited for what did not come.
        self.interleaved = self.held = 0
        self.failure: AssertionError | None = None

    def resources(self) -> Any:
        ended = [call for call in self.ioloop.sched._tasks if not call.cancelled]
        return _this.num_fds(), len(self.ioloop.socket_map), self.ioloop.turns_waiting, len(ended)

    def at_rest(self) -> bool:
        return not self.ioloop.turns_waiting and len(self.ioloop.socket_map) == 1

    def alive(self) -> bool:
        runner = getattr(self.server, "runner", None)
        return bool(runner) if runner is not None else bool(self.server.started)

    def fill(self) -> None:
        fill(self.home)
        (self.home / "witness").mkdir()


@contextlib.contextmanager
def ours(directory: Path) -> Iterator[Target]:
    """What the command serves."""
    hooks = Hooks()

    def change(site: Any) -> None:
        site.base = hooks.handler(site.base)
        site.authorizer = hooks.authorizer(site.authorizer)
        site.attributes["abstracted_fs"] = hooks.file_system(site.attributes["abstracted_fs"])
        site.attributes["permit_foreign_addresses"] = True  # data connections come from 127.0.0.1

    try:
        with served(directory, change=change) as target:
            yield Target(target.server, hooks, target.home, target.log)
    finally:
        for threads in (THREADS, PASSWORD_THREADS):
            threads.kill()


@contextlib.contextmanager
def theirs(directory: Path) -> Iterator[Target]:
    """pyftpdlib's server, handler and data connections, on our loop."""
    hooks = Hooks(careful=True)
    home = directory / "home"
    home.mkdir()
    handler = handler_class(
        hooks.authorizer(users(home)),
        hooks.handler(FTPHandler),
        abstracted_fs=hooks.file_system(FTPHandler.abstracted_fs),
        permit_foreign_addresses=True,
        auth_failed_timeout=0.0,
    )
    with serving(handler) as server:
        yield Target(server, hooks, home, str)


# --- the test


class Example:
    """One run of all clients."""

    def __init__(self, target: Target, seed: int, clients: list[tuple[float, list[Step]]]) -> None:
        self.target = target
        target.fill()
        self.before = target.resources()
        self.logged = target.log()
        rates = {f"127.0.0.{number}": rate for number, (rate, _) in enumerate(clients, 2)}
        self.mischief = target.hooks.mischief = Mischief(seed, rates, target.hooks.careful)
        self.players = [Player(target.address, source, self.mischief) for source in rates]
        self.steps = [steps for _, steps in clients]

    def run(self, undisturbed: list[Any]) -> None:
        plays = [
            gevent.spawn(player.play, steps) for player, steps in zip(self.players, self.steps, strict=True)
        ]
        testimony = gevent.spawn(witness, self.target.address)
        try:
            gevent.joinall([*plays, testimony], raise_error=True)
            assert testimony.get() == undisturbed
            self.hold()
            self.end()
            self.check()
        except (Exception, gevent.Timeout) as error:
            self.target.failure = AssertionError(f"{error!r}\n{self.story()}")
            raise self.target.failure from error
        finally:
            gevent.killall([*plays, testimony])
            for session in self.sessions():
                session.close()
            for timeout in self.mischief.timeouts:
                timeout.close()  # (libuv goes on using the memory of a timer that nobody closes)

    def story(self) -> str:
        """All that was said, and what was called; last what the server has now and had before."""
        calls = [
            "\n".join([f"calls for {each.address}:{each.port}", *each.story])
            for each in self.mischief.sessions.values()
            if each.address != WITNESS
        ]
        resources = f"{self.target.resources()}, before {self.before}; {self.mischief.problems}"
        return "\n\n".join([*(player.story() for player in self.players), *calls, resources])

    def sessions(self) -> Iterator[Victim]:
        for player in self.players:
            yield from player.sessions

    def hold(self) -> None:
        """Every session waits for what does not come, or for its client; nothing spins, others are served."""
        held = self.mischief.held = Event()
        talks = [
            gevent.spawn(session.say, [b"STAT dir", b"NOOP", b"MLST a"], range(10, 30))  # more to come
            for session in self.sessions()
            if not session.ended
        ]
        try:
            eventually(lambda: passes(SPAN) <= SPIN)
            self.target.held += self.mischief.holding
            with Client(self.target) as client:
                client.command("PWD", "257")
        finally:
            held.set()
            self.mischief.held = None
            gevent.joinall(talks, raise_error=True)

    def end(self) -> None:
        """The clients go; nobody waits any more."""
        for session in self.sessions():
            session.close()
        eventually(lambda: all(each.over and not each.open for each in self.mischief.sessions.values()))
        self.mischief.helpers.join()
        self.target.interleaved += self.mischief.interleaved

    def check(self) -> None:
        eventually(lambda: no_more(self.target.resources(), self.before))
        assert not self.mischief.problems
        assert all(file.closed for file in self.mischief.files)
        for session in self.sessions():
            if session.seen is not None:
                fences = session.seen.fences
                assert fences == session.fences[: len(fences)], session.story()
        errors = unexpected(self.target.log()[len(self.logged) :])
        assert not errors


def passes(seconds: float) -> int:
    """How many the hub makes in that time, or somewhat more."""
    count = 0

    def _on_pass() -> None:
        nonlocal count
        count += 1

    watcher = gevent.get_hub().loop.check(ref=False)
    watcher.start(_on_pass)
    try:
        gevent.sleep(seconds)
    finally:
        watcher.stop()
        watcher.close()
    return count


def unexpected(log: str) -> list[str]:
    """Errors with a traceback that were not raised on purpose."""
    errors = re.findall(r"^[\w.]+(?:Error|Failed|Timeout|Exit|Interrupt|Exception)\b.*$", log, re.MULTILINE)
    return [each for each in errors if MARK not in each and "Timeout" not in each]


#: How many runs of all clients.
EXAMPLES = {"short": 15, "proof": 100, "long": 300_000}


@pytest.fixture
def begin(request: pytest.FixtureRequest, _no_hang: None) -> Callable[[str], None]:
    """Tells the watchdog that it is another run from now on."""
    watchdog: Any = request.getfixturevalue("_watchdog")
    return lambda name: watchdog.test(name)


@pytest.mark.blocks  # its files are on a disk
@pytest.mark.parametrize(
    ("serve", "clients"), [(ours, clients_of(lines)), (theirs, clients_of(lines.filter(in_order)))]
)
def test_sessions_keep_their_order_and_leave_others_alone(
    serve: Any, clients: Any, tmp_path: Path, effort: Effort, begin: Callable[[str], None]
) -> None:
    with serve(tmp_path) as target:
        target.fill()
        undisturbed = witness(target.address)
        eventually(target.at_rest)

        @settings(
            max_examples=EXAMPLES[effort],
            deadline=None,
            derandomize=effort == "short",
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=[Phase.explicit, Phase.generate],
        )
        @given(seed=st.integers(0, 1 << 32), clients=clients)
        def run(seed: int, clients: list[tuple[float, list[Step]]]) -> None:
            if target.failure is not None:  # run again, it would begin with what that has left behind
                raise target.failure
            begin(f"{serve.__name__}, {seed}, {clients}")
            Example(target, seed, clients).run(undisturbed)

        run()
        assert target.interleaved
        assert target.held
        assert target.alive()
