"""The control connection under a fuzzer that knows FTP's grammar: nothing a client sends does harm.

Hypothesis makes up sessions: commands in every order with valid, odd and hostile arguments, pipelined, cut
into packets anywhere, with Telnet's control sequences; data connections that come late, early or never and
end in every way; sessions that end in the middle of a word. They are sent over real sockets to what
`python -m bridge.ftp` serves with its options. What must hold: every reply has a code that the command may
have (legal.py), and its text ends; the files are what the replies have said (tree.py); nothing is left of a
session that has ended; no traceback in the log.

A failure prints the steps as a program, and all that was said. `--hypothesis-seed` repeats a run of --proof.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import hypothesis.strategies as st
import psutil
import pytest
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from proof import grammar
from proof.driver import Driver
from proof.sequences import await_or_fail, no_more, sequences, settings_of
from proof.served import QUOTA, Served, fill, served, tree_of
from proof.tree import Tree, differences
from support.effort import Effort
from support.servers import eventually

_this = psutil.Process()

which = st.integers(0, 2)
endings = st.sampled_from(["close", "close", "read", "read", "half", "reset"])


class Machine(RuleBasedStateMachine):
    """Up to three sessions with one server."""

    target: Served
    begins: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        self.begins()
        fill(self.target.home)
        self.before = self.resources()
        self.logged = len(self.target.log())
        self.tree = Tree()
        self.sessions: dict[int, Driver] = {}

    def resources(self) -> Any:
        ioloop = self.target.server.ioloop
        return _this.num_fds(), len(ioloop.socket_map), len(self.target.server.sessions())

    def session(self, number: int) -> Driver:
        """The one of that number; a new one if it has ended.

        What the others' uploads have done is known before: the order of what two sessions do is that here.
        """
        for other, each in list(self.sessions.items()):
            if each.ended:
                self.forget(self.sessions.pop(other))
            elif other != number:
                each.finish_upload()
        if number not in self.sessions:
            session = self.sessions[number] = Driver(self.target.address, self.tree)
            session.log_in()
            session.say([b"TYPE I"])
        return self.sessions[number]

    def forget(self, session: Driver) -> None:
        session.close_control()
        await_or_fail(lambda: not self.serves(session), session.story)
        upload = session.upload
        if upload is not None:  # whether its end has come before the session's, only the file can tell
            path = self.target.home / upload.path[1:]
            whole = os.path.isfile(path) and path.read_bytes() == upload.result()
            session.transfer_ended(complete=whole and session.data_ended)
        session.close_data()

    def serves(self, session: Driver) -> bool:
        return any(each.remote_address[1] == session.local_port for each in self.target.server.sessions())

    # --- what happens

    @rule(number=which, line=grammar.lines)
    def command(self, number: int, line: bytes) -> None:
        self.session(number).say([line])

    @rule(
        number=which,
        lines=st.lists(grammar.lines, min_size=2, max_size=6),
        cuts=st.lists(st.integers(0, 2000), max_size=4),
    )
    def pipelined(self, number: int, lines: list[bytes], cuts: list[int]) -> None:
        self.session(number).say(lines, cuts)

    @rule(number=which, line=st.sampled_from([b"EPSV", b"PASV", b"EPSV 1"]))
    def passive(self, number: int, line: bytes) -> None:
        self.session(number).say([line])

    @rule(number=which, line=st.sampled_from([b"PORT %s", b"EPRT %s"]))
    def active(self, number: int, line: bytes) -> None:
        self.session(number).active(line)

    @rule(number=which)
    def connect(self, number: int) -> None:
        self.session(number).connect()

    @rule(number=which, content=grammar.contents)
    def send_data(self, number: int, content: bytes) -> None:
        self.session(number).send_data(content)

    @rule(number=which, how=endings)
    def end_data(self, number: int, how: str) -> None:
        self.session(number).end_data(how)

    @rule(number=which, name=st.sampled_from(grammar.NAMES), content=grammar.contents, how=endings)
    def upload(self, number: int, name: bytes, content: bytes, how: str) -> None:
        session = self.session(number)
        session.say([b"EPSV"])
        session.connect()
        session.say([b"STOR " + name])
        session.send_data(content)
        session.end_data(how)

    @rule(
        number=which,
        line=st.sampled_from([b"RETR a", b"RETR dir/c", b"LIST", b"MLSD dir", b"NLST"]),
        how=endings,
    )
    def download(self, number: int, line: bytes, how: str) -> None:
        session = self.session(number)
        session.say([b"EPSV"])
        session.connect()
        session.say([line])
        session.end_data(how)

    @rule(number=which, more=st.sampled_from([b"", b"", b"NOOP\r\nDELE a\r\nBEHIND\r\n"]))
    def encrypt(self, number: int, more: bytes) -> None:
        session = self.session(number)
        if session.encrypt(more):
            session.say([b"PBSZ 0"])

    @rule(number=which, level=st.sampled_from([b"P", b"P", b"C"]))
    def protect(self, number: int, level: bytes) -> None:
        self.session(number).say([b"PROT " + level])

    @rule(number=which)
    def log_in(self, number: int) -> None:
        self.session(number).log_in()

    @rule(
        number=which,
        how=st.sampled_from(["quit", "close", "reset"]),
        partial=st.sampled_from([b"", b"STOR a", b"\xff"]),
    )
    def hang_up(self, number: int, how: str, partial: bytes) -> None:
        self.session(number).hang_up(how, partial)

    # --- what must hold

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # no step has failed
                self.check()
        finally:
            for session in self.sessions.values():
                session.close_control()
                session.close_data()
            for left in self.target.server.sessions():
                left.disconnect("the sequence has failed")
            with contextlib.suppress(gevent.Timeout):  # that of a step is to be seen
                eventually(lambda: not self.target.server.sessions())

    def check(self) -> None:
        for session in self.sessions.values():
            if not session.ended:
                session.hang_up("close")
            self.forget(session)
        story = "\n".join(session.story() for session in self.sessions.values())
        log = self.target.log()[self.logged :]
        assert "Traceback" not in log, f"{log}\n{story}"
        await_or_fail(
            lambda: no_more(self.resources(), self.before),
            lambda: f"{self.resources()}, more than {self.before}\n{story}",
        )
        problems = differences(self.tree.files, tree_of(self.target.home))
        assert not problems, f"{problems}\n{story}"


#: Sequences of up to 30 steps.
EXAMPLES = {"short": 20, "proof": 400, "long": 300_000}


def warm_up(target: Served) -> None:
    """What a process opens once, at the first hash, the first handshake."""
    session = Driver(target.address, Tree())
    session.encrypt()
    session.log_in()
    session.say([b"HASH a"])
    session.next_owed("hash")
    session.hang_up("quit")


@pytest.fixture
def begins(_watchdog: Any, _no_hang: None) -> Iterator[Callable[[], None]]:
    """Called when a sequence begins."""
    with sequences(_watchdog, "test_fuzz") as begin:
        yield begin


def test_nothing_a_client_sends_does_harm(tmp_path: Path, effort: Effort, begins: Any) -> None:
    with served(tmp_path, "--hash", "--atomic-uploads", quota=QUOTA) as target:
        warm_up(target)
        machine: Any = type("Machine", (Machine,), {"target": target, "begins": staticmethod(begins)})
        run_state_machine_as_test(machine, settings=settings_of(effort, EXAMPLES))
