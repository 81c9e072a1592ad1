"""Failed logins: counted by network and in all processes, slower replies, a ban and its end."""

from __future__ import annotations

import ftplib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.authorizers import DummyAuthorizer

from bridge.server.shared_table import SharedTable
from bridge.users import bans as bans_module
from bridge.users.bans import REFUSAL, BanMixin, Bans, Policy, network_of
from support.cli import LIMIT, Command
from support.servers import Client, eventually, handler_class, started, users

#: `python -m bridge.ftp` that says 530 at once, instead of after 3 s and more.
HASTY = """
import sys
import bridge.ftp
from pyftpdlib.handlers import FTPHandler
FTPHandler.auth_failed_timeout = 0.01
sys.exit(bridge.ftp.main())
"""


class Tables:
    """Those of a site, with the column that is this process's."""

    def __init__(self, rows: int = 64) -> None:
        self.failures, self.bans = SharedTable(2, rows), SharedTable(2, rows)
        self.slot = 0

    def __call__(self) -> tuple[SharedTable, SharedTable, int]:
        return self.failures, self.bans, self.slot


@pytest.fixture
def tables() -> Iterator[Tables]:
    made = Tables()
    yield made
    made.failures.close()
    made.bans.close()


# --- what it counts


@pytest.mark.parametrize(
    ("ip", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("somewhere", "somewhere"),
    ],
)
def test_an_address_counts_as_its_network(ip: str, network: str) -> None:
    assert network_of(ip) == network


def test_too_many_failures_ban_a_network_and_no_other(tables: Tables) -> None:
    bans = Bans(Policy(3, 600, 600), tables)
    assert [bans.failed(f"2001:db8::{number}") for number in (1, 2)] == [1, 2]
    assert not bans.is_banned("2001:db8::1")
    assert bans.failed("2001:db8::3") == 3
    assert bans.is_banned("2001:db8::4")
    assert not bans.is_banned("2001:db8:0:1::1")
    assert not bans.is_banned("192.0.2.1")


def test_failures_in_other_processes_count_and_bans_of_others_hold(tables: Tables) -> None:
    one = Bans(Policy(2, 600, 600), tables)
    other = Bans(Policy(2, 600, 600), lambda: (tables.failures, tables.bans, 1))
    one.failed("192.0.2.1")
    assert other.failed("192.0.2.1") == 2
    assert one.is_banned("192.0.2.1")


def test_failures_and_bans_are_taken_back_in_time(tables: Tables) -> None:
    bans = Bans(Policy(2, 0.05, 0.1), tables)
    end = bans.start()
    try:
        bans.failed("192.0.2.1")
        eventually(lambda: not list(tables.failures.items()))
        bans.failed("192.0.2.1")
        bans.failed("192.0.2.1")
        assert bans.is_banned("192.0.2.1")
        eventually(lambda: not bans.is_banned("192.0.2.1"))
        eventually(lambda: not list(tables.bans.items()))
        assert not list(tables.failures.items())
    finally:
        end()


def test_the_end_of_a_ban_leaves_a_newer_one(tables: Tables) -> None:
    bans = Bans(Policy(1, 600, 600), tables)
    bans.failed("192.0.2.1")
    bans._lift("192.0.2.1")
    assert bans.is_banned("192.0.2.1")
    tables.bans.put("192.0.2.1", int(time.monotonic() * 1000) - 1, 0)
    assert not bans.is_banned("192.0.2.1")
    bans._lift("192.0.2.1")
    assert not list(tables.bans.items())


def test_a_full_table_bans_nobody_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    small = Tables(rows=1)
    try:
        bans = Bans(Policy(2, 600, 600), small)
        bans.failed("192.0.2.1")
        for _ in range(3):
            assert bans.failed("192.0.2.2") == 2  # so that the reply is as slow as for the last before a ban
        assert not bans.is_banned("192.0.2.2")
        assert [record.levelname for record in caplog.records] == ["ERROR"]
    finally:
        small.failures.close()
        small.bans.close()


# --- what clients see


def handler(home: Path, bans: Bans, authorizer: DummyAuthorizer | None = None, **attributes: Any) -> Any:
    base = type("Base", (BanMixin, handler_class(users(home, authorizer))), {"bans": bans})
    return type("Handler", (base,), attributes)


def fail(client: Client) -> str:
    client.command("USER u", "331")
    return client.command("PASS wrong", "530")


