"""`python -m bridge.ftp`: a complete FTP and FTPS server in one command.

The top of the package, and the only file that reads argv, configures logging, installs signal handlers
or exits. What the options are is in options.py and in the modules of FEATURES; what they make is in site.py.

The first SIGINT or SIGTERM drains the server, and the process exits with 0; the second cuts what is left, and
ends the process with that signal if it is still there FORCE seconds later; the third ends it at once. SIGHUP
takes up what has changed, SIGUSR1 opens log files anew, where a feature has something to do then.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gevent
from pyftpdlib.prefork import cpu_count, fork_processes

from bridge import logs, tls
from bridge.drain import KILL_GRACE
from bridge.monitor import watch_hub
from bridge.options import UsageError, parser_of
from bridge.servers import GeventFTPServer
from bridge.site import Site

log = logging.getLogger(__name__)

#: Seconds a server has to end after the second signal: what `stop(0)` may take, and as much again.
FORCE = 2 * KILL_GRACE

#: What takes part in a site, in this order: modules with `add_options(parser)` and `configure(site)`.
FEATURES: tuple[Any, ...] = (logs, tls)


def site_of(options: argparse.Namespace) -> Site:
    """What the options ask for, not yet bound. Raises UsageError."""
    site = Site(options)
    for feature in FEATURES:
        feature.configure(site)
    return site


# --- running


def _announce(site: Site) -> None:
    """Say where it listens, how to connect and how to stop."""
    if site.options.quiet:
        return
    host, port = site.server.address
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    url_host = f"[{shown}]" if ":" in shown else shown
    for line in (
        f"Serving {site.directory} {'(writable)' if site.options.write else '(read-only)'} "
        f"to {site.users} on {host} port {port}",
        *site.told,
        f"Connect:  curl {site.client_options}ftp://{url_host}:{port}/",
        "Stop:     Ctrl-C",
    ):
        print(line, flush=True)


def _on_signals(*reactions: Callable[[], object]) -> None:
    """Each SIGINT or SIGTERM calls the next of *reactions*; after them it ends the process, as by itself.

    Plain Python handlers, not watchers on the hub: they also run when a handler blocks the hub. A reaction
    must not raise: in the middle of a fork, Python drops exceptions.
    """
    pid = os.getpid()
    left = list(reactions)

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != pid or not left:  # (a session's process inherits this handler)
            _end_by(number)
            return
        left.pop(0)()
        if not left and len(reactions) > 1:
            threading.Thread(target=_end_after, args=(FORCE, number), daemon=True).start()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def _whenever(number: int, reaction: Callable[[], object]) -> None:
    pid = os.getpid()
    # (a session's process inherits this handler)
    signal.signal(number, lambda *_: reaction() if os.getpid() == pid else None)


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# --- runs in a native thread: no gevent


def _end_after(seconds: float, number: int) -> None:
    time.sleep(seconds)
    print(f"ends: signal {number} came twice, and something blocks", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)  # the third


# --- runs in the main greenlet


def _serve(site: Site, announce: Callable[[], None]) -> None:
    server = site.server
    hub = gevent.get_hub()

    def soon(function: Callable[..., object], *args: object) -> Callable[[], object]:
        return lambda: hub.loop.run_callback_threadsafe(gevent.spawn, function, *args)

    if isinstance(server, GeventFTPServer):
        _on_signals(soon(server.stop), soon(server.stop, 0))
    else:
        _on_signals(soon(server.close_all))
    for number, reactions in ((signal.SIGHUP, site.reload), (signal.SIGUSR1, site.rotate)):
        if reactions:
            _whenever(number, soon(_all, reactions))
    endings = [start() for start in site.services]
    if site.options.max_blocking_time:
        endings.append(watch_hub(hub, site.options.max_blocking_time))
    announce()
    try:
        server.serve_forever()
    finally:
        for end in reversed(endings):
            end()


def _all(reactions: list[Callable[[], object]]) -> None:
    for reaction in reactions:
        try:
            reaction()
        except Exception:
            log.exception("%r failed", reaction)


class _Pipe:
    """A word from the pre-fork parent to its children: they hold the reading end and see it close.

    Its death says everything at once.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def close(self) -> None:
        """Close the writing end; more than once is no harm."""
        writer, self._writer = self._writer, -1
        if writer >= 0:
            os.close(writer)


def _prefork(site: Site, announce: Callable[[], None]) -> None:
    """Serve in one child for each core; the parent waits for them in here and leaves by SystemExit.

    A signal closes the parent's end of a pipe, and each child stops its server: the first to drain, the
    second at once. They also stop when the parent is gone for another reason. The parent leaves when the
    last child has.
    """
    drain, force = _Pipe(), _Pipe()
    _on_signals(drain.close, force.close)
    announce()
    fork_processes(cpu_count())
    for pipe, timeout in ((drain, None), (force, 0)):
        pipe.close()
        gevent.spawn(_stop_after, pipe.reader, site.server, timeout)
    _serve(site, lambda: None)


def _stop_after(reader: int, server: Any, timeout: float | None) -> None:
    hub = gevent.get_hub()
    watcher = hub.loop.io(reader, 1)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()
    server.stop(timeout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code. Wrong options exit with 2 (SystemExit), as argparse does."""
    parser = parser_of(FEATURES)
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            site = site_of(options)
            several = site.slots > 1 or options.concurrency in ("pre-fork", "multi-proc")
            stack.enter_context(site.logs.installed(several))
            site.bind()
        except UsageError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        serve = _prefork if options.concurrency == "pre-fork" else _serve
        try:
            serve(site, lambda: _announce(site))
        finally:
            site.server.close_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
