"""`python -m bridge.ftp`: a complete FTP and FTPS server in one command.

The top of the package, and the only file that reads argv, configures logging, installs signal handlers
or exits. What the options are is in options.py and in the modules of FEATURES; what they make is in
application.py.

The first SIGINT or SIGTERM drains the server, and the process exits with 0; the second cuts what is left, and
ends the process with that signal if it is still there FORCE seconds later; the third ends it at once. SIGHUP
takes up what has changed, SIGUSR1 opens log files anew, where a feature has something to do then. What
becomes of workers is in workers/supervisor.py.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gevent

from bridge.ftp.application import Site
from bridge.ftp.options import parser_of
from bridge.ftp.parts import (
    bans,
    config,
    logs,
    passive,
    privileges,
    proxy,
    systemd,
    tls,
    users,
    web,
    workers,
)
from bridge.ftp.start_lines import announcement, summary
from bridge.loop.hubs import hear_signals
from bridge.loop.monitor import watch_hub
from bridge.server import signals
from bridge.server.errors import ConfigError
from bridge.server.server import GeventFTPServer
from bridge.users import passwd

#: What takes part in a site, in this order: modules with `add_options(parser)` and `configure(site)`.
#: Workers come before what makes tables for all processes, and bind before privileges are dropped; systemd is
#: told around what others do on SIGHUP.
FEATURES: tuple[Any, ...] = (
    config,
    logs,
    workers,
    tls,
    users,
    bans,
    passive,
    proxy,
    web,
    privileges,
    systemd,
)


def site_of(options: argparse.Namespace) -> Site:
    """What the options ask for, not yet bound. Raises UsageError."""
    site = Site(options)
    for feature in FEATURES:
        feature.configure(site)
    return site


# --- running


def _telling(site: Site, stop: Callable[[], object]) -> Callable[[], object]:
    def reaction() -> None:
        stop()
        site.tell("stopping")

    return reaction


# --- runs in the main greenlet


def _serve(site: Site, announce: Callable[[], None]) -> None:
    server = site.server
    hub = gevent.get_hub()

    def soon(function: Callable[..., object], *args: object) -> Callable[[], object]:
        return lambda: hub.loop.run_callback_threadsafe(gevent.spawn, function, *args)

    if isinstance(server, GeventFTPServer):
        signals.on_signals(_telling(site, soon(server.stop)), soon(server.stop, 0))
    else:
        signals.on_signals(_telling(site, soon(server.close_all)))
    for number, reactions in ((signal.SIGHUP, site.reload), (signal.SIGUSR1, site.rotate)):
        if reactions:
            signals.whenever(number, soon(signals.run_all, reactions))
    endings = [hear_signals(hub), *(start() for start in site.services)]
    if site.options.max_blocking_time:
        endings.append(watch_hub(hub, site.options.max_blocking_time))
    announce()
    try:
        server.serve_forever()
    finally:
        for end in reversed(endings):
            end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code. Wrong options exit with 2 (SystemExit), as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "passwd":
        return passwd.main(argv[1:])
    parser = parser_of(FEATURES)
    options = config.parse(lambda: parser_of(FEATURES), argv)
    with contextlib.ExitStack() as stack:
        try:
            site = site_of(options)
            several = site.workers > 1 or options.concurrency == "multi-proc"
            stack.enter_context(site.logs.installed(several))
            if options.check:
                site.prepare()
                print(f"As it should be: {summary(site)}", flush=True)
                return 0
            site.bind()
        except ConfigError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        stack.callback(site.close)
        if site.workers > 1:
            return workers.run(site, _serve, lambda: _announce(site))
        _serve(site, lambda: _announce(site))
    return 0


def _announce(site: Site) -> None:
    for line in () if site.options.quiet else announcement(site, sys.stdout):
        print(line, flush=True)
    site.tell("ready")


if __name__ == "__main__":
    sys.exit(main())
