"""Attacks, where they come from, what we do, and the tests that show it, here and elsewhere.

Run by `pytest tests/proof/test_security*.py`, against the command as its users start it; `--proof` and
`--long` try more random paths and arguments, more races and larger floods. "pyftpdlib's" are weaknesses of
pyftpdlib's own servers and handlers, which its FTPServer has on GeventIOLoop, too; the command and
GeventFTPServer do not have them (bridge/session/). CVEs of other servers are
attacks that we try here.

Paths
  `..`, absolute, deep, encoded                      CVE-2007-6736 (pyftpdlib)
    Resolved as text; the top of the home is its own parent; nothing is decoded.
    -> test_security.test_no_path_leads_out
  symbolic links out of the home, STOU's too         CVE-2008-7262 (pyftpdlib)
    550. STOU is pyftpdlib's. FTP has no command that makes links.
    -> test_security.test_no_path_leads_out, test_authorizer.test_no_command_leaves_the_home
    -> test_hardening.test_stou_stays_in_the_home
  a link swapped in between look and deed
    With --users the deed is done on what was looked at (filesystems/jail.py). Without, whoever can write to
    the directory by other ways than FTP wins.
    -> test_security.test_a_race_with_a_link_is_never_won
    -> test_jail.test_a_link_swapped_in_after_the_check_leads_nowhere
  RNFR in one home, RNTO in another
    A new login forgets RNFR.
    -> test_security.test_a_rename_does_not_cross_homes
  NUL in a path                                      (pyftpdlib's: the session ends, with a traceback)
    501.
    -> test_hardening.test_a_nul_is_refused_and_the_session_goes_on
  SITE EXEC, SITE CPFR, SITE CHMOD 4777              CVE-2015-3306 (ProFTPD)
    There are no such commands. CHMOD sets no set-user-id.
    -> test_security_data.test_site_runs_and_copies_nothing
    -> test_hardening.test_chmod_lends_nobody_the_servers_identity
  patterns that expand                               CVE-2001-1501, CVE-2011-0762, CVE-2011-0418
    Nothing is expanded.
    -> test_security_data.test_patterns_are_names

Data connections
  bounce: PORT and EPRT to others                    RFC 2577, 3; CVE-1999-0017; CVE-2007-6741 (pyftpdlib)
    501, and no packet is sent: not to other addresses, nor to ports below 1024.
    -> test_security_data.test_data_goes_to_nobody_else, test_security_data.test_no_other_host_is_connected_to
  somebody else at the passive port                  CVE-1999-0351
    Is closed at once; the client gets its data, and no reply for what others do (pyftpdlib's: a 425).
    -> test_hardening.test_a_stranger_at_the_passive_port_is_no_reply
    -> test_security_data.test_a_thief_gets_nothing, test_protocol.test_data_from_another_client_is_refused
    -> test_security_data.test_a_thief_gets_nothing_from_pyftpdlib_s_server
  ... from the same address
    With --require-session-reuse only the client's TLS session; without, whoever is first.
    -> test_tls.test_a_data_connection_must_resume_the_session_of_its_control_connection
  guessing the next port                             RFC 2577, 8; CVE-2007-6738 (pyftpdlib)
    Ports are random.
    -> test_security_data.test_ports_are_not_in_order
  taking all passive ports
    425 for others until a port is free again, after 30 s at most. An address can take --max-cons-per-ip.
    -> test_security_limits.test_one_address_does_not_get_all_passive_ports
    -> test_resource_exhaustion.test_all_passive_ports_in_use_is_425_and_no_content_is_mixed_up
  a running transfer given another's file            (pyftpdlib's)
    503.
    -> test_peers.test_a_transfer_is_not_mixed_up_with_another

Names
  line breaks in replies and listings                (pyftpdlib's)
    `?`. Quotes in 257 are doubled (RFC 959).
    -> test_hardening.test_a_name_adds_no_line_to_replies_and_listings
    -> test_security_data.test_quotes_are_doubled
  forged lines of logs and xferlog, escape sequences
    Escaped.
    -> test_logs.test_no_name_breaks_or_forges_a_line, test_security_data.test_a_user_name_is_no_log_line
    -> test_logs.test_the_lines_of_a_traceback_are_indented_in_text_and_a_field_in_json
  script in the status page
    Escaped, and a Content-Security-Policy. No label of a metric is a name that clients choose.
    -> test_app.test_names_are_escaped_wherever_they_stand, test_security_data.test_names_are_no_labels

Logins
  guessing passwords                                 RFC 2577, 5; CVE-2008-7263, CVE-2007-6737 (pyftpdlib)
    3 in a session, each answer later than the one before, then a ban. Sessions that are logged in go on:
    nobody is thrown out for a neighbour. New ones from a banned address (IPv6: /64) are refused, to
    neighbours, too.
    -> test_bans.test_the_reply_takes_twice_as_long_each_time
    -> test_command.test_max_login_attempts_ends_the_session
    -> test_bans.test_the_command_bans_at_connect_in_all_processes
    -> test_bans.test_who_is_banned_gets_421_in_sessions_that_exist_too_but_not_after_a_login
    -> test_bans.test_a_full_table_bans_nobody_and_is_said_once
    -> test_hardening.test_auth_wins_no_time_and_no_attempts
  finding out who exists                             RFC 2577, 7
    The same replies, at the same cost.
    -> test_security_limits.test_unknown_users_hear_the_same
    -> test_authorizer.test_every_login_takes_one_scrypt_of_the_same_cost
  never logging in
    `--timeout` counts from the connection on, not from the last command (pyftpdlib's).
    -> test_security_limits.test_who_does_not_log_in_has_no_longer_than_the_timeout
    -> test_hardening.test_commands_win_no_time_to_log_in
    -> test_hardening.test_a_login_that_waits_is_not_too_late

Time and memory
  the rest of a long command obeyed                  CVE-2008-4247 (BSD's ftpd; pyftpdlib's)
    Thrown away.
    -> test_hardening.test_the_rest_of_a_command_that_is_too_long_is_no_command
    -> test_hardening.test_the_command_is_strict_in_worker_processes_too
  commands without an end, replies nobody reads      CVE-2007-6739 (pyftpdlib)
    Take no memory.
    -> test_security_limits.test_what_has_no_end_takes_no_memory
    -> test_peers.test_a_client_that_floods_and_never_reads_is_given_up
    -> test_peers.test_a_client_that_reads_late_gets_every_reply_and_takes_no_memory
    -> test_peers.test_a_flood_takes_turns_with_other_sessions
  many slow connections                              CVE-2007-6750 (Slowloris)
    Count for --max-cons-per-ip before they say anything.
    -> test_security_limits.test_silent_connections_count
    -> test_workers.test_limits_hold_for_all_workers_together
    -> test_transport.test_a_client_that_does_not_go_on_costs_nothing_and_is_closed
    -> test_app.test_a_client_that_says_nothing_loses_its_place
  connections closed before they are accepted        CVE-2010-3494 (pyftpdlib)
    Nothing happens.
    -> test_security_limits.test_connections_that_are_gone_at_once
  huge numbers, far dates, arguments without end
    A reply; the session goes on; no file grows.
    -> test_security_limits.test_whatever_the_argument_the_session_goes_on
    -> test_security_limits.test_rest_makes_no_holes
  PROXY headers that are none, or not to be believed
    The connection is closed.
    -> test_protocol.test_what_is_no_header_is_an_error
    -> test_protocol.test_a_header_that_trickles_in_has_no_longer
    -> test_protocol.test_a_header_from_elsewhere_is_not_believed

TLS
  commands in the clear behind AUTH                  CVE-2011-0411, CVE-2011-1575 (Pure-FTPd; pyftpdlib's)
    Dropped; nothing is replied in the clear after 234.
    -> test_security_limits.test_nothing_from_before_tls_is_obeyed_in_it
    -> test_peers.test_what_follows_auth_tls_in_the_clear_is_dropped_and_does_not_spin
  a login in the clear that lives on in TLS          RFC 2228 (pyftpdlib's)
    One logs in again.
    -> test_hardening.test_after_auth_one_logs_in_anew
  going back to the clear: CCC, PROT C, plain data
    Refused with --tls-required. Where PROT P holds, a plain data connection gets nothing.
    -> test_security_limits.test_tls_is_not_left, test_hardening.test_prot_c_does_not_get_around_tls
    -> test_tls.test_tls_required_is_for_control_or_data_connections_or_both
  renegotiation, old versions                        CVE-2009-3555
    Refused.
    -> test_tls.test_renegotiation_is_refused, test_tls.test_nothing_older_than_tls_1_2_is_spoken

Status page
  other methods and paths, other pages' forms, names that are made to point here, too much
    Refused.
    -> test_app.test_there_is_nothing_else, test_app.test_other_methods_are_refused
    -> test_app.test_what_another_page_sends_is_refused_even_with_password_and_token
    -> test_app.test_without_a_password_no_name_of_the_internet_can_point_at_the_page
    -> test_app.test_with_a_password_the_page_is_for_those_who_have_it, test_app.test_a_form_has_a_size
    -> test_app.test_without_a_password_the_page_is_on_loopback_only
    -> test_app.test_without_the_token_nothing_happens
"""

