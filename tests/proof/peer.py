"""A client that goes on when the server has seen all it did, so that no race decides. No tests here.

Used by test_differential.py. It looks into the server's session, which is in this process: whether a data
connection was accepted, how much of an upload has come, whether an end was noticed.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from typing import Any

import gevent.socket
import gevent.ssl
from pyftpdlib.handlers import FTPHandler

from bridge.session.data import TransferMixin
from proof.legal import name_of
from proof.sequences import await_or_fail
from support.servers import PATIENCE, encrypted

#: No server knows this command. Its reply comes when everything before has been replied to.
FENCE = "FENCE"

DOWNLOADS = frozenset({"RETR", "LIST", "NLST", "MLSD"})

#: A step of a sequence: the name of a method of `Peer`, and its arguments.
Step = tuple[Any, ...]


class Peer:
    """A session with a server of this process, on this hub or in another thread."""

    def __init__(self, server: Any) -> None:
        self.story: list[str] = []
        self.sock = gevent.socket.create_connection(server.address[:2], PATIENCE)
        self.file = self.sock.makefile("rb")
        self.data: Any = None
        self.port = 0
        self.sent = 0
        self.ended = False
        port = self.sock.getsockname()[1]
        self.reply()
        #: The server's end of this session.
        self.handler: Any = next(
            each
            for each in list(server.ioloop.socket_map.values())
            if isinstance(each, FTPHandler) and each.remote_port == port
        )

    def do(self, step: Step) -> str:
        """What came of a step: the replies, the data, and "closed" at the end of the session."""
        if self.ended:
            return "closed"
        method, *arguments = step
        self.story.append(f"{step!r:.200}")
        happened: list[str] = getattr(self, method)(*arguments)
        self.story.append("    " + "\n    ".join(happened).replace("\r\n", "\n    "))
        return "\n".join(happened)

    def wait(self, condition: Callable[[], object], otherwise: str) -> None:
        await_or_fail(condition, lambda: f"{otherwise}\n" + "\n".join(self.story))

    # --- the control connection

    def reply(self) -> str:
        """The next one, with all its lines; "closed" at the end."""
        text = ""
        while not self.ended:
            try:
                line = self.file.readline().decode("utf-8", "replace")
            except ConnectionError:
                line = ""
            except TimeoutError:
                raise AssertionError("no reply\n" + "\n".join(self.story)) from None
            if not line:
                self.ended = True
                return text + "closed"
            text += line
            if re.match(r"\d\d\d ", line):
                break
        return text.removesuffix("\r\n")

    def send(self, line: bytes) -> None:
        try:
            self.sock.sendall(line + b"\r\n")
        except OSError:
            pass  # it has hung up: the next reply is the end

    def first_replies(self) -> list[str]:
        """To a command: its own, and before it that to a transfer which it has ended."""
        replies = [self.reply()]
        while re.match(r"42[56] .*: the client ", replies[-1]):
            replies.append(self.reply())
        return replies

    def until_fence(self) -> list[str]:
        replies: list[str] = []
        if self.ended:
            return replies
        self.send(FENCE.encode())
        while not self.ended:
            reply, fence, _ = self.reply().partition(f'500 Command "{FENCE}" not understood.')
            if reply:  # behind it only if pyftpdlib's had a line break in it
                replies.append(reply)
            if fence:
                break
        return replies

    def line(self, line: bytes) -> list[str]:
        """A command, whose reply may come late; with the data it sends, if it has where to."""
        name, channel = name_of(line), self.handler.data_channel
        if name in (DOWNLOADS | {"STOR", "APPE"}) and channel is not None and channel.receive:
            return ["not sent"]  # pyftpdlib would mix both transfers, and end neither
        connected = self.data is not None and channel is not None
        self.send(line)
        replies = self.first_replies()  # before the fence is sent: pyftpdlib goes on with what it has
        if replies[0][0] == "1" and name in DOWNLOADS and connected:
            replies.append(self.read_data())
        replies += self.until_fence()
        if (match := re.search(r"(\d+),(\d+)\)\.$|\|(\d+)\|\)\.$", replies[-1])) is not None:
            self.port = int(match[3]) if match[3] else int(match[1]) * 256 + int(match[2])
        return replies

    def encrypt(self) -> list[str]:
        """AUTH TLS, and the handshake if the server is for it."""
        self.send(b"AUTH TLS")
        replies = [self.reply()]
        if replies[0].startswith("234") and not isinstance(self.sock, gevent.ssl.SSLSocket):
            self.file.close()
            self.sock = encrypted(self.sock)
            self.file = self.sock.makefile("rb")
        return replies + self.until_fence()

    # --- data connections

    def connect(self) -> list[str]:
        """To the passive port that was told last; perhaps nobody listens there any more."""
        ended = self.end("close") if self.data is not None else []
        pending = self.handler._out_dtp_queue is not None
        try:
            self.data = gevent.socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        except OSError:
            return [*ended, "nobody listens", *self.until_fence()]
        self.wait(lambda: self.handler._dtp_acceptor is None, "the data connection is not accepted")
        return ended + self.connected(pending=pending) + self.until_fence()

    def active(self, line: bytes) -> list[str]:
        """PORT or EPRT to a listener of ours; *line* has a %s for the address."""
        if self.handler._out_dtp_queue is not None or self.handler._in_dtp_queue is not None:
            return ["not sent"]  # pyftpdlib forgets the connection it makes for what has waited for it
        ended = self.end("close") if self.data is not None else []
        with gevent.socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            old = b"127,0,0,1,%d,%d" % divmod(port, 256)
            self.send(line % (old if line.startswith(b"PORT") else b"|1|127.0.0.1|%d|" % port))
            replies = self.first_replies()
            if replies[-1].startswith("200"):
                self.data = listener.accept()[0]
                replies += self.connected(pending=False)
        return ended + replies + self.until_fence()

    def connected(self, *, pending: bool) -> list[str]:
        """*pending*: a transfer has waited for this connection, and sends."""
        self.sent = 0
        self.data.settimeout(PATIENCE)
        if self.handler._prot:
            try:
                self.data = encrypted(self.data)
            except OSError:
                self.close_data()
                return ["no TLS"]
        return [self.read_data()] if pending else []

    def read_data(self) -> str:
        """All of it, and its end."""
        channel = self.handler.data_channel
        content, end = b"", ""
        try:
            while chunk := self.data.recv(65536):
                content += chunk
        except OSError as error:
            end = f" {type(error).__name__}"
        self.close_data()
        self.wait(lambda: channel is None or channel._closed, "the data connection does not end")
        return f"data: {content.decode('latin-1')}{end}"

    def send_data(self, content: bytes) -> list[str]:
        channel = self.handler.data_channel
        if self.data is None or channel is None:
            return ["no data connection"]
        try:
            self.data.sendall(content)
        except OSError:
            pass
        self.sent += len(content)
        if content and isinstance(channel, TransferMixin) and not (channel.receive or channel._closed):
            return ["kept for a command", *self.until_fence()]
        if content:  # who receives nothing hangs up instead
            self.wait(
                lambda: channel._closed or (channel.receive and channel.tot_bytes_received >= self.sent),
                "the data is not received",
            )
        return self.until_fence()

    def end(self, how: str) -> list[str]:
        """Close the data connection (close), without TLS's goodbye (cut), or reset it (reset)."""
        channel = self.handler.data_channel
        if self.data is None or channel is None:
            self.close_data()
            return ["no data connection"]
        if how == "close" and isinstance(self.data, gevent.ssl.SSLSocket):
            if not channel.receive:  # the server reads nothing, nor TLS's goodbye, before a command
                self.data.settimeout(0)
            try:
                self.data = self.data.unwrap()
            except OSError:
                pass
        elif how == "reset":
            self.data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_data()
        self.wait(lambda: channel._closed, "the end of the data connection is not seen")
        return self.until_fence()

    def close_data(self) -> None:
        if self.data is not None:
            self.data.close()
            self.data = None

    def hang_up(self) -> None:
        """QUIT; returns when the server has forgotten the session."""
        self.close_data()
        self.send(b"ABOR")  # a transfer that waits for its data connection would put QUIT off
        self.send(b"QUIT")
        while not self.ended:
            self.reply()
        self.close()
        self.wait(lambda: self.handler._closed, "the session does not end")

    def close(self) -> None:
        self.close_data()
        self.file.close()
        self.sock.close()
