"""Metrics and status page: --http and --http-admin. The work is done in web/app.py."""

from __future__ import annotations

import argparse
import importlib.util

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError
from bridge.web import ENVIRONMENT, CountingMixin, Guard, ReportingMixin, Web, administrator


def address(value: str) -> tuple[str, int]:
    """HOST:PORT, [v6]:PORT or PORT."""
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or (colon and not host):
        raise argparse.ArgumentTypeError(f"{value!r}: write HOST:PORT, [v6]:PORT or PORT")
    try:
        number = int(port)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}: write HOST:PORT, [v6]:PORT or PORT") from None
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"port {number} is not between 0 (any free port) and 65535")
    return host or "127.0.0.1", number


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group(
        "metrics and status page (need prometheus_client and psutil: pip install 'pyftpdlib-gevent[metrics]')"
    )
    group.add_argument(
        "--http",
        type=address,
        metavar="ADDRESS",
        help="serve /metrics, /healthz and a status page: HOST:PORT, [v6]:PORT, or PORT on 127.0.0.1; "
        "port 0 for any free one",
    )
    group.add_argument(
        "--http-admin",
        metavar="USER:PASSWORD",
        help="who may see the page, from everywhere, and disconnect sessions; @FILE for a file with it, "
        f"or set {ENVIRONMENT}, so that it is not in the list of processes",
    )


def configure(application: Application) -> None:
    """Serve metrics and the page if the options say so. Raises UsageError."""
    options = application.options
    if options.http is None:
        if options.http_admin is not None:
            raise UsageError("--http-admin needs --http")
        return
    for name in ("prometheus_client", "psutil"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--http needs {name}: pip install 'pyftpdlib-gevent[metrics]'")
    web = Web(options.http, Guard(administrator(options.http_admin)))
    application.attributes["counts"] = web.counts
    application.mixins.append(CountingMixin)
    application.server_mixins.append(ReportingMixin)
    if not options.check:
        application.before_bind.append(lambda: application.start_lines.append(web.bind(application.slots)))
    application.services.append(
        lambda: web.start(
            application.server, application.directory, application.slot, application.runtime_dir
        )
    )
