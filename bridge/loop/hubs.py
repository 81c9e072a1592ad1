"""Which hub: the thread's own, through threads that end and processes that fork.

A leaf of the package. gevent keeps one hub for every native thread. bridge borrows it and never destroys
one that was there before. Two cases need care:

- **A hub that bridge brought to life in a native thread** (pyftpdlib's `ThreadedFTPServer` starts one
  thread for each session) is destroyed when that thread ends, or earlier by `end`. gevent leaves that to
  whoever first used gevent in the thread; without it every such session leaks two file descriptors
  (measured; gevent 26.9).
- **A forked child** inherits the parent's hub with the parent's watchers on it. Each guest drops its own;
  `replace` gives the child a hub of its own when it was forked in the middle of a turn, where going on
  with the inherited hub would resume the parent's greenlets in the child.

A guest is an ioloop: it registers once, weakly, and is told when its hub is no longer to be used.

And a program's signals: gevent asks for them before it waits for events, and one that comes in between would
wait for the next event (gevent 26.9; measured on libev: 4 of 50 000 signals sent to a hub about to rest).
`hear_signals` wakes the hub for each. A process has one place for that, so a program has to ask for it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import gevent
from gevent import get_hub, monkey

# --- names of gevent outside its documented interface (tests/test_structure.py checks that they exist)
from gevent._hub_local import get_hub_if_exists, set_hub  # isort: skip

#: Thread-local for native threads also under `patch_all()`, where `threading.local` is per greenlet.
_thread = monkey.get_original("_thread", "_local")()


class Guest(Protocol):
    """Somebody with watchers on a hub."""

    def leave_hub(self, hub: Any) -> None:
        """*hub* is about to be destroyed: release every watcher on it."""

    def after_fork(self) -> None:
        """This is a forked child now: release every watcher, they are the parent's."""


#: Held by whoever touches watchers of a hub that is at rest from another thread, while a hub ends, and during
#: a fork.
lock = monkey.get_original("_thread", "RLock")()

#: Seconds that the exit of the process waits for a thread that destroys its hub. That takes 0.1 ms, unless a
#: call in the hub's own threadpool blocks: gevent waits for it.
EXIT_TIMEOUT = 1.0

_guests: weakref.WeakSet[Guest] = weakref.WeakSet()
_watching_forks = _watching_exit = _exiting = False


def welcome(guest: Guest) -> None:
    """Tell *guest* of forks and of hubs that end, for as long as it is alive."""
    _guests.add(guest)
    _watch_forks()


def _watch_forks() -> None:
    global _watching_forks
    if not _watching_forks:
        _watching_forks = True
        # No thread but the forking one lives on in a child, and none that held the lock may be missing.
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=_in_child)


def current() -> Any:
    """The hub of this thread. One made here for a native thread ends with the thread."""
    hub = get_hub_if_exists()
    if hub is None:
        hub = get_hub()
        if not hub.main_hub:
            _thread.undertaker = _Undertaker(hub)
            _watch_exit()
    return hub


def end() -> None:
    """Destroy this native thread's hub now, if `current` made it; else do nothing. Idempotent.

    For a thread that somebody waits for by a lock or an event: the finalizer comes after the thread's last
    line, and `Thread.join()` alone waits for it. Call it in the thread's main greenlet.
    """
    undertaker = getattr(_thread, "undertaker", None)
    if undertaker is not None:
        undertaker.bury()


def _watch_exit() -> None:
    global _watching_exit
    if not _watching_exit:
        _watching_exit = True
        atexit.register(_at_exit)


def _at_exit() -> None:
    """Wait for the thread that destroys its hub now, and let no other begin.

    When Python finalizes, every other thread ends where it next asks for the GIL, by pthread_exit(), which
    unwinds the C stack (CPython before 3.14). `Hub.destroy()` asks for it on the hub's stack, which lacks
    frames of the greenlet that called it: memory is corrupted, and the process aborts (gevent 26.9).
    """
    global _exiting
    _exiting = True
    if lock.acquire(timeout=EXIT_TIMEOUT):
        lock.release()


def seconds_until(when: float) -> float:
    """Seconds to wait until *when* (`time.monotonic()`), one of libuv's milliseconds at least.

    Of a shorter timer gevent warns on libuv; it would end too early, and be armed again and again.
    """
    return max(when - monotonic(), 0.001)


def running(hub: Any) -> bool:
    """Whether *hub* is what its thread runs at this moment; exact while the caller holds the GIL."""
    return bool(hub) and hub.gr_frame is None


