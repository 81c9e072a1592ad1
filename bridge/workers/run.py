"""Processes that share the port and the limits: what the parent binds, and what each worker does.

The parent configures and binds everything, forks, and has no hub and no greenlet, ever; each child makes its
server on an inherited socket and serves on a hub of its own. supervisor.py is the parent's loop and says what
becomes of workers. **Every place has a listening socket of its own** (SO_REUSEPORT), which the parent never
closes while it lives: what waits in the queue of a dead worker is its successor's. Where there is no
SO_REUSEPORT, and for sockets that systemd passed, all places share one.

A reload in a successor starts from what the parent read when it started, so one that fails there leaves that
in force.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import gevent

from bridge.server import ConfigError
from bridge.workers.supervisor import (
    CUT,
    DRAIN,
    HELD,
    KEEPS,
    READY,
    RETIRE,
    ROTATE,
    Forked,
    Parent,
    Supervisor,
    WorkerProcess,
)

log = logging.getLogger(__name__)


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


def listeners_of(first: Any, number: int) -> list[Any]:
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
        raise ConfigError(f"--workers: cannot bind the port once more: {error.strerror}") from None
    return listeners


# --- runs in the parent, then in each worker


def run(listeners: Sequence[Any], slots: int, parent: Parent, work: Callable[[Link], None]) -> int:
    """Serve in a child for each of *listeners*; in the parent return the exit code when all are gone.

    - (int) slots: how many workers there may be at once, with those that retire.
    - work: called in each child; the child ends when it returns. *listeners* are closed there.
    """
    supervisor = Supervisor(listeners, slots, parent)
    try:
        supervisor.run()
    except Forked as child:
        worker = child.worker
    else:
        return supervisor.exit_code
    work(_link(listeners, worker))
    return 0


# --- runs in a worker process, in the main greenlet


class Link:
    """A worker's end of what joins it to its parent.

    `slot` is its column in shared tables, `listener` its own listening socket, `is_successor` whether it was
    started after the parent was configured, so that what can be read again is to be read.
    """

    def __init__(self, worker: WorkerProcess, listener: socket.socket) -> None:
        self.slot = worker.slot
        self.listener = listener
        self.is_successor = bool(worker.generation)
        self._channel = worker.inner

    def serve(self, server: Any, rotate: Callable[[], object]) -> None:
        """Start *server*, tell the parent, and obey it from now on. *rotate* reopens log files."""
        server.start()
        gevent.spawn(_obey_parent, self._channel, server, rotate)
        self._channel.send(READY)


def _link(listeners: Sequence[Any], worker: WorkerProcess) -> Link:
    """Make this process a worker: its signals, its random numbers, its sockets."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # nothing is served yet
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent's: it sends orders
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    random.seed()
    worker.channel.close()
    listener = worker.place.listener.dup()
    for each in {*listeners}:
        each.close()
    return Link(worker, listener)


def _obey_parent(channel: socket.socket, server: Any, rotate: Callable[[], object]) -> None:
    hub = gevent.get_hub()
    watcher = hub.loop.io(channel.fileno(), 1)
    orders: dict[bytes, tuple[Any, ...]] = {
        DRAIN: (server.stop,),
        CUT: (server.stop, 0),
        RETIRE: (_retire, server, channel),
        ROTATE: (rotate,),
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
