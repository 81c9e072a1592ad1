"""The same sequence is sent to pyftpdlib on its own loop, and to us: replies, data and files are the same.

    pytest tests/proof/test_differential.py            # 40 sequences to each of ours
    pytest tests/proof/test_differential.py --proof    # 200

Sequences are made up by hypothesis with test_fuzz.py's grammar: commands in every order with valid, odd and
hostile arguments, AUTH TLS, logins, data connections of every kind, which end in every way. What is between
two steps is not left to chance (peer.py), so every difference is one.

- pyftpdlib's FTPServer and TLS_FTPHandler on GeventIOLoop: no difference at all.
- GeventFTPServer, with what it adds to the same class: only those in `EXCEPTIONS`. Each is shown to be one by
  a sequence of its own, so that none is listed which is gone. A name that is not UTF-8 is kept byte for byte,
  which replies do not show: see BYTE_FOR_BYTE.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pyftpdlib.handlers import TLS_FTPHandler
from pyftpdlib.ioloop import IOLoop

from proof import grammar
from proof.legal import name_of
from proof.peer import Peer, Step
from proof.sequences import sequences, settings_of
from proof.served import fill, tree_of
from proof.tree import differences
from support.cli import certificate
from support.effort import Effort
from support.servers import handler_class, serving, serving_in_thread, started, users

#: pyftpdlib leaves it to the collector to close the files of transfers that never begin.
UNCLOSED = "ignore:unclosed file <.*/(pyftpdlib|loop)/:ResourceWarning"
#: Hypothesis is asked to print commands of 9000 bytes.
LONG = "ignore:Generating overly large repr:hypothesis.errors.HypothesisWarning"
pytestmark = [pytest.mark.filterwarnings(UNCLOSED), pytest.mark.filterwarnings(LONG)]

#: Sequences of up to 12 parts, each of up to 6 steps.
EXAMPLES = {"short": 40, "proof": 200, "long": 200_000}


class Exception_(NamedTuple):
    """A difference that is meant."""

    reason: str
    #: A sequence whose last step shows it.
    shown_by: list[Step]
    #: All that pyftpdlib replies to a step, and all that we do: regular expressions.
    theirs: str
    ours: str
    #: Which steps it may be in: the command, or the name of another step.
    steps: str = ".*"
    #: What has been before in that session: the name of a step.
    after: str = ""


def _line(*lines: bytes) -> list[Step]:
    return [("line", line) for line in lines]


LOGIN = _line(b"USER u", b"PASS p", b"TYPE I")
SECURE: list[Step] = [("encrypt",), *LOGIN, *_line(b"PBSZ 0", b"PROT P")]
PASSIVE = [*_line(b"EPSV"), ("connect",)]
TEXT = [*_line(b"TYPE A"), *PASSIVE, *_line(b"RETR new")]
UPLOAD = [*PASSIVE, *_line(b"STOR new"), ("send_data", b"some")]

EXCEPTIONS = [
    Exception_(
        "A NUL is in no command.",
        _line(b"MKD a\0b"),
        ".*",
        r"501 A command has no NUL in it\.",
    ),
    Exception_(
        "The rest of a command that is too long is no command.",
        _line(b"MKD " + b"A" * 9000),
        r"500 Command too long\.\n500 .*",
        r"500 Command too long\.",
    ),
    Exception_(
        "Replies and listings have no other line breaks than those that end their lines.",
        _line(b"X\rY"),
        r".*[\r\n].*",
        r".*\?.*",
    ),
    Exception_(
        "A name that is too long is called that.",
        _line(b"MDTM " + b"A" * 300),
        "550 .*",
        r"550 File name too long\.",
    ),
    Exception_(
        "MLSD of what is not there is 550.",
        _line(b"MLSD missing"),
        r"501 No such directory\.",
        r"550 .*",
        "MLSD",
    ),
    Exception_(
        "A file's mode is octal as clients read it.",
        _line(b"OPTS MLST unix.mode;", b"MLST a"),
        r".*unix\.mode=0o.*",
        r".*unix\.mode=0[0-7].*",
    ),
    Exception_(
        "One transfer at a time.",
        _line(b"LIST", b"NLST"),
        ".*",
        r"503 Wait for the end of the transfer\.",
        "RETR|STOR|STOU|APPE|LIST|NLST|MLSD",
    ),
    Exception_(
        "A transfer that was given a 150 has an end: by ABOR.",
        _line(b"LIST", b"ABOR"),
        "225 .*",
        r"426 Transfer aborted( via ABOR)?\.\n226 ABOR command successful\.",
        "ABOR",
    ),
    Exception_(
        "A transfer that was given a 150 has an end: by USER or REIN.",
        _line(b"LIST", b"USER u"),
        "(331|230) .*",
        r"426 Transfer aborted\.\n(331|230) .*",
        "USER|REIN",
    ),
    Exception_(
        "A transfer that was given a 150 has an end: by what asks for another data connection.",
        [*UPLOAD, *_line(b"EPSV")],
        "[245].*",
        r"42[56] [\w' ]+: the client (gave it up|asks for another data connection)\.\n[245].*",
        "PASV|EPSV|PORT|EPRT|active",
    ),
    Exception_(
        "A transfer that was given a 150 has an end: by AUTH.",
        [*_line(b"LIST"), ("encrypt",)],
        "234 .*",
        r"234 .*\n426 Transfer aborted\.",
        "encrypt",
    ),
    Exception_(
        "After AUTH one logs in again.",
        [("encrypt",), *_line(b"PWD")],
        ".*",
        r"(no data connection\n|226 Transfer complete\.\n)?530 Log in with USER and PASS first\."
        r"|503 Login with USER first\."
        r"|331 Username ok, .*|211-.*Waiting for username\..*",
        after="encrypt",
    ),
    Exception_(
        "After AUTH one has no data connection.",
        [*PASSIVE, ("encrypt",), ("send_data", b"some")],
        "",
        "no data connection",
        "send_data|end",
        after="encrypt",
    ),
    Exception_(
        "An upload that was reset is not complete.",
        [*UPLOAD, ("end", "reset")],
        r"226 .*",
        r"426 Connection broke off; transfer aborted\.",
        "end",
    ),
    Exception_(
        "What comes before its STOR is kept for it.",
        [*PASSIVE, ("send_data", b"some")],
        "",
        "kept for a command",
        "send_data",
    ),
    Exception_(
        "In ASCII mode each line ends with CRLF, also the first one if the last byte of a piece is a CR.",
        [*PASSIVE, *_line(b"STOR new"), ("send_data", b"\nx\r"), ("end", "close"), *TEXT],
        r"1.*\ndata: \n.*",
        r"1.*\ndata: \r\n.*",
        "RETR",
    ),
]

#: Why a name that is not UTF-8 is another one on the disk: pyftpdlib writes U+FFFD for each such byte.
BYTE_FOR_BYTE = "A name is kept byte for byte."

#: What is never the same twice: ports, times, and inodes.
CHANCE = [
    (r"\d+,\d+\)\.", "PORT)."),
    (r"\|\|\|\d+\|", "|||PORT|"),
    (r"(?<=127\.0\.0\.1:)\d+", "PORT"),
    (r"modify=\d+", "modify=TIME"),
    (r"elapsed time: \S+ secs", "elapsed time: TIME"),
    (r"unique=\w+", "unique=ID"),
    (r"(?m)^(213 )\d{14}$", r"\1TIME"),
    (r"[A-Z][a-z][a-z] \d\d (\d\d:\d\d| \d{4})", "TIME"),
]


# --- what is sent

#: STOU's names are random.
lines = grammar.theirs.filter(lambda line: name_of(line) != "STOU").map(lambda line: ("line", line))
names = st.sampled_from(grammar.NAMES)
types = st.sampled_from([_line(b"TYPE A"), _line(b"TYPE I"), []])
endings = st.sampled_from([[("end", how)] for how in ("close", "close", "close", "cut", "reset")])

#: Fewer line feeds than test_fuzz.py has: for so many, pyftpdlib blocks the hub in ASCII mode.
contents = st.binary(max_size=64) | st.builds(
    lambda text, times: text * times,
    st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"a\r\nb\rc\n", b"\r\r\n\n", b"\x00\xff\r", b"\nz\r"]),
    st.sampled_from([1, 2, 3000]),
)

uploads = st.builds(
    lambda type, command, name, content: [*type, *PASSIVE, *_line(command + name), ("send_data", content)],
    types,
    st.sampled_from([b"STOR ", b"APPE "]),
    names,
    contents,
)
downloads = st.builds(
    lambda type, line: [*type, *PASSIVE, *_line(line)],
    types,
    names.map(lambda name: b"RETR " + name) | st.sampled_from([b"LIST", b"MLSD dir", b"NLST"]),
)

#: Steps that belong together, so that each sequence gets somewhere.
several: st.SearchStrategy[list[Step]] = st.one_of(
    *[st.lists(lines, min_size=1, max_size=6)] * 4,
    st.sampled_from([b"ABOR", b"USER u", b"EPSV", b"PASV", b"STOR b", b"RETR a", b"LIST", b"STAT"]).map(
        _line
    ),
    st.sampled_from([LOGIN, PASSIVE, [("connect",)], [("encrypt",)]]),
    st.sampled_from([b"PORT %s", b"EPRT %s"]).map(lambda line: [("active", line)]),
    uploads,
    st.builds(lambda upload, end: [*upload, *end], uploads, endings),
    downloads,
    contents.map(lambda content: [("send_data", content)]),
    endings,
    st.sampled_from([b"PROT P", b"PROT C"]).map(lambda line: _line(b"PBSZ 0", line)),
)
sequence = st.builds(
    lambda first, parts: [*first, *(step for part in parts for step in part)],
    st.sampled_from([LOGIN, LOGIN, SECURE]),
    st.lists(several, max_size=12),
)


# --- two servers


class Pair:
    """pyftpdlib, and one of ours, each with a directory of its own."""

    def __init__(self, homes: list[Path], servers: list[Any]) -> None:
        self.homes, self.servers = homes, servers

    def run(self, steps: list[Step], exceptions: list[Exception_]) -> list[str]:
        """Send *steps* to both; the reasons for which they were not the same."""
        reasons: list[str] = []
        peers = self.begin()
        done: set[str] = set()
        try:
            for step in steps:
                theirs, ours = (without_chance(peer.do(step)) for peer in peers)
                reason: str | None = None
                if exceptions and theirs == ours and theirs[:1] in ("1", "2", "3") and not is_utf8(step):
                    reason = BYTE_FOR_BYTE
                elif theirs != ours:
                    name = name_of(step[1]) if step[0] == "line" else step[0]
                    reason = reason_of(name, done, theirs, ours, exceptions)
                    assert reason, f"pyftpdlib: {theirs!r:.500}\nwe: {ours!r:.500}\n{_stories(peers)}"
                if reason:
                    reasons.append(reason)
                    # From here on the sessions and the files are not the same: begin anew.
                    self.end(peers)
                    peers = self.begin()
                    done.clear()
                    for each in LOGIN:
                        for peer in peers:
                            peer.do(each)
                done.add(step[0])
        except BaseException:
            for peer in peers:
                peer.close()
            raise
        self.end(peers)
        trees = [tree_of(home) for home in self.homes]
        assert not differences(*trees), f"{differences(*trees)}\n{_stories(peers)}"
        return reasons

    def begin(self) -> list[Peer]:
        for home in self.homes:
            fill(home)
        return [Peer(server) for server in self.servers]

    def end(self, peers: list[Peer]) -> None:
        for peer in peers:
            peer.hang_up()


def is_utf8(step: Step) -> bool:
    """Whether the command of *step*, if it is one, is text."""
    if step[0] != "line":
        return True
    try:
        step[1].decode()
    except UnicodeDecodeError:
        return False
    return True


def without_chance(text: str) -> str:
    for pattern, name in CHANCE:
        text = re.sub(pattern, name, text)
    return text


def reason_of(name: str, done: set[str], theirs: str, ours: str, exceptions: list[Exception_]) -> str | None:
    """Why the step *name*, after those of *done*, may have brought *theirs* and *ours*."""
    for each in exceptions:
        if (
            re.fullmatch(each.steps, name)
            and (not each.after or each.after in done)
            and re.fullmatch(each.theirs, theirs, re.DOTALL)
            and re.fullmatch(each.ours, ours, re.DOTALL)
        ):
            return each.reason
    return None


def _stories(peers: list[Peer]) -> str:
    return "\n".join(
        f"--- {name}\n" + "\n".join(peer.story) for name, peer in zip(("pyftpdlib", "we"), peers, strict=True)
    )


@pytest.fixture
def begins(_watchdog: Any, _no_hang: None) -> Iterator[Callable[[], None]]:
    """Called when a sequence begins."""
    with sequences(_watchdog, "test_differential") as begin:
        yield begin


def handler_in(home: Path, pem: Path) -> Any:
    fill(home)
    return handler_class(
        users(home), TLS_FTPHandler, certfile=str(pem), ssl_context=None, auth_failed_timeout=0.0
    )


@contextlib.contextmanager
def pair(directory: Path, serve: Any) -> Iterator[Pair]:
    """pyftpdlib in a thread, and what *serve* serves on this hub."""
    pem = certificate(directory)
    homes = [directory / "pyftpdlib", directory / ("loop" if serve is serving else "server")]
    handlers = [handler_in(home, pem) for home in homes]
    with serving_in_thread(handlers[0], IOLoop) as theirs, serve(handlers[1]) as ours:
        yield Pair(homes, [theirs, ours])


@pytest.mark.parametrize(
    ("serve", "exceptions"), [(serving, []), (started, EXCEPTIONS)], ids=["loop", "server"]
)
def test_replies_data_and_files_are_pyftpdlibs(
    tmp_path: Path, effort: Effort, begins: Callable[[], None], serve: Any, exceptions: list[Exception_]
) -> None:
    with pair(tmp_path, serve) as both:

        @settings_of(effort, EXAMPLES)
        @given(sequence)
        def same(steps: list[Step]) -> None:
            begins()
            both.run(steps, exceptions)

        same()


def test_names_are_kept_byte_for_byte(tmp_path: Path) -> None:
    with pair(tmp_path, started) as both:
        for home in both.homes:
            fill(home)
        peers = both.begin()
        for peer in peers:
            for step in [*LOGIN, *_line(b"MKD B\xe4", b"MKD B\xf6")]:
                peer.do(step)
        both.end(peers)
        made = [{name for name in os.listdir(os.fsencode(home)) if name[:1] == b"B"} for home in both.homes]
        assert made == [{"B\ufffd".encode()}, {b"B\xe4", b"B\xf6"}]
        assert both.run([*LOGIN, *_line(b"MKD B\xe4")], EXCEPTIONS) == [BYTE_FOR_BYTE]


def test_each_exception_is_one(tmp_path: Path) -> None:
    with pair(tmp_path, started) as both:
        for each in EXCEPTIONS:
            assert both.run([*LOGIN, *each.shown_by], [each]) == [each.reason]
