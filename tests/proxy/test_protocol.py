"""PROXY headers: who is believed, what is read of them, and what then knows the client's address."""

from __future__ import annotations

import contextlib
import ftplib
import ipaddress
import logging
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.socket
import pytest
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer, GeventIOLoop
from support.cli import Command, certificate, run
from support.servers import Client, encrypted, eventually, handler_class, needs_ipv6, users

pytest.importorskip("proxyprotocol", reason="proxy-protocol is not installed")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.loop.native_socket import NativeSocket
from bridge.proxy.protocol import (
    LINE,
    NothingSent,
    ProxiedPassiveDTP,
    ProxyError,
    ProxyServerMixin,
    QuietChecksMixin,
    is_among,
    read_header,
)

CLIENT = ("192.0.2.7", 40000)
V1 = b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 21\r\n"
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LOCALHOST = [ipaddress.ip_network("127.0.0.0/8")]


def v2(ip: str = CLIENT[0], port: int = CLIENT[1], tail: bytes = b"", kind: int = 0x21) -> bytes:
    """A version 2 header: *kind* 0x21 for PROXY, 0x20 for LOCAL."""
    source = ipaddress.ip_address(ip)
    other = ipaddress.ip_address("203.0.113.1" if source.version == 4 else "2001:db8::1")
    body = source.packed + other.packed + struct.pack("!HH", port, 21) + tail
    family = 0x11 if source.version == 4 else 0x21
    return SIGNATURE + struct.pack("!BBH", kind, family, len(body)) + body


LOCAL = SIGNATURE + struct.pack("!BBH", 0x20, 0, 0)


# --- reading a header


@contextlib.contextmanager
def pair() -> Iterator[tuple[Any, Any]]:
    """The balancer's end and ours; native, as what a listener accepts is."""
    ours, theirs = (NativeSocket(fileno=end.detach()) for end in socket.socketpair())
    with ours, theirs:
        yield theirs, ours


HEADERS = {
    V1: CLIENT,
    b"PROXY TCP6 2001:DB8::7 2001:db8::1 40000 21\r\n": ("2001:db8::7", 40000),
    b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:203.0.113.1 40000 21\r\n": CLIENT,
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN " + b"f" * (LINE - 16) + b"\r\n": None,
    v2(): CLIENT,
    v2("2001:db8::7"): ("2001:db8::7", 40000),
    v2(tail=b"\xe0\x00\x03abc" * 100): CLIENT,
    v2(kind=0x20): None,
    LOCAL: None,
    SIGNATURE + struct.pack("!BBH", 0x21, 0, 0): None,  # an address family that nobody knows
}
assert max(len(header) for header in HEADERS if header.startswith(b"PROXY")) == LINE


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:28].decode("ascii", "replace"))
def test_a_header_is_read_and_not_a_byte_behind_it(header: bytes) -> None:
    with pair() as (balancer, sock):
        balancer.sendall(header + b"USER u\r\n")
        assert read_header(sock, 5) == HEADERS[header]
        assert sock.recv(100) == b"USER u\r\n"


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:28].decode("ascii", "replace"))
def test_a_header_may_come_byte_by_byte(header: bytes) -> None:
    with pair() as (balancer, sock):
        reading = gevent.spawn(read_header, sock, 20)
        for byte in header[:-1]:
            balancer.send(bytes([byte]))
            eventually(lambda: pending(sock) == 0)
            assert not reading.dead
        balancer.send(header[-1:] + b"\r\n")
        assert reading.get() == HEADERS[header]
        assert sock.recv(100) == b"\r\n"


