"""Names are the same bytes on the wire and on the disk, in the session's encoding or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from bridge import AtomicFS, OffloadedFS
from bridge.filesystems.jail import ConfinedFS
from bridge.filesystems.threads import Threads
from support.servers import Client, handler_class, started, users

#: As cameras and Windows' ftp.exe send them (ISO 8859-1), and every byte that a name can have.
LATIN = [b"B\xe4r.txt", b"B\xf6r.txt"]
EVERY = bytes(byte for byte in range(1, 256) if byte not in b"\r\n/\xff")


class Bytes:
    """A session whose commands and replies are bytes."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def reply(self) -> bytes:
        while True:
            line: bytes = self.client.file.readline().rstrip(b"\r\n")
            if not line or (line[:3].isdigit() and line[3:4] == b" "):
                return line

    def command(self, line: bytes, code: bytes) -> bytes:
        self.client.sock.sendall(line + b"\r\n")
        reply = self.reply()
        assert reply.startswith(code), (line, reply)
        return reply

    def put(self, line: bytes, content: bytes) -> bytes:
        with self.client.data() as data:
            told = self.command(line, b"1")
            data.sendall(content)
        assert self.reply().startswith(b"226")
        return told

    def get(self, line: bytes) -> bytes:
        content = b""
        with self.client.data() as data:
            self.command(line, b"1")
            while chunk := data.recv(65536):
                content += chunk
        assert self.reply().startswith(b"226")
        return content


@pytest.fixture(params=[AbstractedFS, ConfinedFS, AtomicFS, OffloadedFS], ids=lambda fs: str(fs.__name__))
def fs(request: pytest.FixtureRequest) -> Iterator[Any]:
    threads = Threads()
    yield type("FS", (request.param,), {"threads": threads})
    threads.kill()


@pytest.mark.parametrize("names", [LATIN, [EVERY, EVERY[:-1]]], ids=["ISO 8859-1", "every byte"])
def test_two_names_are_two_files(tmp_path: Path, fs: Any, names: list[bytes]) -> None:
    with started(handler_class(users(tmp_path), abstracted_fs=fs)) as server, Client(server) as client:
        session = Bytes(client)
        for name in names:
            session.put(b"STOR " + name, b"content of " + name)
        assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted(names)
        for name in names:
            assert session.get(b"RETR " + name) == b"content of " + name
        assert session.get(b"NLST") == b"".join(name + b"\r\n" for name in sorted(names))
        for line in (b"LIST", b"MLSD"):
            listed = session.get(line).split(b"\r\n")
            assert all(any(each.endswith(b" " + name) for each in listed) for name in names), line


def test_directories_keep_their_names(tmp_path: Path) -> None:
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        session = Bytes(client)
        for name in LATIN:
            assert name in session.command(b"MKD " + name, b"257")
            assert name in session.command(b"CWD " + name, b"250")
            assert b'"/' + name + b'"' in session.command(b"PWD", b"257")
            session.put(b"APPE " + name, b"content")
            told = session.put(b"STOU " + name, b"unique")
            unique = told.partition(b"FILE: ")[2]
            assert unique.startswith(name + b".")
            session.command(b"CWD /", b"250")
            directory = os.path.join(os.fsencode(tmp_path), name)
            assert sorted(os.listdir(directory)) == sorted([name, unique])


def test_replies_tell_the_names_that_were_asked_for(tmp_path: Path) -> None:
    with started(handler_class(users(tmp_path))) as server, Client(server) as client:
        session = Bytes(client)
        name = LATIN[0]
        session.put(b"STOR " + name, b"content")
        client.sock.sendall(b"MLST " + name + b"\r\n")
        assert client.file.readline() == b'250-Listing "/' + name + b'":\r\n'
        assert client.file.readline().endswith(b" /" + name + b"\r\n")
        session.reply()
        assert name in session.command(b"MDTM missing" + name, b"550")
        session.command(b"RNFR " + name, b"350")
        session.command(b"RNTO " + LATIN[1], b"250")
        session.command(b"DELE " + LATIN[1], b"250")
    assert os.listdir(tmp_path) == []


def test_other_encodings_keep_their_bytes_too(tmp_path: Path) -> None:
    name = b"\xc4\xe3\xff.txt"  # two bytes are a letter of GBK, the third is none
    with started(handler_class(users(tmp_path), encoding="gbk")) as server, Client(server) as client:
        session = Bytes(client)
        session.put(b"STOR " + name, b"content")
        assert session.get(b"NLST") == name + b"\r\n"
        assert session.get(b"RETR " + name) == b"content"


def test_a_handler_that_chooses_how_to_decode_is_left_alone(tmp_path: Path) -> None:
    class Strict(FTPHandler):
        unicode_errors = "strict"

    with started(handler_class(users(tmp_path), Strict)) as server, Client(server) as client:
        Bytes(client).command(b"STOR " + LATIN[0], b"501")
