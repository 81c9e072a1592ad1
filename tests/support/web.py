"""`--http` in this process, beside its FTP server, and a client for it. No tests in here."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent.socket
from prometheus_client.parser import text_string_to_metric_families

import bridge.ftp.command
from bridge.filesystems.threads import THREADS
from bridge.ftp.application import Application
from bridge.ftp.options import parser_of
from support.servers import PATIENCE

FORM = "application/x-www-form-urlencoded"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str


class Web:
    """What a browser would be to the server at *port*; *user* and *password* go with every request."""

    def __init__(self, port: int, user: str = "", password: str = "") -> None:
        self.port = port
        self.credentials = base64.b64encode(f"{user}:{password}".encode()).decode() if user else ""

    def ask(self, path: str, method: str = "GET", body: str | None = None, **headers: str | None) -> Answer:
        """One request; headers by their names with _ for -, None to leave out one that is usual."""
        with self.connected() as ask:
            return ask(path, method, body, **headers)

    @contextlib.contextmanager
    def connected(self) -> Iterator[Callable[..., Answer]]:
        """A connection, for one request after the other."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.sock = gevent.socket.create_connection(("127.0.0.1", self.port), PATIENCE)

        def ask(path: str, method: str = "GET", body: str | None = None, **headers: str | None) -> Answer:
            sent: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
            if self.credentials:
                sent["Authorization"] = f"Basic {self.credentials}"
            if body is not None:
                sent |= {"Content-Type": FORM, "Content-Length": str(len(body))}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.putrequest(method, path, skip_host=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(None if body is None else body.encode())
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())

        try:
            yield ask
        finally:
            connection.close()

    def status(self) -> Any:
        answer = self.ask("/status.json")
        assert answer.status == 200, answer
        return json.loads(answer.text)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: `name{label="value",...}`, labels in their order."""
        answer = self.ask("/metrics")
        assert answer.status == 200, answer
        return {
            sample.name + _labels(sample.labels): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }


def _labels(labels: dict[str, str]) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{{{inner}}}" if inner else ""


def site_of(home: Path, *argv: str) -> Application:
    """A site as the command makes it, bound to free ports on 127.0.0.1."""
    options = parser_of(bridge.ftp.command.PARTS).parse_args(
        ["-i", "127.0.0.1", "-p", "0", "-d", str(home), "--http", "0", *argv]
    )
    site = bridge.ftp.command.application_of(options)
    site.bind()
    return site


@contextlib.contextmanager
def serving_site(
    home: Path, *argv: str, user: str = "", password: str = "", runtime_dir: Path | None = None
) -> Iterator[tuple[Any, Web]]:
    """The site's FTP server and the client of its web application, on this hub."""
    site = site_of(home, *argv)
    if runtime_dir is not None:
        site.runtime_dir = str(runtime_dir)
    port = int(site.start_lines[-1].rpartition("://")[2].split("/")[0].rpartition(":")[2])
    endings = []
    try:
        site.server.start()
        endings += [start() for start in site.services]
        yield site.server, Web(port, user, password)
    finally:
        site.server.stop(0)
        site.server.ioloop.close()  # the site's, which the process takes along elsewhere
        for end in reversed(endings):
            end()
        site.close()
        THREADS.kill()