from __future__ import annotations

import ast
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from proof.attacker import CHEAP, SECRET, Attacker, state_of
from support.cli import LIMIT, Command
from support.effort import Effort

pytestmark = pytest.mark.program

HERE = Path(__file__).parent

#: Random paths, and rounds of a race.
MANY = {"short": 40, "proof": 1500, "long": 100_000}
ROUNDS = {"short": 100, "proof": 5000, "long": 300_000}


@pytest.mark.parametrize("file", ["test_security.py", "test_security_data.py", "test_security_limits.py"])
def test_the_table_above_is_true(file: str) -> None:
    """Every test in it exists, and every test of these files is in it."""
    named = {tuple(name.split(".")) for name in re.findall(r"\btest_\w+\.test_\w+", __doc__ or "")}
    for module, name in named:
        paths = HERE.parent.rglob(f"{module}.py")
        assert any(name in _tests_of(path) for path in paths), (module, name)
    missing = _tests_of(HERE / file) - {name for module, name in named if f"{module}.py" == file}
    assert missing <= {"test_the_table_above_is_true"}


def _tests_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef) and each.name[:5] == "test_"}


# --- paths


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Has links to what is outside of it; beside it lie another's home, and secrets."""
    home = tmp_path / "srv" / "ada"
    (home / "dir").mkdir(parents=True)
    (home / "dir" / "file").write_text("mine")
    outside = tmp_path / "srv" / "eve"
    (outside / "dir").mkdir(parents=True)
    (outside / "secret").write_bytes(SECRET)
    for directory in (outside, outside / "dir", home.parent, tmp_path):
        (directory / "eves-diary").touch()  # seen in a listing of what is outside, and nobody's to make
    (home / "out").symlink_to(outside)
    (home / "up").symlink_to("../..")
    (home / "root").symlink_to("/")
    (home / "leak").symlink_to("../eve/secret")
    (home / "loop").symlink_to("loop")
    (home / "far").symlink_to("dir/../out/../eve/secret")
    (tmp_path / "users").write_text(f"ada:{CHEAP}:ada:write\neve:{CHEAP}:eve:write\n")
    return home


