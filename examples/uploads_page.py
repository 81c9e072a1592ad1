"""An FTP server and a web page about it in one process: uploads over FTP show up on the page.

Both servers run on gevent's one hub. Nothing is patched, and no thread or queue stands between them: what
the FTP handler appends to a list, the web application reads. Try it:

    python examples/uploads_page.py --directory /tmp
    curl -T README.md ftp://alice:secret@127.0.0.1:2121/   # in another terminal; bob:secret is there too
    curl http://127.0.0.1:8080/                            # or open it in a browser

Both listen on 127.0.0.1 only, since the passwords are known to everybody. Ctrl-C or SIGTERM stops both:
neither accepts anything new, transfers and requests that run have 10 seconds to finish.
"""

import argparse
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from html import escape
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer

HOST = "127.0.0.1"
DRAIN = 10.0  # seconds
KEPT = 1000  # uploads the page remembers
PORT_HELP = "0 for any free one (default: %(default)s)"


def build(directory: str, ftp_port: int = 0, http_port: int = 0) -> tuple[GeventFTPServer, WSGIServer]:
    """The two servers, to be started."""
    home = os.path.realpath(directory)
    users = DummyAuthorizer()
    for name in ("alice", "bob"):
        users.add_user(name, "secret", home, perm="elw")
    uploads: deque[tuple[str, int, str, datetime]] = deque(maxlen=KEPT)  # newest first

    class Handler(FTPHandler):
        authorizer = users

        def on_file_received(self, file: str) -> None:
            who = f"{self.username} from {self.remote_ip}"
            uploads.appendleft((os.path.relpath(file, home), os.path.getsize(file), who, datetime.now()))

    def page() -> Iterator[str]:
        yield "<!doctype html><meta charset=utf-8><title>Uploads</title>\n<h1>Uploads</h1>\n<table>\n"
        yield "<tr><th>Name<th>Bytes<th>Who<th>When\n"
        for name, size, who, when in uploads:
            yield f"<tr><td>{escape(name)}<td>{size}<td>{escape(who)}<td>{when:%Y-%m-%d %H:%M:%S}\n"
        sessions = ftp.sessions()
        yield f"</table>\n<h2>Sessions: {len(sessions)}</h2>\n<ul>\n"
        for each in sessions:
            transfer = f": {each.transfer.path}, {each.transfer.bytes} bytes" if each.transfer else ""
            yield f"<li>{escape(each.user or '(not logged in)')} from {escape(each.remote_address[0])}"
            yield f"{escape(transfer)}\n"
        yield "</ul>\n"

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] != "/":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"The uploads are at /\n"]
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
        return ["".join(page()).encode()]

    ftp = GeventFTPServer((HOST, ftp_port), Handler)
    # With a pool, stop() waits for requests that run; without one they are left alone.
    return ftp, WSGIServer((HOST, http_port), application, spawn=Pool())


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="FTP uploads and a web page that lists them.")
    parser.add_argument("--ftp-port", type=int, default=2121, help=PORT_HELP)
    parser.add_argument("--http-port", type=int, default=8080, help=PORT_HELP)
    parser.add_argument("--directory", default=".", help="where uploads go (default: the current one)")
    options = parser.parse_args()

    ftp, http = servers = build(options.directory, options.ftp_port, options.http_port)
    told_to_stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, told_to_stop.set)
    for server in servers:
        server.start()
    print(f"FTP:  ftp://{HOST}:{ftp.server_port}/\nPage: http://{HOST}:{http.server_port}/", flush=True)
    told_to_stop.wait()
    gevent.joinall([gevent.spawn(server.stop, DRAIN) for server in servers])


if __name__ == "__main__":
    main()
