"""Starts the command with every pair of options that may be used together.

Less than twenty servers do: each has a set of options, and every pair of options, with each of their values,
is in one set at least (a covering array). "Absent" counts as a value. The options are those of the parser:

- flags, and options with choices, need no entry below; all choices but the default are tried, if VALUES names
  no others;
- all others need a value in VALUES;
- an option that is refused without another goes into NEEDS, two that are refused together into REFUSED;
- an option that ends the command at once goes into ENDS.

The package allpairspy (2.5.1) is not used: it filters the beginnings of rows, and cannot know whether NEEDS
can still be met. It left out 25 of 4978 legal pairs and reported nothing.
"""

from __future__ import annotations

import base64
import contextlib
import ftplib
import http.client
import importlib.util
import io
import itertools
import json
import os
import pwd
import random
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge.ftp
from bridge.ftp.command import PARTS
from bridge.ftp.options import parser_of
from bridge.ftp.parts import config
from support.cli import LIMIT, Command
from support.ftps_clients import VERSIONS, Authority, client_context
from support.servers import held_ports

pytestmark = pytest.mark.program

#: Options with their values, None for an option that is absent, "" for a flag.
Row = dict[str, str | None]
Choice = tuple[str, str | None]
#: With each choice, those that no row has together with it.
Missing = dict[Choice, set[Choice]]

# --- what is known of the options

#: A value for each option that has one, or several. {names} are attributes of `Place`.
VALUES: dict[str, tuple[str, ...]] = {
    "interface": ("127.0.0.1",),
    "port": ("0",),
    "directory": ("{pub}",),
    "banner": ("Pairs",),
    "encoding": ("latin-1",),
    "username": ("ada",),
    "password": ("lovelace",),
    "max-login-attempts": ("5",),
    "range": ("20000-20099",),
    "passive-ports": ("20100-20199",),
    "nat-address": ("192.0.2.1",),
    "masquerade": ("192.0.2.2", "127.0.0.0/8=192.0.2.3"),
    "max-cons": ("100",),
    "max-cons-per-ip": ("3",),
    "timeout": ("60",),
    "stop-timeout": ("5",),
    "long-wait": ("20",),
    "max-blocking-time": ("1",),
    "config": ("{config}",),
    "log-file": ("{log}",),
    "xferlog": ("{xferlog}",),
    "workers": ("2",),
    "tls-max": ("1.2",),  # not the newest
    "tls-required": ("both",),  # for the others there are flags
    "certfile": ("{server}",),
    "keyfile": ("{server}",),
    "client-ca": ("{authority}",),
    "users": ("{users}",),
    "ban": ("5/60",),
    "proxy-protocol": ("127.0.0.1",),
    "http": ("127.0.0.1:{http}",),
    "http-admin": ("op:secret",),
    "user": ("nobody",),
    "chroot": ("{root}",),
}

#: Never absent: the port's default may be in use.
ALWAYS = {"port"}

#: Options of which one at least must be there, too.
NEEDS: dict[str, tuple[str, ...]] = {
    "username": ("password",),
    "password": ("username",),
    "atomic-uploads": ("write", "users"),
    "keyfile": ("certfile",),
    **dict.fromkeys(("certfile", "client-ca", "require-session-reuse", "tls-max"), ("tls",)),
    **dict.fromkeys(("tls-required", "tls-control-required", "tls-data-required"), ("tls",)),
    "http-admin": ("http",),
    "chroot": ("user",),
}

#: Two options, or one with one of its values only, that are refused together; and why.
REFUSED: dict[tuple[str, str], str] = {
    ("username", "users"): "users of a file have their passwords there",
    ("password", "users"): "it is --username's, which is refused",
    ("users", "chroot"): "homes need /proc",
    ("debug", "quiet"): "one wants more lines, the other fewer",
    ("nat-address", "masquerade=192.0.2.2"): "both name the address for all networks",
    ("concurrency=pre-fork", "workers"): "it is --workers 0",
}

