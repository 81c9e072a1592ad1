"""Which uploads are known not to be whole, and that their files are aborted in place of closed."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from gevent import monkey
from pyftpdlib.filesystems import AbstractedFS

from support.exhaustion import lines_of
from support.servers import eventually, reset
from support.uploads import (
    ENDS,
    HUB_AND_THREADS,
    PLAIN_AND_TLS,
    by_abor,
    by_leaving,
    by_new_pasv,
    by_operator,
    by_stop,
    site,
    store,
)

CONTENT = bytes(range(256)) * 1000

_allocate_lock = monkey.get_original("_thread", "allocate_lock")


# --- what is known not to be whole


def test_a_reset_is_not_the_end_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tls in (False, True):
        (tmp_path / str(tls)).mkdir()
        # Whoever does without TLS's goodbye does not take a reset for the end of the file.
        with site(tmp_path / str(tls), tls, require_close_notify=False) as it, it.client() as client:
            with client.data() as data:
                client.command("STOR file", "1")
                data.sendall(CONTENT)
                it.in_progress(len(CONTENT))
                reset(data)
                assert client.reply() == "426 Connection broke off; transfer aborted."
            assert it.events[-1] == ("incomplete", str(it.home / "file"))
            assert (it.home / "file").read_bytes() == CONTENT  # as pyftpdlib keeps it
    assert not lines_of(caplog, "pyftpdlib", logging.ERROR)


@pytest.mark.parametrize("required", [True, False, None])
@HUB_AND_THREADS
def test_tls_without_goodbye(
    tmp_path: Path, required: bool | None, offload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    more = {} if required is None else {"require_close_notify": required}
    with site(tmp_path, True, offload, fs=AbstractedFS, **more) as it, it.client() as client:
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(CONTENT)
            data.shutdown(socket.SHUT_WR)  # a bare FIN
            if required is False:
                assert client.reply().startswith("226")
            else:
                assert client.reply() == "426 Connection broke off; transfer aborted."
        expected = "received" if required is False else "incomplete"
        assert it.events[-1] == (expected, str(it.home / "file"))
        assert store(client, "STOR file", CONTENT).startswith("226")  # with it
        assert it.events[-1] == ("received", str(it.home / "file"))
    assert not lines_of(caplog, "pyftpdlib", logging.ERROR)


# --- files that can be aborted


class Sink:
    """An open file that writes down what is done to it; a write may wait, natively."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False
        self.calls: list[str] = []
        self.writing: list[Any] = []

    def write(self, data: bytes) -> None:
        for lock in self.writing:
            self.calls.append("write begins")
            lock.acquire()
            self.calls.append("write ends")

    def close(self) -> None:
        self.calls.append("close")
        self.closed = True

    def abort(self) -> None:
        self.calls.append("abort")
        self.closed = True


def sink_fs() -> Any:
    """A file system whose uploads go into Sinks; `sinks` are those."""

    class SinkFS(AbstractedFS):
        sinks: list[Sink] = []

        def open(self, filename: str, mode: str) -> Any:
            self.sinks.append(Sink(filename))
            return self.sinks[-1]

    return SinkFS


@PLAIN_AND_TLS
@HUB_AND_THREADS
@pytest.mark.parametrize("end", [*ENDS, None], ids=lambda end: getattr(end, "__name__", "226"))
def test_what_is_not_whole_is_aborted_and_not_closed(
    tmp_path: Path, end: Any, tls: bool, offload: bool
) -> None:
    fs = sink_fs()
    with site(tmp_path, tls, offload, fs=fs) as it, it.client() as client:
        if end is None:
            assert store(client, "STOR file", CONTENT).startswith("226")
        else:
            with client.data() as data:
                client.command("STOR file", "1")
                data.sendall(CONTENT)
                it.in_progress(len(CONTENT))
                end(it, client, data)
        (sink,) = fs.sinks
        eventually(lambda: sink.closed)
    assert sink.calls == ["close" if end is None else "abort"]


@HUB_AND_THREADS
@pytest.mark.parametrize("end", [by_abor, by_operator, by_stop, by_leaving, by_new_pasv])
def test_what_never_began_is_aborted_and_not_closed(tmp_path: Path, end: Any, offload: bool) -> None:
    fs = sink_fs()
    with site(tmp_path, False, offload, fs=fs) as it, it.client() as client:
        client.command("EPSV", "229")
        client.command("STOR file", "150")
        if end is by_new_pasv:
            client.command("EPSV", "425")  # of the STOR
        else:
            end(it, client, None)
        (sink,) = fs.sinks
        eventually(lambda: sink.closed)
    assert sink.calls == ["abort"]


def test_a_file_is_not_aborted_under_a_running_write(tmp_path: Path) -> None:
    fs = sink_fs()
    with site(tmp_path, False, True, fs=fs) as it, it.client() as client, client.data() as data:
        client.command("STOR file", "1")
        (sink,) = fs.sinks
        lock = _allocate_lock()
        lock.acquire()
        sink.writing.append(lock)
        data.sendall(CONTENT)
        eventually(lambda: sink.calls)
        by_operator(it, client, data)
        assert sink.calls == ["write begins"]
        lock.release()
        eventually(lambda: sink.closed)
        assert sink.calls == ["write begins", "write ends", "abort"]


@PLAIN_AND_TLS
def test_the_session_ends_by_the_reply_that_cannot_be_sent(
    tmp_path: Path, tls: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with site(tmp_path, tls) as it, it.client() as client:
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(CONTENT)
            it.in_progress(len(CONTENT))
            control = it.control()
            if tls:
                data.unwrap()
            data.close()  # the hub sees this first
            reset(client)
            eventually(lambda: not it.server._sessions)
        assert (it.home / "file").read_bytes() == CONTENT
        assert control._idler is None or control._idler.cancelled
    assert not lines_of(caplog, "bridge", logging.ERROR)
    assert not lines_of(caplog, "pyftpdlib", logging.ERROR)


class JavasEnd:
    """A TLS connection of pyOpenSSL's whose close_notify is raised as Java's is: as an end without one.

    JSSE sends `user_canceled` before it, and ends TCP at once.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def recv(self, size: int) -> bytes:
        from OpenSSL import SSL

        try:
            return bytes(self._connection.recv(size))
        except SSL.ZeroReturnError:
            raise SSL.SysCallError(-1, "Unexpected EOF") from None


def test_a_goodbye_of_tls_is_one_whatever_pyopenssl_raises(tmp_path: Path) -> None:
    with site(tmp_path, True, fs=AbstractedFS) as it, it.client() as client:
        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(CONTENT)
            it.in_progress(len(CONTENT))
            channel = it.control().data_channel
            channel.socket = JavasEnd(channel.socket)
            data.unwrap()
        assert client.reply() == "226 Transfer complete."
        assert it.events[-1] == ("received", str(it.home / "file"))
