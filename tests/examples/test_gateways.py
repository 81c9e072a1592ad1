"""The examples that show other servers' files, run as by their users: a real web and a real S3 server."""

from __future__ import annotations

import contextlib
import ftplib
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from support.examples import EXAMPLES, PATIENCE, PYTHON, Program, Run, assert_clean_stop, example, session

pytestmark = pytest.mark.program


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_requests = needs("requests")
needs_s3 = needs("boto3", "moto", "flask")

BIG = bytes(range(256)) * (80 << 10)  # 20 MiB: more than sockets keep on the way
HALF = len(BIG) // 2


@pytest.mark.parametrize(
    "name",
    [pytest.param("http_gateway", marks=needs_requests), pytest.param("object_store", marks=needs_s3)],
)
def test_import_has_no_effects(run: Run, name: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {name}\n"
        "from gevent import monkey; from gevent._hub_local import get_hub_if_exists\n"
        "print(get_hub_if_exists(), monkey.saved, callable({0}.build), callable({0}.main))\n"
    ).format(name)
    program = run(*PYTHON, "-c", code)
    program.expect(r"^None \{\} True True\n$")
    assert program.process.wait(PATIENCE) == 0
    assert not program.errors


def retrieve(ftp: ftplib.FTP, name: str) -> bytes:
    blocks: list[bytes] = []
    ftp.retrbinary(f"RETR {name}", blocks.append, 1 << 20)
    return b"".join(blocks)


def listed(ftp: ftplib.FTP, path: str = "") -> list[list[str]]:
    """Kind, size and name of each line of LIST."""
    lines: list[str] = []
    ftp.retrlines(f"LIST {path}", lines.append)
    return [[line[0], line.split()[4], line.split()[-1]] for line in lines]


def abort(ftp: ftplib.FTP, data: Any) -> None:
    ftp.putcmd("ABOR")
    assert ftp.getmultiline()[:3] == "426"
    data.close()  # only now: before, it could be taken for the end of the file
    assert ftp.getmultiline()[:3] in ("225", "226")


# --- examples/http_gateway.py


