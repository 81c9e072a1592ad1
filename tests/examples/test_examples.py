"""The examples do what their docstrings promise: each runs as its user runs it, beside real clients."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import io
import os
import select
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.examples import EXAMPLES, PATIENCE, PYTHON, Program, Run, assert_clean_stop, example, session

pytestmark = pytest.mark.program

MISSING = [
    *(["redis-server is not installed"] if shutil.which("redis-server") is None else []),
    *(["the redis package is not installed"] if find_spec("redis") is None else []),
]
needs_redis = pytest.mark.skipif(bool(MISSING), reason=" and ".join(MISSING))


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as response:
        return str(response.read().decode())


@pytest.mark.parametrize("name", ["uploads_page", pytest.param("redis_authorizer", marks=needs_redis)])
def test_import_has_no_effects(run: Run, name: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {name}\n"
        "from gevent import monkey; from gevent._hub_local import get_hub_if_exists\n"
        "print(get_hub_if_exists(), monkey.saved, callable({0}.build), callable({0}.main))\n"
    ).format(name)
    program = run(*PYTHON, "-c", code)
    program.expect(r"^None \{\} True True\n$")
    assert program.process.wait(PATIENCE) == 0
    assert not program.errors


# --- examples/uploads_page.py


@pytest.fixture
def uploads(run: Run, tmp_path: Path) -> tuple[Program, int, int]:
    home = tmp_path / "uploads"
    home.mkdir()
    program = example(run, "uploads_page.py", "--ftp-port", "0", "--http-port", "0", "--directory", str(home))
    found = program.expect(r"FTP:  ftp://127\.0\.0\.1:(\d+)/\nPage: http://127\.0\.0\.1:(\d+)/\n")
    return program, int(found[1]), int(found[2])


def rows(page: str) -> list[list[str]]:
    return [line.split("<td>")[1:] for line in page.splitlines() if line.startswith("<tr><td>")]


def test_page_shows_uploads_newest_first(uploads: tuple[Program, int, int], tmp_path: Path) -> None:
    _, ftp_port, http_port = uploads
    assert rows(fetch(http_port)) == []
    with session(ftp_port, "alice", "secret") as alice, session(ftp_port, "bob", "secret") as bob:
        alice.storbinary("STOR first.bin", io.BytesIO(b"x" * 300_000))
        bob.storbinary("STOR <b>&.txt", io.BytesIO(b"1234"))
    newest, oldest = rows(fetch(http_port))
    assert newest[:3] == ["&lt;b&gt;&amp;.txt", "4", "bob from 127.0.0.1"]
    assert oldest[:3] == ["first.bin", "300000", "alice from 127.0.0.1"]
    assert oldest[3] <= newest[3]
    assert (tmp_path / "uploads" / "first.bin").read_bytes() == b"x" * 300_000


def test_page_answers_while_sessions_are_open(uploads: tuple[Program, int, int]) -> None:
    _, ftp_port, http_port = uploads
    assert "Sessions: 0" in fetch(http_port)
    with session(ftp_port, "alice", "secret") as alice, session(ftp_port):
        with alice.transfercmd("STOR half.bin") as data:  # open, not yet sent
            page = fetch(http_port)
            assert "Sessions: 2" in page
            assert "<li>alice from 127.0.0.1" in page
            assert "<li>(not logged in) from" in page
            assert rows(page) == []
            data.sendall(b"now")
        assert alice.voidresp().startswith("226")
        assert [row[0] for row in rows(fetch(http_port))] == ["half.bin"]
        assert alice.voidcmd("QUIT").startswith("221")
        assert alice.file is not None
        assert alice.file.read() == ""  # until the server has closed the session
        page = fetch(http_port)
        assert "Sessions: 1" in page
        assert "<li>alice" not in page


def test_other_pages_are_not_found(uploads: tuple[Program, int, int]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{uploads[2]}/other", timeout=PATIENCE)
    caught.value.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_uploads_page_stops_cleanly(uploads: tuple[Program, int, int], number: int) -> None:
    program, ftp_port, _ = uploads
    with session(ftp_port, "alice", "secret"):
        assert_clean_stop(program, number)


def until_refused(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED:
                return
    pytest.fail(f"port {port} still accepts")


def test_uploads_page_lets_both_servers_finish(uploads: tuple[Program, int, int], tmp_path: Path) -> None:
    program, ftp_port, http_port = uploads
    with session(ftp_port, "alice", "secret") as alice, alice.transfercmd("STOR file") as data:
        data.sendall(b"first ")
        with socket.create_connection(("127.0.0.1", http_port), PATIENCE) as request:
            request.sendall(b"GET / HTTP/1.0\r\n")  # and not yet all of it
            fetch(http_port)  # so the one before was accepted
            program.process.send_signal(signal.SIGTERM)
            until_refused(ftp_port)
            until_refused(http_port)
            request.sendall(b"\r\n")
            assert request.recv(12) == b"HTTP/1.1 200"
        data.sendall(b"second")
        data.close()
        assert alice.voidresp().startswith("226")
        assert program.process.wait(PATIENCE) == 0, program.errors
    assert (tmp_path / "uploads" / "file").read_bytes() == b"first second"


# --- examples/redis_authorizer.py


class RedisSetup:
    """A private Redis server with the user alice, and the example that asks it."""

    def __init__(self, run: Run, directory: Path, sockets: Path) -> None:
        socket = sockets / "redis.sock"
        self.url = f"unix://{quote(str(socket))}"
        self.redis = run("redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "")
        self.redis.expect("ready to accept connections at")
        self.home = directory / "home"
        self.home.mkdir()
        (self.home / "file.txt").write_bytes(b"content")
        self.run = run
        self.add("alice", "secret")
        self.program = example(run, "redis_authorizer.py", "--redis", self.url, "--port", "0")
        self.port = int(self.program.expect(r"FTP: ftp://127\.0\.0\.1:(\d+)/\n")[1])

    def add(self, name: str, password: str) -> None:
        added = example(
            self.run, "redis_authorizer.py", "--redis", self.url, "add", name, password, str(self.home)
        )
        assert added.process.wait(PATIENCE) == 0, added.errors
        assert not added.errors

    def client(self) -> Any:
        import redis

        return contextlib.closing(redis.Redis.from_url(self.url, socket_timeout=PATIENCE))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Redis keeps its socket, and says nothing."""
        self.redis.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.redis.process.pid, os.WSTOPPED)
        try:
            yield
        finally:
            self.redis.process.send_signal(signal.SIGCONT)


