"""FTPS handshakes that end late, never, or with a refusal; in process, where the hub can be watched."""

from __future__ import annotations

import contextlib
import gc
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import gevent.ssl
import pytest

pytest.importorskip("OpenSSL")

from pyftpdlib.handlers import TLS_FTPHandler

from bridge.server import ConfigError
from bridge.tls.certificates import Identity, load
from bridge.tls.transport import Contexts, ControlMixin, DataMixin
from support.fakes import Gate, WaitingFS
from support.ftps_clients import Authority
from support.servers import (
    PATIENCE,
    Client,
    assert_idle,
    encrypted,
    eventually,
    handler_class,
    reset,
    started,
    users,
)


@contextlib.contextmanager
def ftps(
    directory: Path, implicit: bool = True, reuse: bool = False, server: Any = None, **attributes: Any
) -> Iterator[Any]:
    """A server with a certificate of its own."""
    contexts = Contexts(require_reuse=reuse)
    contexts.take(load(str(Authority(directory).issue("server"))), [])
    data = type("Data", (DataMixin, TLS_FTPHandler.dtp_handler), {})
    base = type("Control", (ControlMixin, TLS_FTPHandler), {"dtp_handler": data, "contexts": contexts})
    handler = handler_class(users(directory), base, tls_implicit=implicit, **attributes)
    with started(handler, **(server or {})) as running:
        yield running


def connected(server: Any) -> Any:
    return gevent.socket.create_connection(server.address, PATIENCE)