#: Options that end the command before anything is served.
ENDS = ("help", "version", "check", "print-config")

PARSER = parser_of(PARTS)
#: The parser's options, by the first of their long names.
OPTIONS = {
    next(name[2:] for name in action.option_strings if name.startswith("--")): action
    for action in PARSER.options()
}


def unavailable() -> dict[str, str]:
    """Options that cannot be tried here, and why."""
    found: dict[str, str] = {}
    if os.geteuid() != 0:
        found |= dict.fromkeys(("user", "chroot"), "only root can become another user")
    if importlib.util.find_spec("OpenSSL") is None:
        names = {"tls"} | {name for name, others in NEEDS.items() if "tls" in others} | {"keyfile"}
        found |= dict.fromkeys(names, "pyOpenSSL is not installed")
    if importlib.util.find_spec("proxyprotocol") is None:
        found["proxy-protocol"] = "proxy-protocol is not installed"
    for package in ("prometheus_client", "psutil"):
        if importlib.util.find_spec(package) is None:
            found |= dict.fromkeys(("http", "http-admin"), f"{package} is not installed")
    if not os.path.exists("/proc/self/fd/0"):
        found["users"] = "needs Linux with /proc"
    return found


UNAVAILABLE = unavailable()


def values_of(name: str) -> tuple[str, ...]:
    """The values of an option that are tried; none if it lacks an entry above."""
    action = OPTIONS[name]
    if action.nargs == 0:
        return ("",)
    if action.choices is not None and name not in VALUES:
        return tuple(value for value in action.choices if value != action.default)
    return VALUES.get(name, ())


#: What each option may be in a row.
DOMAINS: dict[str, tuple[str | None, ...]] = {
    name: values_of(name) if name in ALWAYS else (None, *values_of(name))
    for name in OPTIONS
    if name not in ENDS and name not in UNAVAILABLE
}

# --- the covering array


def is_refused(row: Row) -> bool:
    """Whether two of its options are in REFUSED."""
    given = {name for name, value in row.items() if value is not None}
    given |= {f"{name}={value}" for name, value in row.items()}
    return any(given.issuperset(pair) for pair in REFUSED)


def completed(row: Row, refusing: bool = True) -> Row | None:
    """*row* with what its options need; None if that cannot be, as some of it is absent or REFUSED."""
    if refusing and is_refused(row):
        return None
    for name, needed in NEEDS.items():
        if row.get(name) is not None and all(row.get(other) is None for other in needed):
            more = [(other, value) for other in needed if other not in row for value in values_of(other)]
            rows = (completed({**row, other: value}, refusing) for other, value in more)
            return next((each for each in rows if each is not None), None)
    return row


def covering_array() -> list[Row]:
    """Rows with a value for every option, such that all choices that can be in one row are in one.

    Greedy: a row begins with two choices that no row has both of; each further option, in random order, gets
    the value that makes the most of such pairs. (In the order of the parser it takes ten rows more.)
    """
    rng = random.Random(0)  # the same rows every time
    choices: list[Choice] = [(name, value) for name, values in DOMAINS.items() for value in values]
    missing: Missing = {choice: set() for choice in choices}
    for one, other in itertools.permutations(choices, 2):
        if one[0] != other[0] and completed(dict((one, other))):
            missing[one].add(other)
    rows: list[Row] = []
    while any(missing.values()):
        one = max(choices, key=lambda choice: len(missing[choice]))
        other = max(
            (each for each in choices if each in missing[one]), key=lambda choice: len(missing[choice])
        )
        row = dict((one, other))
        for name in rng.sample(list(DOMAINS), len(DOMAINS)):
            if name not in row:
                possible = [(name, value) for value in DOMAINS[name] if completed({**row, name: value})]
                row |= [max(possible, key=lambda choice: len(missing[choice] & row.items()))]
        for choice in row.items():
            missing[choice] -= row.items()
        rows.append({name: row[name] for name in DOMAINS})
    return rows


