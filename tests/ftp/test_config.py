"""--config, --check and --print-config: what a file says arrives, what is wrong in it is told in one line."""

from __future__ import annotations

import argparse
import ftplib
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import bridge.ftp.command
from bridge.ftp.options import Parser, parser_of
from bridge.ftp.parts import config
from support.cli import LIMIT, Command, run

pytestmark = pytest.mark.program


def make_parser() -> Parser:
    """The command's parser, and options of kinds that it may get."""
    parser = parser_of(bridge.ftp.command.PARTS)
    parser.add_argument("--allow", action="append", type=int, default=[1])
    parser.add_argument("--mode", nargs="?", const="plain", choices=("plain", "fancy"))
    parser.add_argument("--size", type=complex, default=1j)  # a default that has no form in TOML
    parser.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True)
    return parser


def options(path: Path, text: str, *argv: str) -> argparse.Namespace:
    path = path / "ftp.toml"
    path.write_text(text, encoding="utf-8")
    return config.parse(make_parser, ["--config", str(path), *argv])


# --- what a file says


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("port = 2200", "", {"port": 2200}),
        ('port = "2200"', "", {"port": 2200}),
        ("port = 2200", "-p 2300", {"port": 2300}),
        ("port = 2200", "-p 2121", {"port": 2121}),  # the default, but on the command line
        ('range = "8000-8002"', "", {"range": [8000, 8001, 8002]}),
        ("stop-timeout = 0.5", "", {"stop_timeout": 0.5}),
        ('banner = "--help"', "", {"banner": "--help"}),
        ('banner = ""', "", {"banner": ""}),
        ("write = true", "", {"write": True}),
        ("write = false", "", {"write": False}),
        ("write = false", "-w", {"write": True}),
        ("cache = false", "", {"cache": False}),
        ("cache = true", "--no-cache", {"cache": False}),
        ("allow = [2, 3]", "", {"allow": [2, 3]}),
        ("allow = 4", "", {"allow": [4]}),
        ("allow = []", "", {"allow": []}),
        ("", "", {"allow": [1]}),
        ("allow = [2, 3]", "--allow 5 --allow 6", {"allow": [5, 6]}),
        ("mode = true", "", {"mode": "plain"}),
        ("mode = false", "", {"mode": None}),
        ('mode = "fancy"', "", {"mode": "fancy"}),
        ('mode = "fancy"', "--mode", {"mode": "plain"}),
        ('# nothing\nencoding = "latin-1"', "-w", {"encoding": "latin-1", "write": True, "port": 2121}),
    ],
)
def test_a_value_is_that_of_the_option(
    tmp_path: Path, text: str, argv: str, expected: dict[str, Any]
) -> None:
    parsed = vars(options(tmp_path, text, *argv.split()))
    assert {name: parsed[name] for name in expected} == expected


def test_all_else_is_as_without_a_file(tmp_path: Path) -> None:
    parsed = vars(options(tmp_path, "port = 2200"))
    plain = vars(make_parser().parse_args([]))
    assert parsed.keys() == plain.keys()
    assert {name for name in parsed if parsed[name] != plain[name]} == {"config", "port"}


def test_a_server_is_what_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "pub").mkdir()
    (tmp_path / "pub" / "hello.txt").touch()
    (tmp_path / "ftp.toml").write_text(
        'directory = "pub"\nbanner = "from the file"\ninterface = "127.0.0.1"\n'
    )
    with Command("--config", "ftp.toml", directory=tmp_path) as server:
        with ftplib.FTP(timeout=LIMIT) as client:
            client.connect("127.0.0.1", server.port)
            assert client.getwelcome() == "220 from the file"
            client.login()
            assert client.nlst() == ["hello.txt"]


