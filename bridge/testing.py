"""`running()`: an FTP server in the background, for the tests of programs that talk to one.

Sits on server/server.py. Where the caller's sockets are gevent's (`patch_all()`), the server lives on the
caller's hub; elsewhere in a native thread with a hub of its own, since a caller that blocks would block it
too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gevent import monkey

from bridge.loop import hubs
from bridge.server import GeventFTPServer

_start_thread = monkey.get_original("_thread", "start_new_thread")
_allocate_lock = monkey.get_original("_thread", "allocate_lock")


@contextlib.contextmanager
def running(
    handler: Any, address: Any = ("127.0.0.1", 0), *, thread: bool | None = None, **attributes: Any
) -> Iterator[GeventFTPServer]:
    """A started GeventFTPServer for the length of the block; by default on a free port of 127.0.0.1.

    - (bool) thread: whether it runs in a native thread. None: unless the `socket` module is patched.
    - attributes: class attributes of GeventFTPServer for this server (`max_cons=2`).

    What cannot be bound raises here (OSError). At the end of the block the server is stopped with a timeout
    of 0: sessions that are left get 421, transfers 426, and nothing is left, not even the thread's hub.
    """
    if thread is None:
        thread = not monkey.is_module_patched("socket")
    for name in attributes:
        if not hasattr(GeventFTPServer, name):
            raise TypeError(f"GeventFTPServer has no attribute {name!r}")
    server = type("GeventFTPServer", (GeventFTPServer,), attributes)(address, handler)
    with _in_thread(server) if thread else _on_this_hub(server):
        yield server


@contextlib.contextmanager
def _on_this_hub(server: GeventFTPServer) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.stop(0)


@contextlib.contextmanager
def _in_thread(server: GeventFTPServer) -> Iterator[None]:
    started, ended = _allocate_lock(), _allocate_lock()
    started.acquire()
    ended.acquire()
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            try:
                server.start()
                started.release()
                server.serve_forever()
            finally:
                hubs.end()
        except BaseException as error:
            raised.append(error)
            if started.locked():
                started.release()
        finally:
            ended.release()

    _start_thread(serve, ())
    started.acquire()
    try:
        if raised:
            raise raised[0]
        yield
    finally:
        server.stop(0)
        ended.acquire()
