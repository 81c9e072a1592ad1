"""Peers that fail in any state, stall or flood: the session ends, all is released, the hub never spins."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from support.cli import certificate
from support.fakes import Gate, WaitingAuthorizer
from support.servers import (
    Client,
    assert_idle,
    encrypted,
    eventually,
    handler_class,
    reset,
    settled,
    started,
    time_out,
    users,
    vanish,
)

#: More than the kernel buffers on both sides of a loopback connection (below 10 MB by default).
BIG = bytes(range(256)) * (16 << 12)
#: Seconds until a server that is told to gives up a peer that has got where it is to fail.
TIMEOUT = 0.4


@contextlib.contextmanager
def serving(home: Path, base: Any = FTPHandler, **attributes: Any) -> Iterator[Any]:
    """A server that must have released everything, and still serve, when the test ends.

    `server.files` are those that its file system has opened.
    """
    files: list[Any] = []

    class FS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            files.append(super().open(filename, mode))
            return files[-1]

    attributes = {"authorizer": users(home), "abstracted_fs": FS, **attributes}
    with started(handler_class(base=base, **attributes), files=files) as server:
        yield server
        eventually(lambda: not server.sessions())
        assert [*server.ioloop.socket_map.values()] == [server]
        assert [call for call in server.ioloop.sched._tasks if not call.cancelled] == []
        assert all(file.closed for file in files)
        with Client(server) as client:
            client.command("NOOP", "200")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "big").write_bytes(BIG)
    return tmp_path


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Attributes of a handler that speaks TLS."""
    pytest.importorskip("OpenSSL", reason="FTPS needs pyOpenSSL")
    from pyftpdlib.handlers import TLS_FTPHandler

    pem = certificate(tmp_path_factory.mktemp("tls"))
    return {"base": TLS_FTPHandler, "certfile": str(pem), "ssl_context": None}


# --- where a peer is when it fails

LOGIN = ("USER u", "PASS p", "TYPE I")
SECURE = ("AUTH TLS", "encrypt", *LOGIN, "PBSZ 0", "PROT P")
HELLO = b"\x16\x03\x01"  # how a ClientHello begins

#: What it says, sends and does before.
STATES: dict[str, tuple[str | bytes, ...]] = {
    "connected": (),
    "half-logged-in": ("USER u",),
    "idle": LOGIN,
    "passive": (*LOGIN, "PASV"),
    "data-connected": (*LOGIN, "connect"),
    "download-announced": (*LOGIN, "PASV", "RETR big"),
    "upload-announced": (*LOGIN, "PASV", "STOR new"),
    "download": (*LOGIN, "connect", "RETR big", "started"),
    "upload": (*LOGIN, "connect", "STOR new", b"half of it", "started"),
    "control-handshake": (*LOGIN, "AUTH TLS", HELLO),
    "encrypted-idle": SECURE,
    "data-handshake": (*SECURE, "connect", HELLO, "RETR big"),
    "encrypted-download": (*SECURE, "connect", "encrypt", "RETR big", "started"),
    "encrypted-upload": (*SECURE, "connect", "encrypt", "STOR new", b"half of it", "started"),
}


@pytest.fixture
def attributes(state: str, request: pytest.FixtureRequest) -> Any:
    """Of a handler for the state."""
    return request.getfixturevalue("tls") if "AUTH TLS" in STATES[state] else {}


@contextlib.contextmanager
def peer(server: Any, state: str) -> Iterator[Any]:
    """A client in that state, and its data connection or None."""
    client = Client(server, login=False)
    data: Any = None
    assert client.reply().startswith("220")
    (session,) = server.sessions()
    for step in STATES[state]:
        if isinstance(step, bytes):
            (data or client.sock).sendall(step)
        elif step == "connect":
            data = client.data()
            eventually(lambda: session.handler.data_channel)
        elif step == "encrypt" and data is not None:
            data = encrypted(data)
        elif step == "encrypt":
            client.encrypt()
        elif step == "started":
            eventually(lambda: session.handler.data_channel.get_transmitted_bytes())
        else:
            client.send(step)
            assert client.reply()[:1] in ("1", "2", "3")
    try:
        yield client, data
    finally:
        for connection in filter(None, (data, client)):
            reset(connection)


def hurry(server: Any, *names: str) -> None:
    """Give the only session, its data connection or its passive port TIMEOUT from now on.

    Else they have the 30 and 300 seconds of pyftpdlib, in which every peer gets where it is to fail.
    """
    control = server.sessions()[0].handler
    for name in names:
        channel = control if name == "control" else getattr(control, name)
        if channel is not None:
            time_out(channel, TIMEOUT)


# --- how it fails


def half_close(client: Client) -> None:
    client.sock.shutdown(socket.SHUT_WR)


def read(data: Any) -> bytes:
    return b"".join(iter(lambda: data.recv(1 << 20), b""))


