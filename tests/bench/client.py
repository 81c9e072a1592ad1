"""An FTP client for benchmarks: as little as is needed, on blocking sockets, and it believes nothing.

Neighbours: load.py, whose jobs use it. What is not as expected (a reply code, a missing 226) raises.
"""

from __future__ import annotations

import socket
import ssl
from typing import Protocol

#: Seconds without a single byte after which a server counts as hanging.
PATIENCE = 30.0
#: A recv() or send() takes at most this; four times what Linux's loopback usually has ready. Bytes.
BUFFER = 1 << 18


class Target(Protocol):
    """Where to, and how."""

    host: str
    port: int
    user: str
    tls: bool
    implicit_tls: bool

    def encrypt(self, sock: socket.socket) -> ssl.SSLSocket:
        """TLS on a connection."""


class Unexpected(Exception):
    """The server did something else than its work."""


class Session:
    """A control connection, logged in, with blocking sockets."""

    def __init__(self, target: Target, address: str | None = None) -> None:
        self._target = target
        source = (address, 0) if address else None
        self.sock = socket.create_connection((target.host, target.port), PATIENCE, source)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        if target.implicit_tls:
            self.sock = target.encrypt(self.sock)
        self.reply("220")
        if target.tls and not target.implicit_tls:
            self.command("AUTH TLS", "234")
            self.sock = target.encrypt(self.sock)
        self.command(f"USER {target.user}", "331")
        self.command("PASS p", "230")
        if target.tls:
            self.command("PBSZ 0", "200")
            self.command("PROT P", "200")
        self.command("TYPE I", "200")

    def reply(self, code: str) -> str:
        """The last line of the next reply, which must begin with *code*."""
        while True:
            line, end, rest = self._received.partition(b"\r\n")
            if not end:
                received = self.sock.recv(4096)
                if not received:
                    raise Unexpected(f"connection closed instead of {code}")
                self._received += received
                continue
            self._received = rest
            if line[:3].isdigit() and line[3:4] == b" ":
                text = line.decode(errors="replace")
                if not text.startswith(code):
                    raise Unexpected(f"{text!r} instead of {code}")
                return text

    def command(self, line: str, code: str) -> str:
        """Send *line*; its reply."""
        self.sock.sendall(f"{line}\r\n".encode())
        return self.reply(code)

    def data(self) -> socket.socket:
        """A data connection by EPSV, not yet encrypted."""
        port = int(self.command("EPSV", "229").split("|")[3])
        return socket.create_connection((self._target.host, port), PATIENCE)

    def download(self, line: str) -> int:
        """Bytes that *line* brings."""
        count, buffer = 0, bytearray(BUFFER)
        data = self.data()
        self.command(line, "1")
        if self._target.tls:
            data = self._target.encrypt(data)
        with data:
            while got := data.recv_into(buffer):
                count += got
        self.reply("226")
        return count

    def upload(self, name: str, size: int) -> int:
        """STOR *size* bytes."""
        chunk = memoryview(bytes(BUFFER))
        data = self.data()
        self.command(f"STOR {name}", "1")
        if self._target.tls:
            data = self._target.encrypt(data)
        with data:
            for start in range(0, size, BUFFER):
                data.sendall(chunk[: size - start])
            if isinstance(data, ssl.SSLSocket):
                data.unwrap().close()
        self.reply("226")
        return size

    def close(self) -> None:
        """Leave without a word."""
        self.sock.close()
