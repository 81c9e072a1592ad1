"""Uploads over plain FTP and TLS, on the hub and on threads, and all ways to end one early. No tests here."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyftpdlib.handlers
import pytest

from bridge import OffloadedFS
from bridge.filesystems.atomic import is_hidden
from bridge.filesystems.threads import Threads
from support import cli
from support.fakes import RecordingHandler
from support.servers import Client, encrypted, eventually, handler_class, reset, started, users

#: Parameters of tests: TLS or not, file system on threads or not.
PLAIN_AND_TLS = pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
HUB_AND_THREADS = pytest.mark.parametrize("offload", [False, True], ids=["hub", "threads"])


class TLSClient(Client):
    """Encrypts commands and data."""

    def __init__(self, server: Any) -> None:
        super().__init__(server, login=False)
        self.reply()
        self.command("AUTH TLS", "234")
        self.encrypt()
        for line, code in (("USER u", "331"), ("PASS p", "230"), ("PBSZ 0", "200"), ("PROT P", "200")):
            self.command(line, code)

    def data(self) -> Any:
        return encrypted(super().data())


class Site:
    """A server with a directory, `home`, and its handler class."""

    def __init__(self, home: Path, server: Any, tls: bool) -> None:
        self.home = home
        self.server = server
        self._client_class = TLSClient if tls else Client

    @property
    def events(self) -> list[Any]:
        events: list[Any] = self.server.handler.events
        return events

    def control(self) -> Any:
        """The handler of its only session."""
        (control,) = self.server._sessions
        return control

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        with self._client_class(self.server) as client:
            client.command("TYPE I", "200")
            yield client

    def in_progress(self, size: int) -> None:
        """Return when so many bytes of the only session's upload have come."""
        control = self.control()
        eventually(lambda: control.data_channel and control.data_channel.get_transmitted_bytes() == size)

    def hidden(self) -> list[str]:
        return [name for name in os.listdir(self.home) if is_hidden(name)]

    def visible(self) -> set[str]:
        return {name for name in os.listdir(self.home) if not is_hidden(name)}


@contextlib.contextmanager
def site(
    tmp_path: Path,
    tls: bool,
    offload: bool = False,
    base: Any = RecordingHandler,
    fs: Any = None,
    **more: Any,
) -> Iterator[Site]:
    """Serve `tmp_path/home`, with file system *fs*."""
    home = tmp_path / "home"
    home.mkdir()
    if tls:
        pytest.importorskip("OpenSSL")
        pytest.importorskip("cryptography")
        more |= {"certfile": str(cli.certificate(tmp_path)), "ssl_context": None}
        base = type("TLSHandler", (base, pyftpdlib.handlers.TLS_FTPHandler), {})
    threads = Threads()
    if fs is not None:
        more["abstracted_fs"] = type("FS", (OffloadedFS, fs), {"threads": threads}) if offload else fs
    try:
        with started(handler_class(users(home), base, events=[], **more)) as server:
            yield Site(home, server, tls)
    finally:
        threads.kill()


def store(client: Client, command: str, content: bytes) -> str:
    """The reply; over TLS with its goodbye. The server may close the connection before it has read all."""
    with client.data() as data:
        client.command(command, "1")
        with contextlib.suppress(OSError):
            data.sendall(content)
            if isinstance(client, TLSClient):
                data.unwrap()
    return client.reply()


# --- how an upload ends before its time; `end(site, client, data)` returns when the client has had its reply


def by_abor(site: Site, client: Client, data: Any) -> None:
    client.command("ABOR", "426")
    assert client.reply().startswith("226")


def by_reset(site: Site, client: Client, data: Any) -> None:
    reset(data)
    assert client.reply().startswith("426")


def by_fin_without_goodbye(site: Site, client: Client, data: Any) -> None:
    """Over TLS only: the connection ends, but the file does not."""
    data.shutdown(socket.SHUT_WR)
    assert client.reply().startswith("426")


def by_operator(site: Site, client: Client, data: Any) -> None:
    site.server.sessions()[0].abort_transfer()
    assert client.reply().startswith("426")


def by_new_pasv(site: Site, client: Client, data: Any) -> None:
    client.command("EPSV", "426")
    assert client.reply().startswith("229")


def by_stop(site: Site, client: Client, data: Any) -> None:
    site.server.stop(0)
    assert client.reply().startswith("426")


def by_leaving(site: Site, client: Client, data: Any) -> None:
    reset(client)
    eventually(lambda: not site.server.sessions())


ENDS = [by_abor, by_reset, by_operator, by_new_pasv, by_stop, by_leaving]