# --- what is wrong in it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 1", "prot: no such option; did you mean port?"),
        ("max_cons = 1", "max_cons: no such option; did you mean max-cons?"),
        ("xyzzy = 1", "xyzzy: no such option"),
        ("port = 70000", "port: port 70000 is not between 0 (any free port) and 65535"),
        ('port = "ftp"', "port: 'ftp' is no port number"),
        ("port = true", "port: takes a value, not true"),
        ("port = [1]", "port: takes one value, no list"),
        ("port = 2024-01-01", "port: 2024-01-01 is neither text nor a number"),
        ("allow = [[1]]", "allow: [1] is neither text nor a number"),
        ('allow = [1, "b"]', "allow: invalid int value: 'b'"),
        ('write = "yes"', "write: 'yes' is neither true nor false"),
        ("write = 1", "write: 1 is neither true nor false"),
        ('range = "9-8"', "range: '9-8' does not rise from a port (1 to 65535) to another"),
        ("[tls]\na = 1", "[tls] or a table: options are written without sections, tls = ..."),
        ('config = "other.toml"', "config: only on the command line"),
        ("check = true", "check: only on the command line"),
        ("help = true", "help: only on the command line"),
    ],
)
def test_an_error_names_the_file_and_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        options(tmp_path, text)
    assert raised.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"python -m bridge.ftp: error: --config: {tmp_path}/ftp.toml: {expected}\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"port = ", "no TOML: "),
        (b"port = 1\nport = 2", "no TOML: "),
        (b'banner = "\xff"', "no TOML: "),
        (b'concurrency = "asink"', "concurrency: invalid choice: 'asink'"),
        (None, "cannot read: No such file or directory"),
    ],
)
def test_a_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, expected: str
) -> None:
    path = tmp_path / "ftp.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as raised:
        config.parse(make_parser, ["--config", str(path)])
    assert raised.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bridge.ftp: error: --config: {path}: {expected}")


def test_a_wrong_combination_is_told_as_ever(tmp_path: Path) -> None:
    (tmp_path / "ftp.toml").write_text('username = "ada"\n')
    result = run(sys.executable, "-m", "bridge.ftp", "--config", "ftp.toml", directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "python -m bridge.ftp: error: --username needs --password\n"


# --- --print-config


SAMPLES = {
    "-p": "2200",
    "-r": "8000-8002",
    "--timeout": "7",
    "--stop-timeout": "0.5",
    "--banner": 'a "banner" with \\, ü and \x7f and \n',
    "-d": "/tmp",
    "--concurrency": "pre-fork",
    "--encoding": "latin-1",
    "-u": "ada",
    "--nat-address": "192.0.2.1",
    "--allow": "7",
    "--size": "3+2j",
}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        config.parse(make_parser, [*argv, "--print-config"])
    assert raised.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        *([name, value] for name, value in SAMPLES.items()),
        [word for item in SAMPLES.items() for word in item],
        ["-w", "--hash", "--no-cache", "--mode", "--allow", "5", "--allow", "6"],
    ],
    ids=lambda argv: argv[0] if argv else "none",
)
def test_what_is_printed_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    text = printed(capsys, *argv)
    again = vars(options(tmp_path, text))
    assert again.pop("config")
    expected = vars(make_parser().parse_args(argv))
    del expected["config"]
    assert again == expected
    path = str(tmp_path / "ftp.toml")
    assert printed(capsys, "--config", path) == text


def test_what_is_printed_is_what_is_in_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ftp.toml"
    path.write_text('range = "8000-8002"\ntimeout = 7\nmode = true\n')
    lines = printed(capsys, "--config", str(path), "--timeout", "8").splitlines()
    assert {'range = "8000-8002"', "timeout = 8", "mode = true", "port = 2121"} <= set(lines)
    assert "# nat-address =" in lines


def test_passwords_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "-u", "ada", "-P", "lovelace")
    assert "lovelace" not in text
    assert "# password = (not shown)\n" in text


def test_bytes_that_are_no_text_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        config.parse(make_parser, ["-d", "caf\udce9", "--print-config"])
    assert raised.value.code == 2
    assert "--print-config: a value is no text in UTF-8" in capsys.readouterr().err


# --- --check


def test_check_says_in_one_line_what_would_be_served(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "bridge.ftp", "--check", "-w", directory=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        f"As it should be: serving {tmp_path} (writable) to anonymous on all interfaces port 2121\n"
    )


def test_check_binds_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        argv = ["--check", "-i", "127.0.0.1", "-p", str(other.getsockname()[1])]
        result = run(sys.executable, "-m", "bridge.ftp", *argv, directory=tmp_path)
    assert result.returncode == 0, result


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-d", "nowhere"], "--directory: 'nowhere' is not a directory"),
        (["--atomic-uploads"], "--atomic-uploads needs --write or --users"),
        (["--tls", "--certfile", "not.pem"], "--certfile: no certificate, PEM, in 'not.pem'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_check_finds_what_a_start_would(tmp_path: Path, argv: list[str], expected: str) -> None:
    if "--tls" in argv:
        pytest.importorskip("OpenSSL")
    (tmp_path / "not.pem").write_text("this is not PEM\n")
    result = run(sys.executable, "-m", "bridge.ftp", "--check", *argv, directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"python -m bridge.ftp: error: {expected}")