class Web(ThreadingHTTPServer):
    """Serves `files`; /gated sends its second half, and /slow all, when `gate` is set; PUT in chunks."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WebRequest)
        self.files = {"/big": BIG, "/gated": BIG, "/slow": b"slow", "/sub/a #%b": b"abc"}
        self.gate = threading.Event()
        self.asked = threading.Event()
        self.got = threading.Event()
        self.incomplete = threading.Event()


class WebRequest(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.path == "/sub":
            self.send_response(301)
            self.send_header("Location", "/sub/")
            self.end_headers()
            return
        content = self._content()
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/gated":
            self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Sun, 09 Sep 2001 01:46:40 GMT")
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self._send(content)

    do_GET = do_HEAD

    def _content(self) -> bytes | None:
        if self.path == "/":
            return b"<a href='../'>up</a><a href='big'>big</a><a href='gated'>?</a><a href='sub/'>sub</a>"
        if self.path == "/sub/":
            return b"<a href='a%20%23%25b'>a b</a><a href='?C=N'>by name</a><a href='/'>top</a>"
        return self.server.files.get(unquote(self.path))

    def _send(self, content: bytes) -> None:
        half = {"/gated": HALF, "/slow": 0}.get(self.path, len(content))
        self.wfile.write(content[:half])
        if half < len(content):
            self.server.asked.set()
            assert self.server.gate.wait(PATIENCE)
            self.wfile.write(content[half:])

    def do_PUT(self) -> None:
        if self.path == "/refused%20at%20once":
            self.send_error(403)
            return
        assert self.headers["Transfer-Encoding"] == "chunked"
        content = b""
        while size := int(self.rfile.readline() or b"-1", 16):
            if size < 0:
                self.server.incomplete.set()
                return
            content += self.rfile.read(size)
            self.rfile.readline()
            self.server.got.set()
        if self.path == "/refused":
            self.send_error(403)
            return
        self.server.files[self.path] = content
        self.send_response(201)
        self.end_headers()


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def gateway(run: Run, web: Web) -> tuple[Program, int]:
    program = example(run, "http_gateway.py", f"http://127.0.0.1:{web.server_port}", "--port", "0")
    return program, int(program.expect(r"FTP: ftp://127\.0\.0\.1:(\d+)/\n")[1])


@needs_requests
def test_web_pages_as_files(gateway: tuple[Program, int], web: Web) -> None:
    program, port = gateway
    with session(port, "alice", "secret") as ftp:
        assert listed(ftp) == [["-", str(len(BIG)), "big"], ["-", "0", "gated"], ["d", "0", "sub"]]
        ftp.cwd("sub")
        assert ftp.nlst() == ["a #%b"]
        ftp.voidcmd("TYPE I")
        assert ftp.size("a #%b") == 3
        assert retrieve(ftp, "a #%b") == b"abc"
        assert retrieve(ftp, "/big") == BIG
        for command in ("RETR nothing", "CWD nothing", "SIZE /gated", "APPE new", "MKD new"):
            with pytest.raises(ftplib.error_perm, match=r"^550"):
                ftp.voidcmd(command)
    assert_clean_stop(program, signal.SIGTERM)


@needs_requests
def test_web_pages_are_streamed_and_a_slow_one_stalls_its_own_session(
    gateway: tuple[Program, int], web: Web
) -> None:
    program, port = gateway
    with session(port, "alice", "secret") as ftp, session(port, "alice", "secret") as other:
        ftp.voidcmd("TYPE I")
        with ftp.transfercmd("RETR gated") as data:
            file = data.makefile("rb")
            assert file.read(HALF) == BIG[:HALF]
            assert web.asked.wait(PATIENCE)
            assert other.voidcmd("NOOP").startswith("200")
            assert retrieve(other, "big") == BIG
            web.gate.set()
            assert file.read() == BIG[HALF:]
            file.close()
        assert ftp.voidresp().startswith("226")
    assert_clean_stop(program, signal.SIGINT)


@needs_requests
def test_a_download_is_aborted_while_the_web_server_says_nothing(
    gateway: tuple[Program, int], web: Web
) -> None:
    program, port = gateway
    with session(port, "alice", "secret") as ftp:
        with ftp.transfercmd("RETR slow") as data:
            assert web.asked.wait(PATIENCE)
            abort(ftp, data)
        assert not web.gate.is_set()
        assert retrieve(ftp, "big") == BIG
    assert_clean_stop(program, signal.SIGTERM)


@needs_requests
def test_uploads_are_puts(gateway: tuple[Program, int], web: Web) -> None:
    program, port = gateway
    with session(port, "alice", "secret") as ftp:
        with ftp.transfercmd("STOR new") as data:
            data.sendall(BIG[:HALF])
            assert web.got.wait(PATIENCE)  # the server has some of it before all is sent
            data.sendall(BIG[HALF:])
        assert ftp.voidresp().startswith("226")
        assert web.files["/new"] == BIG
        assert ftp.storbinary("STOR empty", io.BytesIO()).startswith("226")
        assert web.files["/empty"] == b""
        with pytest.raises(ftplib.error_temp, match=r"^426 Permission denied|^426 Forbidden"):
            ftp.storbinary("STOR refused", io.BytesIO(b"x"))
        with ftp.transfercmd("STOR refused at once") as data, contextlib.suppress(ConnectionError):
            data.sendall(BIG)
        with pytest.raises(ftplib.error_temp, match=r"^426"):
            ftp.voidresp()
        with ftp.transfercmd("STOR half") as data:
            data.sendall(BIG[:HALF])
            abort(ftp, data)
        assert web.incomplete.wait(PATIENCE)
        assert "/half" not in web.files
    assert_clean_stop(program, signal.SIGTERM)


# --- examples/object_store.py

MOTO = """
import signal
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
signal.pause()
"""


class Store:
    """A server that speaks S3, a client to look into it, and the example in front of it."""

    def __init__(self, run: Run) -> None:
        import boto3

        moto = run(*PYTHON[:1], "-c", MOTO)
        url = moto.expect(r"http://\S+:\d+\n")[0].strip()
        self.s3: Any = boto3.client("s3", endpoint_url=url)
        self.program = example(run, "object_store.py", "--endpoint", url, "--create", "--port", "0", "bucket")
        self.port = int(self.program.expect(r"FTP: ftp://127\.0\.0\.1:(\d+)/\n")[1])

    def objects(self) -> list[str]:
        return [each["Key"] for each in self.s3.list_objects_v2(Bucket="bucket").get("Contents", ())]

    def uploads(self) -> list[dict[str, str]]:
        """That are not complete."""
        uploads = self.s3.list_multipart_uploads(Bucket="bucket").get("Uploads", ())
        return [{name: each[name] for name in ("Key", "UploadId")} for each in uploads]

    def parts(self) -> int:
        """Of the one upload that runs."""
        uploads = self.uploads()
        return len(self.s3.list_parts(Bucket="bucket", **uploads[0]).get("Parts", ())) if uploads else 0


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def store(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = Store(run)
    with contextlib.closing(store.s3):
        yield store


@needs_s3
def test_objects_as_files(store: Store) -> None:
    with session(store.port, "alice", "secret") as ftp:
        ftp.storbinary("STOR docs/deep/small.txt", io.BytesIO(b"small"))
        ftp.storbinary("STOR empty", io.BytesIO())
        ftp.storbinary("STOR docs/big", io.BytesIO(BIG), 1 << 20)
        assert store.objects() == ["docs/big", "docs/deep/small.txt", "empty"]
        assert store.s3.get_object(Bucket="bucket", Key="docs/big")["Body"].read() == BIG
        assert listed(ftp) == [["d", "0", "docs"], ["-", "0", "empty"]]
        assert listed(ftp, "docs") == [["d", "0", "deep"], ["-", str(len(BIG)), "big"]]
        ftp.cwd("docs/deep")
        ftp.voidcmd("TYPE I")
        assert ftp.size("small.txt") == 5
        assert retrieve(ftp, "small.txt") == b"small"
        assert retrieve(ftp, "../big") == BIG
        ftp.delete("../../empty")
        assert "empty" not in store.objects()
        for command in ("RETR nothing", "CWD nothing", "SIZE /docs", "APPE new"):
            with pytest.raises(ftplib.error_perm, match=r"^550"):
                ftp.voidcmd(command)
    assert_clean_stop(store.program, signal.SIGTERM)


@needs_s3
def test_parts_arrive_while_the_client_sends(store: Store) -> None:
    with session(store.port, "alice", "secret") as ftp:
        with ftp.transfercmd("STOR new") as data:
            data.sendall(BIG)  # 20 MiB: two parts of 8 and a rest
            until(lambda: store.parts() == 2)
            assert store.objects() == []
        assert ftp.voidresp().startswith("226")
        assert store.objects() == ["new"]
        assert store.uploads() == []
    assert_clean_stop(store.program, signal.SIGINT)


@needs_s3
@pytest.mark.parametrize("how", ["ABOR", "the session ends"])
def test_an_aborted_upload_leaves_nothing(store: Store, how: str) -> None:
    with session(store.port, "alice", "secret") as ftp, ftp.transfercmd("STOR new") as data:
        data.sendall(BIG[:HALF])
        until(lambda: store.parts() == 1)
        if how == "ABOR":
            abort(ftp, data)
        else:
            ftp.close()
        until(lambda: not store.uploads())
    assert store.objects() == []
    assert_clean_stop(store.program, signal.SIGTERM)