ROWS = covering_array()
NUMBERED = pytest.mark.parametrize("row", ROWS, ids=[f"row{number}" for number in range(len(ROWS))])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ENDS])
def test_every_pair_with_an_option_is_tried(name: str) -> None:
    """Counted anew, without what made the array. (Those in ENDS are tried with every row, below.)"""
    assert values_of(name), (
        f"{Path(__file__).name}: add {name!r} to VALUES, with a value that a server and its clients "
        "can use here; to NEEDS, if it is refused without another option; to REFUSED, if it is refused with "
        "another one"
    )
    if name in UNAVAILABLE:
        pytest.skip(UNAVAILABLE[name])
    for value, (other, others) in itertools.product(DOMAINS[name], DOMAINS.items()):
        for its in others if other != name else ():
            if any(row[name] == value and row[other] == its for row in ROWS):
                continue
            assert completed({name: value, other: its}) is None, f"no row has {name}={value}, {other}={its}"
            # and nothing is left out that no table names
            absent = value is None or its is None
            assert absent or is_refused({name: value, other: its}), f"add ({name!r}, {other!r}) to REFUSED"


def test_all_that_is_known_is_of_options_that_are() -> None:
    pairs = [each.partition("=")[0] for pair in REFUSED for each in pair]
    needed = [other for others in NEEDS.values() for other in others]
    known = {*VALUES, *ALWAYS, *NEEDS, *needed, *pairs, *ENDS, *UNAVAILABLE}
    assert known <= OPTIONS.keys()


# --- what options name


class Place:
    """A directory that everybody may enter, with what the values name."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.http = root, port
        self.pub = root / "pub"
        self.pub.mkdir()
        (self.pub / "hello").write_bytes(CONTENT)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.pub, nobody.pw_uid, nobody.pw_gid)
        self.users = root / "users"
        self.users.write_text(f"ada:{HASH}:::\n")
        self.config = root / "ftp.toml"
        self.config.touch()
        self.log, self.xferlog = root / "log", root / "xferlog"
        authority = Authority(root)
        self.authority = authority.path
        self.server, self.client = authority.issue("server"), authority.issue("client")

    def words(self, row: Row) -> list[str]:
        """The command line of *row*; with --config most of it is in that file."""
        given = {name: value.format(**vars(self)) for name, value in row.items() if value is not None}
        in_file = []
        if "config" in given:
            # (tests/honest looks for --chroot on the command line)
            in_file = [name for name in given if name not in ("config", "chroot")]
            lines = [f"{name} = {json.dumps(given[name] or True)}\n" for name in in_file]
            self.config.write_text("".join(lines), encoding="utf-8")
        words = [[f"--{name}", value] for name, value in given.items() if name not in in_file]
        return [word for word in itertools.chain(*words) if word]


#: Of "lovelace", cheap to check.
HASH = "$scrypt$ln=4,r=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$a1OrpMD7nJtazBN81GzycLXMbRGbLCqZCYRE72ey35w"
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def place(open_path: Path) -> Iterator[Place]:
    with held_ports(1) as port:
        yield Place(open_path, port)


# --- servers


#: The command with --quiet, which prints nothing, and a line that says where it listens.
TELLING = """
import sys
import bridge.ftp
from bridge.ftp.application import Application

report_state = Application.report_state

def telling(application, state):
    if state == "ready":
        print(" on %s port %d" % application.server.address[:2], flush=True)
    report_state(application, state)

