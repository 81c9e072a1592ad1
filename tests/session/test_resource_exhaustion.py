"""Descriptors and ports run out under a server, for real.

What is promised: a shortage costs the transfer that meets it, never a session and never the server; the
client is told with the right code, the log says it once, and all goes on by itself when it is over.

Only what cannot be had for real is simulated: ENFILE, ENOBUFS and ENOMEM of accept(). Network namespaces need
root; without it those tests skip. Disks are in test_storage_errors.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

from bridge.loop import registration as channels
from support.exhaustion import (
    PORTS,
    connected,
    handler_for,
    in_a_small_network,
    lines_of,
    no_descriptors,
)
from support.servers import PATIENCE, Client, eventually, held_ports, started

_native_sleep = monkey.get_original("time", "sleep")

MB = 1 << 20


def connecting(client: Client, port_reply: str, sock: Any) -> None:
    """Connect a socket, made in better times, to the port that the reply to EPSV names."""
    sock.connect((client.sock.getpeername()[0], int(port_reply.split("|")[3])))


# --- no descriptor for a connection


def listening(server: Any) -> Any:
    """The registration of the listener, which knows how long it rests."""
    (registration,) = (each for each in server.ioloop._registrations.values() if each.channel is server)
    return registration


@contextlib.contextmanager
def knocking(server: Any) -> Iterator[None]:
    """Somebody waits to be accepted; leaves when somebody was."""
    with gevent.socket.create_connection(server.address) as waiting:
        yield
        assert waiting.recv(3) == b"220"


def test_sessions_go_on_while_nobody_can_be_accepted(tmp_path: Path) -> None:
    with started(handler_for(tmp_path)) as server, Client(server) as client, Client(server) as uploader:
        with gevent.socket.socket() as waiting, connected(server, uploader) as data:
            uploader.command("STOR a", "125")
            with no_descriptors():
                waiting.connect(server.address)
                eventually(lambda: listening(server).delay)
                client.command("CWD /", "250")
                data.sendall(b"x" * MB)
                eventually(lambda: (tmp_path / "a").stat().st_size > MB // 2)  # the end may be buffered
                assert listening(server).delay
            data.close()
            assert uploader.reply().startswith("226")
            assert waiting.recv(3) == b"220"


def test_a_shortage_is_logged_once_and_so_is_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with started(handler_for(tmp_path)) as server:
        for _ in range(2):
            with gevent.socket.socket() as waiting:
                with no_descriptors():
                    waiting.connect(server.address)
                    eventually(lambda: listening(server).delay >= 4 * channels.MIN_DELAY)
                assert waiting.recv(3) == b"220"
            eventually(lambda: not server.sessions())  # which would free a descriptor
    messages = lines_of(caplog, "bridge.loop.registration")
    expected = ["cannot accept: [Errno 24]", "accepts connections again"] * 2
    assert len(messages) == len(expected)
    assert all(part in message for part, message in zip(expected, messages, strict=True)), messages


@pytest.mark.blocks
def test_a_listener_tries_again_ever_more_rarely(tmp_path: Path) -> None:
    """However late it is in the hub's pass when an attempt fails."""
    attempts: list[tuple[float, float]] = []

    def handle_accept(self: Any) -> None:
        _native_sleep(0.05)
        attempts.append((listening(self).delay, time.monotonic()))
        super(type(self), self).handle_accept()

    with started(handler_for(tmp_path), handle_accept=handle_accept) as server:
        with gevent.socket.socket() as waiting:
            with no_descriptors():
                waiting.connect(server.address)
                eventually(lambda: len(attempts) == 10)
            assert waiting.recv(3) == b"220"
    delays = [delay for delay, _ in attempts[:10]]
    assert delays == pytest.approx([0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1])
    for (_, before), (delay, after) in itertools.pairwise(attempts[:10]):
        assert after - before > 0.05 + 0.9 * delay


