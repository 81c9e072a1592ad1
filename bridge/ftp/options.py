"""The command's options: names, types, defaults and what --help says of them.

A leaf of the package. The options are those of `python -m pyftpdlib`, by name and meaning, and more; those of
a part are added by its module (`add_options`). Defaults are taken from the attribute that an option sets.
Every error is one line that names the option, with exit code 2.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import gevent
from pyftpdlib import servers
from pyftpdlib.handlers import FTPHandler

import bridge
from bridge.server import ConfigError

T = TypeVar("T")

DEFAULT_PORT = 2121  # python -m pyftpdlib
CONCURRENCY = ("async", "pre-fork")


class UsageError(ConfigError):
    """A wrong option or a wrong combination: one line for the user."""


# --- types


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """*parse* as argparse's `type`: its ValueError is the message to the user."""

    def convert(value: str) -> T:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


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


def count_or(zero: str) -> Callable[[str], int]:
    """A number of things; *zero* is what 0 means."""

    def count(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is no number") from None
        if number < 0:
            raise argparse.ArgumentTypeError(f"{number} is negative; 0 means {zero}")
        return number

    return count


count = count_or("no limit")


def seconds(value: str) -> float:
    """A number of seconds, 0 or more."""
    try:
        seconds = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds") from None
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and any number of seconds")
    return seconds


def concurrency(value: str) -> str:
    """One of CONCURRENCY; pyftpdlib's other modes are its own command's."""
    if value in ("multi-thread", "multi-proc"):
        raise argparse.ArgumentTypeError(
            f"{value} is not offered here; use `python -m pyftpdlib --concurrency {value}`"
        )
    return value


# --- the parser


def suggestion(word: str, names: Iterable[str]) -> str:
    """`; did you mean NAME?` for the nearest of *names*; nothing if none is near."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _with_choice(message: str) -> str:
    choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
    if choice is None:
        return message
    # (argparse puts the choices in quotes until Python 3.11)
    return message + suggestion(choice[1], choice[2].replace("'", "").split(", "))


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line, without the usage, and suggest the nearest name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.suggest_on_error = False  # Python 3.15 suggests a choice by itself, in other words

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for action in self.options() for name in action.option_strings if len(name) > 2]
            word = unknown[0].partition("=")[0]
            near = suggestion(word, names) if word.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return options

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {_with_choice(message)}\n")

    # --- argparse's private names: here and nowhere else

    def options(self) -> list[argparse.Action]:
        """All options, in order."""
        return list(self._actions)

    def groups(self) -> list[tuple[str, list[argparse.Action]]]:
        """Titles of the groups that have options, with these."""
        return [
            (group.title or "", list(group._group_actions))
            for group in self._action_groups
            if group._group_actions
        ]

    def explanation(self, action: argparse.Action) -> str:
        """What --help says of an option, with its default."""
        return self._get_formatter()._expand_help(action) if action.help else ""

    @staticmethod
    def repeatable(action: argparse.Action) -> bool:
        """Whether an option may be given more than once and collects its values."""
        return isinstance(action, (argparse._AppendAction, argparse._ExtendAction))


def parser_of(parts: Iterable[Any]) -> Parser:
    """The parser with the options below and those of each of *parts*, in groups of their own."""
    parser = Parser(
        prog="python -m bridge.ftp",
        usage="%(prog)s [OPTION ...]",
        add_help=False,
        description="Share a directory over FTP. Without options: the current directory, read-only, "
        f"to anonymous users, on port {DEFAULT_PORT}.",
        epilog="Times are in seconds.",
    )
    about = parser.add_argument_group("about")
    about.add_argument("-h", "--help", action="help", help="show all options")
    about.add_argument(
        "--version", action="version", version=f"bridge {bridge.__version__}", help="show the version"
    )
    for add in (_add_main, _add_users, _add_data, _add_limits, _add_files, _add_logs):
        add(parser)
    for part in parts:
        part.add_options(parser)
    return parser


def _add_main(parser: Parser) -> None:
    group = parser.add_argument_group("main options")
    group.add_argument(
        "-i", "--interface", metavar="ADDRESS", help="address to listen on (default: all interfaces)"
    )
    group.add_argument(
        "-p",
        "--port",
        type=port,
        default=DEFAULT_PORT,
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    group.add_argument(
        "-d",
        "--directory",
        metavar="PATH",
        default=os.curdir,
        help="directory to share (default: the current one)",
    )
    group.add_argument(
        "-w", "--write", action="store_true", help="let users change files (default: read-only)"
    )
    group.add_argument("--banner", default=FTPHandler.banner, help="greeting (default: pyftpdlib's)")
    group.add_argument(
        "--encoding",
        type=encoding,
        metavar="NAME",
        default="utf-8",
        help="of commands, replies and file names (default: %(default)s)",
    )
    group.add_argument(
        "--concurrency",
        type=concurrency,
        choices=CONCURRENCY,
        default="async",
        help="one process for all sessions, or as --workers 0; `python -m pyftpdlib` also offers a thread "
        "or a process for each session (default: %(default)s)",
    )


def _add_users(parser: Parser) -> None:
    group = parser.add_argument_group("users")
    group.add_argument(
        "-u", "--username", help="user to log in as; anonymous may not then (default: anonymous)"
    )
    group.add_argument("-P", "--password", help="the user's password")
    group.add_argument(
        "--max-login-attempts",
        type=count,
        metavar="COUNT",
        default=FTPHandler.max_login_attempts,
        help="failed logins before a session ends (default: %(default)s)",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data connections")
    group.add_argument(
        "-r",
        "--range",
        type=port_range,
        metavar="FROM-TO",
        help="ports for passive data connections (default: any free port)",
    )
    group.add_argument(
        "-n", "--nat-address", metavar="ADDRESS", help="address to tell clients in passive mode, behind a NAT"
    )
    group.add_argument(
        "--permit-foreign-addresses",
        action="store_true",
        help="let data connections come from or go to another address than the control connection's",
    )
    group.add_argument(
        "--permit-privileged-ports", action="store_true", help="let PORT name ports below 1024"
    )
    group.add_argument("--disable-sendfile", action="store_true", help="do not use sendfile(2) to send files")


def _add_limits(parser: Parser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-cons",
        type=count,
        metavar="COUNT",
        default=bridge.GeventFTPServer.max_cons,
        help="simultaneous sessions, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--max-cons-per-ip",
        type=count,
        metavar="COUNT",
        default=servers.FTPServer.max_cons_per_ip,
        help="simultaneous sessions from one address, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=count,
        metavar="SECONDS",
        default=FTPHandler.timeout,
        help="end sessions and stalled transfers after this time, 0 for never (default: %(default)s)",
    )
    group.add_argument(
        "--stop-timeout",
        type=seconds,
        metavar="SECONDS",
        default=bridge.GeventFTPServer.stop_timeout,
        help="seconds to let transfers finish at shutdown (default: %(default)g)",
    )


def _add_files(parser: Parser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--atomic-uploads",
        action="store_true",
        help="show uploaded files when they are complete, and remove the rest; also what a crash has left "
        "(needs --write or --users)",
    )
    group.add_argument(
        "--hash",
        action="store_true",
        help="compute checksums of files for clients (HASH, XCRC, XMD5, XSHA256)",
    )
    group.add_argument(
        "--use-localtime", action="store_true", help="list files with local times (default: GMT)"
    )


def _add_logs(parser: Parser) -> None:
    group = parser.add_argument_group("logs")
    group.add_argument("-D", "--debug", action="store_true", help="log commands and replies too")
    group.add_argument(
        "--long-wait",
        type=seconds,
        metavar="SECONDS",
        default=bridge.GeventIOLoop.long_wait,
        help="log a session that has waited this long in one command, 0 for never (default: %(default)g)",
    )
    group.add_argument(
        "--max-blocking-time",
        type=seconds,
        metavar="SECONDS",
        default=gevent.config.max_blocking_time,
        help="log what stops all sessions for longer than this, 0 for never (default: %(default)g)",
    )
