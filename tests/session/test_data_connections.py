"""Data connections that end: nobody else's descriptor is touched, and there is one reply."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import psutil
import pytest
from pyftpdlib.handlers import FTPHandler

from support.cli import Command
from support.servers import PATIENCE, Client, encrypted, eventually, handler_class, reset, started, users
from support.uploads import site

CONTENT = bytes(range(256)) * 20_000


@contextlib.contextmanager
def port(client: Client) -> Iterator[Any]:
    """The client's end of a connection that the server has made for PORT."""
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        high, low = divmod(listener.getsockname()[1], 256)
        client.command(f"PORT 127,0,0,1,{high},{low}", "200")
        listener.settimeout(PATIENCE)
        connection, _ = listener.accept()
        with connection:
            yield connection


@pytest.mark.parametrize("command", ["PASV", "ABOR", "QUIT"])
def test_what_follows_an_active_transfer_leaves_other_sessions_alone(tmp_path: Path, command: str) -> None:
    """The descriptor is another session's by then: pyftpdlib would take it off the loop, for good."""
    (tmp_path / "small").write_bytes(b"small")
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        with gevent.socket.socket() as second, port(client) as data:
            eventually(lambda: len(server.ioloop.socket_map) == 3)
            descriptor = max(server.ioloop.socket_map)
            client.command("RETR small", "125")
            assert data.recv(100) == b"small"
            assert data.recv(100) == b""
            assert client.reply().startswith("226")
            second.settimeout(PATIENCE)
            second.connect(server.address)
            assert second.recv(100).startswith(b"220")
            assert max(server.ioloop.socket_map) == descriptor
            client.send(command)
            assert client.reply()
            second.sendall(b"NOOP\r\n")
            assert second.recv(100).startswith(b"200")


def test_quit_does_not_wait_for_a_data_connection_without_a_transfer(tmp_path: Path) -> None:
    """Nor for what was sent on it for a transfer that was refused; pyftpdlib says 421 after 300 s."""
    with started(handler_class(users(tmp_path))) as server, Client(server) as client, client.data() as data:
        data.sendall(b"content")
        client.command("STOR /", "550")
        client.command("QUIT", "221")
        assert client.ended()
        data.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionResetError):
            assert data.recv(1) == b""


def quitting(home: Path, **attributes: Any) -> Any:
    (home / "old").write_bytes(CONTENT)
    return started(handler_class(users(home), **attributes))


def assert_stored_before_the_goodbye(client: Client, home: Path) -> None:
    assert client.reply().startswith("226")
    assert client.reply().startswith("221")
    assert client.ended()
    assert (home / "new").read_bytes() == CONTENT


@pytest.mark.parametrize("connected", ["before", "after"])
def test_quit_behind_stor_waits_for_the_upload(tmp_path: Path, connected: str) -> None:
    """STOR and QUIT in one packet: Cisco's IOS sends them so."""
    with quitting(tmp_path) as server, Client(server) as client:
        number = int(client.command("EPSV", "229").split("|")[3])
        data = gevent.socket.socket()
        if connected == "before":
            data.connect(("127.0.0.1", number))
            eventually(lambda: next(iter(server._sessions)).data_channel)
        client.send("STOR new", "QUIT", "DELE old")
        assert client.reply().startswith("125" if connected == "before" else "150")
        if connected == "after":
            eventually(lambda: next(iter(server._sessions))._leaving is not None)
            data.connect(("127.0.0.1", number))
        with data:
            data.sendall(CONTENT)
        assert_stored_before_the_goodbye(client, tmp_path)
        assert (tmp_path / "old").exists()


def test_quit_behind_stor_waits_in_active_mode(tmp_path: Path) -> None:
    with quitting(tmp_path) as server, Client(server) as client, gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(PATIENCE)
        high, low = divmod(listener.getsockname()[1], 256)
        client.send(f"PORT 127,0,0,1,{high},{low}", "STOR new", "QUIT")
        with listener.accept()[0] as data:
            data.sendall(CONTENT)
        assert {client.reply()[:3], client.reply()[:3]} == {"200", "150"}
        assert_stored_before_the_goodbye(client, tmp_path)


def test_quit_in_a_download_follows_its_reply(tmp_path: Path) -> None:
    with quitting(tmp_path) as server, Client(server) as client, client.data() as data:
        client.command("TYPE I", "200")
        client.command("RETR old", "1")
        client.send("QUIT")
        eventually(lambda: next(iter(server._sessions))._leaving is not None)
        content = b""
        while chunk := data.recv(65536):
            content += chunk
        assert content == CONTENT
        assert client.reply().startswith("226")
        assert client.reply().startswith("221")
        assert client.ended()


def test_a_client_may_close_the_control_connection_behind_quit(tmp_path: Path) -> None:
    with quitting(tmp_path) as server, Client(server) as client, client.data() as data:
        client.command("STOR new", "1")
        client.send("QUIT")
        client.sock.shutdown(socket.SHUT_WR)
        eventually(lambda: next(iter(server._sessions))._leaving is not None)
        data.sendall(CONTENT)
        data.close()
        assert_stored_before_the_goodbye(client, tmp_path)


