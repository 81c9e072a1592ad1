"""The command's log: --log-format, --log-file, --xferlog, --quiet.

What is logged of a session is in logs/records.py, where the lines go in logs/output.py.
"""

from __future__ import annotations

import argparse
import logging
import os

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError
from bridge.logs import Logs, RecordsMixin, XferlogMixin


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("logging options (SIGUSR1 reopens the files)")
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines to read, or an object of JSON in each (default: %(default)s)",
    )
    group.add_argument("--log-file", metavar="PATH", help="append the log to this file (default: stderr)")
    group.add_argument("--xferlog", metavar="PATH", help="also log transfers there, in wu-ftpd's format")
    group.add_argument(
        "--quiet", action="store_true", help="log warnings and errors only, and print nothing at start-up"
    )


def configure(application: Application) -> None:
    """Take part in what is logged; `application.logs` is where it goes. Raises UsageError."""
    options = application.options
    if options.quiet and options.debug:
        raise UsageError("--quiet and --debug: only one of them")
    files = [os.path.realpath(path) for path in (options.log_file, options.xferlog) if path]
    if len(set(files)) < len(files):
        raise UsageError("--xferlog and --log-file need a file each")
    level = logging.DEBUG if options.debug else logging.WARNING if options.quiet else logging.INFO
    logs = Logs(options.log_file, options.xferlog, options.log_format == "json", level)
    application.logs = logs
    application.mixins.append(RecordsMixin)
    if options.xferlog:
        application.mixins.append(XferlogMixin)
        application.attributes["xferlog"] = logs.xferlog
    application.rotate.append(logs.reopen)
