"""What the command says: --help and README's tables, errors, and the lines at its start.

The `curl` line that it prints is run by a shell, as whoever copies it would.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bridge.ftp.command
import options_table
from bridge.ftp.options import parser_of
from support.cli import LIMIT, Command, certificate, environment, run
from support.servers import needs_ipv6

pytestmark = pytest.mark.program

PARSER = parser_of(bridge.ftp.command.PARTS)

#: Defaults that --help names by a word: a path that depends on where one is, a text with pyftpdlib's version.
IN_WORDS = {"directory", "banner"}


# --- --help, and README's tables


def test_help_shows_every_option_in_a_group_and_no_colours() -> None:
    result = run(sys.executable, "-m", "bridge.ftp", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python -m bridge.ftp [OPTION ...]\n")
    assert "\x1b" not in result.stdout
    for action in PARSER.options():
        for name in action.option_strings:
            assert re.search(rf"(?<!\S){re.escape(name)}(?=[,\s])", result.stdout), name
    grouped = {action for title, actions in PARSER.groups() for action in actions if title != "options"}
    assert grouped == set(PARSER.options())


def option_id(value: object) -> str:
    return value.option_strings[-1] if isinstance(value, argparse.Action) else ""


@pytest.mark.parametrize("action", PARSER.options(), ids=option_id)
def test_help_names_the_default_that_is_in_force(action: argparse.Action) -> None:
    """By %(default), so that it cannot drift from the value."""
    text = action.help or ""
    assert text
    plain = text.replace("%(default)", "")
    assert not re.search(r"default[:=]? *[\d.]+", plain), text
    has_none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
    if has_none or action.dest in IN_WORDS:
        assert "%(default)" not in text
    else:
        assert "%(default)" in text
        assert options_table.explained(PARSER, action)[1]


@pytest.mark.parametrize("action", PARSER.options(), ids=option_id)
def test_readme_has_every_option(action: argparse.Action) -> None:
    readme = options_table.README.read_text()
    listed = readme[readme.index(options_table.BEGIN) : readme.index(options_table.END)]
    [row] = [line for line in listed.splitlines() if line.startswith(f"| {options_table.spelled(action)} |")]
    assert len(row.split(" | ")) >= 3


def test_readme_is_current() -> None:
    readme = options_table.README.read_text()
    assert readme == options_table.updated(readme, PARSER), "run python -m tests.options_table --update"


def test_the_table_is_printed() -> None:
    done = run(sys.executable, str(Path(options_table.__file__)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == options_table.tables(PARSER) + "\n"


def test_a_table_says_the_default_and_the_unit() -> None:
    rows = options_table.tables(PARSER).splitlines()
    assert (
        "| `--timeout SECONDS` | end sessions and stalled transfers after this time, 0 for never | 300 | s |"
        in rows
    )
    assert "| `-w, --write` | let users change files | read-only |" in rows
    assert "| `-p, --port PORT` | port to listen on, 0 for any free one | 2121 |" in rows


# --- errors


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--usrname ada", "unrecognized arguments: --usrname ada; did you mean --username?"),
        ("--prot=21", "unrecognized arguments: --prot=21; did you mean --port?"),
        ("--write-files", "unrecognized arguments: --write-files; did you mean --write?"),
        ("--xyzzy", "unrecognized arguments: --xyzzy"),
        ("directory", "unrecognized arguments: directory"),
        ("--max-con 3", "ambiguous option: --max-con could match --max-cons, --max-cons-per-ip"),
        ("-p", "argument -p/--port: expected one argument"),
        ("-p 70000", "argument -p/--port: port 70000 is not between 0 (any free port) and 65535"),
        ("--write=yes", "argument -w/--write: ignored explicit argument 'yes'"),
        ("--atomic-uploads", "--atomic-uploads needs --write or --users"),
    ],
)
def test_an_error_is_one_line_that_names_the_option(tmp_path: Path, argv: str, expected: str) -> None:
    result = run(sys.executable, "-m", "bridge.ftp", *argv.split(), directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"python -m bridge.ftp: error: {expected}\n"


def test_a_choice_that_is_none_suggests_the_nearest(tmp_path: Path) -> None:
    """The list of choices is written with quotes, or without from Python 3.12 on."""
    result = run(sys.executable, "-m", "bridge.ftp", "--concurrency", "pre-frok", directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"python -m bridge.ftp: error: argument --concurrency: invalid choice: 'pre-frok' "
        r"\(choose from .*\); did you mean pre-fork\?\n",
        result.stderr,
    )


# --- the start


def connect_line(server: Command) -> str:
    return server.printed("^Connect: ").removeprefix("Connect:").strip()


def pasted(command: str, password: str = "") -> subprocess.CompletedProcess[str]:
    """Run by a shell, without a terminal: curl reads the password that it asks for from stdin."""
    return subprocess.run(
        ["/bin/sh", "-c", command],
        input=f"{password}\n",
        env=environment(),
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(
    ("options", "password"),
    [
        ([], ""),
        (["-i", "127.0.0.2"], ""),
        pytest.param(["-i", "::1"], "", marks=needs_ipv6),
        pytest.param(["-i", "::"], "", marks=needs_ipv6),
        (["-u", "ada", "-P", "lovelace"], "lovelace"),
        (["-u", "it's ada & co", "-P", "pass word"], "pass word"),
        (["--tls", "-u", "ada", "-P", "lovelace", "--tls-control-required"], "lovelace"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_that_is_printed_works(tmp_path: Path, options: list[str], password: str) -> None:
    (tmp_path / "pub").mkdir()
    (tmp_path / "pub" / "hello.txt").touch()
    if "--tls" in options:
        pytest.importorskip("OpenSSL")
        options = [*options, "--certfile", str(certificate(tmp_path))]
    with Command(*options, directory=tmp_path / "pub") as server:
        command = connect_line(server)
        assert password == "" or password not in server.stdout
        done = pasted(command, password)
        assert done.returncode == 0, (command, done)
        assert re.fullmatch(r"-rw.* hello\.txt\n", done.stdout), (command, done)


def start_on_a_terminal(directory: Path, **variables: str) -> str:
    """What is printed on a terminal up to the line about Ctrl-C."""
    terminal, its_end = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "bridge.ftp", "-p", "0"],
            cwd=directory,
            env={**environment(), "TERM": "xterm", **variables},
            stdin=subprocess.DEVNULL,
            stdout=its_end,
            stderr=subprocess.DEVNULL,
        )
        try:
            os.close(its_end)
            printed = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while b"Ctrl-C" not in printed:
                    printed += os.read(terminal, 4096)
        finally:
            process.kill()
            process.wait(LIMIT)
    finally:
        os.close(terminal)
    return printed.decode()


def test_on_a_terminal_it_is_coloured(tmp_path: Path) -> None:
    printed = start_on_a_terminal(tmp_path, NO_COLOR="")
    assert re.search(r"^\x1b\[1mServing .* port \d+\x1b\[0m\r$", printed, re.MULTILINE)
    assert re.search(r"^Connect:  \x1b\[32mcurl ftp://localhost:\d+/\x1b\[0m\r$", printed, re.MULTILINE)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_that_wants_no_colours_gets_none(tmp_path: Path, variables: dict[str, str]) -> None:
    printed = start_on_a_terminal(tmp_path, **variables)
    assert "Ctrl-C" in printed
    assert "\x1b" not in printed


def test_a_pipe_gets_no_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Command(directory=tmp_path) as server:
        server.printed("^Stop: ")
        assert "\x1b" not in server.stdout
