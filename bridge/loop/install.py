"""GeventIOLoop as pyftpdlib's default loop: `install()` and `uninstall()`.

Sits on top of ioloop.py. The one thing in this package that changes pyftpdlib's modules, and only when
called: it sets the name `pyftpdlib.ioloop.IOLoop`, which every channel made without an `ioloop` uses.
"""

from __future__ import annotations

from typing import Any

import pyftpdlib.ioloop

from bridge.loop.ioloop import GeventIOLoop

_replaced: Any = None


def install() -> None:
    """Make GeventIOLoop the loop of every channel that is made without an `ioloop`.

    Call it before the first FTPServer is made; raises RuntimeError when channels already live on
    pyftpdlib's own default loop, which they cannot leave. Twice is no harm. Undone by `uninstall()`.
    """
    global _replaced
    if _replaced is not None:
        return
    default = pyftpdlib.ioloop.IOLoop
    instance = default._instance
    if instance is not None and instance.socket_map:
        raise RuntimeError(
            f"bridge.install() came too late: {len(instance.socket_map)} channel(s) already use "
            f"pyftpdlib's own loop {instance!r}; install before the first FTPServer is made, or give "
            f"each server its ioloop=GeventIOLoop()"
        )
    _replaced = default
    pyftpdlib.ioloop.IOLoop = GeventIOLoop


def uninstall() -> None:
    """Give pyftpdlib its own default loop back; channels that exist stay where they are."""
    global _replaced
    if _replaced is not None:
        pyftpdlib.ioloop.IOLoop = _replaced
        _replaced = None
