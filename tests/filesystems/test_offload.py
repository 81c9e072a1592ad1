"""File systems and authorizers that block for real, on threads: nobody waits but their own session."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey
from gevent.pywsgi import WSGIServer
from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS, UnixFilesystem

from bridge import OffloadedAuthorizer, OffloadedFS, current_session
from bridge.filesystems.offload import READ_AHEAD, RUN, OffloadedFile
from bridge.filesystems.threads import Threads
from support.fakes import NativeGate
from support.servers import Client, eventually, handler_class, started, users

_native_sleep = monkey.get_original("time", "sleep")
_get_ident = monkey.get_original("_thread", "get_ident")

#: As RETR, STOR and listings: what they do goes through many of the methods below.
METHODS = (
    *("open", "mkstemp", "chdir", "mkdir", "listdir", "rmdir", "remove", "rename", "chmod", "stat", "utime"),
    *("lstat", "readlink", "isfile", "isdir", "getsize", "getmtime", "realpath", "lexists", "validpath"),
    *("fs2ftp", "ftp2fs", "ftpnorm", "get_user_by_uid", "get_group_by_gid"),
)


@pytest.fixture
def threads() -> Iterator[Threads]:
    pool = Threads()
    yield pool
    pool.kill()


def offloaded(threads: Threads, base: Any = AbstractedFS, **attributes: Any) -> Any:
    bases = (OffloadedFS,) if base is AbstractedFS else (OffloadedFS, base)
    return type("FS", bases, {"threads": threads, **attributes})


def limited(threads: Threads, base: Any, names: str) -> Any:
    """A file system whose calls take at most 0.05 s if their name in the log begins so.

    Others may have to wait for a processor that long.
    """

    class Limited(offloaded(threads, base)):  # type: ignore[misc]
        def _call(self, *args: Any, name: str, **options: Any) -> Any:
            self.fs_timeout = 0.05 if name.startswith(names) else None
            return super()._call(*args, name=name, **options)

    Limited.__name__ = "FS"
    return Limited


@contextlib.contextmanager
def session(home: Path, filesystem: Any) -> Iterator[tuple[Any, Client]]:
    with started(handler_class(users(home), abstracted_fs=filesystem)) as server, Client(server) as client:
        yield server, client


def slow(gate: NativeGate, names: Any = ("open",)) -> Any:
    """A file system with methods that block for real at a gate, for paths with `slow` in them."""

    def blocking(name: str) -> Any:
        def method(self: Any, path: str, *args: Any) -> Any:
            if "slow" in path:
                gate.wait()
            return getattr(super(SlowFS, self), name)(path, *args)

        return method

    class SlowFS(AbstractedFS):
        pass

    for name in names:
        setattr(SlowFS, name, blocking(name))
    return SlowFS


# --- nobody waits but their own session


def test_fifty_sessions_block_at_once_and_everybody_else_is_served(tmp_path: Path, threads: Threads) -> None:
    gate = NativeGate()
    filesystem = offloaded(threads, slow(gate, ("open", "listdir")))
    (tmp_path / "slow").mkdir()

    def application(_: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"page"]

    http = WSGIServer(("127.0.0.1", 0), application, log=None)
    http.start()
    with started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(server)) for _ in range(50)]
            for number, client in enumerate(clients):
                client.command("EPSV", "229")
                client.send(("NLST slow", f"STOR slow{number}", "RETR slow1")[number % 3])
            gate.arrived(50)
            with Client(server) as other:
                assert other.store("file", b"content").startswith("226")
            with gevent.socket.create_connection(http.address) as page:
                page.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert page.recv(100).startswith(b"HTTP/1.1 200")
            gate.open()
            for client in clients:
                assert client.reply()[0] in "15"
        eventually(lambda: not server.sessions())  # their files are closed, on threads too
    http.stop()


class Recording:
    """Notes on which thread each method of a file system and of its files ran."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def note(self, name: str) -> None:
        self.calls.append((name, _on_hub()))

    def filesystem(self, base: Any, fileno: bool) -> Any:
        recording = self

        def noting(name: str) -> Any:
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                recording.note(name)
                result = getattr(super(RecordingFS, self), name)(*args, **kwargs)
                return RecordingFile(result, recording, fileno) if name in ("open", "mkstemp") else result

            return method

        class RecordingFS(base):
            pass

        for name in METHODS:
            setattr(RecordingFS, name, noting(name))
        return RecordingFS