Application.report_state = telling
sys.exit(bridge.ftp.main())
"""


@NUMBERED
def test_a_server_with_these_options_serves(row: Row, place: Place) -> None:
    print({name: value for name, value in row.items() if value is not None})  # shown if the test fails
    program = ["-m", "bridge.ftp"] if row["quiet"] is None else ["-c", TELLING]
    directory = place.root if row["directory"] else place.pub
    with Command(*place.words(row), directory=directory, program=program) as server:
        if row["quiet"] is None:
            server.printed("^Stop: ")
        for user, password in accounts(row):
            with session(row, place, server, user, password) as client:
                check_session(row, client, f"\u00e9 of {user}")
        if row.get("http"):
            check_pages(place.http)
        code, output = server.stop()
        assert code == 0, output
        check_output(row, place, server)


def accounts(row: Row) -> list[tuple[str, str]]:
    """Who can log in."""
    known = [("ada", "lovelace")] if row["username"] or row.get("users") else []
    return known if known and row["anonymous"] is None else [*known, ("anonymous", "")]


def check_session(row: Row, client: Client, name: str) -> None:
    """Lists, reads and, where it may, writes."""
    assert row["banner"] is None or client.welcome == f"220 {row['banner']}"
    names = {"hello", *client.nlst()}
    if row["write"] is None:
        with pytest.raises(ftplib.error_perm, match=r"^550"):
            client.storbinary(f"STOR {name}", io.BytesIO(CONTENT))
    else:
        client.storbinary(f"STOR {name}", io.BytesIO(CONTENT))
        names.add(name)
    assert set(client.nlst()) == names
    for each in names:
        parts: list[bytes] = []
        client.retrbinary(f"RETR {each}", parts.append)
        assert b"".join(parts) == CONTENT
    if row["hash"] is not None:
        assert client.sendcmd("HASH hello").startswith("213 ")


def check_pages(port: int) -> None:
    headers = {"Authorization": f"Basic {base64.b64encode(b'op:secret').decode()}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)) as connection:
        for path in ("/healthz", "/metrics", "/status.json", "/"):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True), path


def check_output(row: Row, place: Place, server: Command) -> None:
    """What the server has printed and logged."""
    log = server.stderr
    if row["log-file"]:
        assert log == ""
        log = place.log.read_text(encoding="utf-8")
    assert "Traceback" not in server.stdout + log
    if row["quiet"] is None:
        assert server.stdout.startswith("Serving ")
        assert "logged in" in log
        assert ("127.0.0.7:40000" in log) is bool(row.get("proxy-protocol"))
    else:
        assert server.stdout.count("\n") == 1  # TELLING's
    if row["log-format"] == "json":
        assert all(isinstance(json.loads(line), dict) for line in log.splitlines())
    if row["xferlog"]:
        assert "/hello " in place.xferlog.read_text(encoding="utf-8")


# --- clients

#: What a load balancer sends to a server with --proxy-protocol. (In --masquerade's network.)
HEADER = b"PROXY TCP4 127.0.0.7 127.0.0.1 40000 21\r\n"


class Client(ftplib.FTP_TLS):
    """A session as the server's options want it: over TLS, behind a load balancer, or neither."""

    def __init__(self, server: Command, row: Row, context: ssl.SSLContext) -> None:
        super().__init__(timeout=LIMIT, encoding=row["encoding"] or "utf-8", context=context)
        self._row = row
        self._tls = row.get("tls")
        self._header = HEADER if row.get("proxy-protocol") else b""
        self.host, self.port = "127.0.0.1", server.port
        try:
            self.sock = self._connected(self.port)
            if self._tls == "implicit":
                self.sock = self._encrypted(self.sock)
            self.file = self.sock.makefile("r", encoding=self.encoding)
            self.welcome = self.getresp()
            if self._tls == "explicit":
                self.auth()
            if self._tls:
                self.prot_p()
        except BaseException:
            self.close()
            raise

    def _connected(self, port: int) -> socket.socket:
        sock = socket.create_connection((self.host, port), LIMIT)
        sock.sendall(self._header)
        return sock

    def _encrypted(self, sock: Any) -> Any:
        """*sock* with TLS, which resumes the session's."""
        control = getattr(self.sock, "session", None)
        return self.context.wrap_socket(sock, server_hostname=self.host, session=control)

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[Any, None]:
        sock = self._connected(self._passive_port())
        try:
            assert self.sendcmd(cmd)[0] == "1"
            return (self._encrypted(sock) if self._tls else sock), None
        except BaseException:
            sock.close()
            raise

    def _passive_port(self) -> int:
        host, port = ftplib.parse227(self.sendcmd("PASV"))
        assert host == self._passive_address()
        ranges = [self._row[name] for name in ("range", "passive-ports")]
        bounds = [each.split("-") for each in ranges if each]
        assert not bounds or any(int(first) <= port <= int(last) for first, last in bounds)
        return port

    def _passive_address(self) -> str:
        masquerade = self._row["masquerade"]
        return (masquerade or self._row["nat-address"] or self.host).rpartition("=")[2]


