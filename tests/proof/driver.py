"""A client that knows at every moment which replies are due, and what they say of the files. No tests here.

Behind every command it sends a fence: a command that no server knows and whose 500 names it. So what comes
between two fences belongs to the command between them, however the lines were cut into packets, and waiting
for the last fence is waiting for all replies that are due at once. Everything else that may still come is in
`owed`.
"""

from __future__ import annotations

import itertools
import re
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import Any

import gevent
import gevent.socket
import gevent.ssl

from proof.legal import CONNECTS, ENDS, FIRST, GOING, HASHES, first_codes, name_of
from proof.tree import Tree, Upload, absolute
from support.servers import PATIENCE, encrypted

#: Commands whose reply may come when others have had theirs: what is owed then, and its codes.
LATE = {
    **dict.fromkeys(("PORT", "EPRT"), ("connect", CONNECTS)),
    **dict.fromkeys(("HASH", "XCRC", "XMD5", "XSHA1", "XSHA256", "XSHA512"), ("hash", HASHES)),
}
#: Of all that may have these codes, which it is.
LIKELY = {200: ("connect", "transfer", "hash"), 250: ("hash", "transfer", "connect")}
UPLOADS = frozenset({"STOR", "STOU", "APPE"})
TRANSFERS = UPLOADS | {"RETR", "LIST", "NLST", "MLSD"}

Reply = tuple[int, str]


class Illegal(AssertionError):
    """A reply that must not be, with all that was said before it."""


