"""What an upload's reply says: 226 for what is whole, within the quota, and confirmed by the program.

Over plain FTP and TLS, where a connection that ends is not yet a file that ends.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from bridge import AtomicFS
from support.fakes import Gate, RecordingHandler
from support.servers import eventually, time_out
from support.uploads import (
    ENDS,
    HUB_AND_THREADS,
    PLAIN_AND_TLS,
    by_operator,
    by_stop,
    site,
    store,
)

CONTENT = bytes(range(256)) * 1000


# --- confirm_uploads


class Confirming(RecordingHandler):
    """Does with each upload what `answer` says."""

    confirm_uploads = True
    answer: Any = staticmethod(lambda: None)

    def on_file_received(self, file: str) -> Any:
        super().on_file_received(file)
        self.events.append(("content", Path(file).read_bytes()))
        return self.answer()


def failing(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return staticmethod(fail)


ANSWERS = [
    (staticmethod(lambda: None), "226 Transfer complete."),
    (staticmethod(lambda: True), "226 Transfer complete."),
    (staticmethod(lambda: False), "451 The server does not take the file; upload refused."),
    (failing(FilesystemError("No more\r\npictures")), "550 No more pictures; upload refused."),
    (failing(ConnectionRefusedError(111, "Refused")), "451 Refused; upload refused."),
    (failing(RuntimeError("a bug")), "451 Internal error; upload refused."),
]


@PLAIN_AND_TLS
@pytest.mark.parametrize("fs", [AbstractedFS, AtomicFS])
@pytest.mark.parametrize(("answer", "reply"), ANSWERS, ids=[reply[:9] for _, reply in ANSWERS])
def test_the_reply_is_the_programs(tmp_path: Path, answer: Any, reply: str, fs: Any, tls: bool) -> None:
    for keep in (True, False):
        (tmp_path / str(keep)).mkdir()
        more = {"answer": answer, "keep_incomplete_uploads": keep}
        with site(tmp_path / str(keep), tls, base=Confirming, fs=fs, **more) as it, it.client() as client:
            file = it.home / "file"
            for _ in range(2):  # the second shows that nothing of the first is left
                assert store(client, "STOR file", CONTENT) == reply
                assert it.events[-2:] == [("received", str(file)), ("content", CONTENT)]  # once, the last
            assert len(it.events) == 6
            assert file.exists() == (keep or reply.startswith("226"))
            if fs is not AtomicFS:
                assert store(client, "APPE file", b"more") == reply
                assert file.exists()


@PLAIN_AND_TLS
@HUB_AND_THREADS
def test_the_226_waits_for_the_program(tmp_path: Path, tls: bool, offload: bool) -> None:
    gate = Gate()
    more: dict[str, Any] = {"answer": staticmethod(gate.wait)}
    with site(tmp_path, tls, offload, Confirming, AtomicFS if not offload else AbstractedFS, **more) as it:
        with it.client() as client:
            waiting = gevent.spawn(store, client, "STOR file", CONTENT)
            gate.arrived()
            time_out(it.control().data_channel, 0.02)  # which is not for the program
            gevent.sleep(0.05)
            assert not waiting.ready()
            assert it.server.sessions()[0].waiting_since
            with it.client() as other:
                other.command("NOOP", "200")
            gate.open()
            assert waiting.get().startswith("226")
            client.command("NOOP", "200")
        assert [event[0] for event in it.events].count("received") == 1


@PLAIN_AND_TLS
@pytest.mark.parametrize("end", [by_operator, by_stop], ids=lambda end: end.__name__)
def test_a_confirmation_that_is_cut_short_is_none(tmp_path: Path, end: Any, tls: bool) -> None:
    gate = Gate()
    more: dict[str, Any] = {"answer": staticmethod(gate.wait), "keep_incomplete_uploads": False}
    with site(tmp_path, tls, base=Confirming, **more) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        data.sendall(CONTENT)
        goodbye = gevent.spawn(say_goodbye, data, tls)
        gate.arrived()
        end(it, client, data)
        goodbye.join()
        eventually(lambda: not (it.home / "file").exists())
        told = [event[0] for event in it.events]
        assert told[2:5] == ["received", "content", "incomplete"]


def say_goodbye(data: Any, tls: bool) -> None:
    """Until the server has said it too, or has just gone."""
    if not tls:
        data.shutdown(socket.SHUT_WR)
    else:
        with contextlib.suppress(OSError, AssertionError):  # the latter is gevent's, for a raw end
            data.unwrap()


@pytest.mark.parametrize("what", ["abort_transfer", "disconnect"])
def test_a_program_may_end_the_transfer_while_it_is_asked(tmp_path: Path, what: str) -> None:
    class Ending(Confirming):
        def on_file_received(self, file: str) -> Any:
            getattr(self, what)("No.")

    with site(tmp_path, False, base=Ending) as it, it.client() as client:
        assert store(client, "STOR file", CONTENT) == "426 No."
        if what == "disconnect":
            assert client.reply() == "421 No."
        else:
            assert store(client, "STOR file", CONTENT) == "426 No."  # it is asked again
        assert ("incomplete", str(it.home / "file")) in it.events


@PLAIN_AND_TLS
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_what_is_not_whole_is_not_asked_about(tmp_path: Path, end: Any, tls: bool) -> None:
    with site(tmp_path, tls, base=Confirming) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        data.sendall(CONTENT)
        it.in_progress(len(CONTENT))
        end(it, client, data)
        assert "received" not in [event[0] for event in it.events]


def test_without_confirm_uploads_the_reply_comes_first(tmp_path: Path) -> None:
    gate = Gate()
    more: dict[str, Any] = {"confirm_uploads": False, "answer": staticmethod(gate.wait)}
    with site(tmp_path, False, base=Confirming, **more) as it, it.client() as client:
        assert store(client, "STOR file", CONTENT).startswith("226")
        gate.arrived()
        gate.open()


# --- quota_left


class Limited(RecordingHandler):
    """`left` bytes for everybody; writes down who asks."""

    left: Any = 1000

    def quota_left(self, user: str, path: str) -> int | None:
        gevent.sleep(0.001)  # may wait
        self.events.append(("quota", user, path))
        left: int | None = self.left
        return left


@PLAIN_AND_TLS
@HUB_AND_THREADS
@pytest.mark.parametrize("keep", [True, False])
def test_an_upload_ends_at_the_byte(tmp_path: Path, tls: bool, offload: bool, keep: bool) -> None:
    more: dict[str, Any] = {"keep_incomplete_uploads": keep}
    with site(tmp_path, tls, offload, Limited, AbstractedFS, **more) as it, it.client() as client:
        file = it.home / "file"
        assert store(client, "STOR file", CONTENT[:1000]).startswith("226")
        assert file.read_bytes() == CONTENT[:1000]
        assert it.events == [*it.events[:2], ("quota", "u", str(file)), ("received", str(file))]
        for size in (1001, len(CONTENT)):
            reply = "552 Disk quota exceeded; transfer aborted."
            assert store(client, "STOR file", CONTENT[:size]) == reply
            client.command("NOOP", "200")
            assert it.events[-1] == ("incomplete", str(file))
            assert file.exists() == keep
            if keep:
                assert file.read_bytes() == CONTENT[:1000]
        (it.home / "old").write_bytes(b"old")
        assert store(client, "APPE old", CONTENT).startswith("552")
        assert (it.home / "old").read_bytes() == b"old" + CONTENT[:1000]
        client.command("NOOP", "200")


def test_atomic_uploads_leave_nothing_over_the_quota(tmp_path: Path) -> None:
    with site(tmp_path, False, base=Limited, fs=AtomicFS) as it, it.client() as client:
        (it.home / "file").write_bytes(b"old")
        assert store(client, "STOR file", CONTENT).startswith("552")
        assert (it.home / "file").read_bytes() == b"old"
        assert it.hidden() == []


def test_lines_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    with site(tmp_path, False, base=Limited, left=10) as it, it.client() as client:
        client.command("TYPE A", "200")
        assert store(client, "STOR file", b"four\r\n" * 2).startswith("226")
        assert store(client, "STOR file", b"four\r\n" * 2 + b"!").startswith("552")
        assert (it.home / "file").read_bytes() == b"four\n" * 2


def test_nothing_left_is_refused_at_once(tmp_path: Path) -> None:
    with site(tmp_path, False, base=Limited, left=0) as it, it.client() as client:
        (it.home / "file").write_bytes(b"old")
        client.command("REST 1", "350")
        for command in ("STOR file", "APPE file", "STOU", "STOU prefix"):
            assert client.command(command, "552") == "552 Quota exceeded: 0 bytes are left."
        assert [event[2] for event in it.events if event[0] == "quota"] == [
            *2 * [str(it.home / "file")],
            *(str(it.home), str(it.home / "prefix")),
        ]
        assert it.visible() == {"file"}
        assert client.retrieve("file") == b"old"  # REST was for the STOR that was refused
        it.server.handler.left = None
        assert store(client, "STOR file", CONTENT).startswith("226")


def test_allo(tmp_path: Path) -> None:
    with site(tmp_path, False, base=Limited) as it, it.client() as client:
        client.command("ALLO 1000", "202")
        assert client.command("ALLO 1001 R 5", "552") == "552 Quota exceeded: 1000 bytes are left."
        client.command("ALLO x", "202")
        client.command("ALLO   ", "202")
        it.server.handler.left = None
        client.command("ALLO 99999999999999", "202")
        assert store(client, "STOR file", CONTENT).startswith("226")


def test_a_quota_may_say_why(tmp_path: Path) -> None:
    class Refusing(FTPHandler):
        events: Any

        def quota_left(self, user: str, path: str) -> int | None:
            raise FilesystemError("Pay first")

    with site(tmp_path, False, base=Refusing) as it, it.client() as client:
        assert client.command("STOR file", "550") == "550 Pay first."
        assert it.visible() == set()