def pending(sock: Any) -> int:
    """Bytes that were not read, while the hub runs."""
    try:
        return len(sock.recv(1000, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


GARBAGE = {
    b"USER anonymous\r\n": "instead of a PROXY header",
    b"PROXY TCP4 192.0.2.7 203.0.113.1 40000\r\n": "instead",
    b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 65536\r\n": "instead",
    b"PROXY TCP4 192.0.2.300 203.0.113.1 40000 21\r\n": "instead",
    b"PROXY TCP4 \xff\xff 203.0.113.1 40000 21\r\n": "instead",
    b"PROXY TCP4 192.0.2.7 203.0.113.1 40000 21\n": "instead",
    b"PROXY UNIX /a /b 1 2\r\n": "instead",
    b"PROXY UNKNOWN " + b"f" * LINE: "has no end",
    SIGNATURE + b"\x11\x11\x00\x00": "instead",  # version 1 in the second's form
    SIGNATURE + b"\x22\x11\x00\x00": "instead",  # neither LOCAL nor PROXY
    SIGNATURE + b"\x21\x11\x00\x04abcd": "instead",  # too short for two addresses
    SIGNATURE + b"\x21\x12\x00\x0c" + bytes(12): "not for TCP",
}


@pytest.mark.parametrize("sent", GARBAGE, ids=lambda sent: sent[:46].decode("ascii", "replace"))
def test_what_is_no_header_is_an_error(sent: bytes) -> None:
    with pair() as (balancer, sock):
        balancer.sendall(sent)
        with pytest.raises(ProxyError, match=GARBAGE[sent]):
            read_header(sock, 5)


def test_the_end_of_the_connection_is_an_error() -> None:
    with pair() as (balancer, sock):
        balancer.shutdown(socket.SHUT_WR)
        with pytest.raises(NothingSent):
            read_header(sock, 5)
    for header in (V1, v2()):
        with pair() as (balancer, sock):
            balancer.send(header[:-1])
            balancer.shutdown(socket.SHUT_WR)
            with pytest.raises(ProxyError, match="ended in its PROXY header"):
                read_header(sock, 5)


@pytest.mark.parametrize("sent", [b"", b"PROXY", V1[:-1], v2()[:-1]])
def test_what_does_not_come_is_not_waited_for(sent: bytes) -> None:
    with pair() as (balancer, sock):
        balancer.send(sent)
        with pytest.raises(ProxyError, match="came in time"):
            read_header(sock, 0.01)


def test_a_header_that_trickles_in_has_no_longer() -> None:
    with pair() as (balancer, sock):
        reading = gevent.spawn(read_header, sock, 0.05)
        balancer.send(SIGNATURE + b"\x21\x11\xff\xff")
        while not reading.dead:
            balancer.send(b"\0")
            eventually(lambda: pending(sock) == 0 or reading.dead)
        with pytest.raises(ProxyError, match="came in time"):
            reading.get()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=120).map(lambda rest: b"PROXY " + rest),
        st.binary(max_size=120).map(lambda rest: SIGNATURE + rest),
        st.tuples(st.sampled_from(sorted(HEADERS)), st.integers(0, 120), st.binary(max_size=9)).map(
            lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]
        ),
    )
)
def test_whatever_comes_is_a_header_or_a_proxy_error(sent: bytes) -> None:
    with pair() as (balancer, sock):
        balancer.sendall(sent)
        balancer.shutdown(socket.SHUT_WR)
        try:
            told = read_header(sock, 5)
        except ProxyError:
            return
        assert told is None or ipaddress.ip_address(told[0])
        left = sock.recv(1000)
        assert sent.endswith(left)
        header = sent[: len(sent) - len(left)]
        assert header.endswith(b"\r\n") or header.startswith(SIGNATURE)
        assert len(header) <= LINE or header.startswith(SIGNATURE)


def test_networks_match_addresses_of_either_family() -> None:
    trusted = [ipaddress.ip_network(each) for each in ("10.0.0.0/8", "fe80::/10")]
    assert is_among("10.1.2.3", trusted)
    assert is_among("::ffff:10.1.2.3", trusted)
    assert is_among("fe80::1%eth0", trusted)
    assert not is_among("11.0.0.1", trusted)
    assert not is_among("2001:db8::1", trusted)


# --- sessions behind a balancer


