"""`python -m bridge.ftp`: a complete FTP and FTPS server in one command.

The top of the package, and the only file that reads argv, configures logging, installs signal handlers
or exits. What the options are is in options.py and in the modules of PARTS; what they make is in
application.py.

The first SIGINT or SIGTERM drains the server, and the process exits with 0; the second cuts what is left, and
ends the process with that signal if it is still there FORCE seconds later; the third ends it at once. SIGHUP
reloads the files that the options name, SIGUSR1 reopens log files. What becomes of workers is in
workers/supervisor.py.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gevent

from bridge.ftp import passwd
from bridge.ftp.application import Application
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
from bridge.loop import wake_on_signals, watch_hub
from bridge.server import ConfigError, signals

#: What takes part in the application, in this order: modules with `add_options(parser)` and
#: `configure(application)`. Workers come before what makes tables for all processes, and bind before
#: privileges are dropped; systemd is told around what others do on SIGHUP.
PARTS: tuple[Any, ...] = (
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


def application_of(options: argparse.Namespace) -> Application:
    """What the options ask for, not yet bound. Raises UsageError."""
    application = Application(options)
    for part in PARTS:
        part.configure(application)
    return application


# --- running


def _telling(application: Application, stop: Callable[[], object]) -> Callable[[], object]:
    def reaction() -> None:
        stop()
        application.report_state("stopping")

    return reaction


# --- runs in the main greenlet


def _serve(application: Application, announce: Callable[[], None]) -> None:
    server = application.server
    hub = gevent.get_hub()

    def soon(function: Callable[..., object], *args: object) -> Callable[[], object]:
        return lambda: hub.loop.run_callback_threadsafe(gevent.spawn, function, *args)

    signals.on_signals(_telling(application, soon(server.stop)), soon(server.stop, 0))
    for number, reactions in ((signal.SIGHUP, application.reload), (signal.SIGUSR1, application.rotate)):
        if reactions:
            signals.whenever(number, soon(signals.run_all, reactions))
    cleanups = [wake_on_signals(hub), *(start() for start in application.services)]
    if application.options.max_blocking_time:
        cleanups.append(watch_hub(hub, application.options.max_blocking_time))
    announce()
    try:
        server.serve_forever()
    finally:
        for end in reversed(cleanups):
            end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return the exit code. Wrong options exit with 2 (SystemExit), as argparse does."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "passwd":
        return passwd.main(argv[1:])
    parser = parser_of(PARTS)
    options = config.parse(lambda: parser_of(PARTS), argv)
    with contextlib.ExitStack() as stack:
        try:
            application = application_of(options)
            several = application.workers > 1
            stack.enter_context(application.logs.installed(several))
            if options.check:
                application.prepare()
                print(f"As it should be: {summary(application)}", flush=True)
                return 0
            application.bind()
        except ConfigError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        stack.callback(application.close)
        if application.workers > 1:
            return workers.run(application, _serve, lambda: _announce(application))
        _serve(application, lambda: _announce(application))
    return 0


def _announce(application: Application) -> None:
    for line in () if application.options.quiet else announcement(application, sys.stdout):
        print(line, flush=True)
    application.report_state("ready")


if __name__ == "__main__":
    sys.exit(main())
