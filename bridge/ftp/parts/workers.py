"""Processes that share the port and the limits: --workers. The work is done in workers/run.py.

The first of the parts that prepare something: those that make tables for all processes want to know how many.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Callable

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError, count_or
from bridge.server import signals
from bridge.workers import Link, Parent, SharedPort, limits, listeners_of
from bridge.workers import run as run_workers

log = logging.getLogger(__name__)

#: Bytes that the path of the directory for temporary files may have. A Unix socket's path has 107 at most, on
#: macOS 103; what is added to it, /bridge-xxxxxxxx/NNNN.sock, has 26.
MAX_TEMPDIR = 75


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers",
        type=count_or("one worker for each core"),
        metavar="COUNT",
        default=1,
        help="processes that share the port and the limits, 0: one for each core (default: %(default)s)",
    )


def configure(application: Application) -> None:
    """Prepare for several processes if the options say so. Raises UsageError."""
    options = application.options
    number = options.workers
    if options.concurrency == "pre-fork":
        if number > 1:
            raise UsageError("--concurrency pre-fork is --workers 0: leave it out to choose their number")
        number = 0
    application.workers = number or cores()
    if application.workers == 1:
        return
    application.slots = 2 * application.workers  # one that retires, and its successor
    application.server_mixins += [SharedPort, limits.SharedLimits, limits.Retiring]
    application.server_attributes["session_table"] = staticmethod(
        lambda: (application.shared["sessions"], application.slot)
    )
    application.start_lines.append(f"Workers:  {application.workers}")
    application.before_bind.append(
        lambda: application.shared.update(sessions=limits.table(application.slots, options.max_cons))
    )
    application.after_bind.append(
        lambda: application.listeners.extend(listeners_of(application.server.socket, application.workers))
    )


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- runs in the parent, then in each worker


def run(
    application: Application,
    serve: Callable[[Application, Callable[[], None]], None],
    announce: Callable[[], None],
) -> int:
    """Serve in `application.workers` children; in the parent return the exit code when all of them are gone.

    *serve* is called in each child, with what it must call when it is about to serve.
    """
    try:
        deep = len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPDIR
        application.runtime_dir = tempfile.mkdtemp(prefix="bridge-", dir="/tmp" if deep else None)
    except OSError as error:  # after a chroot, say
        log.warning("workers cannot ask each other: no directory for their sockets: %s", error)
    pid = os.getpid()

    def forget(slot: int) -> None:
        for table in application.shared.values():
            table.clear_column(slot)

    parent = Parent(announce, application.report_state, lambda: signals.run_all(application.rotate), forget)
    try:
        return run_workers(
            application.listeners, application.slots, parent, lambda link: _work(application, link, serve)
        )
    finally:
        if os.getpid() == pid:
            if application.runtime_dir is not None:
                shutil.rmtree(application.runtime_dir, ignore_errors=True)
            for listener in application.listeners[1:]:
                listener.close()


def _work(
    application: Application, link: Link, serve: Callable[[Application, Callable[[], None]], None]
) -> None:
    application.slot = link.slot
    reload, application.reload = application.reload, []
    rotate, application.rotate = application.rotate, []
    application.serve_on(link.listener)

    def announce() -> None:
        if link.is_successor:  # what was forked is as old as the parent
            signals.run_all(reload)
        link.serve(application.server, lambda: signals.run_all(rotate))

    serve(application, announce)