def test_the_reply_takes_twice_as_long_each_time(
    tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bans_module, "MAX_DELAY", 0.05)
    bans = Bans(Policy(9, 600, 600), tables)
    delays: list[float] = []

    def respond(self: Any, line: str, *args: Any, **kwargs: Any) -> None:
        if line.startswith("530"):
            delays.append(self.auth_failed_timeout)
        super(kind, self).respond(line, *args, **kwargs)

    kind = handler(tmp_path, bans, respond=respond, max_login_attempts=9)
    with started(kind) as server, Client(server, login=False) as client, Client(server, login=False) as other:
        client.reply()
        other.reply()
        fail(client)
        fail(other)  # of the same address
        for _ in range(3):
            fail(client)
    assert delays == [0.01, 0.02, 0.04, 0.05, 0.05]


def test_nobody_waits_for_the_reply_to_somebody_else(tmp_path: Path, tables: Tables) -> None:
    kind = handler(tmp_path, Bans(Policy(9, 600, 600), tables), auth_failed_timeout=600)
    with started(kind) as server, Client(server, login=False) as slow:
        slow.reply()
        slow.send("USER u", "PASS wrong")
        eventually(lambda: tables.failures.total("127.0.0.1"))
        with Client(server) as client:
            client.command("NOOP", "200")


def test_a_success_does_not_make_up_for_failures(tmp_path: Path, tables: Tables) -> None:
    kind = handler(tmp_path, Bans(Policy(9, 600, 600), tables))
    with started(kind) as server, Client(server, login=False) as client:
        client.reply()
        fail(client)
        with Client(server):
            assert tables.failures.total("127.0.0.1") == 1


def test_who_is_banned_gets_421_in_sessions_that_exist_too_but_not_after_a_login(
    tmp_path: Path, tables: Tables
) -> None:
    bans = Bans(Policy(2, 600, 600), tables)
    kind = handler(tmp_path, bans)
    with started(kind) as server, Client(server) as inside, Client(server, login=False) as waiting:
        waiting.reply()
        waiting.command("USER u", "331")
        with Client(server, login=False) as client:
            client.reply()
            fail(client)
            fail(client)
        assert waiting.command("PASS p", "421") == f"421 {REFUSAL}"
        assert waiting.ended()
        inside.command("NOOP", "200")


# --- the command


@pytest.mark.program
@pytest.mark.parametrize("concurrency", ["async", "pre-fork"])
def test_the_command_bans_at_connect_in_all_processes(tmp_path: Path, concurrency: str) -> None:
    options = ["--ban", "3/600", "--concurrency", concurrency, "--max-login-attempts", "1"]
    with Command(*options, "-u", "ada", "-P", "x", directory=tmp_path, program=["-c", HASTY]) as server:
        for _ in range(3):
            with ftplib.FTP(timeout=LIMIT) as client:
                client.connect("127.0.0.1", server.port)
                with pytest.raises(ftplib.error_perm, match="530 Authentication failed"):
                    client.login("ada", "wrong")
        server.logged(r"127\.0\.0\.1 is banned for 600 s: 3 failed logins in 600 s")
        for _ in range(10):
            with (
                ftplib.FTP(timeout=LIMIT) as client,
                pytest.raises(ftplib.error_temp, match="421 Too many f"),
            ):
                client.connect("127.0.0.1", server.port)


@pytest.mark.program
def test_0_bans_nobody(tmp_path: Path) -> None:
    options = ["--ban", "0", "--max-login-attempts", "99", "-u", "ada", "-P", "x"]
    with Command(*options, directory=tmp_path, program=["-c", HASTY]) as server:
        with ftplib.FTP(timeout=LIMIT) as client:
            client.connect("127.0.0.1", server.port)
            for _ in range(20):
                with pytest.raises(ftplib.error_perm):
                    client.login("ada", "wrong")
            client.login("ada", "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5/60", Policy(5, 60, 60)), ("5/60/0.5", Policy(5, 60, 0.5)), ("0", Policy(0, 0, 0))],
)
def test_the_option(text: str, expected: Policy) -> None:
    assert Policy.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "5", "5/", "0/60", "5/0", "5/60/0", "-1/60", "5/60/60/60", "a/b", "5/inf"]
)
def test_the_option_when_it_makes_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no FAILURES|has to be more than 0"):
        Policy.parse(text)
