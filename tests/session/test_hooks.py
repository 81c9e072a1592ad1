"""The events that bridge adds to pyftpdlib's: what they tell, that they may wait, and that they end."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from bridge import AtomicFS
from bridge.session.control import SessionMixin
from bridge.session.data import TransferMixin
from bridge.session.handlers import prepared
from bridge.session.hooks import Events, Transfer
from support.exhaustion import lines_of
from support.fakes import Gate, RecordingHandler
from support.servers import eventually
from support.uploads import ENDS, HUB_AND_THREADS, PLAIN_AND_TLS, by_leaving, site, store

CONTENT = bytes(range(256)) * 1000


# --- what is done to files, and that it starts


class Told(RecordingHandler):
    gate: Gate | None = None

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        if self.gate is not None:
            self.gate.wait()

    def on_file_deleted(self, file: str) -> None:
        self._note("deleted", file)

    def on_file_renamed(self, src: str, dst: str) -> None:
        self._note("renamed", src, dst)

    def on_directory_made(self, path: str) -> None:
        self._note("made", path)

    def on_directory_removed(self, path: str) -> None:
        self._note("removed", path)

    def on_transfer_started(self, transfer: Transfer) -> None:
        self._note("started", transfer)


def test_what_clients_do_to_files_is_told(tmp_path: Path) -> None:
    with site(tmp_path, False, base=Told) as it, it.client() as client:
        home = str(it.home)
        for command in ("MKD directory", "XMKD other", "RNFR other", "RNTO new", "RMD directory", "XRMD new"):
            client.command(command, "2" if not command.startswith("RNFR") else "350")
        (it.home / "file").touch()
        client.command("DELE file", "250")
        for command in ("DELE none", "MKD .", "RMD none", "RNTO x"):
            client.command(command, "5")
        client.command("NOOP", "200")
        assert it.events[2:] == [
            ("made", f"{home}/directory"),
            ("made", f"{home}/other"),
            ("renamed", f"{home}/other", f"{home}/new"),
            ("removed", f"{home}/directory"),
            ("removed", f"{home}/new"),
            ("deleted", f"{home}/file"),
        ]


@PLAIN_AND_TLS
def test_the_start_of_a_transfer_is_told(tmp_path: Path, tls: bool) -> None:
    with site(tmp_path, tls, base=Told) as it, it.client() as client:
        path = str(it.home / "file")
        for connected in (True, False):  # before the command, or only then
            for command, direction in (("STOR", "upload"), ("RETR", "download")):
                if connected:
                    with client.data() as data:
                        control = it.control()
                        eventually(lambda: control.data_channel)  # noqa: B023
                        client.command(f"{command} file", "125")
                        _finish(data, command, tls)
                    assert client.reply().startswith("226")
                elif command == "STOR":
                    assert store(client, "STOR file", CONTENT).startswith("226")
                elif not tls:
                    assert client.retrieve("file") == CONTENT
                else:
                    continue
                (_, transfer) = next(event for event in reversed(it.events) if event[0] == "started")
                assert (transfer.command, transfer.path, transfer.direction) == (command, path, direction)
                assert (transfer.user, transfer.bytes) == ("u", 0)
        count = len(it.events)
        with client.data() as data:
            client.command("LIST", "1")
            while data.recv(65536):
                pass
        client.reply()
        assert len(it.events) == count  # a listing is no file


def _finish(data: Any, command: str, tls: bool) -> None:
    if command == "STOR":
        data.sendall(CONTENT)
        if tls:
            data.unwrap()
        return
    content = b""
    while chunk := data.recv(65536):
        content += chunk
    assert content == CONTENT


@pytest.mark.parametrize("command", ["STOR file", "RETR file", "DELE file", "MKD new"])
def test_events_may_wait(tmp_path: Path, command: str) -> None:
    with site(tmp_path, False, base=Told, gate=Gate()) as it, it.client() as client, it.client() as other:
        (it.home / "file").write_bytes(CONTENT)
        gate = it.server.handler.gate
        data = client.data() if command[1:4] in ("TOR", "ETR") else None
        client.send(command, "NOOP")
        gate.arrived()
        assert it.server.sessions()[0].waiting_since
        other.command("NOOP", "200")
        gate.open()
        replies = [client.reply()[:3]]
        if data is not None:
            if command.startswith("STOR"):
                data.sendall(CONTENT)
            else:
                _finish(data, "RETR", False)
            data.close()
            replies.append(client.reply()[:3])
        replies.append(client.reply()[:3])
        assert set(replies) in ({"125", "200", "226"}, {"150", "200", "226"}, {"250", "200"}, {"257", "200"})


@pytest.mark.parametrize("what", ["abort_transfer", "disconnect", "raise"])
@pytest.mark.parametrize("command", ["STOR file", "RETR file"])
@pytest.mark.parametrize("connected", [True, False], ids=["125", "150"])
def test_a_transfer_may_be_ended_when_it_starts(
    tmp_path: Path, what: str, command: str, connected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    channels = []

    class Ending(RecordingHandler):
        def on_transfer_progress(self, transfer: Transfer) -> None:
            raise AssertionError("there is none")

        def on_transfer_started(self, transfer: Transfer) -> None:
            channels.append(self.data_channel)
            if what == "raise":
                raise RuntimeError("a bug")
            getattr(self, what)("No.")

    with site(tmp_path, False, base=Ending, fs=AtomicFS) as it, it.client() as client:
        (it.home / "file").write_bytes(CONTENT)
        if connected:
            data = client.data()
            control = it.control()
            eventually(lambda: control.data_channel)
            client.command(command, "125")
        else:
            port = int(client.command("EPSV", "229").split("|")[3])
            client.command(command, "150")
            data = gevent.socket.create_connection(("127.0.0.1", port))
        assert client.reply() == ("426 Internal error; transfer aborted." if what == "raise" else "426 No.")
        data.close()
        if what == "disconnect":
            assert client.reply() == "421 No."
        else:
            client.command("NOOP", "200")
        assert it.hidden() == []
        assert (it.home / "file").read_bytes() == CONTENT
        assert [channel._progress for channel in channels] == [None]
    assert len(lines_of(caplog, "pyftpdlib", logging.ERROR)) == (what == "raise")


# --- progress


class Watching(RecordingHandler):
    progress_interval = 0.02

    def on_transfer_progress(self, transfer: Transfer) -> None:
        self.events.append(("progress", transfer))

    @classmethod
    def progress(cls) -> list[Transfer]:
        return [event[1] for event in cls.events if event[0] == "progress"]


@PLAIN_AND_TLS
@HUB_AND_THREADS
def test_progress_is_told_now_and_then(tmp_path: Path, tls: bool, offload: bool) -> None:
    with site(tmp_path, tls, offload, Watching, AbstractedFS) as it, it.client() as client:
        progress = it.server.handler.progress
        with client.data() as data:
            client.command("STOR file", "1")
            gevent.sleep(0.05)
            assert progress() == []  # nothing has come
            for number in range(1, 4):
                data.sendall(b"x" * 100)
                eventually(lambda: len(progress()) == number)  # noqa: B023
                assert progress()[-1].bytes == 100 * number
            gevent.sleep(0.05)
            assert len(progress()) == 3  # nothing more has come
            if tls:
                data.unwrap()
        assert client.reply().startswith("226")
        one, *_, last = progress()
        assert (one.command, one.path, one.direction) == ("STOR", str(it.home / "file"), "upload")
        assert (one.user, one.seconds <= last.seconds - 0.02) == ("u", True)


@PLAIN_AND_TLS
@pytest.mark.parametrize("end", [*ENDS, None], ids=lambda end: getattr(end, "__name__", "226"))
def test_nothing_watches_a_transfer_that_has_ended(tmp_path: Path, end: Any, tls: bool) -> None:
    with site(tmp_path, tls, base=Watching, progress_interval=1000) as it, it.client() as client:
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(CONTENT)
            it.in_progress(len(CONTENT))
            channel = it.control().data_channel
            timer = channel._progress
            assert not timer.cancelled
            if end is not None:
                end(it, client, data)
            elif tls:
                data.unwrap()
        if end is None:
            assert client.reply().startswith("226")
        if end is not by_leaving:
            eventually(lambda: channel._closed)
        assert timer.cancelled


def test_without_an_event_nothing_is_armed(tmp_path: Path) -> None:
    with site(tmp_path, False) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        data.sendall(CONTENT)
        it.in_progress(len(CONTENT))
        assert it.control().data_channel._progress is None
        assert it.control().data_channel._data_wrapper is None  # no quota either


def test_a_bug_in_progress_ends_the_transfer(tmp_path: Path) -> None:
    class Buggy(Watching):
        def on_transfer_progress(self, transfer: Transfer) -> None:
            raise RuntimeError("a bug")

    with site(tmp_path, False, base=Buggy) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        data.sendall(CONTENT)
        assert client.reply() == "426 Internal error; transfer aborted."
        client.command("NOOP", "200")


# --- where the defaults are


def test_defaults_hide_nothing() -> None:
    class Custom(FTPHandler):
        confirm_uploads = True
        progress_interval = 5

        def on_file_deleted(self, file: str) -> None: ...

    handler = prepared(Custom)
    assert (handler.confirm_uploads, handler.progress_interval) == (True, 5)
    assert handler.on_file_deleted is Custom.on_file_deleted
    assert handler.on_file_renamed is Events.on_file_renamed
    assert handler.keep_incomplete_uploads is True
    half = type("Half", (SessionMixin, FTPHandler), {"dtp_handler": handler.dtp_handler})
    assert issubclass(prepared(half), Events)
    assert issubclass(prepared(half).dtp_handler, TransferMixin)
    assert os.path.basename(Events.__module__) == "bridge.session.hooks"
