"""What cannot be looked at is an error, and no answer (bridge/filesystems/local.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS

from bridge import OffloadedFS
from bridge.filesystems.atomic import AtomicFS
from bridge.filesystems.jail import ConfinedFS
from bridge.filesystems.local import HomeFS
from bridge.filesystems.threads import Threads
from support.servers import Client, handler_class, started, users

FILE_SYSTEMS: list[Any] = [AbstractedFS, ConfinedFS, type("AtomicConfined", (AtomicFS, ConfinedFS), {})]
#: What a disk, NFS and the kernel say when they cannot tell.
ERRORS = [errno.EIO, errno.ESTALE, errno.ENOMEM]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a link that leads out of it."""
    home, outside = tmp_path / "home", tmp_path / "outside"
    (home / "d" / "sub").mkdir(parents=True)
    (home / "d" / "file").write_text("content")
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (home / "out").symlink_to(outside)
    return home


class Failing:
    """os.lstat and os.stat fail with `error` for paths that end with `name`, once if so said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.error, self.left = "", 0, 0
        for function in ("lstat", "stat", "readlink"):
            monkeypatch.setattr(os, function, self._failing(getattr(os, function)))

    def _failing(self, function: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.left and self.name and str(path).endswith(self.name):
                self.left -= 1
                raise OSError(self.error, os.strerror(self.error), path)
            return function(path, *args, **kwargs)

        return call

    def next(self, name: str, error: int, times: int = 1) -> None:
        self.name, self.error, self.left = name, error, times


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    failing = Failing(monkeypatch)
    yield failing
    failing.left = 0


@pytest.mark.parametrize("error", [*ERRORS, errno.EACCES])
@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_no_link_leads_out_while_it_cannot_be_looked_at(
    home: Path, failing: Failing, fs: Any, error: int
) -> None:
    outside = home.parent / "outside"
    before = sorted(os.listdir(outside))
    with started(handler_class(users(home), abstracted_fs=fs)) as server, Client(server) as client:
        for command in (
            *("RETR out/secret", "STOR out/new", "DELE out/secret", "NLST out", "SIZE out/secret"),
            *("MLST out/secret", "CWD out", "MKD out/new", "RNFR out/secret", "STOU out/new"),
        ):
            with client.data():
                failing.next("/out", error)
                client.command(command, "550")
                failing.left = 0
        client.command("NOOP", "200")
    assert sorted(os.listdir(outside)) == before


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("command", ["LIST d", "NLST d", "MLSD d"])
def test_a_directory_that_cannot_be_looked_at_is_no_file(
    home: Path, failing: Failing, command: str, error: int
) -> None:
    with started(handler_class(users(home))) as server, Client(server) as client, client.data():
        failing.next("/d", error)
        client.command(command, "550")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("command", ["LIST d", "MLSD d"])
def test_a_listing_has_no_gaps(home: Path, failing: Failing, command: str, error: int) -> None:
    with started(handler_class(users(home))) as server, Client(server) as client:
        with client.data():
            failing.next("/file", error)
            client.command(command, "1")
            assert client.reply().startswith("451")
        with client.data() as data:
            client.command(command, "1")
            assert b"file" in data.recv(1000)
        assert client.reply().startswith("226")


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES])
def test_what_is_not_there_for_the_user_is_left_out(home: Path, failing: Failing, error: int) -> None:
    with started(handler_class(users(home))) as server, Client(server) as client:
        with client.data() as data:
            failing.next("/file", error)
            client.command("LIST d", "1")
            with data.makefile("rb") as file:
                assert [line.split()[-1] for line in file] == [b"sub"]
        assert client.reply().startswith("226")


def test_paths_are_real_as_always(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there, what is missing, links that lead nowhere, around in circles and up again."""
    for name, target in (
        *(("in", "d/sub"), ("missing", "d/none"), ("deep", "none/none"), ("around", "around")),
        *(("up", "d/../file"), ("up2", "in/../none"), ("absolute", str(home / "none")), ("two", "missing")),
        *(("a", "b"), ("b", "a"), ("top", ".."), ("outside-none", "out/none"), ("dot", ".")),
    ):
        (home / name).symlink_to(target)
    fs = HomeFS(str(home), None)
    monkeypatch.chdir(home)
    tails = ["", "/", "/none", "/none/none", "/d/file", "/d/file/none", "/..", "/../none", "/.", "/secret"]
    for path in (f"{name}{tail}" for name in [*os.listdir(home), "none", "."] for tail in tails):
        for each in (path, f"{home}/{path}"):
            assert fs.realpath(each) == os.path.realpath(each), each
    deep = str(home / "/".join(["n"] * 2000))  # as many as fit into a command, and more
    assert fs.realpath(deep) == deep


