"""An FTP view of a web server: RETR streams a page to the client, STOR does a PUT while the client sends.

`requests` knows nothing of gevent; `patch_all()` makes its sockets wait cooperatively, so that a slow web
server stalls the session that asked it and no other. Directories are pages of links, as web servers make
them (nginx's autoindex, Apache's mod_autoindex, Python's http.server). Try it:

    python -m http.server --bind 127.0.0.1 8080 &
    python examples/http_gateway.py http://127.0.0.1:8080 &
    curl ftp://alice:secret@127.0.0.1:2121/
    curl -T README.md ftp://alice:secret@127.0.0.1:2121/   # if the web server takes PUT: http.server does not

It listens on 127.0.0.1 only, since the password is known to everybody. Ctrl-C or SIGTERM stops it: transfers
that run have 10 seconds to finish.
"""

if __name__ == "__main__":  # before any other import; who imports this module decides for himself
    from gevent import monkey

    monkey.patch_all()

import argparse
import errno
import signal
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, unquote

import gevent
import requests
from gevent.queue import Queue, ShutDown
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer
from bridge.filesystems.virtual import Entry, VirtualFS

DRAIN = 10.0  # seconds
PATIENCE = 30.0  # seconds the web server may say nothing
MISSING, REFUSED = (404, 410), (401, 403, 405, 501)


def checked(response: requests.Response) -> requests.Response:
    """*response* if it is a success; else it is closed, and the FTP client gets to know why."""
    if response.ok:
        return response
    response.close()
    if response.status_code in MISSING:
        raise FileNotFoundError(errno.ENOENT, response.reason)
    if response.status_code in REFUSED:
        raise PermissionError(errno.EACCES, response.reason)
    raise OSError(errno.EIO, f"the web server says {response.status_code} {response.reason}")


class Links(HTMLParser):
    """The names that a page links to; those of directories end with a slash."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an <a href="name">; not what leads elsewhere."""
        href = dict(attrs).get("href") or ""
        if tag == "a" and not set(href.removesuffix("/")) & set("/?#:"):
            self.names.append(unquote(href))


class Put:
    """A PUT request that runs while the client sends; one block waits between them."""

    def __init__(self, http: requests.Session, url: str) -> None:
        self.blocks: Any = Queue(1)
        body = iter(self.blocks.get, b"")
        self.request = gevent.spawn(http.put, url, data=body, timeout=PATIENCE)
        self.request.link(lambda _: self.blocks.shutdown(immediate=True))  # nobody takes blocks any more

    def write(self, data: bytes) -> None:
        """Hand over *data* when the web server has taken what came before."""
        if data:
            self._put(data)

    def close(self) -> None:
        """End the request and wait for the answer."""
        self._put(b"")
        checked(self.request.get())

    def abort(self) -> None:
        """Break the request off: without its last chunk it is none."""
        self.request.kill()

    def _put(self, data: bytes) -> None:
        try:
            self.blocks.put(data)
        except ShutDown:
            checked(self.request.get())
            raise OSError(errno.EIO, "the web server did not want it all") from None


class WebFS(VirtualFS):
    """The web server at `url`; connections are those of `http`."""

    url: str
    http: requests.Session

    def entry(self, path: str) -> Entry | None:
        """Ask with HEAD; a web server redirects from a directory without slash to one with it."""
        response = self.http.head(self.url + quote(path), timeout=PATIENCE)
        name = path.rpartition("/")[2]
        if response.is_redirect and response.headers["Location"].endswith("/"):
            return Entry(name, type="dir")
        if response.status_code in MISSING:
            return None
        headers = checked(response).headers
        length, modified = headers.get("Content-Length"), headers.get("Last-Modified")
        return Entry(
            name,
            int(length) if length is not None else None,
            parsedate_to_datetime(modified).timestamp() if modified else None,
        )

    def entries(self, path: str) -> Iterator[Entry]:
        """The links of the directory's page; HEAD tells the size of each."""
        page = checked(self.http.get(self.url + quote(path.rstrip("/") + "/"), timeout=PATIENCE)).text
        for name in Links(page).names:
            if name.endswith("/"):
                yield Entry(name.rstrip("/"), type="dir")
            else:
                entry = self.entry(f"{path.rstrip('/')}/{name}")
                if entry is not None:
                    yield entry

    def open_read(self, path: str) -> Any:
        """The body of the answer to GET, as it comes."""
        headers = {"Accept-Encoding": "identity"}
        return checked(
            self.http.get(self.url + quote(path), headers=headers, stream=True, timeout=PATIENCE)
        ).raw

    def open_write(self, path: str) -> Put:
        """The body of a PUT."""
        return Put(self.http, self.url + quote(path))


def build(url: str, http: requests.Session, port: int = 0) -> GeventFTPServer:
    """An FTP server on 127.0.0.1 that shows the web server at *url*, to be started."""
    users = DummyAuthorizer()
    users.add_user("alice", "secret", "/", perm="elrw")
    filesystem = type("FS", (WebFS,), {"url": url.rstrip("/"), "http": http})
    handler = type("Handler", (FTPHandler,), {"authorizer": users, "abstracted_fs": filesystem})
    return GeventFTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="An FTP view of a web server.")
    parser.add_argument("url", metavar="URL", help="of the web server: its top is that of FTP users")
    parser.add_argument("--port", type=int, default=2121, help="0 for any free one (default: %(default)s)")
    options = parser.parse_args()

    with requests.Session() as http:
        server = build(options.url, http, options.port)
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, server.stop, DRAIN)
        server.start()
        print(f"FTP: ftp://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