@contextlib.contextmanager
def session(row: Row, place: Place, server: Command, user: str, password: str) -> Iterator[Client]:
    """Somebody who is logged in."""
    version = VERSIONS[0] if row.get("tls-max") == "1.2" else VERSIONS[1]
    context = client_context(version, place.client if row.get("client-ca") else None)
    with contextlib.closing(Client(server, row, context)) as client:
        client.login(user, password, secure=False)
        yield client
        client.quit()


# --- what is refused, and what ends at once


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The line with which the command ends instead of the answer to --check."""
    with pytest.raises(SystemExit) as raised:
        bridge.ftp.main(["--check", *words])
    shown = capsys.readouterr()
    assert (raised.value.code, shown.out, shown.err.count("\n")) == (2, "", 1), shown
    return shown.err


def choice(text: str) -> tuple[str, str]:
    """An option as REFUSED has it, with its value or its first one."""
    name, equals, value = text.partition("=")
    return name, value if equals else values_of(name)[0]


@pytest.mark.parametrize("pair", REFUSED, ids=" ".join)
def test_a_pair_that_cannot_be_is_refused(
    pair: tuple[str, str], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    row = completed(dict(map(choice, pair)), refusing=False)
    assert row is not None
    error = refusal(capsys, place.words(row))
    assert any(f"--{name}" in error for name in row)


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_without_what_it_needs_is_refused(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    row: Row = {name: values_of(name)[0]}
    for other in NEEDS[name]:  # what it needs, needs others: those are there
        there = completed({other: values_of(other)[0]})
        assert there is not None
        row |= {each: value for each, value in there.items() if each not in NEEDS[name]}
    error = refusal(capsys, place.words(row))
    assert f"--{name} needs" in error


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """What the command prints, when it ends at once with 0."""

    def printed(words: list[str]) -> str:
        try:
            code: object = bridge.ftp.main(words)
        except SystemExit as end:  # argparse's
            code = end.code
        shown = capsys.readouterr()
        assert (code, "Traceback" in shown.err) == (0, False), (words, shown)
        return shown.out

    return printed


@pytest.mark.parametrize(
    ("name", "expected"), [("help", "Share a directory over FTP"), ("version", "bridge ")]
)
def test_what_only_prints_does_so(
    name: str, expected: str, place: Place, printed: Callable[[list[str]], str]
) -> None:
    for row in ROWS:
        assert expected in printed([*place.words(row), f"--{name}"])


def test_check_finds_no_fault(
    place: Place, printed: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.pub)
    for row in ROWS:
        assert f" {place.pub} (" in printed([*place.words(row), "--check"])


def test_a_printed_configuration_says_the_same(place: Place, printed: Callable[[list[str]], str]) -> None:
    """Passwords excepted, which are not printed."""
    file = place.root / "printed.toml"
    for row in ROWS:
        words = place.words(row)
        file.write_text(printed([*words, "--print-config"]), encoding="utf-8")
        parsed, again = (
            vars(config.parse(lambda: parser_of(PARTS), each)) for each in (words, ["--config", str(file)])
        )
        differing = {name for name in parsed if parsed[name] != again[name]}
        assert differing <= {"config", "password", "http_admin"}, words