def test_quit_does_not_wait_for_a_data_connection_that_never_comes(tmp_path: Path) -> None:
    class Impatient(FTPHandler.passive_dtp):
        timeout = 0.01

    with quitting(tmp_path, passive_dtp=Impatient) as server, Client(server) as client:
        client.command("EPSV", "229")
        client.send("STOR new", "QUIT")
        replies = [client.reply()[:3] for _ in range(3)]
        assert replies in (["150", "425", "221"], ["425", "221", ""])  # the latter if the time was up at once
        assert client.ended()


@pytest.mark.parametrize("before", [False, True], ids=["none", "one that is used up"])
def test_quit_does_not_wait_for_a_data_connection_that_nobody_has_asked_for(
    tmp_path: Path, before: bool
) -> None:
    with quitting(tmp_path) as server, Client(server) as client:
        if before:
            with port(client) as data:
                client.command("RETR old", "125")
                while data.recv(65536):
                    pass
            assert client.reply().startswith("226")
        client.send("STOR new", "QUIT")
        assert [client.reply()[:3] for _ in range(4)] == ["150", "425", "221", ""]


def test_disconnect_says_421_where_quit_waits(tmp_path: Path) -> None:
    with quitting(tmp_path) as server, Client(server) as client, client.data():
        client.command("STOR new", "1")
        client.send("QUIT")
        eventually(lambda: next(iter(server._sessions))._leaving is not None)
        server.sessions()[0].disconnect("Enough")
        assert client.reply() == "426 Enough"
        assert client.reply() == "421 Enough"
        assert client.ended()


def test_empty_lines_in_ascii_mode_do_not_block_the_hub(tmp_path: Path) -> None:
    """pyftpdlib inserts each CR for itself: 0.12 s for 64 KiB of line feeds (conftest's guard notices)."""
    (tmp_path / "text").write_bytes(b"\n" * 65535 + b"\r" + b"\n" * 100_000)  # a CRLF in two chunks
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        client.command("TYPE A", "200")
        content = b""
        with client.data() as data:
            client.command("RETR text", "125")
            while chunk := data.recv(65536):
                content += chunk
        assert client.reply().startswith("226")
        assert content == b"\r\n" * 165_535


def test_pyftpdlib_keeps_what_has_given_its_socket_away() -> None:
    """When it does not, `ActiveMixin.del_channel` may go."""
    names = ("_dtp_acceptor", "_idler", "_in_dtp_queue", "_out_dtp_queue")
    control = type("Control", (), {**dict.fromkeys(names), "_dtp_connector": 1})()
    FTPHandler._on_dtp_connection(control)
    assert control._dtp_connector == 1


def test_a_connection_made_for_port_that_is_reset_at_once(tmp_path: Path) -> None:
    """Between the 200 and the data channel: 425, where pyftpdlib waits for the transfer for ever."""
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.setblocking(False)

        def log_cmd(self: Any, cmd: str, arg: str, respcode: int, respstr: str) -> None:
            if cmd == "PORT" and respcode == 200:
                reset(listener.accept()[0])  # which does not let the hub run

        (tmp_path / "small").write_bytes(b"small")
        with started(handler_class(users(tmp_path), log_cmd=log_cmd)) as server, Client(server) as client:
            high, low = divmod(listener.getsockname()[1], 256)
            client.command(f"PORT 127,0,0,1,{high},{low}", "200")
            client.command("RETR small", "425")
            client.command("NOOP", "200")
            assert client.retrieve("small") == b"small"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("first", [True, False], ids=["command first", "connection first"])
def test_one_reply_to_a_connection_that_was_reset_before_it_was_accepted(
    tmp_path: Path, tls: bool, first: bool
) -> None:
    with site(tmp_path, tls) as it, it.client() as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        if first:
            client.command("STOR file", "150")
        data = socket.create_connection(("127.0.0.1", port))  # which does not let the hub run
        reset(data)
        if not first:
            client.command("STOR file", "425")
        else:
            assert client.reply().startswith("425")
        client.command("NOOP", "200")
        client.command("EPSV", "229")
        assert it.hidden() == []


@pytest.mark.program
def test_the_command_over_tls_gives_one_reply_to_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("OpenSSL")
    pytest.importorskip("cryptography")
    from support.ftps_clients import FTPS

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with (
        Command("--write", "--tls", directory=tmp_path) as server,
        contextlib.closing(FTPS(server)) as client,
    ):
        client.voidcmd("TYPE I")
        address = client.makepasv()
        assert client.sendcmd("STOR file").startswith("150")
        process = psutil.Process(server.pid)
        process.suspend()
        try:
            reset(socket.create_connection(address))
        finally:
            process.resume()
        assert client.getmultiline().startswith("425")
        assert client.voidcmd("NOOP").startswith("200")
        assert client.sendcmd("PASV").startswith("227")
        assert "Traceback" not in server.stop()[1]


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("command", ["NLST", "LIST", "MLSD"])
def test_an_empty_listing_is_a_transfer_like_any_other(tmp_path: Path, tls: bool, command: str) -> None:
    """To write nothing is an error to OpenSSL; pyftpdlib would close in the middle of the handshake."""
    with site(tmp_path, tls) as it, it.client() as client:
        for _ in range(20):  # it depends on what comes first, the command or the ClientHello
            client.send("EPSV")
            number = int(client.reply().split("|")[3])
            with gevent.socket.create_connection(("127.0.0.1", number), PATIENCE) as data:
                client.command(command, "1")
                with encrypted(data) if tls else data as connection:
                    assert connection.recv(10) == b""
            assert client.reply().startswith("226")