@pytest.mark.parametrize("fail", [reset, half_close])
@pytest.mark.parametrize("state", list(STATES))
def test_a_session_ends_with_its_control_connection(
    home: Path, state: str, fail: Any, attributes: Any
) -> None:
    with serving(home, **attributes) as server, peer(server, state) as (client, _):
        fail(client)
        eventually(lambda: not server.sessions())
        assert_idle()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SO_ATTACH_FILTER is Linux's")
@pytest.mark.parametrize("state", list(STATES))
def test_a_peer_that_vanishes_is_given_up(home: Path, state: str, attributes: Any) -> None:
    with serving(home, **attributes) as server, peer(server, state) as (client, data):
        hurry(server, "control", "data_channel", "_dtp_acceptor")
        for sock in filter(None, (client.sock, data)):
            try:
                vanish(sock)
            except PermissionError:
                pytest.skip("on this kernel, only root may attach a filter to a socket")
        assert_idle()
        eventually(lambda: not server.sessions())


@pytest.mark.parametrize("fail", [reset, half_close])
def test_a_session_whose_turn_waits_ends_with_the_wait(tmp_path: Path, fail: Any) -> None:
    gate = Gate()
    authorizer = users(tmp_path, WaitingAuthorizer(gate), "slow")
    with serving(tmp_path, authorizer=authorizer) as server, Client(server, login=False) as client:
        client.send("USER slow", "PASS p")
        gate.arrived()
        fail(client)
        assert_idle()
        assert len(server.sessions()) == 1
        gate.open()


@pytest.mark.parametrize("state", [state for state in STATES if "connect" in STATES[state]])
def test_a_session_outlives_its_data_connection(home: Path, state: str, attributes: Any) -> None:
    with serving(home, **attributes) as server, peer(server, state) as (client, data):
        (session,) = server.sessions()
        reset(data)
        eventually(lambda: session.handler.data_channel is None)
        assert all(file.closed for file in server.files)
        assert_idle()
        if "download" in state:
            assert client.reply().startswith("426")
        client.send("SYST")
        eventually(lambda: client.reply().startswith("215"))


def test_a_download_does_not_need_the_other_direction(home: Path) -> None:
    with serving(home) as server, peer(server, "download") as (client, data):
        data.shutdown(socket.SHUT_WR)
        assert_idle()
        assert read(data) == BIG
        assert client.reply().startswith("226")


# --- data connections that are never read, never made, or used twice


@pytest.mark.parametrize("state", ["data-connected", "download", "data-handshake", "encrypted-download"])
def test_a_data_connection_that_stalls_is_given_up(home: Path, state: str, attributes: Any) -> None:
    with serving(home, **attributes) as server, peer(server, state) as (client, _):
        hurry(server, "data_channel")
        assert_idle()
        assert client.reply() == "421 Data connection timed out."
        assert client.ended()


def test_a_port_where_nobody_connects_is_closed(home: Path) -> None:
    with serving(home) as server, Client(server) as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        hurry(server, "_dtp_acceptor")
        assert_idle()
        assert client.reply() == "421 Passive data channel timed out."
        with pytest.raises(ConnectionRefusedError):
            gevent.socket.create_connection((server.address[0], port))
        assert client.store("next", b"another").startswith("226")


@pytest.mark.parametrize("state", ["upload-announced", "download-announced"])
@pytest.mark.parametrize(
    ("give_up", "replies"),
    [(None, ["425"]), ("ABOR", ["426", "226"]), ("EPSV", ["425", "229"]), ("USER u", ["426", "331"])],
)
def test_a_transfer_whose_data_connection_never_comes_is_over(
    home: Path, state: str, give_up: str | None, replies: list[str]
) -> None:
    with serving(home) as server, peer(server, state) as (client, _):
        if give_up:
            client.send(give_up)
        else:
            hurry(server, "_dtp_acceptor")
        assert [client.reply()[:3] for _ in replies] == replies
        assert server.files[0].closed
        if give_up == "USER u":
            client.command("PASS p", "230")
        assert client.store("next", b"another").startswith("226")
        assert client.retrieve("next") == b"another"
    assert (home / "next").read_bytes() == b"another"
    assert (home / "big").read_bytes() == BIG


def test_a_transfer_is_not_mixed_up_with_another(home: Path) -> None:
    """pyftpdlib gives the data connection the new file, and may send from the old one's descriptor."""
    with serving(home) as server, peer(server, "download") as (client, data):
        for command in ("STOR new", "NLST", "RETR big"):
            client.command(command, "503")
        assert read(data) == BIG
        assert client.reply().startswith("226")
    assert not (home / "new").exists()


# --- floods

#: Pairs of commands in a flood.
COUNT = 500


class Flooded(FTPHandler):
    """Knows how many bytes it has kept for its client at most, and how many SYSTs it has handled."""

    peak = 0
    handled = 0

    def on_connect(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)

    def push(self, data: str) -> None:
        super().push(data)
        waiting = [*self.producer_fifo, self._held, self.ac_in_buffer]
        self.peak = max(self.peak, sum(len(each) for each in waiting if isinstance(each, bytes)))

    def ftp_SYST(self, line: str) -> None:
        self.handled += 1
        end = time.perf_counter() + 0.001
        while time.perf_counter() < end:
            pass
        super().ftp_SYST(line)


