"""What pyftpdlib lets clients do and we do not (bridge/session/hardening.py)."""

from __future__ import annotations

import errno
import ftplib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET6
from typing import Any

import gevent.socket
import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import TLS_FTPHandler

from bridge import GeventFTPServer
from support.cli import Command, certificate, log_in
from support.fakes import Gate, WaitingAuthorizer
from support.servers import PATIENCE, Client, eventually, handler_class, needs_ipv6, started, users

LIMIT = 2048  # pyftpdlib's, bytes of a command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("content")
    return home


def serving(home: Path, **attributes: Any) -> Any:
    return started(handler_class(users(home), **attributes))


@contextmanager
def serving_at(host: str, home: Path) -> Iterator[Any]:
    server = GeventFTPServer((host, 0), handler_class(users(home)))
    server.start()
    try:
        yield server
    finally:
        server.stop(0)


def handlers(server: Any) -> list[Any]:
    """Of all sessions, logged in or not."""
    return [session.handler for session in server.sessions()]


# --- commands


@pytest.mark.program
@pytest.mark.parametrize("concurrency", ["async", "pre-fork"])
def test_the_command_is_strict_in_worker_processes_too(home: Path, concurrency: str) -> None:
    with Command("--concurrency", concurrency, directory=home) as server, log_in(server) as client:
        with pytest.raises(ftplib.error_perm, match=r"^501 A command has no NUL"):
            client.sendcmd("SIZE a\0b")


@pytest.mark.parametrize("pieces", [[LIMIT + 1], [LIMIT + 1] * 3, [LIMIT, LIMIT, 10], [100_000]])
def test_the_rest_of_a_command_that_is_too_long_is_no_command(home: Path, pieces: list[int]) -> None:
    with serving(home) as server, Client(server) as client:
        for number, size in enumerate(pieces):
            client.sock.sendall(b"X" * size)
            if not number and size > LIMIT:
                assert client.reply() == "500 Command too long."
        client.sock.sendall(b"DELE file\r\nNOOP\r\n")
        if pieces[0] <= LIMIT:
            assert client.reply() == "500 Command too long."
        assert client.reply().startswith("200")
    assert (home / "file").exists()


COMMANDS = [
    "USER a\0b",
    "PASS a\0b",
    "RETR a\0b",
    "STOR a\0b",
    "CWD a\0b",
    "STOU a\0b",
    "MFMT 20200101000000 a\0",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_nul_is_refused_and_the_session_goes_on(
    home: Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(home) as server, Client(server) as client:
        client.command(command, "501")
        client.command("NOOP", "200")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "code"), [("4755", "550"), ("2755", "550"), ("1755", "200"), ("755", "200")]
)
def test_chmod_lends_nobody_the_servers_identity(home: Path, mode: str, code: str) -> None:
    with serving(home) as server, Client(server) as client:
        client.command(f"SITE CHMOD {mode} file", code)
    assert not (home / "file").stat().st_mode & 0o6000


