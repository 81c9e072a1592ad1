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

from bridge.ftp.application import Site
from bridge.ftp.options import UsageError
from bridge.server import signals
from bridge.workers import limits
from bridge.workers.run import Link, SharedPort, listeners_of
from bridge.workers.run import run as run_workers
from bridge.workers.supervisor import Parent

log = logging.getLogger(__name__)

#: Bytes that the path of the directory for temporary files may have. A Unix socket's path has 107 at most, on
#: macOS 103; what is added to it, /bridge-xxxxxxxx/NNNN.sock, has 26.
MAX_TEMPDIR = 75


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
    site.server_attributes["session_table"] = staticmethod(lambda: (site.shared["sessions"], site.slot))
    site.told.append(f"Workers:  {site.workers}")
    site.before.append(lambda: site.shared.update(sessions=limits.table(site.slots, options.max_cons)))
    site.after.append(lambda: site.listeners.extend(listeners_of(site.server.socket, site.workers)))


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- runs in the parent, then in each worker


def run(site: Site, serve: Callable[[Site, Callable[[], None]], None], announce: Callable[[], None]) -> int:
    """Serve in `site.workers` children; in the parent return the exit code when all of them are gone.

    *serve* is called in each child, with what it must call when it is about to serve.
    """
    try:
        deep = len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPDIR
        site.runtime_dir = tempfile.mkdtemp(prefix="bridge-", dir="/tmp" if deep else None)
    except OSError as error:  # after a chroot, say
        log.warning("workers cannot ask each other: no directory for their sockets: %s", error)
    pid = os.getpid()

    def forget(slot: int) -> None:
        for table in site.shared.values():
            table.clear_column(slot)

    parent = Parent(announce, site.tell, lambda: signals.run_all(site.rotate), forget)
    try:
        return run_workers(site.listeners, site.slots, parent, lambda link: _work(site, link, serve))
    finally:
        if os.getpid() == pid:
            if site.runtime_dir is not None:
                shutil.rmtree(site.runtime_dir, ignore_errors=True)
            for listener in site.listeners[1:]:
                listener.close()


def _work(site: Site, link: Link, serve: Callable[[Site, Callable[[], None]], None]) -> None:
    site.slot = link.slot
    reload, site.reload = site.reload, []
    rotate, site.rotate = site.rotate, []
    site.serve_on(link.listener)

    def announce() -> None:
        if link.is_successor:  # what was forked is as old as the parent
            signals.run_all(reload)
        link.serve(site.server, lambda: signals.run_all(rotate))

    serve(site, announce)