def flood(command: str) -> bytes:
    """Each command is followed by one whose reply says which it answers."""
    return "".join(f"{command}\r\n{number:0>1000}\r\n" for number in range(COUNT)).encode()


def stops(handler: Any) -> None:
    """Wait until a flooded handler, all buffers on the way to its client full, handles no more commands."""
    eventually(lambda: handler._held)
    settled(lambda: handler.last_active)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "directory").mkdir()
    for number in range(200):
        (tmp_path / "directory" / f"{number:0>200}").touch()
    return tmp_path


@pytest.mark.parametrize("command", ["STAT directory", "HELP"])
def test_a_client_that_reads_late_gets_every_reply_and_takes_no_memory(directory: Path, command: str) -> None:
    with serving(directory, Flooded) as server, Client(server) as client, Client(server) as other:
        handler = server.sessions()[0].handler
        sender = gevent.spawn(client.sock.sendall, flood(command))
        stops(handler)
        assert_idle()
        assert other.store("file", b"content").startswith("226")
        for number in range(COUNT):
            assert client.reply().startswith("21")
            assert client.reply() == f'500 Command "{number:0>1000}" not understood.'
        client.command("NOOP", "200")
        sender.get()
        assert 0 < handler.peak < 1 << 20


@pytest.mark.parametrize("state", ["idle", "encrypted-idle"])
def test_a_client_that_floods_and_never_reads_is_given_up(
    directory: Path, state: str, attributes: Any
) -> None:
    with serving(directory, **attributes) as server, peer(server, state) as (client, _):
        sender = gevent.spawn(client.sock.sendall, flood("STAT directory"))
        stops(server.sessions()[0].handler)
        hurry(server, "control")
        assert_idle()
        eventually(lambda: not server.sessions())
        with contextlib.suppress(OSError):
            sender.get()


def test_a_flood_takes_turns_with_other_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, Flooded) as server, Client(server) as client, Client(server) as other:
        handler = server.sessions()[0].handler
        client.send(*["SYST"] * 300)
        eventually(lambda: handler.handled)
        other.command("NOOP", "200")
        assert handler.handled < 300
        assert all(client.reply().startswith("215") for _ in range(300))


def test_what_follows_auth_tls_in_the_clear_is_dropped_and_does_not_spin(home: Path, tls: Any) -> None:
    with serving(home, **tls) as server, Client(server) as client:
        client.send("AUTH TLS", "DELE big")
        assert client.reply().startswith("234")
        assert_idle()
        client.encrypt()
        client.command("SYST", "215")
    assert (home / "big").exists()


# --- descriptors that are used again


class Named(FTPHandler):
    """Says to whom it talks."""

    def on_connect(self) -> None:
        self.banner = str(self.remote_port)

    def ftp_NOOP(self, line: str) -> None:
        self.respond(f"200 {self.remote_port}")


def test_every_client_gets_its_own_replies_however_often_descriptors_are_used_again(tmp_path: Path) -> None:
    gate = Gate()
    authorizer = users(tmp_path, WaitingAuthorizer(gate), "slow")
    served = 0

    def connect() -> tuple[Client, str]:
        client = Client(server, login=False)
        port = client.sock.getsockname()[1]
        assert client.reply() == f"220 {port}"
        return client, f"200 {port}"

    def come_and_go() -> None:
        nonlocal served
        while served < 3000:
            served += 1
            client, mine = connect()
            client.send(*[("NOOP",), ("NOOP", "USER u", "PASS p", "EPSV"), ("NOOP", "QUIT")][served % 3])
            assert client.reply() == mine
            reset(client)

    with serving(tmp_path, Named, authorizer=authorizer) as server:
        waiting = [connect() for _ in range(10)]
        for client, _ in waiting:
            client.send("USER slow", "PASS p", "NOOP")
        eventually(lambda: gate.arrivals == 10)
        for client, _ in waiting[::2]:
            reset(client)
        gevent.joinall([gevent.spawn(come_and_go) for _ in range(6)], raise_error=True)
        assert_idle()
        eventually(lambda: len(server.sessions()) == 10)
        gate.open()
        for client, mine in waiting[1::2]:
            assert [client.reply() for _ in range(3)][1:] == ["230 Login successful.", mine]
            client.close()


def test_a_connection_that_the_kernel_does_not_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What libev does when epoll_ctl(2) fails: it stops the watcher, and calls it a last time."""
    with serving(tmp_path) as server, Client(server) as client:
        (control,) = server._sessions
        registration = server.ioloop._registrations[control._fileno]
        for _ in range(3):
            registration.watcher.stop()
            registration._on_ready(server.ioloop.READ)
            eventually(lambda: not server.ioloop._turns.ready)
            client.command("NOOP", "200")
        assert_idle()
        assert "cannot be watched" in caplog.text