def test_stou_stays_in_the_home(home: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (home / "out").symlink_to(tmp_path / "outside")
    (home / "in").mkdir()
    with serving(home) as server, Client(server) as client:
        client.command("STOU out/x", "550")
        client.command("STOU in/x", "150")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("look", [1, 2])
def test_a_path_that_changes_meanwhile_is_550(home: Path, look: int) -> None:
    class FS(AbstractedFS):
        looks = 0

        def realpath(self, path: str) -> str:
            if path.endswith("gone"):
                FS.looks += 1
                if FS.looks == look:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
            return super().realpath(path)  # type: ignore[no-any-return]

    (home / "gone").touch()
    with serving(home, abstracted_fs=FS) as server, Client(server) as client:
        assert client.command("MFMT 20200101000000 gone", "550") == "550 No such file or directory."
        client.command("MFMT 20200101000000 gone", "213")


# --- line breaks


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT, errno.ENOENT])
@pytest.mark.parametrize("good", [1, 50])  # STAT sends 20 at a time
def test_a_status_that_cannot_be_finished_ends_the_session(
    home: Path, good: int, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else would tell: the code of its first line holds for all of them."""

    class Failing(AbstractedFS):
        def format_list(self, *args: Any, **kwargs: Any) -> Any:
            yield from list(super().format_list(*args, **kwargs)) * good
            raise OSError(error, "on purpose")

    with serving(home, abstracted_fs=Failing) as server, Client(server) as client, Client(server) as other:
        client.send("STAT /")
        heard = client.file.readlines()
        assert heard.pop(0).startswith(b"213-")
        assert all(line.startswith(b"-r") for line in heard)
        other.command("NOOP", "200")
    assert "on purpose" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["d\n200 x", "d\r200 x", "\n", "d\n\r200"])
def test_a_name_adds_no_line_to_replies_and_listings(home: Path, name: str) -> None:
    shown = name.replace("\n", "?").replace("\r", "?")
    with serving(home) as server, Client(server) as client:
        assert shown in client.command(f"MKD {name}", "257")
        for command in ("LIST", "NLST", "MLSD"):
            with client.data() as data:
                client.command(command, "1")
                listing = b""
                while chunk := data.recv(65536):
                    listing += chunk
            assert client.reply().startswith("226")
            assert len(listing.splitlines()) == 2
            assert listing.split(b"\r\n")[:-1] == listing.splitlines()
        for command in ("STAT /", f"MLST {name}"):
            client.send(command)
            lines: list[bytes] = []
            while not lines or lines[-1][:3] + lines[-1][3:4] not in (b"213 ", b"250 "):
                lines.append(client.file.readline())
            assert all(line.endswith(b"\r\n") and line.count(b"\r") == 1 for line in lines)
            assert len(lines) == (4 if command == "STAT /" else 3)
        assert shown in client.command(f"CWD {name}", "250")
        assert shown in client.command("PWD", "257")
        client.command("CDUP", "250")
        client.command(f"RMD {name}", "250")


# --- other people's data connections


def test_a_stranger_at_the_passive_port_is_no_reply(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(home) as server, Client(server) as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        for command in ("", "RETR file"):
            if command:
                client.command(command, "150")
            thief = gevent.socket.create_connection(("127.0.0.1", port), PATIENCE, ("127.0.0.2", 0))
            assert thief.recv(1) == b""
            thief.close()
        with gevent.socket.create_connection(("127.0.0.1", port), PATIENCE) as data:
            assert data.recv(100) == b"content"
        assert client.reply().startswith("226")
        client.command("NOOP", "200")
    assert caplog.text.count("Rejected data connection from foreign address 127.0.0.2:") == 2


# --- logins


def test_commands_win_no_time_to_log_in(home: Path) -> None:
    with serving(home) as server, Client(server, login=False) as client, Client(server) as other:
        client.reply()
        session, known = (
            each for each in server.ioloop.socket_map.values() if hasattr(each, "authenticated")
        )
        for each in (session, known):
            each._unknown_since -= each.timeout + 1
        other.command("NOOP", "200")
        client.send("NOOP", "NOOP")
        assert client.reply().startswith("421")
        assert client.reply() == ""


def test_a_login_that_waits_is_not_too_late(home: Path) -> None:
    gate = Gate()
    authorizer = users(home, WaitingAuthorizer(gate), "slow")
    with started(handler_class(authorizer)) as server, Client(server, login=False) as client:
        client.reply()
        client.command("USER slow", "331")
        client.send("PASS p")
        eventually(lambda: gate.arrivals)
        (session,) = handlers(server)
        session._unknown_since -= session.timeout + 1
        gate.open()
        assert client.reply().startswith("230")
        client.command("REIN", "230")  # from here on there is as much time as ever
        client.command("NOOP", "200")


# --- TLS


@pytest.fixture
def tls(home: Path, tmp_path: Path) -> dict[str, Any]:
    return {"base": TLS_FTPHandler, "certfile": str(certificate(tmp_path))}


def test_auth_wins_no_time_and_no_attempts(home: Path, tls: Any) -> None:
    with serving(home, **tls) as server, Client(server, login=False) as client:
        client.reply()
        (session,) = handlers(server)
        since = session._unknown_since
        client.command("USER u", "331")
        client.command("PASS wrong", "530")
        client.command("AUTH TLS", "234")
        client.encrypt()
        assert session._unknown_since == since
        for _ in range(2):
            client.command("USER u", "331")
            client.command("PASS wrong", "530")
        assert client.reply() == ""


def test_after_auth_one_logs_in_anew(home: Path, tls: Any) -> None:
    with serving(home, **tls) as server, Client(server) as client:
        client.command("AUTH TLS", "234")
        client.encrypt()
        client.command("PWD", "530")
        client.command("PASS p", "503")
        client.command("USER u", "331")
        client.command("PASS p", "230")
        client.command("AUTH TLS", "503")
        client.command("PWD", "257")


def test_prot_c_does_not_get_around_tls(home: Path, tls: Any) -> None:
    with serving(home, tls_data_required=True, **tls) as server, Client(server) as client:
        client.command("AUTH TLS", "234")
        client.encrypt()
        client.command("USER u", "331")
        client.command("PASS p", "230")
        client.command("PBSZ 0", "200")
        client.command("PROT P", "200")
        port = int(client.command("EPSV", "229").split("|")[3])
        client.command("PROT c", "200")
        with pytest.raises(ConnectionRefusedError):
            gevent.socket.create_connection(("127.0.0.1", port), PATIENCE)
        client.command("EPSV", "550")


# --- what a user may, and who a client is


@pytest.mark.parametrize(
    ("perm", "code"),
    [("elrf", "550"), ("elraf", "550"), ("elrwf", "250"), ("elrdf", "250")],
    ids=["rename", "append", "write", "delete"],
)
@pytest.mark.parametrize("target", ["other", "empty"])
def test_to_replace_by_a_rename_takes_the_right_to_delete_or_to_write(
    home: Path, perm: str, code: str, target: str
) -> None:
    (home / "other").write_text("other")
    (home / "empty").mkdir()
    (home / "directory").mkdir()
    authorizer = DummyAuthorizer()
    authorizer.add_user("u", "p", str(home), perm=perm)
    with started(handler_class(authorizer)) as server, Client(server) as client:
        source = "file" if target == "other" else "directory"
        client.command(f"RNFR {source}", "350")
        client.command(f"RNTO {target}", code)
        assert (home / source).exists() == (code == "550")
        if code == "550":
            client.command(f"RNTO {target}", "503")  # the RNFR is used up
        client.command(f"RNFR {target}", "350")
        client.command("RNTO new", "250")
    assert (home / "new").exists()


@needs_ipv6
@pytest.mark.parametrize(
    "address",
    ["::1", "0:0:0:0:0:0:0:1", "0000:0000:0000:0000:0000:0000:0000:0001", "::0001", "::0.0.0.1"],
)
def test_eprt_may_write_the_clients_address_as_it_likes(home: Path, address: str) -> None:
    with serving_at("::1", home) as server, Client(server) as client, gevent.socket.socket(AF_INET6) as data:
        data.bind(("::1", 0))
        data.listen(1)
        data.settimeout(PATIENCE)
        client.command(f"EPRT |2|{address}|{data.getsockname()[1]}|", "200")
        client.send("RETR file")
        with data.accept()[0] as connection:
            assert connection.recv(100) == b"content"


@needs_ipv6
def test_eprt_to_a_stranger_is_refused_however_it_is_written(home: Path) -> None:
    with serving_at("::1", home) as server, Client(server) as client:
        for address in ("::2", "0:0:0:0:0:0:0:2", "::ffff:127.0.0.1", "nonsense", ""):
            client.command(f"EPRT |2|{address}|2000|", "501")


@needs_ipv6
@pytest.mark.parametrize("address", ["|1|127.0.0.1|", "|2|::ffff:127.0.0.1|", "|2|::FFFF:7f00:1|"])
def test_eprt_of_an_ipv4_client_on_an_ipv6_socket(home: Path, address: str) -> None:
    with serving_at("::", home) as server:
        with Client(type("", (), {"address": ("127.0.0.1", server.address[1])})) as client:
            with gevent.socket.socket() as data:
                data.bind(("127.0.0.1", 0))
                data.listen(1)
                data.settimeout(PATIENCE)
                client.command(f"EPRT {address}{data.getsockname()[1]}|", "200")
                client.send("RETR file")
                with data.accept()[0] as connection:
                    assert connection.recv(100) == b"content"
