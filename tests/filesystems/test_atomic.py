"""AtomicFS: nobody ever sees half an upload, whatever happens to it, and nothing is left of it.

Also the protocol behind it: a file that has `abort()` is aborted in place of closed when its upload did not
complete. Over plain FTP and TLS, with the file system on the hub and on threads.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyftpdlib.filesystems import AbstractedFS

from bridge import AtomicFS
from bridge.filesystems.atomic import SUFFIX, is_hidden, remove_leftovers
from support import exhaustion
from support.cli import CONCURRENCY, LIMIT, Command
from support.clients import CLIENTS, client
from support.exhaustion import lines_of
from support.fakes import RecordingHandler
from support.servers import Client, eventually, handler_class, reset, serving, time_out, users
from support.uploads import (
    ENDS,
    HUB_AND_THREADS,
    PLAIN_AND_TLS,
    Site,
    by_fin_without_goodbye,
    by_leaving,
    by_stop,
    site,
    store,
)

HALF = b"half " * 20_000
LEFTOVER = f".file.0123456789abcdef{SUFFIX}"


# --- what others see


@PLAIN_AND_TLS
@HUB_AND_THREADS
@pytest.mark.parametrize("old", [b"", b"old content"], ids=["new", "overwriting"])
def test_a_file_appears_when_it_is_whole(tmp_path: Path, tls: bool, offload: bool, old: bytes) -> None:
    with site(tmp_path, tls, offload, fs=AtomicFS) as it, it.client() as client:
        file = it.home / "file"
        if old:
            file.write_bytes(old)
            file.chmod(0o640)
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(HALF)
            it.in_progress(len(HALF))
            assert it.visible() == ({"file"} if old else set())
            assert len(it.hidden()) == 1
            if old:
                assert file.read_bytes() == old
                assert stat.S_IMODE((it.home / it.hidden()[0]).stat().st_mode) == 0o640
            data.sendall(HALF)
            if tls:
                data.unwrap()
        assert client.reply().startswith("226")
        assert file.read_bytes() == 2 * HALF
        assert (it.visible(), it.hidden()) == ({"file"}, [])
        assert it.events[-1] == ("received", str(file))
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(file.stat().st_mode) == (0o640 if old else 0o666 & ~umask)


@HUB_AND_THREADS
def test_clients_neither_see_nor_reach_hidden_files(tmp_path: Path, offload: bool) -> None:
    with site(tmp_path, False, offload, fs=AtomicFS) as it, it.client() as client:
        (it.home / LEFTOVER).write_bytes(HALF)
        (it.home / ".hidden~").touch()
        for command in ("LIST", "NLST", "MLSD"):
            with client.data() as data:
                client.command(command, "1")
                listed = b"".join(iter(lambda: data.recv(65536), b""))
            assert client.reply().startswith("226")
            assert b".hidden~" in listed
            assert SUFFIX.encode() not in listed
        for command in ("RETR", "SIZE", "DELE", "STOR", "APPE", "RNFR", "MLST", "MKD", "MFMT 20200101000000"):
            client.command(f"{command} {LEFTOVER}", "550")
        client.command("RNFR .hidden~", "350")
        client.command(f"RNTO {LEFTOVER}", "550")
        assert (it.home / LEFTOVER).read_bytes() == HALF


# --- what does not complete


@PLAIN_AND_TLS
@HUB_AND_THREADS
@pytest.mark.parametrize("end", [*ENDS, by_fin_without_goodbye], ids=lambda end: end.__name__)
def test_nothing_is_left_of_an_upload_that_ends_early(
    tmp_path: Path, end: Any, tls: bool, offload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if end is by_fin_without_goodbye and not tls:
        pytest.skip("FTP has no other mark for the end of a file")
    # keep_incomplete_uploads = False must not remove the old file either.
    with site(tmp_path, tls, offload, fs=AtomicFS, keep_incomplete_uploads=False) as it:
        (it.home / "file").write_bytes(b"old content")
        with it.client() as client, client.data() as data:
            client.command("STOR file", "1")
            data.sendall(HALF)
            it.in_progress(len(HALF))
            end(it, client, data)
        eventually(lambda: it.hidden() == [])
        assert (it.home / "file").read_bytes() == b"old content"
        assert ("incomplete", str(it.home / "file")) in it.events
        assert "received" not in [event[0] for event in it.events]
    assert not lines_of(caplog, "pyftpdlib", logging.ERROR)


def test_an_upload_that_times_out_leaves_nothing(tmp_path: Path) -> None:
    with site(tmp_path, False, fs=AtomicFS) as it, it.client() as client:
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(HALF)
            it.in_progress(len(HALF))
            time_out(it.control().data_channel, 0.05)
            assert client.reply().startswith("421")
        assert (it.visible(), it.hidden()) == (set(), [])
        assert it.events[-1][0] != "received"


def by_rein(site: Site, client: Client) -> None:
    client.command("REIN", "426")


def by_abor(site: Site, client: Client) -> None:
    client.command("ABOR", "426")


@HUB_AND_THREADS
@pytest.mark.parametrize("end", [by_rein, by_abor, by_stop, by_leaving], ids=lambda end: end.__name__)
def test_an_upload_whose_data_connection_never_comes_leaves_nothing(
    tmp_path: Path, end: Any, offload: bool
) -> None:
    more: dict[str, Any] = {"keep_incomplete_uploads": False}  # which does not mean the old file
    with site(tmp_path, False, offload, fs=AtomicFS, **more) as it, it.client() as client:
        (it.home / "file").write_bytes(b"old content")
        client.command("EPSV", "229")
        client.command("STOR file", "150")
        assert len(it.hidden()) == 1
        end(it, client, *([None] if end in (by_stop, by_leaving) else []))
        eventually(lambda: it.hidden() == [])
        assert (it.home / "file").read_bytes() == b"old content"


@pytest.mark.parametrize("connected", [True, False], ids=["125", "150"])
def test_a_client_that_is_gone_when_its_file_is_open_leaves_nothing(tmp_path: Path, connected: bool) -> None:
    class Leaving(RecordingHandler):
        def respond(self, resp: str, *args: Any, **kwargs: Any) -> None:
            if resp[:3] in ("125", "150"):
                self.handle_close()  # what send() does
            else:
                super().respond(resp, *args, **kwargs)

    with site(tmp_path, False, base=Leaving, fs=AtomicFS) as it, it.client() as client:
        (it.home / "file").write_bytes(b"old content")
        if connected:
            data = client.data()
            control = it.control()
            eventually(lambda: control.data_channel)
        client.send("STOR file")
        assert client.ended()
        assert it.hidden() == []
        assert (it.home / "file").read_bytes() == b"old content"
        if connected:
            data.close()


@HUB_AND_THREADS
def test_a_failing_rename_is_told_and_leaves_nothing(tmp_path: Path, offload: bool) -> None:
    with site(tmp_path, False, offload, fs=AtomicFS) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        (it.home / "file").mkdir()
        data.close()
        assert client.reply() == "426 Is a directory; transfer aborted."
        assert it.hidden() == []
        assert it.events[-1][0] == "incomplete"
        client.command("NOOP", "200")


@PLAIN_AND_TLS
def test_a_full_disk_leaves_nothing(tmp_path: Path, tls: bool) -> None:
    with (
        site(tmp_path, tls, fs=AtomicFS) as it,
        exhaustion.small_disk(it.home / "disk"),
        it.client() as client,
    ):
        assert store(client, "STOR disk/file", bytes(3 << 20)).startswith("452")
        assert os.listdir(it.home / "disk") == []
        assert store(client, "STOR disk/file", b"x").startswith("226")


def test_pyftpdlibs_own_handler_leaves_nothing(tmp_path: Path) -> None:
    handler = handler_class(users(tmp_path), abstracted_fs=AtomicFS)
    with serving(handler) as server, Client(server) as client:
        assert client.store("whole", HALF).startswith("226")
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(HALF)
            control = list(server.ioloop.socket_map.values())[1]
            eventually(lambda: control.data_channel and control.data_channel.transfer_in_progress())
            client.command("ABOR", "426")
            client.reply()
        client.command("EPSV", "229")
        client.command("STOR file", "150")
        reset(client)
        eventually(lambda: len(server.ioloop.socket_map) == 1)
        assert os.listdir(tmp_path) == ["whole"]


# --- commands and names


@PLAIN_AND_TLS
@HUB_AND_THREADS
def test_other_ways_to_upload(tmp_path: Path, tls: bool, offload: bool) -> None:
    with site(tmp_path, tls, offload, fs=AtomicFS) as it, it.client() as client:
        with client.data() as data:
            name = it.home / client_reply_name(client)
            assert not name.exists()
            data.sendall(HALF)
            if tls:
                data.unwrap()
        assert client.reply().startswith("226")
        assert name.read_bytes() == HALF
        assert stat.S_IMODE(name.stat().st_mode) == 0o600  # as pyftpdlib
        assert store(client, "APPE file", b"new").startswith("226")
        refusal = "550 Uploads are atomic here: send the whole file, with STOR."
        assert client.command("APPE file", "550") == refusal
        client.command("REST 1", "350")
        assert client.command("STOR file", "550") == refusal
        assert (it.home / "file").read_bytes() == b"new"
        assert it.visible() == {"file", name.name}


def client_reply_name(client: Client) -> str:
    return client.command("STOU", "1").split("FILE: ")[1]


def test_a_symbolic_link_stays(tmp_path: Path) -> None:
    with site(tmp_path, False, fs=AtomicFS) as it, it.client() as client:
        (it.home / "directory").mkdir()
        (it.home / "link").symlink_to("directory/file")
        for content in (b"new", b"newer"):
            assert store(client, "STOR link", content).startswith("226")
            assert os.readlink(it.home / "link") == "directory/file"
            assert (it.home / "directory" / "file").read_bytes() == content
        assert it.events[-1] == ("received", str(it.home / "link"))


def test_what_could_not_be_opened_is_refused_as_ever(tmp_path: Path) -> None:
    with site(tmp_path, False, fs=AtomicFS) as it, it.client() as client:
        (it.home / "directory").mkdir()
        assert client.command("STOR directory", "550") == "550 Is a directory."
        assert client.command("STOR none/file", "550") == "550 No such file or directory."
        assert client.command(f"STOR {'x' * 256}", "550") == "550 File name too long."
        assert store(client, f"STOR {'x' * 255}", b"long").startswith("226")
        assert store(client, f"STOR {'ä' * 127}", b"long").startswith("226")
        assert it.hidden() == []


def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    with site(tmp_path, False, fs=AtomicFS) as it, it.client() as client:
        (it.home / "file").touch()
        os.chown(it.home / "file", 1234, 4321)
        assert store(client, "STOR file", b"new").startswith("226")
        status = (it.home / "file").stat()
        assert (status.st_uid, status.st_gid, status.st_size) == (1234, 4321, 3)


@pytest.mark.parametrize("fsync", [True, False])
def test_fsync_uploads(tmp_path: Path, fsync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    fs = type("FS", (AtomicFS,), {"fsync_uploads": fsync})
    with site(tmp_path, False, fs=fs) as it, it.client() as client:
        assert store(client, "STOR file", b"content").startswith("226")
        assert [is_hidden(os.path.basename(path)) for path in synced] == ([True, False] if fsync else [])
        assert synced[1:] == ([str(it.home)] if fsync else [])


# --- leftovers


def test_leftovers_are_what_nobody_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bridge.filesystems.atomic")
    with site(tmp_path, False, fs=AtomicFS) as it, it.client() as client:
        (it.home / "sub").mkdir()
        old = it.home / "sub" / LEFTOVER
        old.touch()
        others = [f"file.0123456789abcdef{SUFFIX}", f".file.0123456789abcde{SUFFIX}", LEFTOVER + "~", "file~"]
        for name in others:
            (it.home / name).touch()
        (it.home / LEFTOVER).symlink_to(it.home / others[0])
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(HALF)
            it.in_progress(len(HALF))
            assert remove_leftovers(str(it.home)) == [str(old)]
            assert f"removed {old}" in caplog.text
        assert client.reply().startswith("226")
        assert (it.home / "file").read_bytes() == HALF
        assert {*others, "file"} <= it.visible()


def test_a_server_that_starts_while_a_file_is_made_does_no_harm(tmp_path: Path) -> None:
    tries: list[str] = []

    class Racing(AbstractedFS):
        def open(self, filename: str, mode: str) -> Any:
            file = super().open(filename, mode)
            if is_hidden(os.path.basename(filename)):
                tries.append(filename)
                if len(tries) == 1:  # before it could be locked
                    assert remove_leftovers(os.path.dirname(filename)) == [filename]
                elif len(tries) == 2:
                    locked.append(os.open(filename, os.O_RDONLY))
                    fcntl.flock(locked[0], fcntl.LOCK_EX)
                    os.unlink(filename)
            return file

    locked: list[int] = []
    with site(tmp_path, False, fs=type("FS", (AtomicFS, Racing), {})) as it, it.client() as client:
        assert store(client, "STOR file", HALF).startswith("226")
        assert (it.home / "file").read_bytes() == HALF
        assert len(tries) == 3
        os.close(locked[0])


@pytest.mark.program
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_what_a_crash_leaves_is_removed_at_the_next_start(tmp_path: Path) -> None:
    options = ("-w", "--atomic-uploads")
    with Command(*options, directory=tmp_path) as server:
        with client("curl", "up", server) as process:
            assert process.stdin is not None
            process.stdin.write(bytes(1 << 20))
            process.stdin.flush()
            server.logged("FTP session opened")
            wait_until(lambda: len(os.listdir(tmp_path)) == 1)
            with Command(*options, directory=tmp_path):  # another server: it lets the upload be
                assert len(os.listdir(tmp_path)) == 1
            server.stop(signal.SIGKILL)
        (name,) = os.listdir(tmp_path)
        assert is_hidden(name)
    with Command(*options, directory=tmp_path) as server:
        server.logged(f"removed {re.escape(str(tmp_path / name))}")
        assert os.listdir(tmp_path) == []


@pytest.mark.program
@pytest.mark.parametrize("concurrency", CONCURRENCY)
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "killed"])
def test_real_clients(tmp_path: Path, name: str, concurrency: str, complete: bool) -> None:
    with Command("-w", "--atomic-uploads", "--concurrency", concurrency, directory=tmp_path) as server:
        with client(name, "up", server) as process:
            assert process.stdin is not None
            process.stdin.write(bytes(4 << 20))
            process.stdin.flush()
            wait_until(lambda: [each for each in os.listdir(tmp_path) if is_hidden(each)])
            assert not (tmp_path / "file").exists()
            if complete:
                process.stdin.close()
                assert process.wait(LIMIT) == 0
                assert (tmp_path / "file").read_bytes() == bytes(4 << 20)
            else:
                process.kill()
                process.wait(LIMIT)  # to a server without TLS, as if it had sent all
        wait_until(lambda: not [each for each in os.listdir(tmp_path) if is_hidden(each)])


def wait_until(condition: Any) -> None:
    with gevent.Timeout(LIMIT):
        while not condition():
            gevent.sleep(0.005)


def test_a_tree_of_any_depth_is_searched_for_leftovers(tmp_path: Path) -> None:
    """Clients make it: more directories in one another than Python calls functions in one another."""
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open(LEFTOVER, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    try:
        assert remove_leftovers(str(tmp_path)) == [str(tmp_path / "/".join(["d"] * 1200) / LEFTOVER)]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree() recurses