def test_cwd_leaves_the_process_where_it_is(home: Path) -> None:
    """A file system over this one may wait in there, while other sessions have relative paths."""
    where = []

    class Watching(HomeFS):
        def fs2ftp(self, fspath: str) -> str:
            where.append(os.getcwd())
            found: str = super().fs2ftp(fspath)
            return found

    before = os.getcwd()
    with (
        started(handler_class(users(home), abstracted_fs=Watching)) as server,
        Client(server) as client,
    ):
        client.command("CWD d", "250")
        client.command("CWD file", "550 Not a directory.")
        client.command("CWD none", "550 No such file or directory.")
        assert client.command("PWD", "257") == '257 "/d" is the current directory.'
    assert set(where) == {before}


def test_a_path_too_long_is_refused(home: Path) -> None:
    with started(handler_class(users(home))) as server, Client(server) as client:
        client.command(f"SIZE {'n' * 1000}", "550")
        client.command(f"DELE {'n' * 1000}", "550")
        client.command("NOOP", "200")


def test_a_link_that_leads_nowhere_can_be_removed(home: Path) -> None:
    (home / "nowhere").symlink_to("none")
    (home / "around").symlink_to("around")
    with started(handler_class(users(home))) as server, Client(server) as client:
        client.command("DELE nowhere", "250")
        client.command("DELE around", "250")
    assert sorted(os.listdir(home)) == ["d", "out"]


@pytest.fixture(
    params=[*FILE_SYSTEMS, AtomicFS, OffloadedFS, type("Durable", (OffloadedFS, AtomicFS), {})],
    ids=lambda fs: str(fs.__name__),
)
def fs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each file system of ours, also where GeventFTPServer adds what it lacks."""
    threads = Threads()
    yield type("FS", (request.param,), {"threads": threads})
    threads.kill()


@pytest.fixture(params=["fifo", "fifo with a reader", "fifo with a writer", "socket", "device", "directory"])
def special(request: pytest.FixtureRequest, home: Path) -> Iterator[Path]:
    """Something in the home that is no regular file."""
    path = home / "special"
    with contextlib.ExitStack() as stack:
        if request.param.startswith("fifo"):
            os.mkfifo(path)
            if " " in request.param:
                fd = os.open(path, (os.O_RDWR if "writer" in request.param else os.O_RDONLY) | os.O_NONBLOCK)
                stack.callback(os.close, fd)
        elif request.param == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif request.param == "device":
            try:
                os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))  # /dev/null
            except PermissionError:
                pytest.skip("only root can make a device")
        else:
            path.mkdir()
        yield path


def test_only_regular_files_are_opened(home: Path, special: Path, fs: Any) -> None:
    """To open a FIFO would block the hub until somebody opens its other end."""
    with started(handler_class(users(home), abstracted_fs=fs)) as server, Client(server) as client:
        for command in ("RETR", "STOR", "APPE"):
            reply = client.command(f"{command} special", "550")
            assert reply[4:] in ("Not a regular file.", "Is a directory."), (command, reply)
        client.command("REST 0", "501")
        client.command("NOOP", "200")
    assert special.exists()


def test_a_file_that_becomes_a_fifo_after_it_was_looked_at(home: Path, fs: Any) -> None:
    class Swapping(DummyAuthorizer):
        def has_perm(self, username: str, perm: str, path: str | None = None) -> bool:
            if perm == "r":  # asked when the path has been looked at
                os.unlink(home / "d" / "file")
                os.mkfifo(home / "d" / "file")
            return True

    handler = handler_class(users(home, Swapping()), abstracted_fs=fs)
    with started(handler) as server, Client(server) as client:
        client.command("RETR d/file", "550 Not a regular file")


def test_the_mode_of_a_file_is_octal_as_others_write_it(home: Path) -> None:
    """lftp takes pyftpdlib's `0o644` for 0, and mirrors files that nobody may read."""
    name = "unix.mode=0o644;"
    (home / name).touch()
    (home / name).chmod(0o640)
    with started(handler_class(users(home))) as server, Client(server) as client:
        client.command("OPTS MLST type;unix.mode;", "200")
        with client.data() as data:
            client.command("MLSD", "1")
            listing = b""
            while chunk := data.recv(4096):
                listing += chunk
        assert client.reply().startswith("226")
        assert b"type=file;unix.mode=0640; unix.mode=0o644;\r\n" in listing
        client.send(f"MLST {name}")
        client.file.readline()
        assert client.file.readline() == f" type=file;unix.mode=0640; /{name}\r\n".encode()
        client.reply()
        client.command("OPTS MLST type;", "200")
        client.send(f"MLST {name}")
        client.file.readline()
        assert client.file.readline() == f" type=file; /{name}\r\n".encode()
        client.reply()


def test_mlsd_tells_what_is_missing_from_what_is_no_directory(home: Path) -> None:
    """RFC 3659, 7.2.1. rclone makes a directory after 550, and gives up after 501."""
    with started(handler_class(users(home))) as server, Client(server) as client:
        client.command("MLSD missing", "550")
        client.command("MLSD d/missing/deeper", "550")
        client.command("MLSD d/file", "501")