#: With whom: anonymous of the quickstart with --write, and a user of a file.
WHO = {"anonymous": ("-w", "-d", "srv/ada"), "ada": ("--users", "users", "-d", "srv")}


@pytest.fixture(params=WHO)
def victim(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Iterator[tuple[Command, str]]:
    """The command, a user of it; nothing outside of the home may have changed in the end."""
    before = state_of(tmp_path / "srv" / "eve")
    with Command(*WHO[request.param], "--hash", directory=tmp_path) as server:
        yield server, request.param
        assert "Traceback" not in server.stderr
    assert state_of(tmp_path / "srv" / "eve") == before


COMMANDS = [
    "RETR",
    "STOR",
    "STOU",
    "APPE",
    "LIST",
    "NLST",
    "MLSD",
    "STAT",
    "MLST",
    "SIZE",
    "MDTM",
    "CWD",
    "DELE",
    "RMD",
    "MKD",
    "RNFR",
    "HASH",
    "XCRC",
]
COMMANDS += ["SITE CHMOD 777", "MFMT 20200101000000"]
PARTS = [
    "..",
    "...",
    ".",
    "dir",
    "out",
    "up",
    "root",
    "leak",
    "loop",
    "far",
    "eve",
    "secret",
    "file",
    "srv",
    "new",
    "%2e%2e",
    "..%2f",
    "%252e%252e",
    "~",
    "~eve",
    "C:",
]
PARTS += ["", " ", ".. ", "..\t", "..\\", "..\\..\\", "‥", "\xc0\xae"]


def test_no_path_leads_out(victim: tuple[Command, str], tmp_path: Path, effort: Effort) -> None:
    server, user = victim
    outside = str(tmp_path / "srv" / "eve")
    paths = ["out/secret", "leak", "far", "up/srv/eve/secret", f"root{outside}/secret", f"{outside}/secret"]
    paths += [
        "../eve/secret",
        "/../eve/secret",
        "dir/../../eve/secret",
        "../" * 500 + outside,
        "out",
        "up",
        "root",
    ]
    paths += [
        "/".join(["dir/.."] * 200) + "/out/secret",
        "a/" * 800,
        "x" * 300,
        "loop",
        "loop/" * 40,
        "out/new",
    ]
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    tries = [(command, path) for path in paths for command in COMMANDS]
    for _ in range(MANY[effort]):
        path = "/" * chance.randrange(3) + "/".join(chance.choices(PARTS, k=chance.randint(1, 8)))
        tries.append((chance.choice(COMMANDS), path))
    with Attacker(server, user) as attacker:
        for command, path in tries:
            attacker.do("CWD /")
            reply, data = attacker.attempt(f"{command} {path}", sent=b"by the attacker")
            assert reply[:1] in b"2345", (command, path, reply)
            assert SECRET not in data, (command, path)
            assert not re.search(rb"eves-diary|\betc\b", data), (command, path, data)
            if path in paths and any(part in path for part in ("secret", outside)):
                assert reply[:1] in b"45", (command, path, reply)
            if reply.startswith(b"350"):
                attacker.do("RNTO stolen")


def test_a_race_with_a_link_is_never_won(home: Path, tmp_path: Path, effort: Effort) -> None:
    """While commands run, `ada/race` is a directory and a link to another's by turns."""
    outside = home.parent / "eve"
    before = state_of(outside)
    (home / "race").mkdir()
    (home / "link").symlink_to(outside)
    (home / "race" / "secret").write_text("mine")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            (home / "race").rename(home / "aside")
            (home / "link").rename(home / "race")
            (home / "race").rename(home / "link")
            (home / "aside").rename(home / "race")

    thread = threading.Thread(target=swap)
    commands = [
        f"{command} race/secret" for command in ("RETR", "STOR", "SITE CHMOD 777", "MFMT 20200101000000")
    ]
    commands += [f"{command} race/new" for command in ("MKD", "RMD", "STOU")] + [
        "NLST race",
        "SIZE race/secret",
    ]
    ended: Counter[bytes] = Counter()
    with Command(*WHO["ada"], directory=tmp_path) as server, Attacker(server, "ada") as attacker:
        thread.start()
        try:
            while ended.total() < ROUNDS[effort] or not ended[b"2"] or not ended[b"5"]:
                for command in commands:
                    reply, data = attacker.attempt(command, sent=b"mine")
                    assert reply, command
                    assert SECRET not in data
                    assert b"eves-diary" not in data
                    ended[reply[:1]] += 1
        finally:
            stop.set()
            thread.join(LIMIT)
        assert "Traceback" not in server.stderr
    assert state_of(outside) == before


def test_a_rename_does_not_cross_homes(home: Path, tmp_path: Path) -> None:
    with Command(*WHO["ada"], directory=tmp_path) as server, Attacker(server, "ada") as attacker:
        assert attacker.do("RNFR dir/file").startswith(b"350")
        for path in ("../eve/file", "/../eve/file", f"{home.parent}/eve/file", "out/file"):
            assert attacker.do(f"RNTO {path}").startswith(b"55")
            attacker.do("RNFR dir/file")
        for command, code in (("USER eve", b"331"), ("PASS p", b"230"), ("RNTO mine", b"503")):
            assert attacker.do(command).startswith(code)
    assert (home / "dir" / "file").read_text() == "mine"
    assert sorted(os.listdir(home.parent / "eve")) == ["dir", "eves-diary", "secret"]