def end_of(sock: Any) -> bytes:
    """What comes until the connection ends."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(4096):
            received += chunk
    return received


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00"], ids=["nothing", "half a record"])
def test_a_client_that_does_not_go_on_costs_nothing_and_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    with ftps(tmp_path, handshake_timeout=0.5) as server, connected(server) as sock:
        sock.sendall(said)
        eventually(lambda: server._sessions)
        assert_idle()
        assert end_of(sock) == b""
        eventually(lambda: not server._sessions)
        assert [r.getMessage() for r in caplog.records if "handshake" in r.getMessage()] == [
            f"127.0.0.1:{sock.getsockname()[1]}-[] TLS handshake failed: timed out."
        ]


def test_a_handshake_in_time_has_no_end(tmp_path: Path) -> None:
    with ftps(tmp_path, handshake_timeout=0.2) as server, encrypted(connected(server)) as sock:
        assert sock.recv(4096).startswith(b"220 ")
        gevent.sleep(0.3)
        sock.sendall(b"NOOP\r\n")
        assert sock.recv(4096).startswith(b"200 ")


def test_after_auth_the_client_has_as_long(tmp_path: Path) -> None:
    with ftps(tmp_path, implicit=False, handshake_timeout=0.1) as server, connected(server) as sock:
        assert sock.recv(4096).startswith(b"220 ")
        sock.sendall(b"AUTH TLS\r\n")
        assert sock.recv(4096).startswith(b"234 ")
        assert end_of(sock) == b""


def test_the_greeting_waits_for_the_handshake(tmp_path: Path) -> None:
    connects = []
    with ftps(tmp_path, on_connect=lambda self: connects.append(self)) as server, connected(server) as sock:
        eventually(lambda: server._sessions)
        gevent.sleep(0.01)
        assert not connects
        with encrypted(sock) as tls:
            assert tls.recv(4096).startswith(b"220 ")
            assert len(connects) == 1


def test_who_is_refused_hears_it_over_tls(tmp_path: Path) -> None:
    with ftps(tmp_path, server={"max_cons_per_ip": 1}) as server, encrypted(connected(server)) as first:
        assert first.recv(4096).startswith(b"220 ")
        with encrypted(connected(server)) as second:
            assert end_of(second) == b"421 Too many connections from the same IP address.\r\n"


def test_who_is_refused_and_does_not_listen_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.tls.transport.LAST_REPLY_TIMEOUT", 0.05)
    with ftps(tmp_path, server={"max_cons_per_ip": 1}) as server, encrypted(connected(server)) as first:
        assert first.recv(4096).startswith(b"220 ")
        with connected(server) as second:
            assert end_of(second) == b""


def test_above_max_cons_nothing_is_said_in_the_clear(tmp_path: Path) -> None:
    with ftps(tmp_path, server={"max_cons": 1}) as server, encrypted(connected(server)) as first:
        assert first.recv(4096).startswith(b"220 ")
        with connected(server) as second:
            assert end_of(second) == b""


@pytest.mark.parametrize("closed", ["with TCP's end alone", "with a reset", "with TLS's end"])
def test_a_client_that_leaves_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, closed: str
) -> None:
    with ftps(tmp_path) as server:
        sock = encrypted(connected(server))
        assert sock.recv(4096).startswith(b"220 ")
        if closed == "with TLS's end":
            with contextlib.suppress(ssl.SSLError, OSError):
                sock.unwrap()
            sock.close()
        elif closed == "with a reset":
            reset(sock)
        else:
            sock.close()
        eventually(lambda: not server._sessions)
        assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_an_aborted_transfer_does_not_end_the_session_to_be_resumed(tmp_path: Path) -> None:
    """By its id, which OpenSSL keeps (TLS 1.2): a ticket lies with the client."""
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET
    with ftps(tmp_path, implicit=False, reuse=True) as server, Client(server, login=False) as client:
        client.reply()
        client.command("AUTH TLS", "234")
        client.file.close()
        client.sock = context.wrap_socket(client.sock)
        client.file = client.sock.makefile("rb")
        for line in ("USER u", "PASS p", "PBSZ 0", "PROT P"):
            client.command(line, "")
        (control,) = server._sessions
        for _ in range(3):
            with client.data() as plain:
                client.command("STOR file", "1")
                with context.wrap_socket(plain, session=client.sock.session) as data:
                    assert data.session_reused
                    data.sendall(b"half")
                    eventually(lambda: control.data_channel.get_transmitted_bytes())
                    control.abort_transfer("enough")
                    assert client.reply().startswith("426 enough")
            gc.collect()


def test_nothing_is_sent_before_the_end_of_the_handshake_is_known(tmp_path: Path) -> None:
    """Its last record comes while the file is opened, and ABOR behind that: there is one 426."""
    (tmp_path / "slow").write_bytes(bytes(1 << 24))
    gate = Gate()
    file_system = type("FS", (WaitingFS,), {"gate": gate})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        ftps(tmp_path, implicit=False, abstracted_fs=file_system) as server,
        Client(server, login=False) as client,
    ):
        client.reply()
        client.command("AUTH TLS", "234")
        client.file.close()
        client.sock = encrypted(client.sock)
        client.file = client.sock.makefile("rb")
        for line in ("USER u", "PASS p", "PBSZ 0", "PROT P"):
            client.command(line, "")
        with client.data() as data:
            received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(received, to_send)
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            data.sendall(to_send.read())
            while not to_send.pending:
                received.write(data.recv(1 << 16))
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
            client.sock.sendall(b"RETR slow\r\nABOR\r\n")
            gate.arrived()
            data.sendall(to_send.read())
            gate.open()
            assert client.reply().startswith("125 ")
            assert client.reply().startswith("426 ")
            assert client.reply().startswith("226 ABOR")
            client.command("NOOP", "200")


def test_nonsense_after_the_handshake_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ftps(tmp_path) as server:
        tls = encrypted(connected(server))
        assert tls.recv(4096).startswith(b"220 ")
        with gevent.socket.socket(fileno=tls.detach()) as plain:
            plain.sendall(b"USER in the clear\r\n")
            eventually(lambda: not server._sessions)
        (line,) = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
        assert "TLS connection broke off: " in line


def test_what_openssl_refuses_leaves_the_contexts_as_they_were(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    good, other = load(str(authority.issue("server"))), load(str(authority.issue("other")))
    contexts = Contexts(require_reuse=True)
    contexts.take(good, [])
    before = contexts.context
    with pytest.raises(ConfigError, match=r"^--certfile: OpenSSL refuses "):
        contexts.take(Identity(good.chain, other.key, "mixed.pem"), [])
    assert contexts.context is before
    assert contexts.of_session().get_session_cache_mode() == before.get_session_cache_mode()
    assert contexts.of_session() is not contexts.of_session()
