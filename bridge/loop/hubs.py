"""Which hub: the thread's own, through threads that end and processes that fork.

A leaf of the package. gevent keeps one hub for every native thread. bridge borrows it and never destroys
one that was there before. Two cases need care:

- **A hub that bridge brought to life in a native thread** (pyftpdlib's `ThreadedFTPServer` starts one
  thread for each session) is destroyed when that thread ends, or earlier by `end`. gevent leaves that to
  whoever first used gevent in the thread; without it every such session leaks two file descriptors
  (measured; gevent 26.9).
- **A forked child** inherits the parent's hub with the parent's watchers on it. Each ioloop drops its own;
  `replace` gives the child a hub of its own when it was forked in the middle of a turn, where going on
  with the inherited hub would resume the parent's greenlets in the child.

An object with watchers on a hub (an ioloop, the wakeup fd of wakeups.py) registers once, weakly, and is told
when its hub is no longer to be used.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from time import monotonic
from typing import Any, Protocol

import gevent
from gevent import get_hub, monkey

# --- names of gevent outside its documented interface (tests/test_structure.py checks that they exist)
from gevent._hub_local import get_hub_if_exists, set_hub  # isort: skip

#: Thread-local for native threads also under `patch_all()`, where `threading.local` is per greenlet.
_thread = monkey.get_original("_thread", "_local")()


class HubUser(Protocol):
    """An object with watchers on a hub."""

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

_users: weakref.WeakSet[HubUser] = weakref.WeakSet()
_watching_forks = _watching_exit = _exiting = False


def register(user: HubUser) -> None:
    """Tell *user* of forks and of hubs that end, for as long as it is alive."""
    _users.add(user)
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
            _thread.finalizer = _Finalizer(hub)
            _watch_exit()
    return hub


def end() -> None:
    """Destroy this native thread's hub now, if `current` made it; else do nothing. Idempotent.

    For a thread that somebody waits for by a lock or an event: the finalizer comes after the thread's last
    line, and `Thread.join()` alone waits for it. Call it in the thread's main greenlet.
    """
    finalizer = getattr(_thread, "finalizer", None)
    if finalizer is not None:
        finalizer.finalize()


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


def replace() -> Any:
    """Give this thread a fresh hub and return it; the inherited one is left alone and never run again.

    The fresh hub has an event loop of its own, which cannot be gevent's default loop: in such a child
    gevent cannot watch child processes (`gevent.subprocess`).
    """
    hub = type(get_hub())(default=False)
    set_hub(hub)
    return hub


def _in_child() -> None:
    try:
        if get_hub_if_exists() is not None:
            # Before any watcher is touched: the event loop's kernel side is still shared with the parent,
            # and on libuv stopping a watcher here would stop it there. (Harmless when the patched
            # os.fork() does it again.)
            gevent.reinit()
        for user in list(_users):
            user.after_fork()
    finally:
        lock.release()


class _Finalizer:
    """Lies in a thread's local storage; when that is cleared, at the thread's end, it destroys the hub."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def __del__(self) -> None:
        if not sys.is_finalizing():  # (a daemon thread outlives Python, which is gone by now)
            self.finalize()

    def finalize(self) -> None:
        """Destroy the hub, unless somebody has or the process exits."""
        with lock:
            if not _exiting:
                self._destroy(self._hub)

    @staticmethod
    def _destroy(hub: Any) -> None:
        if hub.loop is None:  # somebody destroyed it already
            return
        for user in list(_users):
            user.leave_hub(hub)
        if hasattr(hub.loop, "debug") and any(
            handle.active and handle.ref and not handle.closing and handle.watcher not in (None, hub.loop)
            for handle in hub.loop.debug()
        ):
            # libuv only: closing a loop that still has active handles never returns (gevent 26.9), so
            # what user code left running in this thread keeps its hub, as it does in plain gevent.
            return
        hub.destroy(destroy_loop=True)
