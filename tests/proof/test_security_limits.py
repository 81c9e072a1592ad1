"""Attacks on time, memory, logins and TLS. How to run them, and the table of all: test_security.py."""

from __future__ import annotations

import contextlib
import ftplib
import random
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from proof.attacker import CHEAP, HASTY, SECRET, Attacker, until_closed
from support.cli import LIMIT, Command
from support.effort import Effort
from support.ftps_clients import FTPS
from support.servers import held_ports

pytestmark = pytest.mark.program

#: Bytes of a flood. More than the server may take for it by far.
FLOOD = {"short": 64 << 20, "proof": 2 << 30, "long": 200 << 30}
#: Bytes that a server may grow meanwhile: buffers of 64 KiB, Python's ups and downs. A quarter of the flood.
GROWTH = 16 << 20
#: More than a server answers in the second that it has.
COMMANDS_IN_TIME = 100_000
#: Random arguments, and connections that come and go.
MANY = {"short": 300, "proof": 20_000, "long": 1_000_000}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`python -m bridge.ftp` without any option."""
    with Command(directory=tmp_path_factory.mktemp("quickstart")) as server:
        yield server
        assert "Traceback" not in server.stderr


def memory(server: Command) -> int:
    return int(psutil.Process(server.pid).memory_info().rss)


# --- time


def test_who_does_not_log_in_has_no_longer_than_the_timeout(tmp_path: Path) -> None:
    """Whether it says nothing, a byte now and then, or one command after the other."""
    with Command("--timeout", "1", directory=tmp_path) as server, contextlib.ExitStack() as stack:
        silent, slow, busy = (stack.enter_context(Attacker(server, "")) for _ in range(3))
        for attacker in (slow, busy):
            attacker.sock.settimeout(0.02)
        open_ones = [slow, busy]
        for _ in range(COMMANDS_IN_TIME):
            for attacker, says in ((slow, b"U"), (busy, b"SYST\r\n")):
                if attacker in open_ones and _is_closed(attacker, says):
                    open_ones.remove(attacker)
            if not open_ones:
                break
        assert not open_ones
        assert silent.reply() == b"421 Control connection timed out.\r\n"
        server.logged("session closed", 3)


def _is_closed(attacker: Attacker, says: bytes) -> bool:
    try:
        attacker.send(says)
        return not attacker.sock.recv(65536)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_silent_connections_count(tmp_path: Path) -> None:
    """A quarter of a command from each of three: no place for a fourth, but for others."""
    with Command("--max-cons-per-ip", "3", directory=tmp_path) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Attacker(server, "", "127.0.0.2")).send(b"U")
        refused = stack.enter_context(Attacker(server, "", "127.0.0.2"))
        assert refused.greeting.startswith(b"421 Too many connections from the same IP")
        assert stack.enter_context(Attacker(server)).do("PWD").startswith(b"257")


def test_one_address_does_not_get_all_passive_ports(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        low = stack.enter_context(held_ports(1))
        options = ["--passive-ports", f"{low}-{low}", "--max-cons-per-ip", "2"]
        server = stack.enter_context(Command(*options, directory=tmp_path))
        greedy = stack.enter_context(Attacker(server, source="127.0.0.2"))
        assert greedy.port() == low
        others = [stack.enter_context(Attacker(server, "anonymous", f"127.0.0.{n}")) for n in (2, 3)]
        for other in others:
            assert other.do("PASV").startswith(
                b"425 Can't open data connection: all passive ports are in use"
            )
            assert other.do("PWD").startswith(b"257")
        assert stack.enter_context(Attacker(server, "", "127.0.0.2")).greeting.startswith(b"421")
        greedy.close()
        server.logged("session closed", 2)
        assert others[1].port() == low


def test_connections_that_are_gone_at_once(quickstart: Command, effort: Effort) -> None:
    for number in range(MANY[effort] // 2):
        with socket.create_connection(("127.0.0.1", quickstart.port), LIMIT) as sock:
            if number % 2:
                sock.sendall(b"USER x\r\nPASS")
            if number % 3:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    with Attacker(quickstart) as attacker:
        assert attacker.do("PWD").startswith(b"257")


# --- memory


def test_what_has_no_end_takes_no_memory(quickstart: Command, effort: Effort) -> None:
    """A command without an end, and half a command from each of 100 connections, that say no more."""
    server = quickstart
    with contextlib.ExitStack() as stack:
        attacker = stack.enter_context(Attacker(server))
        block = b"X" * (1 << 20)
        attacker.send(block)
        assert attacker.reply() == b"500 Command too long.\r\n"
        before = memory(server)
        for _ in range(FLOOD[effort] >> 20):
            attacker.send(block)
        assert memory(server) - before < GROWTH
        attacker.send(b"DELE x\r\nPWD\r\n")
        assert attacker.reply().startswith(b"257")
        for _ in range(100):
            stack.enter_context(Attacker(server, "")).send(b"X" * 2000)
        assert attacker.do("PWD").startswith(b"257")
        assert memory(server) - before < GROWTH


COMMANDS = [
    "USER",
    "PASS",
    "CWD",
    "RETR",
    "STOR",
    "APPE",
    "STOU",
    "DELE",
    "MKD",
    "RMD",
    "RNFR",
    "RNTO",
    "LIST",
    "NLST",
    "MLSD",
    "MLST",
    "STAT",
    "SIZE",
    "MDTM",
    "MFMT",
]
COMMANDS += [
    "SITE",
    "REST",
    "ALLO",
    "TYPE",
    "MODE",
    "STRU",
    "PORT",
    "EPRT",
    "EPSV",
    "PASV",
    "OPTS",
    "FEAT",
    "HELP",
    "ABOR",
    "HASH",
    "AUTH",
    "PBSZ",
    "PROT",
    "CCC",
]
COMMANDS += ["SITE CHMOD", "SITE HELP", "ACCT", "SMNT", "XCRC", "RANG", "NOOP", "REIN"]
ARGUMENTS = [
    "9" * 30,
    "9" * 1900,
    "-1",
    "-9" * 300,
    "1e400",
    "nan",
    "0x10",
    "1_0",
    "٣",
    "\xff" * 500,
    "%n%s%d" * 100,
]
ARGUMENTS += [
    "99991231235959 file",
    "00010101000000 file",
    "99999999999999 file",
    "20200230000000 file",
    "0" * 1900,
]
ARGUMENTS += [
    "7777 file",
    "99999999 file",
    "-777 file",
    "MLST " + "x;" * 900,
    "UTF8 ON",
    "|" * 1900,
    "," * 1900,
]
ARGUMENTS += [
    "\x00",
    "\x1b[2J",
    "\r",
    "\n",
    "\xff\xf4\xff\xf2",
    "a" * 1990,
    "/" * 1990,
    " " * 1990,
    "\u202e",
    "",
]


def test_whatever_the_argument_the_session_goes_on(tmp_path: Path, effort: Effort) -> None:
    (tmp_path / "file").write_bytes(b"content")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    tries = [f"{command} {argument}" for argument in ARGUMENTS for command in COMMANDS]
    if effort == "short":
        tries = chance.sample(tries, MANY[effort])
    for _ in range(MANY[effort] if effort != "short" else 0):
        argument = "".join(chance.choices(ARGUMENTS, k=chance.randint(1, 3)))[: chance.randrange(3000)]
        tries.append(f"{chance.choice(COMMANDS)} {argument}")
    with Command("-w", "--hash", directory=tmp_path) as server:
        attacker = Attacker(server)
        try:
            for tried in tries:
                attacker.send(tried.encode("latin-1", "replace") + b"\r\nNOOP\r\n")
                replies: list[bytes] = []
                while not replies or not replies[-1].startswith((b"200 I successfully", b"421 ")):
                    replies.append(attacker.reply())
                    assert replies[-1], (tried[:80], len(tried), replies)
                if tried[:4] in ("USER", "REIN", "PASS", "EPSV") or replies[-1].startswith(b"421"):
                    attacker.close()
                    attacker = Attacker(server)
            assert "Traceback" not in server.stderr
        finally:
            attacker.close()
    assert (tmp_path / "file").stat().st_size <= len(b"content")


def test_rest_makes_no_holes(tmp_path: Path) -> None:
    """Behind which, with a quota, there would be no end of room."""
    home = tmp_path / "ada"
    home.mkdir()
    (home / "file").write_bytes(b"content")
    (tmp_path / "users").write_text(f"ada:{CHEAP}:ada:write:quota=100K\n")
    with Command("--users", "users", directory=tmp_path) as server, Attacker(server, "ada") as attacker:
        for position in (8, 1 << 31, 1 << 62, 10**30):
            for command in ("STOR file", "RETR file", "STOR new"):
                assert attacker.do(f"REST {position}").startswith(b"350")
                assert attacker.do(command).startswith(b"5")
            assert attacker.do(f"REST {position}").startswith(b"350")
            assert attacker.do("APPE file").startswith(b"450")
            attacker.do("REST 0")
    assert (home / "file").read_bytes() == b"content"
    assert not (home / "new").exists()


# --- logins


@pytest.mark.parametrize("options", [["-u", "ada", "-P", "p"], ["--users", "users"]], ids=" ".join)
def test_unknown_users_hear_the_same(tmp_path: Path, options: list[str]) -> None:
    """Also those with names and passwords that are too long, or none."""
    (tmp_path / "ada").mkdir()
    (tmp_path / "users").write_text(f"ada:{CHEAP}:ada:read\n")
    options = [*options, "--ban", "0", "--max-login-attempts", "99"]
    heard = set()
    with (
        Command(*options, directory=tmp_path, program=["-c", HASTY]) as server,
        Attacker(server, "") as attacker,
    ):
        for name in ("ada", "eve", "x" * 2000, "ada ", "Ada", "../ada", "%s", ":"):
            for password in ("wrong", "y" * 2000, ""):
                heard.add((attacker.do(f"USER {name}"), attacker.do(f"PASS {password}")))
    assert heard == {(b"331 Username ok, send password.\r\n", b"530 Authentication failed.\r\n")}


# --- TLS


def test_nothing_from_before_tls_is_obeyed_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SECRET)
    tails = [b"USER anonymous\r\nPASS p\r\nDELE file\r\n", b"DELE file\r\n" * 5000, b"USER an", b"\x15\x03"]
    with Command("-w", "--tls", directory=tmp_path) as server:
        for tail in tails:
            with Attacker(server) as attacker:
                attacker.send(b"AUTH TLS\r\n" + tail)
                assert attacker.reply().startswith(b"234")
                try:
                    attacker.encrypt()
                except (ssl.SSLError, ConnectionError):
                    continue  # came after the handshake had begun, and is no TLS
                assert attacker.do("NOOP").startswith(b"200 I")
                assert attacker.do("PWD").startswith(b"530")
        assert (tmp_path / "file").exists()
        assert "Traceback" not in server.stderr


def test_tls_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SECRET)
    with Command("--tls", "--tls-required", directory=tmp_path) as server:
        with Attacker(server, "") as plain:
            for command in ("USER anonymous", "PASS p"):
                assert plain.do(command).startswith(b"550 SSL/TLS required")
            assert plain.do("PROT C").startswith(b"5")
            assert plain.do("PASV").startswith(b"5")
        client = FTPS(server)
        with contextlib.closing(client):
            for command in ("CCC", "CDC", "ENC", "MIC", "PROT S", "PROT E", "PROT X", "AUTH TLS"):
                with pytest.raises(ftplib.error_perm, match=r"^5"):
                    client.voidcmd(command)
            with socket.create_connection(client.makepasv(), LIMIT) as data:
                client.putcmd("RETR file")
                data.sendall(b"no TLS at all\r\n\r\n")
                assert SECRET not in until_closed(data)
            assert client.getresp()[:3] in ("125", "150")
            with pytest.raises(ftplib.Error, match=r"^(522|426) "):
                client.getresp()
            assert client.nlst() == ["file"]
            assert isinstance(client.sock, ssl.SSLSocket)
            client.prot_c()
            with pytest.raises(ftplib.error_perm, match=r"^550"):
                client.makepasv()
