"""Users of a file: who gets in, what refusing costs, what they may use, and that they stay in their homes."""

from __future__ import annotations

import contextlib
import ftplib
import hashlib
import io
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bridge.users import file as userfile
from bridge.users.authorizer import UserAuthorizer
from bridge.users.file import DummyHashes, Hash, User, parse
from support.cli import LIMIT, Command, environment, run

CHEAP = Hash(4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"p", salt=b"0123456789abcdef", n=16, r=1, p=1))


def write(directory: Path, *lines: str) -> None:
    (directory / "users").write_text("".join(f"{line}\n" for line in lines))
    (directory / "srv" / "ada").mkdir(parents=True, exist_ok=True)


def login(server: Command, user: str = "ada", password: str = "p") -> ftplib.FTP:
    client = ftplib.FTP(timeout=LIMIT)
    try:
        client.connect("127.0.0.1", server.port)
        client.login(user, password)
    except BaseException:
        client.close()
        raise
    return client


OPTIONS = ("-d", "srv", "--users", "users")


@pytest.mark.parametrize(
    ("user", "password", "work"), [("ada", "p", 1), ("ada", "no", 1), ("zoe", "p", 1), ("eve", "p", 1)]
)
def test_every_login_takes_one_scrypt_of_the_same_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, password: str, work: int
) -> None:
    calls: list[tuple[Any, ...]] = []
    real = userfile._scrypt

    def counting(password: str, salt: bytes, *cost: int) -> bytes:
        calls.append(cost)
        return real(password, salt, *cost)

    monkeypatch.setattr(userfile, "_scrypt", counting)
    authorizer = UserAuthorizer(str(tmp_path))
    authorizer.replace({"ada": User("ada", CHEAP), "eve": User("eve")})
    assert (authorizer._refuses(user, password, None) == "") == (user == "ada" and password == "p")
    assert calls == [(4, 1, 1, len(CHEAP.digest))] * work
    assert DummyHashes({}).hash_for("x").ln == userfile.LN


@pytest.mark.program
def test_users_are_limited_and_taken_up_anew(tmp_path: Path) -> None:
    write(tmp_path, f"ada:{CHEAP}:ada:write:sessions=1,quota=100K")
    with Command(*OPTIONS, directory=tmp_path) as server:
        with login(server) as client:
            with pytest.raises(ftplib.error_temp, match="421 Too many sessions"):
                login(server)
            with pytest.raises(ftplib.error_perm, match="552"):
                client.storbinary("STOR big", io.BytesIO(bytes(200_000)))
            assert (tmp_path / "srv/ada/big").stat().st_size == 100 << 10
            client.delete("big")
            client.storbinary("STOR small", io.BytesIO(bytes(100)))
            write(tmp_path, "ada:nonsense")
            server.logged(r"line 1: no hash .*; the users stay as they were")
            write(tmp_path, f"bob:{CHEAP}:ada:read")
            server.logged(r"users: 1 users")
            client.storbinary("STOR more", io.BytesIO(b"of one who is gone"))
            with login(server, "bob") as other:
                assert other.nlst() == ["more", "small"]
                with pytest.raises(ftplib.error_perm, match="550 Not enough"):
                    other.delete("small")


@pytest.mark.program
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_rate_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, tls: bool) -> None:
    """Whenever one looks: not more than so many bytes a second since the start, and some to begin with."""
    rate, ahead = 100_000, 4 * 64 * 1024  # what may lie in the buffers of both ends does not count as moved
    if tls:
        pytest.importorskip("OpenSSL")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write(tmp_path, f"ada:{CHEAP}:ada:write:{direction}={rate}")
    (tmp_path / "srv/ada/file").write_bytes(bytes(5_000_000))
    with Command(*OPTIONS, *(["--tls"] if tls else []), directory=tmp_path) as server:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client = ftplib.FTP_TLS(timeout=LIMIT, context=context) if tls else ftplib.FTP(timeout=LIMIT)
        with contextlib.closing(client):
            client.connect("127.0.0.1", server.port)
            client.login("ada", "p")
            if isinstance(client, ftplib.FTP_TLS):
                client.prot_p()
            client.voidcmd("TYPE I")
            start = time.monotonic()
            with client.transfercmd("STOR file" if direction == "up" else "RETR file") as data:
                data.settimeout(LIMIT)
                if direction == "up":
                    threading.Thread(target=send_all, args=(data,), daemon=True).start()
                looks: list[int] = []
                while len(looks) < 3 or not looks[-1]:
                    if direction == "down":
                        data.recv(1 << 20)
                    client.putcmd("STAT")
                    sent, received = map(int, re.findall(r"Total bytes .*: (\d+)", client.getmultiline()))
                    moved = received if direction == "up" else sent
                    assert moved <= rate * (time.monotonic() - start) + ahead
                    looks.append(moved)
                assert looks[-1] < 5_000_000


