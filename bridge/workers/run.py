"""--workers: processes that share the port and the limits, and a parent that looks after them.

A feature of the command (ftp/application.py), the first of them. The parent configures and binds everything,
forks, and has no hub and no greenlet, ever; each child makes its server on an inherited socket and serves on
a hub of
its own.

Between ftp/command.py and supervisor.py, which is the parent's loop and says what becomes of workers. **Every
place has a listening socket of its own** (SO_REUSEPORT), which the parent never closes while it lives: what
waits in the queue of a dead worker is its successor's. Where there is no SO_REUSEPORT, and for sockets that
systemd passed, all places share one.

A reload in a successor starts from what the parent read when it started, so one that fails there leaves that
in force.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import gevent

from bridge.ftp.application import Site
from bridge.ftp.options import UsageError
from bridge.server import signals
from bridge.workers import limits
from bridge.workers.supervisor import (
    CUT,
    DRAIN,
    HELD,
    KEEPS,
    READY,
    RETIRE,
    ROTATE,
    Forked,
    Supervisor,
    Worker,
)

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers",
        type=_number,
        metavar="COUNT",
        default=1,
        help="processes that share the port and the limits, 0: one for each core (default: %(default)s)",
    )


def _number(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative; 0 means one worker for each core")
    return number


def configure(site: Site) -> None:
    """Prepare for several processes if the options say so. Raises UsageError."""
    options = site.options
    number = options.workers
    if options.concurrency in ("multi-thread", "multi-proc"):
        if number != 1:
            raise UsageError(f"--workers needs --concurrency async, not {options.concurrency}")
        return
    if options.concurrency == "pre-fork":
        if number > 1:
            raise UsageError("--concurrency pre-fork is --workers 0: leave it out to choose their number")
        number = 0
    site.workers = number or cores()
    if site.workers == 1:
        return
    site.slots = 2 * site.workers  # one that retires, and its successor
    site.server_mixins += [SharedPort, limits.SharedLimits, limits.Retiring]
    site.server_attributes["site"] = site
    site.told.append(f"Workers:  {site.workers}")
    site.before.append(lambda: site.shared.update(sessions=limits.table(site.slots, options.max_cons)))
    site.after.append(lambda: site.listeners.extend(_listeners(site.server.socket, site.workers)))


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class SharedPort:
    """For a server class: others of this user may bind the same port, but only if it was free before."""

    socket: Any

    def bind(self, address: Any) -> None:
        """As asyncore's."""
        if hasattr(socket, "SO_REUSEPORT"):
            with socket.socket(self.socket.family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)  # or SO_REUSEPORT would share it with whoever else does
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().bind(address)  # type: ignore[misc]


def _listeners(first: Any, number: int) -> list[Any]:
    """A listening socket for each place: *first*, and more on its port or all the same."""
    option = getattr(socket, "SO_REUSEPORT", None)
    if option is None or first.family == socket.AF_UNIX or not first.getsockopt(socket.SOL_SOCKET, option):
        return [first] * number
    listeners = [first]
    try:
        for _ in range(1, number):
            listener = socket.socket(first.family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
            listener.bind(first.getsockname())
            listener.listen(256)  # GeventFTPServer's
    except OSError as error:
        for listener in listeners[1:]:
            listener.close()
        raise UsageError(f"--workers: cannot bind the port once more: {error.strerror}") from None
    return listeners


# --- runs in the parent, then in each worker


def run(site: Site, serve: Callable[[Site, Callable[[], None]], None], announce: Callable[[], None]) -> None:
    """Serve in `site.workers` children; in the parent return when all of them are gone.

    *serve* is called in each child, with what it must call when it is about to serve. In the parent
    SystemExit is raised if workers cannot start.
    """
    try:
        site.runtime_dir = tempfile.mkdtemp(prefix="bridge-")
    except OSError as error:  # after a chroot, say
        log.warning("workers cannot ask each other: no directory for their sockets: %s", error)
    parent = Supervisor(site, announce)
    pid = os.getpid()
    worker = None
    try:
        parent.run()
    except Forked as child:
        worker = child.worker
    finally:
        if os.getpid() == pid:
            if site.runtime_dir is not None:
                shutil.rmtree(site.runtime_dir, ignore_errors=True)
            for listener in site.listeners[1:]:
                listener.close()
    if worker is not None:
        _work(site, worker, serve)
    elif parent.exit_code:
        sys.exit(parent.exit_code)


# --- runs in a worker process, in the main greenlet


def _work(site: Site, worker: Worker, serve: Callable[[Site, Callable[[], None]], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # nothing is served yet
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent's: it sends orders
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    random.seed()
    worker.channel.close()
    listener = worker.place.listener.dup()
    for each in {*site.listeners}:
        each.close()
    site.slot = worker.slot
    reload, site.reload = site.reload, []
    rotate, site.rotate = site.rotate, []
    site.serve_on(listener)

    def announce() -> None:
        if worker.generation:  # what was forked is as old as the parent
            signals.run_all(reload)
        site.server.start()
        gevent.spawn(_obey_parent, worker.inner, site.server, rotate)
        worker.inner.send(READY)

    serve(site, announce)


def _obey_parent(channel: socket.socket, server: Any, rotate: list[Callable[[], object]]) -> None:
    hub = gevent.get_hub()
    watcher = hub.loop.io(channel.fileno(), 1)
    orders: dict[bytes, tuple[Any, ...]] = {
        DRAIN: (server.stop,),
        CUT: (server.stop, 0),
        RETIRE: (_retire, server, channel),
        ROTATE: (signals.run_all, rotate),
    }
    while True:
        hub.wait(watcher)
        try:
            order = channel.recv(1)
        except ConnectionResetError:
            order = b""  # died with unread news
        gevent.spawn(*orders[order or DRAIN])
        if not order:
            watcher.close()
            return


def _retire(server: Any, channel: socket.socket) -> None:
    server.retire()
    if server.started:
        try:
            channel.send(KEEPS)
        except BrokenPipeError:
            pass  # the parent is gone; its end of the socket says so too
