"""A client process of the soak test: sessions of every kind on a few threads, one after the other.

    python tests/proof/soak_client.py '{"port": 2121, "directory": "round1/0", "records": "FILE", ...}'

Plain and FTPS; uploads, downloads, listings; and all the ways in which clients leave: ABOR, resets, a half
handshake, a connection nobody reads. What each does is a matter of the seed alone. Before and after each
transfer a line of JSON goes to the file of records, by one write, so that a SIGKILL cuts none; test_soak.py
compares them with what is on the disk. No tests in here, and nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ftplib
import hashlib
import json
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Seconds a client waits for the server before it gives up; what it then writes fails the test.
PATIENCE = 60.0

#: Bytes of the files to download, whose names are their sizes: nothing, less than a block of any kind, a bit
#: more than a TLS record, more than a socket's buffers.
SIZES = (0, 1, 1000, 16385, 200_000, 1 << 20, 3_000_000)

#: How often each size is taken: most files are small, and the large ones take the time.
WEIGHTS = (2, 2, 4, 4, 4, 2, 1)

#: Bytes of a file that is surely not yet sent when its transfer is ended: sockets' buffers take up to 10 MB.
LARGE = 16 << 20

USERS = ("ada", "bob")

#: What ends when the server's process dies, or sends 421 because it stops.
LOST = (OSError, EOFError, ftplib.error_temp)


def content(name: str, size: int) -> bytes:
    """What is in a file: other bytes at each place and in each file."""
    return hashlib.shake_128(name.encode()).digest(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Records:
    """Lines of JSON in a file, each written at once."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **record: Any) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class FTP(ftplib.FTP):
    """Knows the text of the last reply; ftplib keeps the code only."""

    reply = ""

    def getmultiline(self) -> str:
        self.reply = super().getmultiline()
        return self.reply


class FTPS(FTP, ftplib.FTP_TLS):
    """Data connections resume the control connection's TLS session."""

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[Any, int | None]:
        conn, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            return self.context.wrap_socket(conn, session=self.sock.session), size
        except BaseException:
            conn.close()
            raise


