"""The command's log: formats, files, rotation, and that nothing slow, stuck or full stops a session."""

from __future__ import annotations

import ftplib
import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest

import bridge.logs.output
import bridge.logs.writer
from bridge.filesystems.text import printable
from bridge.logs.output import JsonFormatter, Logs, TextFormatter
from bridge.logs.records import xferlog_line
from bridge.logs.writer import Writer
from support.cli import LIMIT, Command, certificate, connect, environment, failure, log_in, run, tls_client

#: An identifier of a session.
SESSION = r"[0-9a-f]{12}"

#: The fields of xferlog(5), as strict as the strictest readers that were found: log2timeline's, with the
#: service names of xferlogd.
XFERLOG = re.compile(
    r"(?P<day>[A-Z][a-z]{2}) (?P<month>[A-Z][a-z]{2}) (?P<date>[ \d]\d) (?P<time>\d\d:\d\d:\d\d) "
    r"(?P<year>\d{4}) (?P<seconds>\d+) (?P<host>[\d.]+) (?P<size>\d+) (?P<path>\S+) (?P<type>[ab]) "
    r"(?P<action>[CUT_]) "
    r"(?P<direction>[oid]) (?P<mode>[agr]) (?P<user>\S+) (?P<service>ftps?) (?P<method>[01]) (?P<id>\S+) "
    r"(?P<status>[ci])"
)


def records(text: str) -> list[dict[str, Any]]:
    """The lines of a JSON log, each of which is an object."""
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    assert all(type(line) is dict for line in lines)
    return lines


