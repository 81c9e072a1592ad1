"""SIGTERM in the middle of real clients' transfers: with enough time they complete, and files are whole."""

from __future__ import annotations

import contextlib
import ftplib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import CONCURRENCY, LIMIT, Command, certificate
from support.clients import CLIENTS, client, needs_curl
from support.servers import eventually

pytestmark = pytest.mark.program

MB = 1 << 20
#: More than pipes and sockets buffer, so that a client whose stdin or stdout waits is in mid-transfer.
CONTENT = bytes(range(256)) * (24 * MB // 256)

#: Enough for a transfer on the busiest machine; by default it is cut after 10 s.
PATIENT = ("--stop-timeout", "1000")


@contextlib.contextmanager
def idle_session(server: Command) -> Iterator[ftplib.FTP]:
    with contextlib.closing(ftplib.FTP(timeout=LIMIT)) as session:
        session.connect("127.0.0.1", server.port)
        session.login()
        yield session


def assert_gone(session: ftplib.FTP) -> None:
    with pytest.raises(ftplib.error_temp, match=r"^421 Service shutting down"):
        session.voidresp()


@pytest.mark.parametrize("concurrency", CONCURRENCY)
@pytest.mark.parametrize("name", CLIENTS)
def test_a_download_completes(tmp_path: Path, name: str, concurrency: str) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with (
        Command(*PATIENT, "--concurrency", concurrency, directory=tmp_path) as server,
        idle_session(server) as idle,
    ):
        with client(name, "down", server) as process:
            assert process.stdout is not None
            start = process.stdout.read(MB)
            server.send(signal.SIGTERM)
            server.logged("1 session.* to end, 1 of them after their transfer|2 session.*, 1 of them")
            assert_gone(idle)
            content = start + process.stdout.read()
            whole = process.wait(LIMIT) == 0 and content == CONTENT
            assert whole, (len(content), CONTENT.startswith(content), process.communicate(), server.output)
        code, output = server.wait()
        assert code == 0, output
        assert "1 transfer(s) finished, 0 failed and 0 cut" in output


def upload_through_a_drain(server: Command, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(CONTENT[: 12 * MB])
    process.stdin.flush()
    server.send(signal.SIGTERM)
    server.logged("1 session.* to end, 1 of them after their transfer")
    process.stdin.write(CONTENT[12 * MB :])
    process.stdin.close()
    assert process.wait(LIMIT) == 0, process.stderr


@pytest.mark.parametrize("concurrency", CONCURRENCY)
@pytest.mark.parametrize("name", CLIENTS)
def test_an_upload_completes(tmp_path: Path, name: str, concurrency: str) -> None:
    with Command(*PATIENT, "-w", "--concurrency", concurrency, directory=tmp_path) as server:
        with client(name, "up", server) as process:
            upload_through_a_drain(server, process)
        code, output = server.wait()
        assert code == 0, output
        assert (tmp_path / "file").read_bytes() == CONTENT
        assert "1 transfer(s) finished, 0 failed and 0 cut" in output


@needs_curl
def test_an_upload_over_tls_completes(tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL", reason="pyOpenSSL is not installed")
    home = tmp_path / "home"
    home.mkdir()
    pem = str(certificate(tmp_path))
    with Command(*PATIENT, "-w", "--tls", "--certfile", pem, directory=home) as server:
        with client("curl", "up", server, "--ssl-reqd -k") as process:
            upload_through_a_drain(server, process)
        code, output = server.wait()
        assert code == 0, output
        assert (home / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("concurrency", CONCURRENCY)
@pytest.mark.parametrize("forced_by", ["timeout", "second signal"])
def test_what_does_not_finish_is_cut(tmp_path: Path, forced_by: str, concurrency: str) -> None:
    timeout = "0.1" if forced_by == "timeout" else "1000"
    options = ("-w", "--concurrency", concurrency, "--stop-timeout", timeout)
    with Command(*options, directory=tmp_path) as server, idle_session(server) as session:
        session.voidcmd("TYPE I")
        with contextlib.closing(session.transfercmd("STOR file")) as data:
            data.sendall(b"half")
            eventually(lambda: "Total bytes received: 4" in session.sendcmd("STAT"))
            server.send(signal.SIGTERM)
            if forced_by == "second signal":
                server.logged("1 of them after their transfer")
                server.send(signal.SIGTERM)
            with pytest.raises(ftplib.error_temp, match=r"^426 Service shutting down"):
                session.voidresp()
            with pytest.raises(ftplib.error_temp, match=r"^421 Service shutting down"):
                session.voidresp()
        code, output = server.wait()
        assert code == 0, output
        assert "1 cut, 0 transfer(s) finished, 0 failed and 1 cut" in output
        assert "completed=0 bytes=4" in output
        assert (tmp_path / "file").read_bytes() == b"half"