class RecordingFile:
    def __init__(self, file: Any, recording: Recording, fileno: bool) -> None:
        self.name = file.name
        self._file = file
        self._recording = recording
        if fileno:
            self.fileno = file.fileno

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def _do(self, name: str, *args: Any) -> Any:
        self._recording.note(f"file.{name}")
        return getattr(self._file, name)(*args)

    def read(self, size: int) -> bytes:
        return bytes(self._do("read", size))

    def write(self, data: bytes) -> Any:
        return self._do("write", data)

    def seek(self, *args: Any) -> Any:
        return self._do("seek", *args)

    def tell(self) -> Any:
        return self._do("tell")

    def close(self) -> None:
        self._do("close")


_hub_thread = _get_ident()


def _on_hub() -> bool:
    return bool(_get_ident() == _hub_thread)


@pytest.mark.parametrize("fileno", [True, False], ids=["fileno", "no fileno"])
@pytest.mark.parametrize("base", [AbstractedFS, UnixFilesystem])
def test_nothing_that_may_block_runs_in_the_hubs_thread(
    tmp_path: Path, threads: Threads, base: Any, fileno: bool
) -> None:
    recording = Recording()
    filesystem = offloaded(threads, recording.filesystem(base, fileno))
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    content = os.urandom(3 * READ_AHEAD + 1)
    with started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server:
        with Client(server) as client:
            client.command("TYPE I", "200")
            assert client.store("file", content).startswith("226")
            assert client.retrieve("file") == content
            client.command("REST 9", "350")
            assert client.retrieve("file") == content[9:]
            client.command("REST 9", "350")
            assert client.store("file", b"!").startswith("226")
            for listing in ("LIST", "NLST", "MLSD", "LIST file"):
                assert _list(client, listing)
            client.command("EPSV", "229")
            for line, code in (
                ("STAT dir", "213"),
                ("MLST file", "250"),
                ("SIZE file", "213"),
                ("MDTM file", "213"),
                ("MFMT 20200101000000 file", "213"),
                ("SITE CHMOD 600 file", "200"),
                ("MKD new", "257"),
                ("CWD new", "250"),
                ("CDUP", "250"),
                ("RMD new", "250"),
                ("RNFR file", "350"),
                ("RNTO other", "250"),
                ("DELE other", "250"),
            ):
                client.command(line, code)
            with client.data() as data:
                client.command("STOU", "1")
                data.sendall(b"unique")
            assert client.reply().startswith("226")
    seen = {name for name, _ in recording.calls}
    assert seen >= set(METHODS) - ({"realpath"} if base is UnixFilesystem else set())
    assert seen >= {"file.write", "file.close", "file.tell" if fileno else "file.read"}
    assert {name for name, on_hub in recording.calls if on_hub} == set()


def _list(client: Client, command: str) -> bytes:
    content = b""
    with client.data() as data:
        client.command(command, "1")
        while chunk := data.recv(65536):
            content += chunk
    assert client.reply().startswith("226")
    return content


# --- content and order


@pytest.mark.parametrize("mode", ["A", "I"])
def test_what_is_stored_is_retrieved(tmp_path: Path, threads: Threads, mode: str) -> None:
    """Binary mode sends with sendfile on a thread, ASCII mode reads."""
    content = b"".join(b"line %d\r\n" % number for number in range(300_000))
    with started(handler_class(users(tmp_path), abstracted_fs=offloaded(threads))) as server:
        with Client(server) as client:
            client.command(f"TYPE {mode}", "200")
            assert client.store("file", content).startswith("226")
            assert client.retrieve("file") == content


def test_long_listings_are_sorted_and_complete(tmp_path: Path, threads: Threads) -> None:
    names = [f"{number:05}" for number in range(2 * RUN + 7)]
    for name in names:
        (tmp_path / name).touch()
    with started(handler_class(users(tmp_path), abstracted_fs=offloaded(threads))) as server:
        with Client(server) as client:
            for command in ("NLST", "LIST", "MLSD"):
                listed = [line.split()[-1].decode() for line in _list(client, command).splitlines()]
                assert (sorted(listed) if command == "MLSD" else listed) == names


def test_the_callers_context_goes_along(tmp_path: Path, threads: Threads) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    variable.set("mine")
    assert threads.call(variable.get) == "mine"
    assert threads.call(current_session) is None


def test_a_call_within_a_call_needs_no_second_thread() -> None:
    pool = Threads(size=1)
    try:
        assert pool.call(lambda: pool.call(lambda: "inner")) == "inner"
    finally:
        pool.kill()


