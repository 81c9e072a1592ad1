"""What wakes a hub from outside: signals, and calls from other threads.

Sits on hubs.py. gevent asks for signals before it waits for events, and one that comes in between would wait
for the next event (gevent 26.9; measured on libev: 4 of 50 000 signals sent to a hub about to wait).
`wake_on_signals` wakes the hub for each. A process has one wakeup fd, so a program has to ask for it.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent import get_hub

from bridge.loop import hubs


def wake_on_signals(hub: Any) -> Callable[[], None]:
    """Wake *hub* for each signal, for Python's handler to run. Return what ends it.

    Does nothing if the program has set a wakeup fd itself (`signal.set_wakeup_fd`). Raises
    ValueError in any thread but the main one.
    """
    global _wakeup_fd
    if _wakeup_fd is not None:
        _wakeup_fd.close()
    theirs = signal.set_wakeup_fd(-1)
    if theirs != -1:
        signal.set_wakeup_fd(theirs)
        return lambda: None
    _wakeup_fd = _WakeupFd(hub)
    hubs.register(_wakeup_fd)
    return _wakeup_fd.close


class _WakeupFd:
    """A pipe into which Python writes for each signal, and its watcher. A HubUser."""

    def __init__(self, hub: Any) -> None:
        self.pid = os.getpid()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._watcher = hub.loop.io(self._reader, 1, ref=False)
        self._watcher.start(self._on_signal)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def leave_hub(self, hub: Any) -> None:
        """Its hub is the main thread's, which bridge never destroys."""

    def after_fork(self) -> None:
        """Make a pipe for this process; the parent's is shared."""
        if _wakeup_fd is self and self.pid != os.getpid():
            wake_on_signals(get_hub())

    def _on_signal(self) -> None:
        os.read(self._reader, 4096)  # Python runs the handler before this line

    def close(self) -> None:
        """Release all of it. May be called again."""
        global _wakeup_fd
        if _wakeup_fd is not self:
            return
        _wakeup_fd = None
        now = signal.set_wakeup_fd(-1)
        if now != self._writer:  # somebody has come after us
            signal.set_wakeup_fd(now)
        with hubs.lock:
            self._watcher.stop()
            self._watcher.close()
        os.close(self._reader)
        os.close(self._writer)


_wakeup_fd: _WakeupFd | None = None


class Mailbox:
    """Calls for a hub's thread from other threads, each made exactly once.

    A watcher of its own, since `hub.loop.run_callback_threadsafe` touches libuv's queues in the calling
    thread (gevent 26.9, `_ffi/loop.py`: "XXX: This may not be threadsafe") and a hub that is never run
    again would never make the call.
    """

    def __init__(self, hub: Any) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._watcher = hub.loop.async_(ref=False)
        self._watcher.start(self._on_wakeup)

    def post(self, call: Callable[[], None]) -> bool:
        """Have *call* called in the hub, whatever happens; False if the mailbox is closed. Any thread."""
        with hubs.lock:
            if self._watcher is None:
                return False
            self._calls.append(call)
            self._watcher.send()
            return True

    def close(self) -> None:
        """Release the watcher and make the calls that are left."""
        with hubs.lock:
            watcher, self._watcher = self._watcher, None
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._on_wakeup()

    # --- runs in the hub: must not block

    def _on_wakeup(self) -> None:
        while self._calls:
            self._calls.popleft()()