class Driver:
    """A session. *tree*: the model of the server's files, shared by its sessions; *source*: where from."""

    numbers = itertools.count(1)

    def __init__(self, address: tuple[str, int], tree: Tree, source: str = "127.0.0.1") -> None:
        self.tree = tree
        self.heard: list[str] = []
        self.sock = gevent.socket.create_connection(address, PATIENCE, (source, 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")
        self.address = address
        self.local_port: int = self.sock.getsockname()[1]
        self.ended = False
        #: What may still come: the kind ("transfer", "connect", "hash") and its codes.
        self.owed: dict[str, set[int]] = {}
        self.data: Any = None
        #: Whether the server may have seen the end of its last data connection.
        self.data_ended = True
        self.listener: Any = None
        self.port = 0
        self.protected = False
        self.upload: Upload | None = None
        self.reset_model()
        self.expect(self.reply(), {220})

    def reset_model(self) -> None:
        """As after a login."""
        self.cwd = "/"
        self.ascii = True
        self.renamed: str | None = None

    # --- the control connection

    def reply(self) -> Reply | None:
        """The next one, its last line; None when the connection has ended."""
        first, text = None, ""
        while True:
            try:
                line = self.file.readline().decode("utf-8", "surrogateescape")
            except (ConnectionError, ssl.SSLError):
                line = ""
            if not line:
                if text:
                    raise Illegal(f"the connection ended within a reply: {text!r}\n{self.story()}")
                self.ended = True
                return None
            self.heard.append(f"<- {line.rstrip()}")
            text += line
            if first is None:
                if not re.match(r"[1-5]\d\d[ -]", line):
                    raise Illegal(f"no reply: {line!r}\n{self.story()}")
                first = line[:3]
            # The end of a reply of several lines is its code and a space (RFC 959, 4.2).
            if line.startswith(first + " "):
                return int(first), text.rstrip("\r\n")

    def expect(self, reply: Reply | None, codes: set[int]) -> Reply:
        if reply is None or reply[0] not in codes:
            raise Illegal(f"{reply} is none of {sorted(codes)}\n{self.story()}")
        return reply

    def story(self) -> str:
        """All that was said."""
        return "\n".join(self.heard)

    def say(self, lines: Sequence[bytes], cuts: Sequence[int] = ()) -> list[list[Reply]]:
        """Send *lines*, in packets that end at *cuts*; the replies to each."""
        fences = [b"FENCE%d" % next(self.numbers) for _ in lines]
        text = b"".join(line + b"\r\n" + fence + b"\r\n" for line, fence in zip(lines, fences, strict=True))
        self.heard += [f"-> {line!r:.200}" for line in lines]
        if cuts:
            self.heard.append(f"   in packets, cut at {sorted(cuts)}")
        self.send(text, cuts)
        answers = []
        for line, fence in zip(lines, fences, strict=True):
            replies = self.until(fence)
            answers.append(replies)
            self.understand(line, replies)
        return answers

    def send(self, text: bytes, cuts: Sequence[int] = ()) -> None:
        ends = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
        try:
            for start, end in itertools.pairwise(ends):
                self.sock.sendall(text[start:end])
                gevent.sleep(0)  # the server may read
        except OSError:
            pass  # it has hung up; what it said before is still to be read

    def until(self, fence: bytes) -> list[Reply]:
        replies = []
        while (reply := self.reply()) is not None:
            if reply[0] == 500 and fence.decode() in reply[1]:
                break
            replies.append(reply)
        return replies

    # --- what replies mean

    def understand(self, line: bytes, replies: list[Reply]) -> None:
        """Check the codes, and take up what they say has happened."""
        name = name_of(line)
        if len(line) > 1024 and name != "QUIT" and all(code == 500 for code, _ in replies) and replies:
            return  # too long: one for each packet, RFC 959 knows none (pyftpdlib: after 2048 bytes)
        if self.ended and not replies:
            self.check_end(line)
            return
        late = LATE.get(name)
        for index, reply in enumerate(replies):
            before, after = replies[:index], replies[index + 1 :]
            begins = name in TRANSFERS and reply[0] in (125, 150)
            if reply[0] in first_codes(line) and (
                self.all_owed(before) and self.all_owed(after, ENDS)
                if begins and "transfer" not in self.owed
                else self.all_owed([*before, *after])
            ):
                break
        else:
            if self.all_owed(replies) and (late or self.ended):
                self.settle(replies)
                if self.ended:
                    self.check_end(line)
                elif late:
                    self.owed[late[0]] = late[1]
                return
            codes = [each[0] for each in replies]
            raise Illegal(f"to {line!r:.100}: {codes}, owed {self.owed}\n{self.story()}")
        self.settle(before if begins else [*before, *after])
        self.happened(name, line, reply)
        if begins:
            self.settle(after)

    def check_end(self, line: bytes) -> None:
        """Whether the server may have hung up: it must have said so."""
        if any(each.startswith(r"-> b'\x16\x03") for each in self.heard):
            return  # TLS without AUTH: nothing could be said that the client understands
        last = next((each for each in reversed(self.heard) if each.startswith("<- ")), "")
        if not re.match(r"<- (421 |530 .* Disconnecting\.$)", last):
            raise Illegal(f"hung up at {line!r:.100}\n{self.story()}")

    def owed_as(self, replies: list[Reply], transfer: set[int] | None = None) -> list[str] | None:
        """What each of *replies* is owed as; None if not all are. *transfer*: as if one had begun."""
        owed = self.owed if transfer is None else {**self.owed, "transfer": transfer}

        def kinds_of(replies: list[Reply], left: frozenset[str]) -> list[str] | None:
            if not replies:
                return []
            code = replies[0][0]
            for kind in LIKELY.get(code, ("transfer", "hash", "connect")):
                if kind in left and code in owed[kind]:
                    others = kinds_of(replies[1:], left - {kind})
                    if others is not None:
                        return [kind, *others]
            return None

        return kinds_of(replies, frozenset(owed))

    def all_owed(self, replies: list[Reply], transfer: set[int] | None = None) -> bool:
        """Whether *replies* are owed, each once."""
        return self.owed_as(replies, transfer) is not None

    def settle(self, replies: list[Reply]) -> None:
        """Take up replies that were owed."""
        kinds = self.owed_as(replies)
        if kinds is None:
            raise Illegal(f"{replies} are not owed: {self.owed}\n{self.story()}")
        for kind, reply in zip(kinds, replies, strict=True):
            del self.owed[kind]
            if kind == "transfer":
                self.transfer_ended(complete=reply[0] in (226, 250))

    def transfer_ended(self, *, complete: bool) -> None:
        self.owed.pop("transfer", None)
        upload, self.upload = self.upload, None
        if upload is not None and complete:
            self.tree.files[upload.path] = upload.result()

    def happened(self, name: str, line: bytes, reply: Reply) -> None:
        code, text = reply
        argument = line.decode("utf-8", "surrogateescape").partition(" ")[2]
        path = absolute(self.cwd, argument)
        if name in TRANSFERS and code in (125, 150):
            if "transfer" in self.owed:
                raise Illegal(f"two transfers at once\n{self.story()}")
            self.owed["transfer"] = ENDS
            if name in UPLOADS:
                if name == "STOU":
                    directory, _, prefix = path.rpartition("/") if argument else (self.cwd, "", "")
                    # The reply has ? for each line break in it.
                    path = absolute(directory, prefix + text[10 + len(prefix) :])
                self.upload = Upload(path, ascii=self.ascii, connected=code == 125)
        if code // 100 == 2:
            self.succeeded(name, argument, path, text)
        if name == "RNTO" and code in (250, 550) and "outside" not in text and "privileges" not in text:
            self.renamed = None
        if code == 350 and name == "RNFR":
            self.renamed = path

    def succeeded(self, name: str, argument: str, path: str, text: str) -> None:
        if name in ("MKD", "XMKD"):
            self.tree.make_directory(path)
        elif name in ("DELE", "RMD", "XRMD"):
            self.tree.remove(path)
        elif name == "RNTO":
            assert self.renamed is not None
            self.tree.rename(self.renamed, path)
        elif name in ("CWD", "XCWD"):
            self.cwd = path if argument else "/"
        elif name in ("CDUP", "XCUP"):
            self.cwd = absolute(self.cwd, "..")
        elif name == "TYPE":
            self.ascii = argument.upper().replace(" ", "") in ("A", "L7")
        elif name in ("USER", "REIN") or (name == "PASS" and text.startswith("230")):
            self.reset_model()
        elif name == "ABOR":
            if text.startswith("225"):
                self.transfer_ended(complete=False)
            self.owed.pop("connect", None)
        if name in ("PASV", "EPSV"):
            self.owed.pop("connect", None)
            if (match := re.search(r"(\d+),(\d+)\)|\|(\d+)\|\)", text)) is not None:
                self.port = int(match[3]) if match[3] else int(match[1]) * 256 + int(match[2])
        if name == "PROT":
            self.protected = argument.upper() == "P"
        if name in ("USER", "REIN"):
            self.protected = False

    # --- what a client does

    def log_in(self, user: bytes = b"u") -> None:
        self.say([b"USER " + user])
        self.say([b"PASS p"])

    def encrypt(self, more: bytes = b"") -> bool:
        """AUTH TLS, with *more* in the clear behind it that must not be obeyed."""
        if isinstance(self.sock, gevent.ssl.SSLSocket):
            self.say([b"AUTH TLS"])
            return False
        self.heard.append(f"-> AUTH TLS, and behind it {more!r}")
        self.send(b"AUTH TLS\r\n" + more)
        while (reply := self.reply()) is not None:
            if reply[0] in FIRST["AUTH"] | {500, 501}:
                break
            self.settle([reply])
        if reply is None or reply[0] != 234:
            if more:
                self.until(b"BEHIND")
            return False
        self.file.close()
        self.sock = encrypted(self.sock)
        self.file = self.sock.makefile("rb")
        return True

    def active(self, line: bytes) -> None:
        """PORT or EPRT to a listener of ours; *line* has a %s for the address."""
        self.close_data()
        with gevent.socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            address = (
                b"127,0,0,1,%d,%d" % divmod(port, 256)
                if line.startswith(b"PORT")
                else b"|1|127.0.0.1|%d|" % port
            )
            replies = self.say([line % address])[0]
            if "connect" in self.owed and not self.ended:
                listener.settimeout(PATIENCE)
                self.data = listener.accept()[0]
                self.connected()
                self.next_owed("connect")
            elif replies and replies[-1][0] == 200:
                self.data = listener.accept()[0]
                self.connected()

    def connect(self) -> None:
        """To the passive port that was told last; perhaps nobody listens there any more."""
        self.close_data()
        if self.port:
            try:
                self.data = gevent.socket.create_connection(("127.0.0.1", self.port), PATIENCE)
            except OSError:
                self.heard.append("   nobody listens")
                return
            self.connected()

    def connected(self) -> None:
        self.heard.append("   data connection")
        self.data_ended = False
        if self.upload is not None:
            self.upload.connected = True
        self.data.settimeout(PATIENCE)
        if self.protected:
            try:
                self.data = encrypted(self.data)
            except OSError as error:
                self.heard.append(f"   without TLS: {error}")
                self.close_data()

    def next_owed(self, kind: str) -> None:
        """Wait for it; other replies that are owed may come before."""
        while kind in self.owed and not self.ended:
            reply = self.reply()
            if reply is None:
                self.check_end(kind.encode())
                return
            self.settle([reply])

    def finish_upload(self) -> None:
        """Wait for the reply to it, if nothing is missing for one."""
        if self.upload is not None and self.upload.connected and self.data_ended:
            self.next_owed("transfer")

    def send_data(self, content: bytes) -> None:
        if self.data is None:
            return
        self.heard.append(f"   {len(content)} bytes of data")
        try:
            self.data.sendall(content)
        except OSError:
            self.heard.append("   nobody reads them")
        else:
            if self.upload is not None:
                self.upload.sent += content

    def read_data(self) -> bytes | None:
        """To the end; None if it was cut."""
        content = b""
        if self.data is None:
            return None
        try:
            while chunk := self.data.recv(65536):
                content += chunk
        except OSError:
            return None
        return content

    def end_data(self, how: str) -> None:
        """Close it (close), after reading it all (read), half of it (half), or reset it (reset)."""
        if self.data is None:
            return
        self.heard.append(f"   data connection: {how}")
        self.data_ended = True
        if how == "read" and self.upload is None and "transfer" in self.owed:
            self.read_data()
        elif how == "half":
            try:
                self.data.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return
        elif how == "reset":
            self.data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "close" and isinstance(self.data, gevent.ssl.SSLSocket):
            try:
                self.data = self.data.unwrap()
            except OSError:
                pass
        self.close_data()

    def close_data(self) -> None:
        if self.data is not None:
            self.data.close()
            self.data = None
            self.data_ended = True

    def hang_up(self, how: str, partial: bytes = b"") -> None:
        """End the session: QUIT, close or reset, with half a command before."""
        self.heard.append(f"   the session ends: {how} {partial!r}")
        if how == "quit" and not self.ended:
            if "transfer" in self.owed and self.data is None:
                self.say(
                    [b"ABOR"]
                )  # or QUIT waits for the data connection, for as long as PASV's port is open
            self.send(b"QUIT\r\n")
            said_goodbye = False
            while (reply := self.reply()) is not None:
                if reply[0] == 221 and not said_goodbye:
                    said_goodbye = True
                    self.close_data()
                elif self.all_owed([reply]):
                    self.settle([reply])
                else:
                    self.expect(reply, GOING)
        else:
            self.send(partial)
            if how == "reset":
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.ended = True
        self.close_control()

    def close_control(self) -> None:
        self.file.close()
        self.sock.close()