@pytest.fixture
def setup(run: Run, tmp_path: Path, short_path: Path) -> RedisSetup:
    return RedisSetup(run, tmp_path, short_path)


def start_login(ftp: ftplib.FTP, user: str, password: str) -> None:
    """Send USER and PASS and leave the reply to PASS to `voidresp`."""
    assert ftp.sendcmd(f"USER {user}").startswith("331")
    ftp.putcmd(f"PASS {password}")


def answered(ftp: ftplib.FTP) -> bool:
    assert ftp.sock is not None
    return bool(select.select([ftp.sock], [], [], 0)[0])


@needs_redis
def test_users_log_in_as_stored(setup: RedisSetup) -> None:
    with session(setup.port, "alice", "secret") as ftp:
        assert ftp.nlst() == ["file.txt"]
        ftp.storbinary("STOR new.txt", io.BytesIO(b"new"))
    with setup.client() as client:
        assert client.hset("ftp:user:alice", "perm", "elr") == 0
    with session(setup.port, "alice", "secret") as ftp:
        with pytest.raises(ftplib.error_perm, match=r"^550"):
            ftp.delete("new.txt")
        setup.add("alice", "other")
        ftp.voidcmd("NOOP")
    with session(setup.port, "alice", "other") as ftp:
        ftp.delete("new.txt")
        assert_clean_stop(setup.program, signal.SIGTERM)


@needs_redis
def test_wrong_ones_are_refused(setup: RedisSetup) -> None:
    with setup.client() as client:
        client.hset("ftp:user:half", "perm", "elr")
        record = client.hgetall("ftp:user:alice") | {b"home": b"/nowhere/at/all"}
        client.hset("ftp:user:homeless", mapping=record)
    refused = {
        ("alice", "wrong"): "530 Wrong user name or password.",
        ("nobody", "secret"): "530 Wrong user name or password.",
        ("half", "secret"): "530 Wrong user name or password.",
        ("homeless", "secret"): "530 This account is not set up correctly.",
    }
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(session(setup.port)) for _ in refused]
        for ftp, (user, password) in zip(sessions, refused, strict=True):
            start_login(ftp, user, password)
        for ftp, reply in zip(sessions, refused.values(), strict=True):
            with pytest.raises(ftplib.error_perm) as caught:
                ftp.voidresp()
            assert str(caught.value) == reply
        ftp = sessions[0]
        assert ftp.login("alice", "secret").startswith("230")


@needs_redis
def test_slow_redis_stalls_only_the_login(setup: RedisSetup) -> None:
    with session(setup.port, "alice", "secret") as busy, session(setup.port) as waiting:
        with setup.stopped():
            start_login(waiting, "alice", "secret")
            assert busy.voidcmd("NOOP").startswith("200")
            assert busy.nlst() == ["file.txt"]
            with session(setup.port) as other:
                assert other.getwelcome()
            assert not answered(waiting)
        assert waiting.voidresp().startswith("230")
        assert waiting.nlst() == ["file.txt"]
        assert_clean_stop(setup.program, signal.SIGTERM)


@needs_redis
def test_stop_while_a_login_waits(setup: RedisSetup) -> None:
    with session(setup.port) as busy, session(setup.port) as waiting, setup.stopped():
        start_login(waiting, "alice", "secret")
        busy.voidcmd("NOOP")
        assert_clean_stop(setup.program, signal.SIGTERM)


@needs_redis
def test_without_redis_logins_are_refused(setup: RedisSetup) -> None:
    with session(setup.port, "alice", "secret") as earlier, session(setup.port) as ftp:
        setup.redis.process.kill()
        setup.redis.process.wait(PATIENCE)
        start_login(ftp, "alice", "secret")
        with pytest.raises(ftplib.error_perm, match=r"^530 Users cannot"):
            ftp.voidresp()
        assert ftp.voidcmd("NOOP").startswith("200")
        assert earlier.nlst() == ["file.txt"]
        assert "Redis: Error" in setup.program.errors
        assert_clean_stop(setup.program, signal.SIGTERM)
