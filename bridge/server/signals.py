"""What signals do to a process of the command: single, parent of workers, or worker.

A leaf of the command but for drain.py's number. ftp/command.py and workers/run.py call it; nothing else in
the package installs signal handlers. They are plain Python handlers, not watchers on a hub: a worker's parent
has no hub, and they also run when a handler blocks the hub.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from bridge.server.drain import KILL_GRACE

log = logging.getLogger(__name__)

#: Seconds a server has to end after the second signal: what `stop(0)` may take, and as much again.
FORCE = 2 * KILL_GRACE


def on_signals(*reactions: Callable[[], object]) -> None:
    """Each SIGINT or SIGTERM calls the next of *reactions*; after them it ends the process, as by itself.

    If there are several, the process also ends FORCE seconds after the last of them. A reaction must not
    raise: in the middle of a fork, Python drops exceptions.
    """
    pid = os.getpid()
    left = list(reactions)

    def on_signal(number: int, frame: Any) -> None:
        if os.getpid() != pid or not left:  # (a session's process inherits this handler)
            _end_by(number)
            return
        left.pop(0)()
        if not left and len(reactions) > 1:
            threading.Thread(target=_end_after, args=(FORCE, number), daemon=True).start()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)


def whenever(number: int, reaction: Callable[[], object]) -> None:
    """Each signal *number* calls *reaction*, in this process only."""
    pid = os.getpid()
    # (a session's process inherits this handler)
    signal.signal(number, lambda *_: reaction() if os.getpid() == pid else None)


def run_all(reactions: Iterable[Callable[[], object]]) -> None:
    """Call each of them; one that raises is logged and keeps none of the others from its turn."""
    for reaction in reactions:
        try:
            reaction()
        except Exception:
            log.exception("%r failed", reaction)


def _end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# --- runs in a native thread: no gevent


def _end_after(seconds: float, number: int) -> None:
    time.sleep(seconds)
    print(f"ends: signal {number} came twice, and something blocks", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)  # the third
