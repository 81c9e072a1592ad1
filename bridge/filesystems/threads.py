"""Blocking calls on native threads, made by turns that wait for them.

A leaf of the package; offload.py makes file systems and authorizers of it. A gevent ThreadPool of our own:
gevent's default pool has 10 threads and resolves host names with them.

- **A thread cannot be interrupted.** When the turn is killed or the time limit passes first, the call is
  *abandoned*: not begun if it is still in line, its result thrown away when it comes.
- **No deadlock**: what a call calls in turn, on the same thread, runs there; no thread waits for another.
"""

from __future__ import annotations

import contextvars
import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import get_hub, monkey
from gevent.lock import Semaphore
from gevent.threadpool import ThreadPool

from bridge.loop import seconds_until

log = logging.getLogger(__name__)

_allocate_lock = monkey.get_original("_thread", "allocate_lock")
_thread = monkey.get_original("_thread", "_local")()


def on_one() -> bool:
    """Whether this is one of the threads."""
    return getattr(_thread, "ours", False)


class Threads:
    """A pool of native threads for blocking calls; each hub that uses it gets its own.

    - (int) size: calls at once; more wait in line.
    - (float) queue_timeout: seconds in line, after which OSError (EAGAIN) is raised: 451 to the client.
      None for no limit. The same is raised at once when the system starts no more threads.

    Threads are started when needed and end after 10 s without work. `kill()` ends those of this hub; a
    native thread with a hub of its own calls it before it ends, or the pool and the hub are kept for good.
    """

    def __init__(self, size: int = 64, queue_timeout: float | None = 30.0) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.size = size
        self.queue_timeout = queue_timeout
        #: For each hub its pool, and how many of its threads are free: ThreadPool itself has no time limit.
        self._pools: dict[Any, tuple[ThreadPool, Semaphore]] = {}

    def kill(self) -> None:
        """End the threads of this hub; waits for the calls they run."""
        pool, _ = self._pools.pop(get_hub(), (None, None))
        if pool is not None:
            pool.kill()

    def load(self, hub: Any) -> tuple[int, int, int]:
        """Threads that *hub* has, how many of them are busy, and calls that wait in line."""
        if hub not in self._pools:
            return 0, 0, 0
        pool, free = self._pools[hub]
        return pool.size, self.size - free.counter, free.linkcount()

    # --- runs in a worker greenlet: may wait

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        name: str = "",
        discard: Callable[[Any], None] | None = None,
    ) -> Any:
        """The result of *function*(*args*), called on a thread, in the caller's context (contextvars).

        - (float) timeout: seconds until OSError (ETIMEDOUT) is raised and *name* is logged; None: no limit.
        - discard: called on the thread with a result that nobody waits for any more.

        Called on one of the threads, it calls *function* directly.
        """
        if on_one():
            return function(*args)
        job = _Job(contextvars.copy_context(), function, args, discard)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            task = self._enqueue(job, timeout)
            left = None if deadline is None else seconds_until(deadline)
            with gevent.Timeout(left, _TimeLimit):
                task.get()
        except _TimeLimit:
            log.warning("%s took longer than %g s and was given up", name or function, timeout)
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
        finally:
            job.abandon()
        if job.error is not None:
            try:
                raise job.error
            finally:
                job.error = None  # a cycle: the traceback's frames refer to it
        return job.result

    def _enqueue(self, job: _Job, timeout: float | None) -> Any:
        hub = get_hub()
        if hub not in self._pools:
            self._pools[hub] = (ThreadPool(self.size, hub, idle_task_timeout=10), Semaphore(self.size))
        pool, free = self._pools[hub]
        limits = [each for each in (self.queue_timeout, timeout) if each is not None]
        if not free.acquire(timeout=min(limits, default=None)):
            log.warning("all %d threads were busy for %g s", self.size, min(limits))
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            task = pool.spawn(job)
        except RuntimeError as error:  # RLIMIT_NPROC, or a container's limit
            free.release()
            log.warning("no thread for it: %s", error)
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        task.rawlink(lambda _: free.release())  # also when nobody waits any more
        return task


class _TimeLimit(Exception):
    pass


class _Job:
    """One call on its way through the pool. gevent's pool would log what it raises."""

    def __init__(
        self,
        context: contextvars.Context,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        discard: Callable[[Any], None] | None,
    ) -> None:
        self._context = context
        self._function = function
        self._args = args
        self._discard = discard
        self._lock = _allocate_lock()
        self._abandoned = self._done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def abandon(self) -> None:
        """Nobody waits any more; no effect when it is done."""
        with self._lock:
            self._abandoned = not self._done

    # --- runs in a threadpool thread: no gevent

    def __call__(self) -> None:
        with self._lock:
            if self._abandoned:
                return
        _thread.ours = True
        try:
            result = self._context.run(self._function, *self._args)
        except BaseException as error:
            result, self.error = None, error
        with self._lock:
            self._done = not self._abandoned
        if self._done:
            self.result = result
        elif self.error is not None:
            log.info("given up, and failed later: %r", self.error)
        elif self._discard is not None and result is not None:
            try:
                self._discard(result)
            except Exception:
                log.info("given up, and failed to close later", exc_info=True)


#: The threads of every OffloadedFS and OffloadedAuthorizer that is given no others.
THREADS = Threads()