def replace() -> None:
    """Give this thread a fresh hub; the inherited one is left alone and never run again.

    The fresh hub has an event loop of its own, which cannot be gevent's default loop: in such a child
    gevent cannot watch child processes (`gevent.subprocess`).
    """
    hub = type(get_hub())(default=False)
    set_hub(hub)
    # gevent lets Python's signal handlers run at once on the default loop only (libev/callbacks.c,
    # gevent_check_signals); on this one a signal would wait for the next event.
    hear_signals(hub)


def hear_signals(hub: Any) -> Callable[[], None]:
    """Wake *hub* for each signal, for Python's handler to run. Return what ends it.

    Does nothing if somebody in this program has an arrangement of his own (`signal.set_wakeup_fd`). Raises
    ValueError in any thread but the main one.
    """
    global _ear
    if _ear is not None:
        _ear.close()
    theirs = signal.set_wakeup_fd(-1)
    if theirs != -1:
        signal.set_wakeup_fd(theirs)
        return lambda: None
    _ear = _Ear(hub)
    _watch_forks()
    return _ear.close


class _Ear:
    """A pipe into which Python writes for each signal, and what watches it."""

    def __init__(self, hub: Any) -> None:
        self.pid = os.getpid()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._watcher = hub.loop.io(self._reader, 1, ref=False)
        self._watcher.start(self._on_signal)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def _on_signal(self) -> None:
        os.read(self._reader, 4096)  # Python runs the handler before this line

    def close(self) -> None:
        """Release all of it. May be called again."""
        global _ear
        if _ear is not self:
            return
        _ear = None
        now = signal.set_wakeup_fd(-1)
        if now != self._writer:  # somebody has come after us
            signal.set_wakeup_fd(now)
        with lock:
            self._watcher.stop()
            self._watcher.close()
        os.close(self._reader)
        os.close(self._writer)


_ear: _Ear | None = None


def _in_child() -> None:
    try:
        if get_hub_if_exists() is not None:
            # Before any watcher is touched: the event loop's kernel side is still shared with the parent,
            # and on libuv stopping a watcher here would stop it there. (Harmless when the patched
            # os.fork() does it again.)
            gevent.reinit()
        for guest in list(_guests):
            guest.after_fork()
        if _ear is not None and _ear.pid != os.getpid():
            hear_signals(get_hub())  # by a pipe of its own
    finally:
        lock.release()


class Mailbox:
    """Calls for a hub's thread from other threads, each made exactly once.

    A watcher of its own, since `hub.loop.run_callback_threadsafe` touches libuv's queues in the calling
    thread (gevent 26.9, `_ffi/loop.py`: "XXX: This may not be threadsafe") and a hub that is never run
    again would never make the call.
    """

    def __init__(self, hub: Any) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._bell = hub.loop.async_(ref=False)
        self._bell.start(self._on_bell)

    def post(self, call: Callable[[], None]) -> bool:
        """Have *call* called in the hub, whatever happens; False if the mailbox is closed. Any thread."""
        with lock:
            if self._bell is None:
                return False
            self._calls.append(call)
            self._bell.send()
            return True

    def close(self) -> None:
        """Release the watcher and make the calls that are left."""
        with lock:
            bell, self._bell = self._bell, None
            if bell is not None:
                bell.stop()
                bell.close()
        self._on_bell()

    # --- runs in the hub: must not block

    def _on_bell(self) -> None:
        while self._calls:
            self._calls.popleft()()


class _Undertaker:
    """Lives in a thread's local storage, and takes the hub along when that is cleared."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def __del__(self) -> None:
        if not sys.is_finalizing():  # (a daemon thread outlives Python: nothing is left to bury with)
            self.bury()

    def bury(self) -> None:
        """Destroy the hub, unless somebody has or the process exits."""
        with lock:
            if not _exiting:
                self._bury(self._hub)

    @staticmethod
    def _bury(hub: Any) -> None:
        if hub.loop is None:  # somebody destroyed it already
            return
        for guest in list(_guests):
            guest.leave_hub(hub)
        if hasattr(hub.loop, "debug") and any(
            handle.active and handle.ref and not handle.closing and handle.watcher not in (None, hub.loop)
            for handle in hub.loop.debug()
        ):
            # libuv only: closing a loop that still has active handles never returns (gevent 26.9), so
            # what user code left running in this thread keeps its hub, as it does in plain gevent.
            return
        hub.destroy(destroy_loop=True)