def insecure() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reset(sock: Any) -> None:
    """Close it with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@dataclass
class Thread:
    """Runs *sessions* sessions. Uploads go to *directory*, which is its own."""

    port: int
    directory: str
    sessions: int
    records: Records
    random: random.Random
    #: Connections nobody looks at any more, until the process ends.
    forgotten: contextlib.ExitStack

    def __post_init__(self) -> None:
        self.number = 0
        #: What was stored and answered: by its name now, what it was called when it was stored, and its size.
        self.files: dict[str, tuple[str, int]] = {}

    def run(self) -> None:
        for _ in range(self.sessions):
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                kind(self)
                self.records.write(session=kind.__name__)
            except LOST:
                self.records.write(session=kind.__name__, lost=traceback.format_exc())
            except BaseException:
                self.records.write(session=kind.__name__, problem=traceback.format_exc())

    # --- what sessions are made of

    @contextlib.contextmanager
    def session(self, tls: bool | None = None) -> Any:
        """Logged in, plain or (None: either) FTPS; `quit` or not, it is closed in the end."""
        if tls is None:
            tls = self.random.random() < 0.4
        ftp: FTP = FTPS(timeout=PATIENCE, context=insecure()) if tls else FTP(timeout=PATIENCE)
        with contextlib.closing(ftp):
            ftp.connect("127.0.0.1", self.port)
            ftp.login(self.random.choice(USERS), "p")
            self.records.write(login=True)
            if isinstance(ftp, FTPS):
                ftp.prot_p()
            ftp.voidcmd("TYPE I")
            yield ftp

    def begin(self, ftp: FTP, way: str, path: str, size: int = 0, **more: Any) -> int:
        self.number += 1
        tls = isinstance(ftp, FTPS)
        name = f"{self.directory} {self.number}"
        self.records.write(begin=name, way=way, path=path, size=size, tls=tls, **more)
        return self.number

    def end(self, number: int, reply: str, data: bytes | None = None) -> None:
        sha256 = None if data is None else digest(data)
        self.records.write(end=f"{self.directory} {number}", reply=reply, sha256=sha256)

    def expect(self, holds: bool, otherwise: Any) -> None:
        if not holds:
            raise AssertionError(otherwise)

    def new_name(self) -> str:
        return f"{self.directory}/{self.number}.{self.random.randrange(1000)}"

    def size(self) -> int:
        return self.random.choices(SIZES, WEIGHTS)[0]

    # --- transfers that go well

    def store(self, ftp: FTP, command: str = "STOR") -> None:
        path, size = self.new_name(), self.size()
        data = content(path, size)
        number = self.begin(ftp, "upload", path, size)
        with ftp.transfercmd(f"{command} {path}") as connection:
            connection.sendall(data)
            if isinstance(connection, ssl.SSLSocket):
                connection.unwrap()
        self.end(number, ftp.voidresp(), data)
        self.files[path] = path, size

    def store_unique(self, ftp: FTP) -> None:
        """The server chooses the name, and says it when the data connection is there."""
        path, size = self.new_name(), self.size()
        data = content(path, size)
        number = self.begin(ftp, "upload", path, size, unique=True)
        with ftp.transfercmd(f"STOU {path}") as connection:
            name = f"{path.rpartition('/')[0]}/{ftp.reply.rpartition('FILE: ')[2].rpartition('/')[2]}"
            self.expect(name.startswith(f"{path}."), ftp.reply)
            self.records.write(named=f"{self.directory} {number}", path=name)
            connection.sendall(data)
            if isinstance(connection, ssl.SSLSocket):
                connection.unwrap()
        self.end(number, ftp.voidresp(), data)
        self.files[name] = path, size

    def rename(self, ftp: FTP) -> None:
        if self.files:
            path = self.random.choice(list(self.files))
            of, size = self.files.pop(path)
            new = self.new_name()
            number = self.begin(ftp, "rename", path, to=new)
            self.end(number, ftp.rename(path, new))
            self.files[new] = of, size

    def append(self, ftp: FTP) -> None:
        self.store(ftp, "APPE")

    def refused(self, ftp: FTP) -> None:
        """Uploads are atomic: nothing is added to a file that exists."""
        if not self.files:
            return
        path = self.random.choice(list(self.files))
        for rest in (None, 1):
            try:
                ftp.transfercmd(f"{'STOR' if rest else 'APPE'} {path}", rest).close()
            except ftplib.error_perm as error:
                self.expect(str(error).startswith("550"), error)
            else:
                raise AssertionError("added to a file that exists")

    def retrieve(self, ftp: FTP) -> None:
        common = {name: (name, size) for size in SIZES for name in [f"files/{size}"]}
        path, (of, size) = self.random.choice(list((common | self.files).items()))
        rest = self.random.choice([None, None, size // 3])
        number = self.begin(ftp, "download", path, size, of=of, start=rest or 0)
        with ftp.transfercmd(f"RETR {path}", rest) as connection:
            data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            if isinstance(connection, ssl.SSLSocket):
                connection.unwrap()
        self.end(number, ftp.voidresp(), data)

    def retrieve_slowly(self, ftp: FTP) -> None:
        number = self.begin(ftp, "download", f"files/{1 << 20}", 1 << 20)
        with ftp.transfercmd(f"RETR files/{1 << 20}") as connection:
            pieces = []
            while piece := connection.recv(8192):
                pieces.append(piece)
                time.sleep(0.001)
        self.end(number, ftp.voidresp(), b"".join(pieces))

    def list(self, ftp: FTP) -> None:
        lines: list[str] = []
        command = self.random.choice(["NLST", "LIST", "MLSD"])
        ftp.retrlines(f"{command} {self.directory}", lines.append)  # in ASCII
        ftp.voidcmd("TYPE I")
        names = {line.rsplit(" ", 1)[-1].rsplit("/", 1)[-1] for line in lines}
        self.expect({path.rsplit("/", 1)[-1] for path in self.files} <= names, ("not listed", lines))
        self.expect(not any(name.endswith("~") for name in names), ("half an upload is listed", lines))

    def delete(self, ftp: FTP) -> None:
        if self.files:
            path = self.random.choice(list(self.files))
            del self.files[path]
            number = self.begin(ftp, "delete", path)
            self.end(number, ftp.delete(path))

    def answer(self, ftp: FTP) -> None:
        for command in self.random.sample(["PWD", "NOOP", "STAT", "FEAT", "SYST", "EPSV", "PASV"], 4):
            ftp.sendcmd(command)

    # --- sessions that go well

    def transfers(self) -> None:
        with self.session() as ftp:
            for _ in range(self.random.randint(1, 5)):
                ftp.set_pasv(self.random.random() < 0.8)
                self.random.choice(TRANSFERS)(self, ftp)
            if self.random.random() < 0.7:
                ftp.quit()

    def slow_reader(self) -> None:
        with self.session() as ftp:
            self.retrieve_slowly(ftp)
            ftp.quit()

    def short_logins(self) -> None:
        for _ in range(3):
            with self.session() as ftp:
                ftp.quit()

    def failed_login(self) -> None:
        """Each from an address of its own: the next from there would have to wait."""
        address = f"127.{self.random.randint(1, 250)}.{self.random.randint(1, 250)}.1"
        with contextlib.closing(ftplib.FTP(timeout=PATIENCE, source_address=(address, 0))) as ftp:
            ftp.connect("127.0.0.1", self.port)
            try:
                ftp.login(self.random.choice([*USERS, "nobody"]), "wrong")
            except ftplib.error_perm as error:
                self.expect(str(error).startswith("530"), error)
            else:
                raise AssertionError("logged in with a wrong password")

    # --- sessions that do not

    def cut_upload(self, cut: Callable[[FTP, Any], str | None], ftp: FTP) -> None:
        path, size = self.new_name(), self.random.choice([1000, 200_000, 2_000_000])
        number = self.begin(ftp, "upload", path, size, whole=False)
        with ftp.transfercmd(f"STOR {path}") as connection:
            connection.sendall(content(path, size))
            reply = cut(ftp, connection)
        if reply is not None:
            self.end(number, reply)

    def cut_download(self, cut: Callable[[FTP, Any], str | None], ftp: FTP) -> None:
        number = self.begin(ftp, "download", f"files/{LARGE}", LARGE, whole=False)
        with ftp.transfercmd(f"RETR files/{LARGE}") as connection:
            connection.recv(self.random.choice([1, 100_000]))
            reply = cut(ftp, connection)
        if reply is not None:
            self.end(number, reply)

    def cut(self, how: Callable[[FTP, Any], str | None], goes_on: bool) -> None:
        with self.session() as ftp:
            self.random.choice([self.cut_upload, self.cut_download])(how, ftp)
            if goes_on:  # the session is none the worse
                self.expect(ftp.sendcmd("NOOP").startswith("200"), "NOOP")
                self.store(ftp)

    def abort(self) -> None:
        def by_abor(ftp: FTP, connection: Any) -> str:
            reply = ftp.abort()
            if not reply.startswith(
                "225"
            ):  # it has come before the first byte of the file: one reply for both
                self.expect(reply.startswith("426"), reply)
                self.expect(ftp.getresp().startswith("226"), "ABOR")
            return reply

        self.cut(by_abor, goes_on=True)

    def data_reset(self) -> None:
        def by_reset(ftp: FTP, connection: Any) -> str:
            reset(connection)
            reply = ftp.getmultiline()
            self.expect(reply[:3] in ("425", "426"), reply)  # 425: before it was accepted
            return reply

        self.cut(by_reset, goes_on=True)

    def leave(self) -> None:
        """The control connection first; what the server then does with the other one is waited for."""

        def by_leaving(ftp: FTP, connection: Any) -> str:
            assert ftp.sock is not None
            if self.random.random() < 0.5:
                reset(ftp.sock)
            ftp.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while connection.recv(1 << 20):
                    pass
            return ""

        self.cut(by_leaving, goes_on=False)

    def forget(self) -> None:
        """Nothing is read and nothing is said, until the process ends."""

        def by_silence(ftp: FTP, connection: Any) -> None:
            self.forgotten.enter_context(connection.dup())

        ftp = self.forgotten.enter_context(self.session(tls=False))  # (an SSLSocket has no dup)
        self.random.choice([self.cut_upload, self.cut_download])(by_silence, ftp)

    def say_nothing(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as sock:
            how = self.random.randrange(5)
            if how:
                sock.recv(1000)
            if how == 2:
                sock.sendall(b"USER ada\r\nPASS ")
            if how == 3:
                sock.sendall(self.random.randbytes(5000))
            if how == 4:
                sock.sendall(b"AUTH TLS\r\n")
                sock.recv(1000)
                sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a ClientHello
            if self.random.random() < 0.5:
                reset(sock)

    def data_never_comes(self) -> None:
        with self.session() as ftp:
            ftp.sendcmd("PASV")
            ftp.putcmd(self.random.choice(["RETR files/1000", "LIST", f"NLST {self.directory}"]))
            if self.random.random() < 0.5:
                ftp.sendcmd("NOOP")


TRANSFERS = 3 * [Thread.store, Thread.retrieve] + [
    *(Thread.store_unique, Thread.rename, Thread.append, Thread.refused),
    *(Thread.list, Thread.list, Thread.delete, Thread.answer),
]

#: Kinds of sessions, and how often each is chosen.
KINDS: dict[Callable[[Thread], None], int] = {
    Thread.transfers: 10,
    Thread.slow_reader: 1,
    Thread.short_logins: 2,
    Thread.failed_login: 2,
    Thread.abort: 2,
    Thread.data_reset: 2,
    Thread.leave: 2,
    Thread.forget: 1,
    Thread.say_nothing: 3,
    Thread.data_never_comes: 1,
}


def main() -> None:
    told = json.loads(sys.argv[1])
    records = Records(told["records"])
    forgotten = contextlib.ExitStack()
    threads = []
    for number in range(told["threads"]):
        thread = Thread(
            told["port"],
            f"{told['directory']}/{number}",
            told["sessions"],
            records,
            random.Random(f"{told['seed']} {number}"),
            forgotten,
        )
        threads.append(threading.Thread(target=thread.run))
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    records.write(done=True)


if __name__ == "__main__":
    main()