@pytest.mark.parametrize("number", [errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], ids=errno.errorcode.get)
def test_other_shortages_of_accept_are_outlived_too(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shortage = [True]

    def accept(self: Any) -> Any:
        if shortage:
            raise OSError(number, os.strerror(number))
        return super(type(self), self).accept()

    with started(handler_for(tmp_path), accept=accept) as server, knocking(server):
        eventually(lambda: listening(server).delay >= 4 * channels.MIN_DELAY)
        shortage.clear()
    assert len(lines_of(caplog, "bridge.loop.registration")) == 2


# --- no descriptor for a data connection or a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@contextlib.contextmanager
def session(handler: Any) -> Iterator[Client]:
    with started(handler) as server, Client(server) as client:
        client.command("TYPE I", "200")
        yield client
        client.command("NOOP", "200")
        assert client.retrieve("file") == b"content"


@pytest.mark.parametrize("command", ["PASV", "EPSV"])
def test_without_a_descriptor_passive_mode_is_refused(command: str, file: Path) -> None:
    with session(handler_for(file.parent)) as client, no_descriptors():
        client.command(command, "425")
        client.command(command, "425")


@pytest.mark.parametrize("command", ["PORT", "EPRT"])
def test_without_a_descriptor_active_mode_is_refused(command: str, file: Path) -> None:
    with session(handler_for(file.parent)) as client, gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        line = (
            f"EPRT |1|127.0.0.1|{port}|" if command == "EPRT" else f"PORT 127,0,0,1,{port >> 8},{port & 255}"
        )
        with no_descriptors():
            client.command(line, "425")
        client.command(line, "200")
        client.command("RETR file", "125")
        with listener.accept()[0] as data:
            assert data.recv(100) == b"content"
        assert client.reply().startswith("226")


@pytest.mark.parametrize("command", ["RETR file", "STOR new", "STOU", "APPE file", "LIST file"])
def test_a_transfer_is_refused_when_its_data_connection_cannot_be_accepted(command: str, file: Path) -> None:
    handler = handler_for(file.parent, keep_incomplete_uploads=False)
    with session(handler) as client, gevent.socket.socket() as data, no_descriptors() as descriptors:
        descriptors.give(2)
        port = client.command("EPSV", "229")
        client.command(command, "150")
        descriptors.take_all()
        connecting(client, port, data)
        assert client.reply().startswith("425")
        descriptors.give(1)  # so that the next file could be opened, were it tried
        client.command("NOOP", "200")
    assert os.listdir(file.parent) == ["file"]
    assert ("incomplete" in [event[0] for event in handler.events]) == (command[:2] in ("ST", "AP"))


@pytest.mark.parametrize("command", ["RETR file", "STOR new", "LIST file"])
def test_a_transfer_is_refused_when_its_data_connection_could_not_be_accepted_before(
    command: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with session(handler_for(file.parent)) as client, gevent.socket.socket() as data:
        with no_descriptors() as descriptors:
            descriptors.give(1)
            port = client.command("EPSV", "229")
            connecting(client, port, data)
            eventually(lambda: "Can't open data connection" in caplog.text)
        client.command(command, "425")
    assert os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize(
    "command", ["RETR file", "STOR new", "STOU", "APPE file", "LIST", "NLST", "MLSD", "STAT /"]
)
def test_what_cannot_be_opened_for_lack_of_descriptors_may_be_tried_again(command: str, file: Path) -> None:
    with started(handler_for(file.parent)) as server, Client(server) as client, connected(server, client):
        with no_descriptors():
            client.command(command, "451")
        client.command("RETR missing", "550")
        client.command("RETR file", "125")
        assert client.reply().startswith("226")


# --- no port


#: Ten transfers for each port: a random choice has hardly missed one of them. The client's ports
#: are others: in life it is another machine.
FEW_PORTS = f"""
import itertools, sys, tempfile, gevent.socket
from pathlib import Path
from pyftpdlib.handlers import FTPHandler
from support.servers import Client, handler_class, started, users

connect, ports = gevent.socket.create_connection, itertools.count(2000)
gevent.socket.create_connection = lambda *args: connect(*args, source_address=("127.0.0.1", next(ports)))

class Both(Client):
    def data(self):
        if self.mode == "passive":
            return super().data()
        with gevent.socket.socket() as listener:
            listener.bind(("127.0.0.1", next(ports)))
            listener.listen()
            self.command(f"EPRT |1|127.0.0.1|{{listener.getsockname()[1]}}|", "200")
            return listener.accept()[0]

with tempfile.TemporaryDirectory() as home:
    Path(home, "file").write_bytes(b"content")
    with started(handler_class(users(home), FTPHandler)) as server, Both(server) as client:
        for client.mode in sys.argv[1:]:
            for number in range({10 * PORTS}):
                assert client.retrieve("file") == b"content", number
print("served")
"""


@pytest.mark.program
@pytest.mark.parametrize("modes", ["passive", "active", "passive active", "active passive"])
def test_transfers_do_not_use_up_the_ports(modes: str) -> None:
    result = in_a_small_network(sys.executable, "-c", FEW_PORTS, *modes.split())
    assert result.stdout == "served\n", result.stdout + result.stderr


def test_all_passive_ports_in_use_is_425_and_no_content_is_mixed_up(tmp_path: Path) -> None:
    """50 clients, 10 ports: all ask for a port at the same time, then each as fast as it can."""
    everybody_asked = Event()
    refused: list[int] = []
    accepted: list[int] = []

    def port_for(client: Client) -> int | None:
        client.send("EPSV")
        reply = client.reply()
        assert reply[:3] in ("229", "425"), reply
        if reply.startswith("425"):
            refused.append(1)
            return None
        accepted.append(int(reply.split("|")[3]))
        return accepted[-1]

    def transfer(client: Client, command: str, content: bytes) -> bool:
        port = port_for(client)
        if len(refused) + len(accepted) == 50:
            everybody_asked.set()
        assert everybody_asked.wait(PATIENCE)
        if port is None:
            return False
        with gevent.socket.create_connection(("127.0.0.1", port), PATIENCE) as data:
            client.command(command, "1")
            if command.startswith("STOR"):
                data.sendall(content)
            else:
                assert b"".join(iter(lambda: data.recv(MB), b"")) == content
        assert client.reply().startswith("226")
        return True

    def several(server: Any, number: int) -> None:
        content = f"content of {number} ".encode() * 5000
        with Client(server) as client:
            client.command("TYPE I", "200")
            for command in (f"STOR {number}", f"RETR {number}") * 3:
                while not transfer(client, command, content):
                    gevent.sleep(0)

    with held_ports(10) as first:
        ports = range(first, first + 10)
        with started(handler_for(tmp_path, passive_ports=ports)) as server:
            gevent.joinall([gevent.spawn(several, server, number) for number in range(50)], raise_error=True)
    assert refused
    assert len(accepted) == 50 * 6
    assert set(accepted) <= set(ports)