class Balanced(Client):
    """A client whose connections go through a balancer that sends *header* first."""

    def __init__(
        self, server: Any, header: bytes = V1, login: bool = True, source: str = "127.0.0.1"
    ) -> None:
        self.header = header
        self.source = source
        self.sock = self._connect(server.address)
        self.file = self.sock.makefile("rb")
        if login:
            assert self.reply().startswith("220")
            self.command("USER u", "331")
            self.command("PASS p", "230")

    def __enter__(self) -> Balanced:
        return self

    def _connect(self, address: Any, header: bytes | None = None) -> Any:
        sock = gevent.socket.create_connection(address, 20, source_address=(self.source, 0))
        sock.sendall(self.header if header is None else header)
        return sock

    def data(self, header: bytes | None = None) -> Any:
        reply = self.command("EPSV", "229")
        return self._connect(("127.0.0.1", int(reply.split("|")[3])), header)


@contextlib.contextmanager
def behind(home: Any, base: Any = FTPHandler, trusted: Any = LOCALHOST, **attributes: Any) -> Iterator[Any]:
    """A server with what proxy.py makes of --proxy-protocol."""
    server_attributes: dict[str, Any] = {
        name: attributes.pop(name)
        for name in ("max_cons_per_ip", "proxy_timeout", "stop_timeout")
        if name in attributes
    }
    handler = handler_class(
        users(home), type("H", (QuietChecksMixin, base), {}), passive_dtp=ProxiedPassiveDTP, **attributes
    )
    server_class = type(
        "Server", (ProxyServerMixin, GeventFTPServer), {"proxy_networks": trusted, **server_attributes}
    )
    server: Any = server_class(("127.0.0.1", 0), handler)
    server.start()
    try:
        yield server
    finally:
        server.stop(0)
        assert server.closed


