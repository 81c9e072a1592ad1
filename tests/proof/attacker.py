"""An FTP client that sends any bytes, for attacks on `python -m bridge.ftp`. No tests in here."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from bridge.users.file import Hash
from support.cli import LIMIT, Command

#: What no attack may bring home.
SECRET = b"the-secret-of-somebody-else"

#: scrypt's cheapest hash of the password `p`: checking it shall not be what takes the time here.
CHEAP = Hash(4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"p", salt=b"0123456789abcdef", n=16, r=1, p=1))

#: `python -c HASTY` is the command, whose failed logins wait for 10 ms instead of 3 s.
HASTY = """
import sys
import bridge.ftp
from pyftpdlib.handlers import FTPHandler
FTPHandler.auth_failed_timeout = 0.01
sys.exit(bridge.ftp.main())
"""


class Attacker:
    """A control connection from *source*, with *user* (password `p`) logged in if one is given."""

    def __init__(self, server: Command, user: str = "anonymous", source: str = "127.0.0.1") -> None:
        self.source = source
        self.sock: socket.socket = socket.create_connection(("127.0.0.1", server.port), LIMIT, (source, 0))
        self._file = self.sock.makefile("rb")
        self.greeting = self.reply()
        if user:
            self.do(f"USER {user}")
            assert self.do("PASS p").startswith(b"230")
            self.do("TYPE I")

    def __enter__(self) -> Attacker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def reply(self) -> bytes:
        """All lines of the next reply; what there is at the end of the connection."""
        lines = b""
        while True:
            try:
                line = self._file.readline()
            except ConnectionResetError:
                return lines
            lines += line
            if not line or re.match(rb"\d{3} ", line):
                return lines

    def do(self, command: str | bytes) -> bytes:
        """The reply to one command."""
        self.send((command.encode() if isinstance(command, str) else command) + b"\r\n")
        return self.reply()

    def encrypt(self) -> None:
        """The TLS handshake that follows AUTH. Nothing else may have come in the clear."""
        self.sock.setblocking(False)
        early = self._file.peek() if hasattr(self._file, "peek") else b""
        self.sock.settimeout(LIMIT)
        assert not early, early
        self._file.close()
        self.sock = tls_context().wrap_socket(self.sock)
        self._file = self.sock.makefile("rb")

    def port(self) -> int:
        """Of a passive data connection that is waited for."""
        reply = self.do("EPSV")
        match = re.match(rb"229 .*\|\|\|(\d+)\|", reply)
        assert match is not None, reply
        return int(match[1])

    def data(self, port: int | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port()), LIMIT, (self.source, 0))

    def attempt(self, command: str | bytes, sent: bytes = b"stored") -> tuple[bytes, bytes]:
        """The last reply to a command that may transfer, and what came over its data connection."""
        name = (command.encode() if isinstance(command, str) else command)[:4]
        if name not in (b"RETR", b"STOR", b"STOU", b"APPE", b"LIST", b"NLST", b"MLSD"):
            return self.do(command), b""
        with self.data() as data:
            reply = self.do(command)
            if not reply.startswith(b"1"):
                return reply, b""
            if name in (b"STOR", b"STOU", b"APPE"):
                data.sendall(sent)
                data.shutdown(socket.SHUT_WR)
                return self.reply(), b""
            received = b"".join(iter(lambda: data.recv(65536), b""))
        return self.reply(), received


def until_closed(sock: socket.socket) -> bytes:
    """What comes until the server has closed the connection."""
    received = b""
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def state_of(directory: Path) -> list[tuple[object, ...]]:
    """All that a client could change in *directory*, at any depth."""

    def entries(path: str) -> Iterator[tuple[object, ...]]:
        found = os.lstat(path)
        yield path, found.st_ino, stat.filemode(found.st_mode), found.st_mtime_ns, found.st_size
        if stat.S_ISREG(found.st_mode):
            yield path, Path(path).read_bytes()
        elif stat.S_ISDIR(found.st_mode):
            for name in sorted(os.listdir(path)):
                yield from entries(os.path.join(path, name))

    return list(entries(str(directory)))
