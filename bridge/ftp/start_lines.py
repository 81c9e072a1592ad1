"""What the command prints when it starts: where it listens, to whom, how to connect and how to stop.

Between command.py, which prints it, and the application. Everything but the address is known before it is
bound. Colours (only weight and one hue) are for terminals, and not for those whose user says NO_COLOR
(no-color.org).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import IO

from bridge.filesystems import printable
from bridge.ftp.application import Application
from bridge.logs import coloured

_BOLD, _GREEN, _PLAIN = "\x1b[1m", "\x1b[32m", "\x1b[0m"


def summary(application: Application) -> str:
    """What is served, how and to whom, in one line."""
    served = f"{application.shown_directory} ({application.access}) to {application.users}"
    return printable(f"serving {served} on {_where(application)}")


def announcement(application: Application, stream: IO[str]) -> Iterator[str]:
    """The lines for *stream*."""
    bold, green, plain = (_BOLD, _GREEN, _PLAIN) if coloured(stream) else ("", "", "")
    text = summary(application)
    yield f"{bold}{text[0].upper()}{text[1:]}{plain}"
    yield from map(printable, application.start_lines)
    command = connect_command(application)
    if command:
        yield f"Connect:  {green}{command}{plain}"
    yield "Stop:     Ctrl-C"


def connect_command(application: Application) -> str:
    """A command line for a shell that lists what is served; "" if no client is known that could."""
    address = application.server.address
    if not isinstance(address, tuple):
        return ""
    host, port = address[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else host
    url = f"{application.scheme}://{f'[{host}]' if ':' in host else host}:{port}/"
    return f"curl {application.client_options}{shlex.quote(url)}"


def _where(application: Application) -> str:
    if application.server is None:
        return f"{application.options.interface or 'all interfaces'} port {application.options.port}"
    address = application.server.address
    return f"{address[0]} port {address[1]}" if isinstance(address, tuple) else str(address)
