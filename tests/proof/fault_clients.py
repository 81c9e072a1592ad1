"""FTP clients for a server whose system calls fail: what they send, and what they must be able to rely on.

No tests in here. A `Victim` goes through a script; every step may be refused, and the connection may end, but
a client that waits for longer than cli.LIMIT fails the test, and so does a reply that is not true:

- 226 for an upload: all of it is there, under its name. Refused: what was there before. Neither (the
  connection ended before a reply): one of the two. Never a part of it.
- 226 for a download: all of it has come. Else: the beginning of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import ssl
import sys
import termios
from pathlib import Path

from support.cli import LIMIT

#: What there is to download, and to overwrite. More than a block of any way to send or receive.
SOURCE = bytes(range(256)) * 2000
OLD = b"old" * 1000
#: What is uploaded: several TLS records.
CONTENT = b"new" * 30_000


class Lost(Exception):
    """The control connection has ended."""


class Client:
    """A blocking FTP client: commands and their replies' codes."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), LIMIT)
        self.file = self.sock.makefile("rb")
        self.tls: ssl.SSLContext | None = None
        self.last = ""

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def reply(self) -> str:
        """The next reply's code. Raises Lost, and TimeoutError after LIMIT seconds."""
        while True:
            try:
                line = self.file.readline().decode()
            except TimeoutError:
                raise
            except OSError as error:
                raise Lost from error
            if not line:
                raise Lost
            if line[:3].isdigit() and line[3] == " ":
                self.last = line.rstrip()
                return line[:3]

    def command(self, line: str) -> str:
        try:
            self.sock.sendall(f"{line}\r\n".encode())
        except TimeoutError:
            raise
        except OSError:
            pass  # what it has said before it ended can be read
        return self.reply()

    def log_in(self) -> None:
        for expected in ("331", "230"):
            code = self.command("USER ada" if expected == "331" else "PASS p")
            if code != expected:
                raise AssertionError(self.last)

    def data(self, how: str = "EPSV") -> socket.socket | None:
        """A data connection; None if the server refuses to open one."""
        if how == "PORT":
            with socket.create_server(("127.0.0.1", 0)) as listener:
                listener.settimeout(LIMIT)
                high, low = divmod(listener.getsockname()[1], 256)
                if self.command(f"PORT 127,0,0,1,{high},{low}")[0] != "2":
                    return None
                return listener.accept()[0]
        if self.command(how)[0] != "2":
            return None
        numbers = re.findall(r"\d+", self.last)
        port = int(numbers[-1]) if how == "EPSV" else 256 * int(numbers[-2]) + int(numbers[-1])
        try:
            return socket.create_connection(("127.0.0.1", port), LIMIT)
        except ConnectionError:
            return None

    def encrypt(self) -> None:
        """TLS on the control connection, whatever certificate it has, and on those for data."""
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname = False
        self.tls.verify_mode = ssl.CERT_NONE
        self.file.close()
        self.sock = self.tls.wrap_socket(self.sock)
        self.file = self.sock.makefile("rb")

    def protected(self, data: socket.socket) -> socket.socket:
        return data if self.tls is None else self.tls.wrap_socket(data)