def test_the_directory_of_the_process_stays(tmp_path: Path, threads: Threads) -> None:
    class ChangingFS(AbstractedFS):
        def chdir(self, path: str) -> None:
            super().chdir(path)

    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    before = os.getcwd()
    for base in (AbstractedFS, ChangingFS):
        with started(handler_class(users(tmp_path), abstracted_fs=offloaded(threads, base))) as server:
            with Client(server) as client:
                client.command("CWD dir", "250")
                assert client.command("PWD", "257").startswith('257 "/dir"')
                client.command("CWD /file", "550")
                client.command("CWD /none", "550")
                assert os.getcwd() == before


# --- what is given up


def test_a_call_that_takes_too_long_is_451_and_logged(
    tmp_path: Path, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    gate = NativeGate()
    opened: list[Any] = []

    class SlowFS(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            gate.wait()
            opened.append(super().open(filename, mode))
            return opened[0]

    (tmp_path / "file").write_bytes(b"content")
    filesystem = limited(threads, SlowFS, "FS.open(")
    with (
        started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server,
        Client(server) as client,
    ):
        client.command("EPSV", "229")
        assert client.command("RETR file", "451")
        call = f"FS.open({str(tmp_path / 'file')!r}, 'rb')"
        assert f"{call} took longer than 0.05 s and was given up" in caplog.messages
        client.command("NOOP", "200")
        gate.open()
        eventually(lambda: opened and opened[0].closed)


@pytest.mark.parametrize("name", ["validpath", "isdir", "listdir", "lstat"])
def test_whatever_call_takes_too_long_the_session_goes_on(
    tmp_path: Path, threads: Threads, name: str
) -> None:
    gate = NativeGate()
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "file").touch()
    filesystem = limited(threads, slow(gate, (name,)), "listing " if name == "lstat" else f"FS.{name}(")
    with (
        started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server,
        Client(server) as client,
    ):
        client.command("EPSV", "229")
        client.send("LIST slow")
        reply = client.reply()
        assert reply.startswith("150" if name == "lstat" else "451")
        gate.open()
        client.command("NOOP", "200")


def test_too_many_calls_wait_in_line_and_then_get_451(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = NativeGate()
    pool = Threads(size=1, queue_timeout=0.05)
    filesystem = offloaded(pool, slow(gate))
    try:
        with started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server:
            with Client(server) as one, Client(server) as two, Client(server) as three:
                for client in (one, two, three):
                    client.command("EPSV", "229")
                one.send("STOR slow1")
                gate.arrived()
                for client, name in ((two, "two"), (three, "three")):
                    client.send(f"STOR {name}")
                assert {two.reply()[:3], three.reply()[:3]} == {"451"}
                assert "all 1 threads were busy for 0.05 s" in caplog.messages
                gate.open()
                assert one.reply().startswith("150")
    finally:
        pool.kill()


def test_a_call_for_which_no_thread_can_be_started_takes_no_place() -> None:
    stack_size = monkey.get_original("_thread", "stack_size")
    pool = Threads(size=1, queue_timeout=0.05)
    before = stack_size(1 << 47)  # more than there are addresses
    try:
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                pool.call(len, "")
        stack_size(before)
        assert pool.call(len, "abc") == 3
    finally:
        stack_size(before)
        pool.kill()


def test_a_file_is_not_closed_under_a_running_write(tmp_path: Path, threads: Threads) -> None:
    gate = NativeGate()
    calls: list[str] = []

    class SlowFile:
        name = "slow"
        closed = False

        def write(self, data: bytes) -> None:
            calls.append("write begins")
            gate.wait()
            calls.append("write ends")

        def close(self) -> None:
            calls.append("close")

    filesystem = offloaded(threads, open=lambda *_: OffloadedFile(SlowFile(), threads, None))
    with (
        started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server,
        Client(server) as client,
    ):
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(b"content")
            gate.arrived()
            server.sessions()[0].abort_transfer()
            assert client.reply().startswith("426")
            client.command("NOOP", "200")
            assert calls == ["write begins"]
            gate.open()
            eventually(lambda: len(calls) == 3)
    assert calls == ["write begins", "write ends", "close"]


def test_a_killed_session_leaves_no_file_open(tmp_path: Path, threads: Threads) -> None:
    gate = NativeGate()
    filesystem = offloaded(threads, slow(gate))
    with (
        started(handler_class(users(tmp_path), abstracted_fs=filesystem)) as server,
        Client(server) as client,
    ):
        client.command("EPSV", "229")
        client.send("STOR slow")
        gate.arrived()
        server.sessions()[0].disconnect()
        assert client.reply().startswith("421")
        gate.open()
        # (That it was closed, the leak guard sees.)


def test_errors_of_the_file_system_are_the_clients_and_not_logged_by_gevent(
    tmp_path: Path, threads: Threads, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    class FailingFS(AbstractedFS):
        open = mkdir = fail

    with started(handler_class(users(tmp_path), abstracted_fs=offloaded(threads, FailingFS))) as server:
        with Client(server) as client:
            client.command("EPSV", "229")
            assert client.command("RETR file", "550").endswith("Input/output error.")
            assert client.command("MKD dir", "550").endswith("Input/output error.")
    assert "Traceback" not in capfd.readouterr().err


# --- authorizers


class SlowAuthorizer(DummyAuthorizer):
    """Blocks for real at a gate; looks its users up like DummyAuthorizer, and permissions elsewhere."""

    def __init__(self, gate: NativeGate) -> None:
        super().__init__()
        self.gate = gate
        self.on_hub: dict[str, bool] = {}

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        self.on_hub["validate_authentication"] = _on_hub()
        if username == "slow":
            self.gate.wait()
        super().validate_authentication(username, password, handler)

    def get_home_dir(self, username: str) -> Any:
        self.on_hub["get_home_dir"] = _on_hub()
        return super().get_home_dir(username)

    def has_perm(self, username: str, perm: str, path: Any = None) -> Any:
        self.on_hub["has_perm"] = _on_hub()
        return super().has_perm(username, perm, path)


def test_an_authorizer_that_blocks_stalls_only_its_own_login(tmp_path: Path, threads: Threads) -> None:
    gate = NativeGate()
    authorizer = SlowAuthorizer(gate)
    handler = handler_class(OffloadedAuthorizer(users(tmp_path, authorizer, "slow"), threads=threads))
    with started(handler) as server, Client(server, login=False) as client:
        client.send("USER slow", "PASS p")
        gate.arrived()
        with Client(server) as other:
            assert other.store("file", b"content").startswith("226")
        gate.open()
        assert [client.reply()[:3] for _ in range(3)] == ["220", "331", "230"]
    assert set(authorizer.on_hub) == {"validate_authentication", "get_home_dir", "has_perm"}
    assert not any(authorizer.on_hub.values())


def test_look_ups_in_memory_stay_inline(threads: Threads) -> None:
    plain = OffloadedAuthorizer(DummyAuthorizer(), threads=threads)
    for name in ("has_perm", "get_perms", "get_home_dir", "get_msg_login", "has_user"):
        assert getattr(plain, name).__self__.__class__ is DummyAuthorizer


def test_a_wrong_password_is_530(tmp_path: Path, threads: Threads) -> None:
    handler = handler_class(OffloadedAuthorizer(users(tmp_path), threads=threads))
    with started(handler) as server, Client(server, login=False) as client:
        client.send("USER u", "PASS wrong")
        assert [client.reply()[:3] for _ in range(3)] == ["220", "331", "530"]


def test_a_login_that_takes_too_long_is_530_and_logged(
    tmp_path: Path, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    gate = NativeGate()
    authorizer = OffloadedAuthorizer(users(tmp_path, SlowAuthorizer(gate), "slow"), 0.05, threads)
    with started(handler_class(authorizer)) as server, Client(server, login=False) as client:
        client.send("USER slow", "PASS p")
        assert [client.reply()[:3] for _ in range(3)] == ["220", "331", "530"]
        assert "SlowAuthorizer.validate_authentication took longer than 0.05 s" in caplog.text
        gate.open()
    with pytest.raises(AuthenticationFailed):
        authorizer.validate_authentication("u", "wrong", None)


class Impersonating(DummyAuthorizer):
    def impersonate_user(self, username: str, password: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("wrapped", [True, False])
def test_impersonation_is_refused_since_all_sessions_would_share_it(
    tmp_path: Path, threads: Threads, wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    authorizer: Any = users(tmp_path, Impersonating())
    if wrapped:
        authorizer = OffloadedAuthorizer(authorizer, threads=threads)
    handler = handler_class(authorizer, abstracted_fs=offloaded(threads))
    with started(handler) as server, Client(server, login=False) as client:
        client.send("USER u", "PASS p", "MKD dir")
        assert client.ended()
    assert "cannot be used with an authorizer that impersonates" in caplog.text
    assert list(tmp_path.iterdir()) == []
