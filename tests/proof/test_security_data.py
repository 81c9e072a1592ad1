"""Attacks on data connections, names and SITE. How to run them, and the table of all: test_security.py."""

from __future__ import annotations

import itertools
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import gevent.socket
import pytest

from proof.attacker import HASTY, SECRET, Attacker, until_closed
from support.cli import LIMIT, Command
from support.servers import PATIENCE, Client, handler_class, serving, users

pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`python -m bridge.ftp` without any option."""
    directory = tmp_path_factory.mktemp("quickstart")
    (directory / "file").write_bytes(SECRET)
    (directory / "dir").mkdir()
    with Command(directory=directory) as server:
        yield server
        assert "Traceback" not in server.stderr


def test_site_runs_and_copies_nothing(quickstart: Command) -> None:
    for name in ("anonymous", ""):
        with Attacker(quickstart, name) as attacker:
            for command in (
                "EXEC id",
                "CPFR dir/file",
                "CPTO copy",
                "SYMLINK /etc x",
                "UTIME 1 x",
                "RMDIR dir",
                "MSG",
            ):
                assert attacker.do(f"SITE {command}").startswith(b"500 ")


def test_patterns_are_names(quickstart: Command) -> None:
    with Attacker(quickstart) as attacker:
        for pattern in (
            "*",
            "dir/*",
            "*/.." * 60,
            "{dir,out}" * 60,
            "[a-z]" * 100,
            ".*./*?/" * 60,
            "~",
            "-R /",
        ):
            for command in ("LIST", "NLST", "MLSD", "STAT", "DELE", "RETR", "SIZE"):
                reply, data = attacker.attempt(f"{command} {pattern}")
                assert reply.startswith(b"5"), (command, pattern, reply)
                assert not data


# --- data connections

FOREIGN = [
    "127.0.0.2",
    "0.0.0.0",
    "255.255.255.255",
    "10.0.0.1",
    "127.1",
    "127.0.0.01",
    "2130706433",
    "::1",
    "localhost",
]
MALFORMED = [
    "127,0,0,1,200",
    "127,0,0,1,200,1,1",
    "127,0,0,1,256,0",
    "127,0,0,1,-1,1",
    "256,0,0,1,9,9",
    "127,0,0,1,1e9,1",
]
MALFORMED += ["", ",,,,,", "a,b,c,d,e,f", "9" * 600, ",".join(["9" * 300] * 6)]


def test_data_goes_to_nobody_else(quickstart: Command) -> None:
    """Neither address nor port: each is refused for what it is, and the session goes on."""
    with Attacker(quickstart) as attacker:
        for host in FOREIGN:
            assert attacker.do(f"EPRT |1|{host}|5000|")[:3] in (b"501", b"522"), host
            assert attacker.do(f"EPRT |2|{host}|5000|")[:3] in (b"501", b"522"), host
            if re.fullmatch(r"\d+\.\d+\.\d+\.\d+", host) and host != "127.0.0.01":
                assert attacker.do(f"PORT {host.replace('.', ',')},20,20").startswith(b"501 Rejected"), host
        for port in (0, 1, 21, 25, 1023):
            assert attacker.do(f"PORT 127,0,0,1,{port >> 8},{port & 255}").startswith(b"501"), port
            assert attacker.do(f"EPRT |1|127.0.0.1|{port}|").startswith(b"501"), port
        for argument in MALFORMED:
            assert attacker.do(f"PORT {argument}").startswith(b"501"), argument
        for argument in (
            "|",
            "||||",
            "|1|127.0.0.1||",
            "|3|127.0.0.1|5000|",
            "|1|127.0.0.1|70000|",
            "|" * 500,
            "\\1",
        ):
            assert attacker.do(f"EPRT {argument}")[:3] in (b"501", b"522"), argument
        assert attacker.do("NOOP").startswith(b"200")


def test_no_other_host_is_connected_to(quickstart: Command) -> None:
    with socket.create_server(("127.0.0.2", 0)) as target, Attacker(quickstart) as attacker:
        port = target.getsockname()[1]
        target.setblocking(False)
        for command in (f"PORT 127,0,0,2,{port >> 8},{port & 255}", f"EPRT |1|127.0.0.2|{port}|"):
            assert attacker.do(command).startswith(b"501")
            assert attacker.do("RETR file").startswith(b"150")  # waits for a data connection
            assert attacker.do("ABOR").startswith(b"426")
            assert attacker.reply().startswith(b"226")
            with pytest.raises(BlockingIOError):  # the kernel would have completed the connection
                target.accept()


def test_a_thief_gets_nothing(quickstart: Command) -> None:
    """Four connections of somebody else come first, then the client's."""
    with Attacker(quickstart) as victim:
        port = victim.port()
        thieves = [socket.create_connection(("127.0.0.1", port), LIMIT, ("127.0.0.2", 0)) for _ in range(4)]
        with victim.data(port) as data:
            assert victim.do("RETR file").startswith(b"1")
            assert until_closed(data) == SECRET
        assert victim.reply().startswith(b"226")
        for thief in thieves:
            assert until_closed(thief) == b""
            thief.close()