class Victim(Client):
    """Tries everything once. `steps`: (command, code), "" for the one at which the connection ended."""

    def __init__(self, port: int, home: Path) -> None:
        self.steps: list[tuple[str, str]] = []
        self._home = home
        super().__init__(port)

    @property
    def lost(self) -> bool:
        """Whether it came to its end without QUIT."""
        return self.steps[-1:] != [("QUIT", "221")]

    def refused(self) -> list[str]:
        return [" ".join(step).strip() for step in self.steps if step[1][:1] not in ("1", "2", "3")]

    def command(self, line: str) -> str:
        self.steps.append((line, ""))
        code = super().command(line)
        self.steps[-1] = (line, code)
        return code

    def run(self, script: str) -> None:
        try:
            self.steps.append(("connect", ""))
            code = self.reply()
            self.steps[-1] = ("connect", code)
            if code == "220" and not script.startswith("tls"):
                self._log_in_and_go_on(script)
            elif code == "220" and self.command("AUTH TLS") == "234":
                try:
                    self.encrypt()
                except TimeoutError:
                    raise
                except OSError:
                    raise Lost from None
                self._log_in_and_go_on(script)
        except Lost:
            pass
        finally:
            self.close()

    def _log_in_and_go_on(self, script: str) -> None:
        if self.command("USER ada") == "331" and self.command("PASS p") == "230":
            for line in ("PBSZ 0", "PROT P") if script.startswith("tls") else ():
                self.command(line)
            self.command("TYPE I")
            if script in ("transfers", "tls-up"):
                self._store("STOR", "new", None)
                self._store("STOR", "old", OLD, "PASV")
                self._store("APPE", "appended", None)
            if script in ("transfers", "tls-down"):
                self._retrieve("source", 0, "EPSV")
                self._retrieve("source", 1000, "PORT")
                self._list("LIST")
                self._list("MLSD")
            if script == "files":
                self._files()
        self.command("QUIT")

    def _files(self) -> None:
        for line in (
            *("MKD d", "CWD d", "CDUP", "RNFR old", "RNTO d/moved", "SIZE source", "MDTM source"),
            *("MLST source", "SITE CHMOD 640 source", "MFMT 20200101000000 source", "STAT source"),
            *("RNFR d/moved", "RNTO old", "DELE old", "RMD d", "XMD5 source"),
        ):
            self.command(line)

    def _store(self, command: str, name: str, before: bytes | None, how: str = "EPSV") -> None:
        code = ""
        try:
            data = self.data(how)
            if data is None:
                code = "425"
                return
            with data:
                code = self.command(f"{command} {name}")
                if code[0] == "1":
                    self._send(data)
                    code = ""
                    code = self._end(f"{command} {name}")
        finally:
            self._check(name, code, before)

    def _send(self, data: socket.socket) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            with self.protected(data) as protected:
                protected.sendall(CONTENT)
                if isinstance(protected, ssl.SSLSocket):
                    protected.unwrap()
        data.close()

    def _end(self, step: str) -> str:
        """The reply to a transfer that was begun."""
        self.steps.append((step, ""))
        code = self.reply()
        self.steps[-1] = (step, code)
        return code

    def _check(self, name: str, code: str, before: bytes | None) -> None:
        path = self._home / name
        found = path.read_bytes() if path.exists() else None
        allowed: list[bytes | None] = [before]
        if code[:1] in ("2", ""):
            allowed = [CONTENT] if code else [CONTENT, before]
        assert found in allowed, f"{code!r} for {name}, and there are {len(found or b'')} bytes: {self.steps}"

    def _retrieve(self, name: str, offset: int, how: str) -> None:
        data = self.data(how)
        with data or contextlib.nullcontext():
            if offset and data is not None and self.command(f"REST {offset}") != "350":
                offset = 0
            content, code = self._receive(data, f"RETR {name}")
        assert SOURCE[offset:].startswith(content), f"{code!r} for {name}, and something else came"
        assert code != "226" or content == SOURCE[offset:], f"226 for {name}, and {len(content)} bytes came"

    def _list(self, command: str) -> None:
        content, code = self._receive(self.data(), command)
        assert code != "226" or b"source" in content, f"226 for {command}, and there came {content!r}"

    def _receive(self, data: socket.socket | None, command: str) -> tuple[bytes, str]:
        content = b""
        if data is None:
            return content, "425"
        with data:
            code = self.command(command)
            if code[0] != "1":
                return content, code
            lost = False
            try:
                with self.protected(data) as protected:
                    while chunk := protected.recv(65536):
                        content += chunk
            except ConnectionError:
                pass
            except ssl.SSLError as error:
                # One of the server's records has never come. Tickets, say: OpenSSL passes over their EPIPE,
                # since no kernel lets the next ones through. The client knows, whatever the server says.
                lost = "BAD_RECORD_MAC" in str(error)
        code = self._end(command)
        return content, "" if lost else code


class Bystander:
    """A session that is idle, one that downloads and one that uploads, all in the middle of it.

    While the faults happen they neither send nor read; so the server has nothing to do for them. `go_on` asks
    whether they are still there. The upload goes on a little then, the download only with `end`: how soon the
    server can send more is a matter of TCP's timers.
    """

    #: Bytes uploaded at a time.
    STEP = 1 << 10
    #: Bytes to download: more than fits into the buffers, which are 4 MiB for the server (tcp_wmem).
    SIZE = 8 << 20

    def __init__(self, port: int, home: Path) -> None:
        self._home = home
        # Lines, as TYPE A leaves them alone; it also keeps an upload from having a pipe (splice.py).
        self._pattern = b"".join(b"%063d\n" % n for n in range(self.SIZE // 64))
        (home / "big").write_bytes(self._pattern)
        self._sent = 0
        self._clients = [self._session(port) for _ in range(3)]
        self._down = self._data(self._clients[1], "RETR big")
        self._up = self._data(self._clients[2], "STOR bystander")

    @staticmethod
    def _session(port: int) -> Client:
        client = Client(port)
        assert client.reply() == "220"
        client.log_in()
        return client

    @staticmethod
    def _data(client: Client, command: str) -> socket.socket:
        if command.startswith("RETR"):
            assert client.command("TYPE I") == "200"
        data = client.data()
        assert data is not None, client.last
        assert client.command(command)[0] == "1", client.last
        return data

    def unread(self) -> int:
        """Bytes of the download that have come."""
        return int.from_bytes(fcntl.ioctl(self._down, termios.FIONREAD, bytes(4)), sys.byteorder)

    def go_on(self) -> None:
        assert [client.command("STAT") for client in self._clients] == ["211"] * 3
        begin = self._sent % self.SIZE
        self._up.sendall(self._pattern[begin : begin + self.STEP])
        self._sent += self.STEP

    def end(self) -> None:
        """Let both transfers come to their end, which has to be 226 and the same bytes."""
        with self._down, self._down.makefile("rb") as file:
            assert file.read() == self._pattern
        self._up.close()
        assert [client.reply() for client in self._clients[1:]] == ["226", "226"]
        repeated = self._pattern * (self._sent // self.SIZE + 1)
        assert (self._home / "bystander").read_bytes() == repeated[: self._sent]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._up.close()
        self._down.close()