def send_all(data: socket.socket) -> None:
    with contextlib.suppress(OSError):  # until the server is stopped
        data.sendall(bytes(5_000_000))


@pytest.mark.program
def test_sessions_of_a_user_are_counted_in_all_workers(tmp_path: Path) -> None:
    write(tmp_path, f"ada:{CHEAP}:ada:write:sessions=3")
    with Command(*OPTIONS, "--workers", "2", directory=tmp_path) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(login(server))
        for _ in range(8):  # whichever worker it is
            with pytest.raises(ftplib.error_temp, match="421 Too many sessions"):
                login(server)


@pytest.mark.program
def test_sighup_takes_up_users_and_anonymous_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, f"ada:{CHEAP}:ada:write")
    with Command(*OPTIONS, "--anonymous", directory=tmp_path) as server:
        login(server, "anonymous", "").close()
        write(tmp_path, f"bob:{CHEAP}:ada:write")
        server.send(signal.SIGHUP)
        server.logged(r"users: 1 users")
        login(server, "bob").close()
        with pytest.raises(ftplib.error_perm, match="530"):
            login(server)
    with Command(*OPTIONS, directory=tmp_path) as server, pytest.raises(ftplib.error_perm, match="530"):
        login(server, "anonymous", "")


@pytest.mark.program
def test_no_command_leaves_the_home(tmp_path: Path) -> None:
    write(tmp_path, f"ada:{CHEAP}:ada:write")
    home, outside = tmp_path / "srv" / "ada", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (home / "out").symlink_to(outside)
    (home / "file").symlink_to(outside / "secret")
    (home / "mine").write_text("mine")
    before = sorted(os.listdir(outside))
    with Command(*OPTIONS, "--hash", directory=tmp_path) as server, login(server) as client:
        client.voidcmd("TYPE I")
        for path in ("out/secret", "file", "/out/secret"):
            for command in ("RETR", "STOR", "APPE", "SIZE", "MDTM", "MLST", "DELE", "HASH", "RNFR", "STAT"):
                with pytest.raises(ftplib.error_perm, match="550"):
                    client.sendcmd(f"{command} {path}")
            for command in ("SITE CHMOD 777", "MFMT 20200101000000"):
                with pytest.raises(ftplib.error_perm, match="550"):
                    client.sendcmd(f"{command} {path}")
        for command in ("CWD out", "LIST out", "NLST out", "MLSD out", "MKD out/new", "RMD out"):
            with pytest.raises(ftplib.error_perm, match="550"):
                client.sendcmd(command)
        with pytest.raises(ftplib.Error, match=r"450|550"):
            client.sendcmd("STOU out/new")
        client.sendcmd("RNFR mine")
        with pytest.raises(ftplib.error_perm, match="550"):
            client.sendcmd("RNTO out/mine")
        with pytest.raises(ftplib.error_perm, match="550"):
            client.sendcmd("RETR ../../outside/secret")
    assert sorted(os.listdir(outside)) == before
    assert (outside / "secret").read_text() == "secret"


@pytest.mark.program
def test_passwd_edits_the_file(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("# ours\nbob:*:::\n# the end\n")

    def passwd(*argv: str, password: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bridge.ftp", "passwd", "users", *argv]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(),
            input=password,
            capture_output=True,
            text=True,
            check=False,
        )

    assert passwd("ada", "--stdin", "--home", "ada", "--max-upload", "5K", password="one\n").returncode == 0
    text = (tmp_path / "users").read_text()
    assert text.startswith("# ours\nbob:*:::\n# the end\nada:$scrypt$")
    assert (tmp_path / "users").stat().st_mode & 0o777 == 0o600
    assert passwd("ada", "--perm", "write").returncode == 0
    user = parse((tmp_path / "users").read_text())["ada"]
    assert (user.home, user.perm, user.limits.up) == ("ada", "write", 5120)
    assert user.password is not None
    assert user.password.matches("one")
    assert passwd("bob", "--delete").returncode == 0
    assert passwd("bob", "--delete").returncode == 2
    assert "scrypt" not in passwd("--list").stdout
    assert os.listdir(tmp_path) == ["users"]


@pytest.mark.program
def test_a_wrong_file_is_an_error_at_start(tmp_path: Path) -> None:
    write(tmp_path, "# ours", "ada:x")
    for options, expected in (
        (OPTIONS, "--users: users, line 2: no hash"),
        (("--users", "nowhere"), "--users: cannot read 'nowhere': No such file"),
        ((*OPTIONS, "-u", "a", "-P", "b"), "--username cannot be used with --users"),
    ):
        result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", *options, directory=tmp_path)
        assert result.returncode == 2
        assert expected in result.stderr
