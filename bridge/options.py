"""The command's options: names, types, defaults and what --help says of them.

A leaf of the package. The options are those of `python -m pyftpdlib`, by name and meaning, and more; those of
a feature are added by its module (`add_options`). Defaults are taken from the attribute that an option sets.
Every error is one line that names the option, with exit code 2.
"""

from __future__ import annotations

import argparse
import codecs
import os
from collections.abc import Iterable
from typing import Any

import gevent
from pyftpdlib import servers
from pyftpdlib.handlers import FTPHandler

import bridge

DEFAULT_PORT = 2121  # python -m pyftpdlib
CONCURRENCY = ("async", "pre-fork", "multi-thread", "multi-proc")


class UsageError(Exception):
    """A wrong option or a wrong combination: one line for the user."""


# --- types


def encoding(value: str) -> str:
    """A codec's name."""
    try:
        codecs.lookup(value)
    except LookupError:
        raise argparse.ArgumentTypeError(f"unknown encoding {value!r}; try utf-8 or latin-1") from None
    return value


def port(value: str) -> int:
    """A port number, 0 for any free one."""
    try:
        port = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no port number") from None
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"port {port} is not between 0 (any free port) and 65535")
    return port


def port_range(value: str) -> list[int]:
    """FROM-TO, both included."""
    first, _, last = value.partition("-")
    try:
        start, stop = int(first), int(last)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no range of ports; write FROM-TO") from None
    if not 1 <= start <= stop <= 65535:
        raise argparse.ArgumentTypeError(f"{value!r} does not rise from a port (1 to 65535) to another")
    return list(range(start, stop + 1))


def count(value: str) -> int:
    """A number of things, 0 for no limit."""
    try:
        count = int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"{count} is negative; 0 means no limit")
    return count


def seconds(value: str) -> float:
    """A number of seconds, 0 or more."""
    try:
        seconds = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and any number of seconds")
    return seconds


# --- the parser


def parser_of(features: Iterable[Any]) -> argparse.ArgumentParser:
    """The parser with the options below and those of each of *features*, in groups of their own."""
    parser = argparse.ArgumentParser(
        prog="python -m bridge.ftp",
        description="Share a directory over FTP. Without options: the current directory, read-only, "
        f"to anonymous users, on port {DEFAULT_PORT}.",
    )
    parser.add_argument("--version", action="version", version=f"bridge {bridge.__version__}")

    main = parser.add_argument_group("main options")
    main.add_argument(
        "-i", "--interface", metavar="ADDRESS", help="address to listen on (default: all interfaces)"
    )
    main.add_argument(
        "-p",
        "--port",
        type=port,
        default=DEFAULT_PORT,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    main.add_argument(
        "-w", "--write", action="store_true", help="let users change files (default: read-only)"
    )
    main.add_argument(
        "-d",
        "--directory",
        metavar="PATH",
        default=os.curdir,
        help="directory to share (default: the current one)",
    )
    main.add_argument(
        "-n", "--nat-address", metavar="ADDRESS", help="address to tell clients in passive mode, behind a NAT"
    )
    main.add_argument(
        "-r",
        "--range",
        type=port_range,
        metavar="FROM-TO",
        help="ports for passive data connections (default: any free port)",
    )
    main.add_argument("-D", "--debug", action="store_true", help="log commands and replies too")
    main.add_argument("-u", "--username", help="user to log in as; anonymous may not then")
    main.add_argument("-P", "--password", help="the user's password")
    main.add_argument(
        "--concurrency",
        choices=CONCURRENCY,
        default="async",
        help="one process and one hub for all sessions, as --workers 0, a native thread for each "
        "session, or a process for each session (default: %(default)s)",
    )

    other = parser.add_argument_group("other options")
    other.add_argument(
        "--timeout",
        type=count,
        metavar="SECONDS",
        default=FTPHandler.timeout,
        help="end sessions and stalled transfers after this many seconds, 0 for never (default: %(default)s)",
    )
    other.add_argument("--banner", default=FTPHandler.banner, help="greeting (default: %(default)r)")
    other.add_argument(
        "--permit-foreign-addresses",
        action="store_true",
        help="let data connections come from or go to another address than the control connection's",
    )
    other.add_argument(
        "--permit-privileged-ports", action="store_true", help="let PORT name ports below 1024"
    )
    other.add_argument(
        "--encoding",
        type=encoding,
        default="utf-8",
        help="of commands, replies and file names (default: %(default)s)",
    )
    other.add_argument(
        "--use-localtime", action="store_true", help="list files with local times (default: GMT)"
    )
    other.add_argument("--disable-sendfile", action="store_true", help="do not use sendfile(2) to send files")
    other.add_argument(
        "--max-cons",
        type=count,
        metavar="COUNT",
        default=bridge.GeventFTPServer.max_cons,
        help="simultaneous sessions, 0 for no limit (default: %(default)s)",
    )
    other.add_argument(
        "--max-cons-per-ip",
        type=count,
        metavar="COUNT",
        default=servers.FTPServer.max_cons_per_ip,
        help="simultaneous sessions from one address, 0 for no limit (default: %(default)s)",
    )
    other.add_argument(
        "--max-login-attempts",
        type=count,
        metavar="COUNT",
        default=FTPHandler.max_login_attempts,
        help="failed logins before a session ends (default: %(default)s)",
    )
    other.add_argument(
        "--hash",
        action="store_true",
        help="compute checksums of files for clients (HASH, XCRC, XMD5, XSHA256)",
    )
    other.add_argument(
        "--stop-timeout",
        type=seconds,
        metavar="SECONDS",
        default=bridge.GeventFTPServer.stop_timeout,
        help="let transfers finish for so long when told to stop (async, pre-fork; default: %(default)s)",
    )
    other.add_argument(
        "--long-wait",
        type=seconds,
        metavar="SECONDS",
        default=bridge.GeventIOLoop.long_wait,
        help="log a session that has waited for so long in one command, 0 for never (default: %(default)s)",
    )
    other.add_argument(
        "--max-blocking-time",
        type=seconds,
        metavar="SECONDS",
        default=gevent.config.max_blocking_time,
        help="log what stops all sessions for longer than this, 0 for never (default: %(default)s)",
    )
    other.add_argument(
        "--atomic-uploads",
        action="store_true",
        help="show uploaded files when they are complete, and remove the rest; also what a crash has left "
        "(needs --write)",
    )
    for feature in features:
        feature.add_options(parser)
    return parser