def test_a_thief_gets_nothing_from_pyftpdlib_s_server(tmp_path: Path) -> None:
    """FTPServer on GeventIOLoop: the client has its data too, but also a 425 for each thief."""
    (tmp_path / "file").write_bytes(SECRET)
    with serving(handler_class(users(tmp_path))) as server, Client(server) as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        with gevent.socket.create_connection(("127.0.0.1", port), PATIENCE, ("127.0.0.2", 0)) as thief:
            assert thief.recv(1) == b""
        assert client.reply().startswith("425 Rejected")
        with gevent.socket.create_connection(("127.0.0.1", port), PATIENCE) as data:
            client.command("RETR file", "1")
            assert data.recv(100) == SECRET
        assert client.reply().startswith("226")


def test_ports_are_not_in_order(quickstart: Command) -> None:
    with Attacker(quickstart) as attacker:
        ports = [attacker.port() for _ in range(30)]
    steps = {after - before for before, after in itertools.pairwise(ports)}
    assert len(steps) > 10
    assert ports != sorted(ports)


# --- names


def test_quotes_are_doubled(tmp_path: Path) -> None:
    with Command("-w", directory=tmp_path) as server, Attacker(server) as attacker:
        assert attacker.do('MKD a" is "b') == b'257 "/a"" is ""b" directory created.\r\n'
        attacker.do('CWD a" is "b')
        assert attacker.do("PWD") == b'257 "/a"" is ""b" is the current directory.\r\n'


def test_a_user_name_is_no_log_line(tmp_path: Path) -> None:
    with (
        Command("-u", "ada", "-P", "p", directory=tmp_path, program=["-c", HASTY]) as server,
        Attacker(server, "") as attacker,
    ):
        attacker.do("USER x' logged in.\n[I 2000-01-01 00:00:00] forged\x1b[2J\r%s%(user)s")
        assert attacker.do("PASS \n[E 2000-01-01 00:00:00] forged").startswith(b"530")
        line = server.logged("failed login")
        assert "\x1b" not in line
        assert "%s%(user)s" in line
        assert not re.search(r"^\[. 2000", server.stderr, re.MULTILINE)


def test_names_are_no_labels(tmp_path: Path) -> None:
    name = 'evil"} 1\nbridge_sessions 99'
    (tmp_path / name).write_text("x")
    with (
        Command("--http", "0", "-u", "evil", "-P", "p", directory=tmp_path) as server,
        Attacker(server, "evil") as attacker,
    ):
        assert attacker.attempt(f"RETR {name}")[0].startswith(b"226")
        url = server.printed(r"http://\S+").split()[-1]
        with urllib.request.urlopen(f"{url}metrics", timeout=LIMIT) as answer:
            metrics = answer.read().decode()
    assert "bridge_sessions" in metrics
    assert "evil" not in metrics
