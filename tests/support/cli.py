"""Runs `python -m bridge.ftp` as its users do: a process of its own, ended by a signal.

No tests in here. A `Command` is a context manager: when it is left the process and its children are dead
and reaped, its pipes closed and the threads that read them joined. Nothing sleeps or polls; every wait is
for a line, for the end of a stream or of a process, and fails after LIMIT with everything printed so far.
"""

from __future__ import annotations

import datetime
import ftplib
import ipaddress
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, TypeVar

import psutil

import bridge

_Client = TypeVar("_Client", bound=ftplib.FTP)

#: Where the bridge under test lies: an installed wheel's, or the checkout's.
ROOT = Path(bridge.__file__).parent.parent
#: Seconds for anything one waits for. The slowest takes 5 on an idle machine with 2 cores.
LIMIT = 30.0
#: Values of --concurrency.
CONCURRENCY = ["async", "pre-fork"]


class _Lines:
    """What a stream brings, read by a thread so that the process never waits for us."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str, count: int = 1) -> str | None:
        """The line that is the *count*-th to match *pattern*; None if the stream ends or LIMIT passes."""

        def found() -> list[str]:
            return [line for line in self._lines if re.search(pattern, line)]

        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(found()) >= count, LIMIT)
            lines = found()
            return lines[count - 1] if len(lines) >= count else None

    def join(self) -> bool:
        """Whether the stream ended: whoever could write to it is gone."""
        self._thread.join(LIMIT)
        return not self._thread.is_alive()

    def close(self) -> None:
        if self.join():
            self._stream.close()


class Command:
    """`python -m bridge.ftp -p 0 OPTIONS` in *directory*, or the Python script *program* which runs it."""

    host: str
    port: int

    def __init__(self, *options: str, directory: Path, program: Sequence[str] = ("-m", "bridge.ftp")) -> None:
        self._known_children: list[psutil.Process] = []
        self._process = subprocess.Popen(
            [sys.executable, *program, "-p", "0", *options],
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdout = _Lines(self._process.stdout)
        self._stderr = _Lines(self._process.stderr)
        try:
            match = re.search(r" on (\S+) port (\d+)$", self.printed(r" on \S+ port \d+$"))
            assert match is not None
            self.host, self.port = match[1], int(match[2])
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        family: list[Any] = [*self._known_children, *self.children(), self._process]
        for process in family:
            try:
                process.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass  # gone meanwhile
        self._process.wait(LIMIT)
        self._stdout.close()
        self._stderr.close()

    # --- while it runs

    @property
    def pid(self) -> int:
        return self._process.pid

    def children(self) -> list[psutil.Process]:
        """Its child processes and theirs."""
        if self._process.poll() is not None:
            return []
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def printed(self, pattern: str, count: int = 1) -> str:
        """Wait until *count* lines on stdout matched *pattern*; the last of them."""
        return self._wait_for(self._stdout, pattern, count)

    def logged(self, pattern: str, count: int = 1) -> str:
        """Wait until *count* lines on stderr matched *pattern*; the last of them."""
        return self._wait_for(self._stderr, pattern, count)

    def _wait_for(self, lines: _Lines, pattern: str, count: int) -> str:
        line = lines.wait_for(pattern, count)
        if line is None:
            self._fail(f"never printed {pattern!r} ({count} times)")
        return line

    # --- its end

    def send(self, number: signal.Signals) -> None:
        self._known_children += self.children()  # no longer found as such when it is dead
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Wait for the end of the process, but not of its children."""
        try:
            return self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._fail("did not end")

    def wait(self) -> tuple[int, str]:
        """Exit code and output, when the process and all who inherited its streams are gone."""
        code = self.exit_code()
        for lines in (self._stdout, self._stderr):
            if not lines.join():
                self._fail(f"ended with {code}, but a child of it did not")
        return code, self.output

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return exit code and output."""
        self.send(number)
        return self.wait()

    @property
    def stdout(self) -> str:
        return self._stdout.text

    @property
    def stderr(self) -> str:
        return self._stderr.text

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def _fail(self, problem: str) -> NoReturn:
        raise AssertionError(f"{self._process.args!r} {problem}; its output:\n{self.output}")


def environment() -> dict[str, str]:
    """Ours, with the same bridge as in this process, and UTF-8 file names."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LC_ALL": "C.UTF-8"}


def become_third(sock: socket.socket) -> None:
    """In a child, before it executes a program: give that *sock* as descriptor 3, as systemd does."""
    os.dup2(sock.fileno(), 3)
    os.set_inheritable(3, True)  # if 3 is what it was already, dup2() did nothing


def run(*command: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that ends by itself; its output is in .stdout and .stderr."""
    return subprocess.run(
        command,
        cwd=directory,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=2 * LIMIT,
        check=False,
    )


def connect(server: Command, encoding: str = "utf-8") -> ftplib.FTP:
    """A session that is not logged in; its wait is bounded by LIMIT."""
    return connected(ftplib.FTP(timeout=LIMIT, encoding=encoding), server)


def connected(client: _Client, server: Command) -> _Client:
    """*client*, which is closed if it cannot connect."""
    try:
        client.connect("127.0.0.1", server.port)
    except BaseException:
        client.close()
        raise
    return client


def log_in(server: Command, user: str = "", password: str = "", *, encoding: str = "utf-8") -> ftplib.FTP:
    client = connect(server, encoding)
    try:
        client.login(user, password)
    except BaseException:
        client.close()
        raise
    return client


def certificate(directory: Path) -> Path:
    """A PEM file with a key and a certificate for localhost, signed by itself. Needs cryptography."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def tls_client(server: Command) -> ftplib.FTP_TLS:
    return connected(ftplib.FTP_TLS(timeout=LIMIT, context=tls_context()), server)


def failure(directory: Path, *options: str) -> str:
    """The one line on stderr of a command that cannot start."""
    result = run(sys.executable, "-m", "bridge.ftp", "-p", "0", *options, directory=directory)
    assert result.returncode == 2, result
    assert result.stdout == ""
    prefix = "python -m bridge.ftp: error: "
    assert result.stderr.startswith(prefix), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith("\n")
    return result.stderr.removeprefix(prefix)