def transfers(path: Path) -> list[dict[str, str]]:
    """The lines of an xferlog."""
    matches = [XFERLOG.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(matches), path.read_text()
    return [match.groupdict() for match in matches if match]


def raw(client: ftplib.FTP, line: bytes) -> str:
    """Send what ftplib would not."""
    assert client.sock is not None
    client.sock.sendall(line + b"\r\n")
    return client.getmultiline()


# --- what is in a line


@pytest.mark.program
def test_every_line_of_a_session_names_it_in_text_json_and_xferlog(tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"hello")
    found = {}
    for kind in ("text", "json"):
        options = ["--log-format", kind, "--xferlog", str(tmp_path / f"{kind}.xferlog")]
        with Command(*options, directory=tmp_path) as server:
            with log_in(server) as client:
                client.retrbinary("RETR a file", io.BytesIO().write)
            server.logged("FTP session closed")
            server.stop()
            found[kind] = server.stderr
    ids = re.findall(rf"\] ({SESSION}) 127\.0\.0\.1:\d+-\[", found["text"])
    assert len(ids) == 4, found["text"]  # connect, login, RETR, disconnect
    assert {*ids} == {line["id"] for line in transfers(tmp_path / "text.xferlog")}
    lines = [line for line in records(found["json"]) if "session" in line]
    assert [line["event"] for line in lines] == ["connect", "login", "retr", "disconnect"]
    assert {line["session"] for line in lines} == {
        line["id"] for line in transfers(tmp_path / "json.xferlog")
    }


@pytest.mark.program
def test_json_says_what_happened_to_whom(tmp_path: Path) -> None:
    options = ["-w", "-u", "ada", "-P", "lovelace", "--log-format", "json"]
    with Command(*options, directory=tmp_path) as server:
        with connect(server) as client:
            with pytest.raises(ftplib.error_perm):
                client.login("mallory", "x")
            client.login("ada", "lovelace")
            client.storbinary("STOR one", io.BytesIO(b"12345"))
            client.storbinary("APPE one", io.BytesIO(b"678"))
            client.rename("one", "two")
            client.mkd("dir")
            client.rmd("dir")
            client.delete("two")
            with pytest.raises(ftplib.error_perm):
                client.delete("gone")
            client.quit()
        server.logged('"disconnect"')
        server.stop()
        lines = records(server.stderr)
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert (line["level"], line["logger"], line["pid"]) == ("info", "pyftpdlib", server.pid) or line[
            "logger"
        ].startswith("bridge")
    assert "lovelace" not in server.stderr
    ours = {line["event"]: line for line in lines if "session" in line}
    assert {line["address"] for line in ours.values()} == {"127.0.0.1"}
    assert ours["login_failed"]["user"] == "mallory"
    assert ours["login"]["user"] == ours["disconnect"]["user"] == "ada"
    where = str(tmp_path)
    for event, expected in {
        "stor": {"path": f"{where}/one", "bytes": 5, "completed": True, "code": 226},
        "appe": {"path": f"{where}/one", "bytes": 3, "completed": True, "code": 226},
        "rename": {"path": f"{where}/two", "source": f"{where}/one", "code": 250},
        "mkd": {"path": f"{where}/dir", "code": 257},
        "rmd": {"path": f"{where}/dir", "code": 250},
        "dele": {"path": f"{where}/gone", "code": 550},  # the last one
    }.items():
        assert expected.items() <= ours[event].items()
    assert isinstance(ours["stor"]["seconds"], float)


NASTY = b'x"\\ {}\t\x1b[31m\x07\xc2\x85\xe2\x80\xa8\xe2\x80\xae\n[E 2000-01-01 00:00:00] forged'


@pytest.mark.program
@pytest.mark.parametrize("kind", ["text", "json"])
def test_no_name_breaks_or_forges_a_line(tmp_path: Path, kind: str) -> None:
    home = os.fsencode(tmp_path) + b"/caf\xe9"  # invalid UTF-8, which a client cannot send
    os.mkdir(home)
    xferlog = tmp_path / "xferlog"
    options = ["-w", "-d", os.fsdecode(home), "--log-format", kind, "--xferlog", str(xferlog)]
    with Command(*options, directory=tmp_path) as server:
        with connect(server) as client:
            raw(client, b"USER " + NASTY)
            assert raw(client, b"PASS ").startswith("530")
            client.login()
            open(home + b"/" + NASTY, "w").close()
            assert raw(client, b"DELE " + NASTY).startswith("250")
        server.logged("session closed")
        server.stop()
        text = server.stderr
    line = next(line for line in text.split("\n") if "DELE" in line)
    assert [each["direction"] for each in transfers(xferlog)] == ["d"]
    if kind == "json":
        lines = records(text)
        assert text.isascii()
        (deleted,) = [line for line in lines if line["event"] == "dele"]
        assert deleted["path"] == str(tmp_path) + "/caf\\xe9/" + NASTY.decode()
        assert [line["user"] for line in lines if line["event"] == "login_failed"] == [NASTY.decode()]
    else:
        assert all(re.match(r"\[[IW] ", line) for line in text.splitlines())
        assert re.search(r'caf\\xe9/x"\\ \{\}\\t\\x1b\[31m\\x07\\x85\\u2028\\u202e\\n\[E 2000', line)
        assert all(each.isprintable() for each in text.split("\n"))


def a_record(message: str, *args: object, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    return logging.LogRecord("bridge.x", level, __file__, 1, message, args, more.get("exc_info"))


def test_the_lines_of_a_traceback_are_indented_in_text_and_a_field_in_json() -> None:
    try:
        raise ValueError("bad\n[I 2000-01-01 00:00:00] forged \x1b[31m")
    except ValueError:
        error: Any = sys.exc_info()
    record = a_record("failed: %s", "a\nb", level=logging.ERROR, exc_info=error)
    first, *others = TextFormatter().format(record).split("\n")
    assert first.endswith(r"] failed: a\nb")
    assert len(others) >= 4
    assert all(line.startswith("    ") and "\x1b" not in line for line in others)
    line = json.loads(JsonFormatter().format(record))
    assert (line["event"], line["level"], line["message"]) == ("error", "error", "failed: a\nb")
    assert "forged" in line["exc"]


def test_a_traceback_that_is_logged_as_a_message_is_one_too() -> None:
    trace = 'Traceback (most recent call last):\n  File "x", line 1\nValueError: bad\n'  # pyftpdlib does so
    record = a_record(trace, level=logging.ERROR)
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["exc"]) == ("ValueError: bad", trace.rstrip())
    assert TextFormatter().format(record).split("\n")[1] == "    Traceback (most recent call last):"


@pytest.mark.program
def test_debug_logs_requests_and_replies_as_such_and_no_password(tmp_path: Path) -> None:
    options = ["-D", "-u", "ada", "-P", "lovelace", "--log-format", "json"]
    with Command(*options, directory=tmp_path) as server:
        with log_in(server, "ada", "lovelace"):
            pass
        server.stop()
        lines = records(server.stderr)
        assert "lovelace" not in server.stderr
    assert "<- PASS ******" in [line["message"] for line in lines if line["event"] == "request"]
    assert 230 in [line["code"] for line in lines if line["event"] == "reply"]


# --- xferlog


@pytest.mark.program
def test_xferlog_has_each_transfer_and_deletion(tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL")
    pem = str(certificate(tmp_path))
    home, xferlog = tmp_path / "my home", tmp_path / "xferlog"
    home.mkdir()
    options = ["-w", "-d", str(home), "--xferlog", str(xferlog), "-u", "ada", "-P", "p"]
    with Command(*options, "--tls", "--certfile", pem, directory=tmp_path) as server:
        with log_in(server, "ada", "p") as client:
            client.storbinary("STOR a b", io.BytesIO(b"12345"))
            client.retrlines("RETR a b", lambda line: None)
            client.voidcmd("TYPE I")
            with client.transfercmd("STOR c") as data:
                data.sendall(b"123")
                while "received: 3" not in client.sendcmd("STAT"):
                    pass
                client.putcmd("ABOR")
                client.getmultiline()
            client.getmultiline()
            client.delete("a b")
        with tls_client(server) as client:
            client.login("ada", "p")
            client.prot_p()
            client.retrbinary("RETR c", lambda data: None)
        server.stop()
    got = transfers(xferlog)
    names = ("direction", "status", "type", "size", "service", "mode", "user", "host", "method", "action")
    assert [tuple(line[name] for name in names[:5]) for line in got] == [
        ("i", "c", "b", "5", "ftp"),
        ("o", "c", "a", got[1]["size"], "ftp"),
        ("i", "i", "b", got[2]["size"], "ftp"),
        ("d", "c", "b", "0", "ftp"),
        ("o", "c", "b", got[4]["size"], "ftps"),
    ]
    assert {tuple(line[name] for name in names[5:]) for line in got} == {("r", "ada", "127.0.0.1", "0", "_")}
    where = str(tmp_path).replace(" ", "_") + "/my_home"
    assert [line["path"] for line in got] == [f"{where}/{name}" for name in ("a_b", "a_b", "c", "a_b", "c")]


def test_an_xferlog_line_is_that_of_the_man_page() -> None:
    handler = Namespace(
        remote_ip="192.0.2.1", username="anonymous", session_id="0123456789ab", _current_type="i"
    )
    moment = time.mktime((2026, 11, 5, 14, 3, 30, 0, 0, -1))
    assert xferlog_line(handler, "/é x", "o", False, 20.4, 15, moment) == (
        "Thu Nov  5 14:03:30 2026 20 192.0.2.1 15 /é_x b _ o a anonymous ftp 0 0123456789ab i"
    )
    handler.username, handler.remote_ip = "", ""
    assert xferlog_line(handler, "/x\udcff\u2028", "i", now=moment).endswith(
        " 1 localhost 0 /x__ b _ i r - ftp 0 0123456789ab c"
    )


# --- options


@pytest.mark.program
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--quiet", "--debug"], "--quiet and --debug: only one of them"),
        (["--log-file", "no/such"], "--log-file: cannot append to 'no/such': No such file or directory"),
        (["--xferlog", "."], "--xferlog: cannot append to '.': Is a directory"),
        (["--xferlog", "x", "--log-file", "./x"], "--xferlog and --log-file need a file each"),
        (["--log-file", "pipe"], "--log-file: cannot append to 'pipe': No such device or address"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_errors(tmp_path: Path, options: list[str], expected: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert expected in failure(tmp_path, *options)


#: Runs the command, and says itself where it listens.
TELLING = """
import sys
import bridge.ftp, bridge.ftp.application, bridge.logs.writer
bind = bridge.ftp.application.Application.bind
def telling(site):
    bind(site)
    print(" on %s port %d" % site.server.address, flush=True)
bridge.ftp.application.Application.bind = telling
"""


@pytest.mark.program
def test_quiet_prints_and_logs_nothing_but_what_is_wrong(tmp_path: Path) -> None:
    program = ["-c", TELLING + "sys.exit(bridge.ftp.main())"]
    with Command("--quiet", directory=tmp_path, program=program) as server:
        with log_in(server) as client:
            client.cwd("/")
        code, _ = server.stop()
        assert (code, server.stderr) == (0, "")
        assert server.stdout.count("\n") == 1  # its own
    options = ["--quiet", "--timeout", "1", "--max-cons", "1"]
    with Command(*options, directory=tmp_path, program=program) as server, connect(server):
        with pytest.raises(ftplib.error_temp):
            connect(server)
        server.logged(r"^\[W .*Too many connections")


@pytest.mark.program
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_colours_are_for_terminals_only(tmp_path: Path, variables: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "bridge.ftp", "-p", "0"]
    clean = {name: value for name, value in environment().items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**clean, "TERM": "xterm", **variables},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    try:
        os.close(theirs)
        shown = b""
        while b"passive ports" not in shown:
            shown += os.read(ours, 1000)
        assert (b"\x1b[32m[I " in shown) is not bool(variables)
        assert (b"\x1b" in shown) is not bool(variables)
    finally:
        process.terminate()
        process.wait(LIMIT)
        os.close(ours)


@pytest.mark.program
def test_a_log_file_has_all_of_the_log_and_stderr_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("what was there\n")
    with Command("--log-file", "log", directory=tmp_path) as server:
        with log_in(server):
            pass
        server.stop()
        assert server.stderr == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "what was there"
    assert "concurrency model" in lines[2]
    assert "shutting down" in lines[-1]
    assert all(re.match(r"\[I \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \S", line) for line in lines[1:])


@pytest.mark.program
def test_a_new_log_file_is_not_for_everybody(tmp_path: Path) -> None:
    with Command("--log-file", "log", directory=tmp_path) as server:
        assert (tmp_path / "log").stat().st_mode & 0o007 == 0
        server.stop()


# --- rotation, several processes


@pytest.mark.program
def test_rotation_while_lines_are_written_loses_and_doubles_none(tmp_path: Path) -> None:
    log, xferlog = tmp_path / "log", tmp_path / "xferlog"
    options = ["-w", "--log-file", "log", "--xferlog", "xferlog"]
    number = 0
    with Command(*options, directory=tmp_path) as server, log_in(server) as client:

        def delete_one() -> None:
            nonlocal number
            (tmp_path / f"n{number}").touch()
            client.delete(f"n{number}")
            number += 1

        for turn in range(5):
            for _ in range(20):
                delete_one()
            for path in (log, xferlog):
                path.rename(f"{path}.{turn}")
            server.send(signal.SIGUSR1)
            deadline = time.monotonic() + LIMIT
            while not (log.exists() and xferlog.exists()):
                delete_one()
                assert time.monotonic() < deadline, "no new file"
        delete_one()
        client.quit()
        server.stop()
    for path, pattern in ((log, r"DELE .+/n(\d+) 250$"), (xferlog, r"/n(\d+) a _ d ")):
        parts = [Path(f"{path}.{turn}").read_text() for turn in range(5)] + [path.read_text()]
        assert all(part.endswith("\n") for part in parts)
        assert [int(each) for each in re.findall(pattern, "".join(parts), re.M)] == [*range(number)]


@pytest.mark.program
def test_processes_share_a_log_file_by_whole_lines(tmp_path: Path) -> None:
    options = ["--workers", "2", "--log-file", "log", "--log-format", "json"]
    with Command(*options, directory=tmp_path) as server:
        clients = [log_in(server) for _ in range(8)]
        for _ in range(20):
            for client in clients:
                client.cwd("/")
        for client in clients:
            client.quit()
            client.close()
        server.stop()
    lines = records((tmp_path / "log").read_text())
    assert len([line for line in lines if line.get("command") == "CWD"]) == 160
    assert len({line["session"] for line in lines if line["event"] == "disconnect"}) == 8
    assert len({line["pid"] for line in lines}) == 3


# --- slow, stuck, full

STUCK = (
    TELLING
    + """
import os
fifo = sys.argv.pop(1)
fd = os.open(fifo, os.O_WRONLY)
os.set_blocking(fd, False)
try:
    while True:
        os.write(fd, b"full\\n" * 100)
except BlockingIOError:
    pass
os.set_blocking(fd, True)
os.dup2(fd, 2)
bridge.logs.writer.LIMIT = 10
sys.exit(bridge.ftp.main(sys.argv[1:]))
"""
)


@pytest.mark.program
def test_a_full_pipe_that_nobody_reads_stops_no_session_and_costs_lines_that_are_counted(
    tmp_path: Path,
) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Command(directory=tmp_path, program=["-c", STUCK, fifo]) as server:
            with log_in(server) as client:
                for _ in range(100):
                    client.cwd("/")
                assert client.nlst() == ["fifo"]
                os.set_blocking(reader, True)
                with open(reader, encoding="utf-8", closefd=False) as stream:
                    written = dropped = 0
                    while written + dropped < 106:  # starting (4 lines), connect, login, 100 CWD
                        line = next(stream)
                        if match := re.search(r"^\[W .* (\d+) lines were dropped here", line):
                            dropped += int(match[1])
                        else:
                            written += line.startswith("[I ")
                    assert dropped
                    assert written + dropped == 106
                    client.cwd("/")  # and it goes on
                    assert " CWD " in next(stream)
            assert server.stop()[0] == 0
    finally:
        os.close(reader)


@pytest.mark.program
def test_the_command_ends_although_its_log_is_stuck(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Command(directory=tmp_path, program=["-c", STUCK, fifo]) as server:
            connect(server).close()  # it serves, and is ready for signals
            assert server.stop()[0] == 0
    finally:
        os.close(reader)


@pytest.mark.program
@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no prlimit(2)")
def test_a_log_file_that_cannot_grow_is_waited_for_and_loses_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Command("--log-file", "log", directory=tmp_path) as server, log_in(server) as client:
        process = psutil.Process(server.pid)
        client.cwd("/")
        hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
        process.rlimit(psutil.RLIMIT_FSIZE, (10, hard))
        for _ in range(100):
            client.cwd("/")
        server.logged(r"^log file .*/log.: File too large; ")
        process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
        server.logged("^log file .*/log.: works again")
        client.cwd("/")
        client.quit()
        server.stop()
        assert server.stderr.count("\n") == 2
    assert log.read_text().count(" CWD ") == 102


# --- the writer


def read_all(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_what_was_put_is_written_when_it_is_flushed_or_closed(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path / "log"))
    for number in range(5000):
        writer.put(str(number))
    assert writer.flush(LIMIT)
    assert read_all(tmp_path / "log") == [str(number) for number in range(5000)]
    writer.put("é\udcff")
    writer.close(LIMIT)
    writer.close(LIMIT)
    assert read_all(tmp_path / "log")[5000:] == ["é\\udcff"]


def test_a_writer_that_was_given_nothing_closes_its_file(tmp_path: Path) -> None:
    Writer(str(tmp_path / "log")).close(LIMIT)


def test_lines_for_a_pipe_go_in_pieces_that_do_not_mix() -> None:
    lines = ["x" * 1000] * 9 + ["y" * 9000]
    sizes = [len(block) for block in bridge.logs.writer._blocks(lines, 4096)]
    assert sizes == [4004, 4004, 1001, 9001]
    reader, other = os.pipe()
    try:
        assert bridge.logs.writer._at_once(other) == 4096
    finally:
        os.close(reader)
        os.close(other)


def test_a_file_that_cannot_be_opened_anew_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dir").mkdir()
    writer = Writer(str(tmp_path / "dir" / "log"))
    (tmp_path / "dir").rename(tmp_path / "old")
    writer.reopen()
    writer.put("line")
    writer.close(LIMIT)
    assert read_all(tmp_path / "old" / "log") == ["line"]
    assert "cannot reopen it, goes on with the old file: No such file or directory" in capfd.readouterr().err


def test_a_new_file_helps_one_that_is_full(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.symlink_to("/dev/full")
    writer = Writer(str(log))
    writer.put("line")
    assert not writer.flush(0.1)
    log.unlink()
    writer.reopen()
    writer.close(LIMIT)
    assert read_all(log) == ["line"]
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_a_forked_child_writes_what_it_was_given_and_nothing_of_its_parent(tmp_path: Path) -> None:
    code = f"""
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, Python 3.12
from bridge.logs.writer import Writer
writer = Writer({str(tmp_path / "log")!r})
for number in range(1000):
    writer.put("parent")
pid = os.fork()
writer.put("child" if pid == 0 else "parent")
writer.close(10)
if pid:
    os.waitpid(pid, 0)
"""
    result = run(sys.executable, "-c", code)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(read_all(tmp_path / "log")) == ["child"] + ["parent"] * 1001


@pytest.mark.program
def test_it_works_patched(tmp_path: Path) -> None:
    program = [
        "-c",
        "from gevent import monkey; monkey.patch_all()\nimport sys, bridge.ftp\nbridge.ftp.main()",
    ]
    with Command("--log-file", "log", directory=tmp_path, program=program) as server:
        with log_in(server) as client:
            client.cwd("/")
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_text().count(" CWD ") == 1


def test_what_is_installed_is_taken_out_again(tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in bridge.logs.output.LOGGERS]
    before = [(logger.level, [*logger.handlers]) for logger in loggers], logging.logThreads
    with Logs(str(tmp_path / "log")).installed():
        logging.getLogger("bridge.x").info("%s", "inside")
    logging.getLogger("bridge.x").info("outside")
    assert ([(logger.level, [*logger.handlers]) for logger in loggers], logging.logThreads) == before
    assert [line[-6:] for line in read_all(tmp_path / "log")] == ["inside"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain é ☃.txt", "plain é ☃.txt"),
        ("bad-\udcff", "bad-\\xff"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("line\nfeed\x00", "line\\nfeed\\x00"),
    ],
)
def test_a_name_is_shown_as_it_is_if_that_can_be_printed(name: str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode()
