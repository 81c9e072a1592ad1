"""What clients send that no client should, as the fuzzer found it (tests/proof/test_fuzz.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gevent.socket
import pytest

import bridge.session.pipelining
from bridge.session import handlers
from support.servers import Client, eventually, handler_class, started, users


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def test_a_nul_in_a_name_is_a_syntax_error(root: Path) -> None:
    with started(handler_class(users(root))) as server, Client(server) as client:
        for line in ("RETR a\0b", "CWD \0", "SITE CHMOD 644 \0"):
            client.command(line, "501")
        client.command("NOOP", "200")


def test_allo_without_a_number(root: Path) -> None:
    with started(handler_class(users(root), handlers.FTPHandler)) as server, Client(server) as client:
        client.command("ALLO  ", "202")
        client.command("ALLO \t", "202")


@pytest.mark.blocks  # the first handshake
def test_a_session_of_ftps_that_ends_by_an_error_is_forgotten(root: Path) -> None:
    pytest.importorskip("OpenSSL", reason="needs pyOpenSSL")
    from support.ftps_clients import Authority

    class Broken(handlers.TLS_FTPHandler):
        certfile = str(Authority(root).issue("server"))

        def ftp_NOOP(self, line: str) -> None:
            raise ZeroDivisionError

    for encrypted in (False, True):
        with started(handler_class(users(root), Broken)) as server, Client(server) as client:
            if encrypted:
                client.command("AUTH TLS", "234")
                client.encrypt()
            client.send("NOOP")
            assert client.ended()
            eventually(lambda: not server.sessions())


def test_what_is_pipelined_behind_a_failed_login_is_handled(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bridge.session.pipelining, "COMMANDS_SLICE", -1.0
    )  # others have their turns after each command
    with started(handler_class(users(root))) as server, Client(server, login=False) as client:
        client.reply()
        client.send("USER u", "PASS wrong", "SYST", "SYST", "SYST")
        assert [client.reply()[:3] for _ in range(5)] == ["331", "530", "215", "215", "215"]


def test_a_reply_that_comes_in_between_does_not_stop_what_is_pipelined(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.session.pipelining, "COMMANDS_SLICE", -1.0)

    class Talks(handlers.FTPHandler):
        def ftp_NOOP(self, line: str) -> None:
            self.call_later(0, self.respond, "200 Later.")

    with started(handler_class(users(root), Talks)) as server, Client(server) as client:
        client.send("NOOP", "SYST", "NOOP", "SYST", "SYST")
        assert sorted(client.reply()[:3] for _ in range(5)) == ["200", "200", "215", "215", "215"]


def transfer(client: Client, command: str) -> Any:
    data = client.data()
    client.command(command, "125")
    return data


@pytest.mark.parametrize("command", ["EPSV", "PASV"])
def test_another_data_connection_ends_the_transfer_with_426(root: Path, command: str) -> None:
    with started(handler_class(users(root))) as server, Client(server) as client:
        with transfer(client, "STOR a"):
            client.send(command)
            assert client.reply().startswith("426")
            assert client.reply().startswith("22")
        client.command("NOOP", "200")


@pytest.mark.parametrize(("command", "reply"), [("ABOR", "226"), ("REIN", "230"), ("USER u", "331")])
def test_a_transfer_of_no_bytes_that_is_ended_gets_426(root: Path, command: str, reply: str) -> None:
    with started(handler_class(users(root))) as server, Client(server) as client:
        with transfer(client, "STOR a"):
            client.send(command)
            assert client.reply().startswith("426")
            assert client.reply().startswith(reply)
        client.command("NOOP", "200")


def test_a_second_port_leaves_other_sessions_alone(root: Path) -> None:
    with started(handler_class(users(root))) as server, Client(server) as client:
        with gevent.socket.socket() as listener, gevent.socket.socket() as other:
            other.settimeout(5)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = f"PORT 127,0,0,1,{listener.getsockname()[1] // 256},{listener.getsockname()[1] % 256}"
            client.command(port, "200")
            listener.accept()[0].close()
            (control,) = (each.handler for each in server.sessions())
            eventually(lambda: control.data_channel is None)
            other.connect(server.address[:2])
            assert other.recv(100).startswith(b"220")  # has the descriptor of the data connection
            client.command(port, "200")
            other.sendall(b"NOOP\r\n")
            assert other.recv(100).startswith(b"200")
