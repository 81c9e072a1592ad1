"""Metrics, health and a status page, served by the FTP server's own hub.

Each serving process accepts on one socket, and whichever does asks the others (server/rpc.py) and answers for
all: with exposition.py to /metrics, with page.py to / and /status.json. Who may see what is in auth.py, what
is counted in counts.py.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any

import gevent
import gevent.socket
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer

from bridge.filesystems import THREADS
from bridge.server import ConfigError, rpc
from bridge.web import page
from bridge.web.auth import Guard, Refused
from bridge.web.counts import Counts
from bridge.web.metrics import Reporter

log = logging.getLogger(__name__)

#: Connections at once, in each process: a page or two, a Prometheus, and what somebody leaves open.
CONNECTIONS = 64

#: Seconds for one request from its first byte, or the wait for it, to the last of the answer. Prometheus
#: gives a scrape 10.
REQUEST_TIMEOUT = 20.0

#: Seconds that requests have to end with the server, and that an idle connection of a browser delays its end.
GRACE = 0.3

_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    # (`no-referrer` would make the Origin of the page's own form `null`.)
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
)


class Web:
    """The web application of a server, in every process that serves it.

    - (tuple) address: host and port to listen on, port 0 for any free one.
    - (Guard) guard: who may see the page, and disconnect.

    `bind` opens the socket (ConfigError), which is this object's; `start` serves and returns what ends it.
    """

    def __init__(self, address: tuple[str, int], guard: Guard) -> None:
        from bridge.web.exposition import expose  # with the `metrics` extra; now, since it takes 0.1 s

        self._expose = expose
        self.counts = Counts()
        self._address = address
        self._guard = guard
        self._server: Any = None
        self._directory = "/"
        self._slot = 0
        self._rpc_directory: str | None = None
        self._listener: Any = None
        self._is_local = False
        self._reporter: Reporter
        self._routes: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
            "/": self._page,
            "/status.json": self._status,
            "/metrics": self._metrics,
            "/healthz": self._health,
        }
        package = files("bridge.web")
        self._assets = {
            "/status.css": (package.joinpath("status.css").read_bytes(), "text/css; charset=utf-8"),
            "/status.js": (package.joinpath("status.js").read_bytes(), "text/javascript; charset=utf-8"),
        }

    # --- runs in the parent, before there is a hub

    def bind(self, slots: int = 1) -> str:
        """Open the socket, and the memory of the counters of *slots* processes; a line that tells the URL.

        Raises ConfigError.
        """
        host, port = self._address
        try:
            family, _, _, _, where = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._listener = socket.create_server(where[:2], family=family, backlog=128)
        except OSError as error:
            raise ConfigError(
                f"--http: cannot listen on {host}, port {port}: {error.strerror or error}"
            ) from None
        self._slots = slots
        self.counts.make(slots)
        host, port = self._listener.getsockname()[:2]
        self._is_local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        shown = f"[{host}]" if ":" in host else host
        if self._is_local or self._guard.token:
            return f"Status:   http://{shown}:{port}/"
        return f"Metrics:  http://{shown}:{port}/metrics"

    # --- runs in each serving process

    def start(
        self, server: Any, directory: str, slot: int = 0, rpc_directory: str | None = None
    ) -> Callable[[], None]:
        """Serve on this thread's hub; returns what ends it.

        - (GeventFTPServer) server: of this process, borrowed; with `ReportingMixin`.
        - (str) directory: what it shares; paths in it are shown as users know them.
        - (int) slot: this process's number among those of `bind`.
        - (str) rpc_directory: where the processes have their sockets, None if there is only one.
        """
        self._server, self._directory = server, directory
        self._slot, self._rpc_directory = slot, rpc_directory
        self.counts.take(slot)
        self.counts.add("starts")
        self._reporter = Reporter(slot, self.counts, server, self._shown)
        cleanups = [self._reporter.close]
        if rpc_directory is not None:
            cleanups.append(rpc.serve(rpc_directory, slot, self._answer))
        wsgi_server = WSGIServer(
            gevent.socket.socket(fileno=os.dup(self._listener.fileno())),
            self,
            log=None,
            error_log=log,
            handler_class=_Handler,
            spawn=Pool(CONNECTIONS),
            # (SERVER_NAME: gevent would ask the resolver.)
            environ={"SERVER_NAME": "bridge", "wsgi.multiprocess": self._slots > 1},
        )
        wsgi_server.start()
        cleanups.append(lambda: wsgi_server.stop(GRACE))

        def end() -> None:
            for each in reversed(cleanups):
                each()
            self._listener.close()
            self.counts.close()

        return end

    def _shown(self, path: str) -> str:
        """A path as users know it, if it is in what the server shares."""
        directory = self._directory.rstrip("/")
        return path[len(directory) :] if path.startswith(directory + "/") else path

    # --- runs in a greenlet for each connection: may wait

    def _answer(self, question: dict[str, Any]) -> Any:
        """What another process asks, or this one."""
        match question["ask"]:
            case "gauges":
                return self._reporter.gauges()
            case "status":
                return self._reporter.status()
            case "disconnect":
                handler = self._server.session_of(question["session"])
                if handler is None:
                    return False
                self.counts.add("disconnects")
                handler.disconnect("Disconnected by the operator.")
                return True
            case other:
                raise ValueError(f"another process asks for {other!r}")

    def _ask(self, **question: Any) -> list[Any]:
        """The answers of all processes; this one's first."""
        own = self._answer(question)
        directory = self._rpc_directory
        others = [] if directory is None else rpc.ask_all(directory, self._slot, question)
        return [own, *others]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The WSGI application."""
        try:
            status, body, *headers = self._respond(environ)
        except Refused as refused:
            status, body = refused.status, refused.text.encode() + b"\n"
            headers = [("Content-Type", "text/plain; charset=utf-8"), *refused.headers]
        start_response(status, [*headers, ("Content-Length", str(len(body))), *_HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _respond(self, environ: dict[str, Any]) -> tuple[Any, ...]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/disconnect":
            if method != "POST":
                raise Refused("405 Method Not Allowed", "Only POST.", ("Allow", "POST"))
            return self._disconnect(environ)
        if path not in self._routes and path not in self._assets:
            raise Refused("404 Not Found", "There are: / /status.json /metrics /healthz")
        if method not in ("GET", "HEAD"):
            raise Refused("405 Method Not Allowed", "Only GET and HEAD.", ("Allow", "GET, HEAD"))
        if path in self._assets:
            body, kind = self._assets[path]
            return "200 OK", body, ("Content-Type", kind)
        return self._routes[path](environ)

    def _health(self, _: dict[str, Any]) -> tuple[Any, ...]:
        """200 as long as one process accepts connections."""
        states = [self._server.state]
        if states != ["started"]:
            states = [each["state"] for each in self._ask(ask="gauges")]
        kind = ("Content-Type", "text/plain; charset=utf-8")
        if "started" in states:
            return "200 OK", b"ok\n", kind
        return "503 Service Unavailable", b"draining\n", kind

    def _metrics(self, environ: dict[str, Any]) -> tuple[Any, ...]:
        gauges = self._ask(ask="gauges")
        body, kind = THREADS.call(self._expose, gauges, self.counts.columns(), environ.get("HTTP_ACCEPT", ""))
        return "200 OK", body, ("Content-Type", kind)

    def _status(self, environ: dict[str, Any]) -> tuple[Any, ...]:
        self._guard.check_reader(environ, self._is_local)
        reports = self._ask(ask="status")
        body = THREADS.call(_status_json, reports, self.counts.columns())
        return "200 OK", body, ("Content-Type", "application/json")

    def _page(self, environ: dict[str, Any]) -> tuple[Any, ...]:
        self._guard.check_reader(environ, self._is_local)
        reports = self._ask(ask="status")
        body = THREADS.call(_status_page, reports, self.counts.columns(), self._guard.token)
        return "200 OK", body, ("Content-Type", "text/html; charset=utf-8")

    def _disconnect(self, environ: dict[str, Any]) -> tuple[Any, ...]:
        user, form = self._guard.check_operator(environ)
        done = any(self._ask(ask="disconnect", session=form.get("session", "")))
        log.info("%r disconnects session %.40r: %s", user, form.get("session"), "done" if done else "gone")
        return "303 See Other", b"", ("Location", "./"), ("Content-Type", "text/plain; charset=utf-8")


# --- runs in a threadpool thread: no gevent. Text for 4 processes takes 5 to 10 ms, which would stop the hub


def _status_json(reports: list[Any], columns: dict[int, dict[str, int]]) -> bytes:
    return json.dumps(page.merged(reports, columns)).encode()


def _status_page(reports: list[Any], columns: dict[int, dict[str, int]], token: str | None) -> bytes:
    return page.render(page.merged(reports, columns), token).encode("utf-8", "replace")


# --- runs in a greenlet for each connection: may wait


class _Handler(WSGIHandler):
    """gevent's, with a time limit; gevent has none, and whoever says nothing would keep his place."""

    _TIMED_OUT = "took too long"
    ignored_socket_errors = (*WSGIHandler.ignored_socket_errors, _TIMED_OUT)

    def handle_one_request(self) -> Any:
        """As gevent's, in at most REQUEST_TIMEOUT seconds."""
        with gevent.Timeout(REQUEST_TIMEOUT, TimeoutError(self._TIMED_OUT)):
            return super().handle_one_request()

    def _handle_client_error(self, ex: BaseException) -> Any:
        return None if isinstance(ex, TimeoutError) else super()._handle_client_error(ex)