@pytest.mark.parametrize("header", [V1, v2()], ids=["v1", "v2"])
def test_a_session_has_the_clients_address(
    tmp_path: Path, header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with behind(tmp_path) as server, Balanced(server, header) as client:
        (session,) = server.sessions()
        assert session.remote_address == CLIENT
        assert server.ip_map == {CLIENT[0]: 1}
        client.command("QUIT", "221")
        assert client.ended()
        eventually(lambda: not server.sessions())
        assert not server.ip_map
    lines = [line for line in caplog.messages if "FTP session" in line]
    assert lines == [
        "192.0.2.7:40000-[] FTP session opened (connect)",
        "192.0.2.7:40000-[u] FTP session closed (disconnect).",
    ]


def test_commands_behind_the_header_are_obeyed(tmp_path: Path) -> None:
    with behind(tmp_path) as server:
        with Balanced(server, V1 + b"USER u\r\nPASS p\r\nPWD\r\n", login=False) as client:
            codes = [client.reply()[:3] for _ in range(4)]
            assert codes == ["220", "331", "230", "257"]


def test_a_header_from_elsewhere_is_not_believed(tmp_path: Path) -> None:
    trusted = [ipaddress.ip_network("127.0.0.9")]
    with behind(tmp_path, trusted=trusted) as server:
        with Balanced(server, login=False) as client:
            assert client.reply().startswith("220")
            assert client.reply().startswith("500")
            assert server.sessions()[0].remote_address[0] == "127.0.0.1"
        with Client(server) as client:
            client.store("file", b"content")  # an ordinary session, data connection and all
            assert client.retrieve("file") == b"content"
        with Balanced(server, source="127.0.0.9") as client:
            assert server.sessions()[-1].remote_address == CLIENT


def test_without_a_header_it_is_closed_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with behind(tmp_path, proxy_timeout=0.02) as server:
        with Balanced(server, b"", login=False) as client:
            assert client.reply() == ""
            assert client.ended()
        with Balanced(server, b"USER anonymous\r\n", login=False) as client:
            assert client.ended()
        assert not server.sessions()
        assert not server.ip_map
    assert len(caplog.messages) == 2, caplog.messages
    where = r"127\.0\.0\.1:\d+, which is to tell its clients' addresses: closed, "
    assert re.fullmatch(where + "no PROXY header came in time, but b''", caplog.messages[0])
    assert re.fullmatch(
        where + r"it began with b'USER ano\w*(\\r\\n)?' instead of a PROXY header", caplog.messages[1]
    )


def test_checks_that_only_connect_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accepted: list[Any] = []

    with behind(tmp_path) as server:
        handle = server.handle_accepted

        def recorded(sock: Any, addr: Any) -> None:
            handle(sock, addr)
            accepted.append(addr)

        server.handle_accepted = recorded
        with Balanced(server, b"", login=False):
            pass
        eventually(lambda: accepted)
    assert caplog.messages == []


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN\r\n"], ids=["LOCAL", "UNKNOWN"])
def test_the_balancers_own_connections_are_served_and_not_logged(
    tmp_path: Path, header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with behind(tmp_path) as server:
        with Balanced(server, header, login=False) as client:
            assert client.reply().startswith("220")
            assert server.sessions()[0].remote_address == client.sock.getsockname()
            client.command("QUIT", "221")
            assert client.ended()
        eventually(lambda: not server.sessions())
        assert not [line for line in caplog.messages if "FTP session" in line], caplog.messages
        with Balanced(server, header):
            assert "USER 'u' logged in." in caplog.text  # somebody, after all


def test_limits_count_the_clients_addresses(tmp_path: Path) -> None:
    with behind(tmp_path, max_cons_per_ip=1) as server:
        with Balanced(server), Balanced(server, v2("192.0.2.8")), Balanced(server, v2("2001:db8::7")):
            with Balanced(server, v2(port=40001), login=False) as second:
                assert second.reply() == "421 Too many connections from the same IP address."
                assert second.ended()
            eventually(lambda: len(server.sessions()) == 3)
            assert server.ip_map == {"192.0.2.7": 1, "192.0.2.8": 1, "2001:db8::7": 1}


def test_one_that_sends_no_header_delays_nobody(tmp_path: Path) -> None:
    with behind(tmp_path, proxy_timeout=60) as server:
        with Balanced(server, b"", login=False), Balanced(server, V1[:9], login=False):
            with Balanced(server) as client:
                client.command("NOOP", "200")
                assert len(server.sessions()) == 1


@pytest.mark.parametrize("late", [b"", V1], ids=["nothing", "header"])
def test_a_server_that_stops_waits_for_no_header(
    tmp_path: Path, late: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Also on a loop that lives on: the connection is closed, and its greenlet is gone (leak guard)."""
    caplog.set_level(logging.INFO)
    ioloop = GeventIOLoop()
    server_class = type(
        "Server", (ProxyServerMixin, GeventFTPServer), {"proxy_networks": LOCALHOST, "proxy_timeout": 60}
    )
    server = server_class(("127.0.0.1", 0), handler_class(users(tmp_path)), ioloop)
    server.start()
    try:
        with Balanced(server, b"", login=False) as client:
            eventually(lambda: server._without_header)
            client.sock.sendall(late)  # there, but not yet seen
            server.stop(0)
            assert client.ended()
        eventually(lambda: not server._without_header)
        assert "session opened" not in caplog.text
    finally:
        ioloop.close()


def test_who_comes_in_a_drain_is_told(tmp_path: Path) -> None:
    with behind(tmp_path, proxy_timeout=60) as server:
        with Balanced(server) as busy, Balanced(server, b"", login=False) as late:
            busy.store("file", b"x")
            eventually(lambda: server._without_header)
            server.close()  # the listener; `busy` goes on
            late.sock.sendall(V1)
            assert late.reply().startswith("421 Service shutting down")
            busy.command("NOOP", "200")


# --- data connections


def test_data_connections_have_their_headers_too(tmp_path: Path) -> None:
    with behind(tmp_path) as server, Balanced(server) as client:
        assert client.store("file", b"content" * 10_000).startswith("226")
        assert client.retrieve("file") == b"content" * 10_000


def test_data_from_another_client_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with behind(tmp_path) as server, Balanced(server) as client:
        for header, seen in (
            (v2("192.0.2.8", 5), "192.0.2.8:5"),
            (LOCAL, r"127.0.0.1:\d+"),
            (b"PROXY UNKNOWN\r\n", r"127.0.0.1:\d+"),
        ):
            with client.data(header) as data:
                assert data.recv(1) == b""
            client.command("NOOP", "200")
            assert re.search(f"Rejected data connection from foreign address {seen}", caplog.text)
        assert client.store("file", b"content").startswith("226")


def test_foreign_data_may_be_permitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with behind(tmp_path, permit_foreign_addresses=True) as server, Balanced(server) as client:
        with client.data(v2("192.0.2.8", 5)) as data:
            client.command("STOR file", "1")
            data.sendall(b"content")
        assert client.reply().startswith("226")
    assert "Established data connection with foreign address 192.0.2.8:5." in caplog.text


def test_data_without_a_header_is_dropped_and_the_port_stays_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with behind(tmp_path, proxy_timeout=0.02) as server, Balanced(server) as client:
        port = int(client.command("EPSV", "229").split("|")[3])
        with gevent.socket.create_connection(("127.0.0.1", port)) as stray:
            assert stray.recv(1) == b""
        with client._connect(("127.0.0.1", port)) as data:
            client.command("STOR file", "1")
            data.sendall(b"content")
        assert client.reply().startswith("226")
    lines = [line for line in caplog.messages if "PROXY" in line]
    assert len(lines) == 1
    assert re.match(r"192\.0\.2\.7:40000-\[u\] data connection from 127\.0\.0\.1:\d+, .*in time", lines[0])


def test_data_may_come_past_the_balancer(tmp_path: Path) -> None:
    """The session through it, the data straight from the client, as nodes with public addresses have it."""
    trusted = [ipaddress.ip_network("127.0.0.9")]
    with behind(tmp_path, trusted=trusted) as server:
        with Balanced(server, v2("127.0.0.5"), source="127.0.0.9") as client:
            client.source, client.header = "127.0.0.5", b""
            assert client.store("file", b"content").startswith("226")


def test_who_waits_for_a_header_can_be_disconnected(tmp_path: Path) -> None:
    with behind(tmp_path, proxy_timeout=60) as server, Balanced(server) as client:
        with client.data(b"") as data:
            client.send("STOR file")
            eventually(lambda: server.sessions()[0].waiting_since)
            server.sessions()[0].disconnect("Enough.")
            assert client.reply() == "421 Enough."
            assert data.recv(1) == b""


def test_a_session_that_is_closed_meanwhile_leaves_no_data_connection(tmp_path: Path) -> None:
    """By a program that does so itself."""
    with behind(tmp_path, proxy_timeout=60) as server, Balanced(server) as client:
        with client.data(b"") as data:
            eventually(lambda: server.sessions()[0].waiting_since)
            server.sessions()[0].handler.close()
            data.sendall(V1)
            assert data.recv(1) == b""


@needs_ipv6
def test_a_socket_for_ipv6_makes_no_other_client(tmp_path: Path) -> None:
    """A dual-stack listener says ::ffff:127.0.0.5 of a client whom the balancer calls 127.0.0.5."""
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    handler = handler_class(users(tmp_path), passive_dtp=ProxiedPassiveDTP)
    networks = [ipaddress.ip_network("127.0.0.9")]
    server_class = type("Server", (ProxyServerMixin, GeventFTPServer), {"proxy_networks": networks})
    with contextlib.closing(listener):
        server = server_class(listener, handler)
        server.start()
        try:
            over_ipv4 = SimpleNamespace(address=("127.0.0.1", server.server_port))
            with Balanced(over_ipv4, v2("127.0.0.5"), source="127.0.0.9") as client:
                assert server.sessions()[0].remote_address[0] == "127.0.0.5"
                client.source, client.header = "127.0.0.5", b""
                assert client.store("file", b"content").startswith("226")
        finally:
            server.stop(0)


# --- TLS: the header comes before the handshake


@pytest.fixture(scope="module")
def certfile(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("OpenSSL", reason="pyOpenSSL is not installed")
    return str(certificate(tmp_path_factory.mktemp("tls")))


def transfers_over_tls(client: Balanced) -> None:
    client.command("USER u", "331")
    client.command("PASS p", "230")
    client.command("PBSZ 0", "200")
    client.command("PROT P", "200")
    with contextlib.closing(client.data()) as plain_data:
        client.send("STOR file")
        data = encrypted(plain_data)
        assert client.reply().startswith("1")
        data.sendall(b"content")
        data.unwrap()
        data.close()
    assert client.reply().startswith("226")


def test_explicit_tls_after_the_header(tmp_path: Path, certfile: str) -> None:
    from pyftpdlib.handlers import TLS_FTPHandler

    options = {"certfile": certfile, "tls_control_required": True, "tls_data_required": True}
    with behind(tmp_path, TLS_FTPHandler, **options) as server:
        with Balanced(server, login=False) as client:
            assert client.reply().startswith("220")
            client.command("AUTH TLS", "234")
            client.encrypt()
            transfers_over_tls(client)
            assert server.sessions()[0].remote_address == CLIENT
    assert (tmp_path / "file").read_bytes() == b"content"


def test_implicit_tls_after_the_header(tmp_path: Path, certfile: str) -> None:
    from pyftpdlib.handlers import TLS_FTPHandler

    class Implicit(TLS_FTPHandler):
        def handle(self) -> None:
            self.secure_connection(self.ssl_context)

        def handle_ssl_established(self) -> None:
            super().handle()

    with behind(tmp_path, Implicit, certfile=certfile) as server:
        with Balanced(server, login=False) as client:
            client.encrypt()
            assert client.reply().startswith("220")
            transfers_over_tls(client)
            assert server.sessions()[0].remote_address == CLIENT
    assert (tmp_path / "file").read_bytes() == b"content"


# --- the command


@pytest.mark.program
@pytest.mark.parametrize(
    ("header", "concurrency"),
    [(V1, "async"), (v2(), "async"), (v2(), "pre-fork")],
    ids=["v1", "v2", "pre-fork"],
)
def test_the_command_takes_addresses_from_the_balancer(
    tmp_path: Path, header: bytes, concurrency: str
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    options = ("--proxy-protocol", "127.0.0.9,10.0.0.0/8", "--concurrency", concurrency)
    with Command(*options, directory=tmp_path) as server:
        through = SimpleNamespace(address=("127.0.0.1", server.port))
        with Balanced(through, header, login=False, source="127.0.0.9") as client:
            assert client.reply().startswith("220")
            client.command("USER anonymous", "331")
            client.command("PASS p", "230")
            assert client.retrieve("file") == b"content"
        server.logged(r"192\.0\.2\.7:40000-\[anonymous\] RETR .*file completed=1 bytes=7")
        with ftplib.FTP(timeout=30) as direct:
            direct.connect("127.0.0.1", server.port)
            direct.login()
            assert direct.nlst() == ["file"]
        assert server.stop()[0] == 0


@pytest.mark.program
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--proxy-protocol", "10.0.0.1/8"], "--proxy-protocol: 10.0.0.1/8 has host bits set; write"),
        (["--proxy-protocol", "balancer"], "--proxy-protocol: 'balancer' does not appear to be an IPv4"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = run(sys.executable, "-m", "bridge.ftp", "-p", "0", *options, directory=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.program
def test_without_the_library_the_option_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "proxyprotocol.py").write_text("raise ImportError")
    done = run(sys.executable, "-m", "bridge.ftp", "--proxy-protocol", "10.0.0.0/8", directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "--proxy-protocol needs proxy-protocol: pip install 'pyftpdlib-gevent[proxy]'"
    )
