"""Lines to a file or a pipe that may be slow, full or stuck, without making anybody wait.

A leaf of the package; output.py makes one `Writer` for each place that lines go to. `put` appends to a queue,
a native thread of the writer's own writes: to disks and pipes, gevent's hub cannot wait without blocking.

- **The queue has a limit.** What comes when it is full is dropped and counted, and when the queue moves
  again a line says how many it were.
- **Whole lines.** Each write(2) takes as many whole lines as go at once: the lines of several processes do
  not mix in a file opened with O_APPEND, nor up to PIPE_BUF bytes in a pipe (pipe(7)).
- **Errors are waited out** (no space left, a reader gone): said once on stderr, tried again every RETRY
  seconds with what could not be written, until it can.
- **After a fork** the child begins with an empty queue and a thread of its own: what is queued is the
  parent's to write.

Thread, locks and sleep are native ones also under `patch_all()`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator

from gevent import monkey

_allocate_lock = monkey.get_original("_thread", "allocate_lock")
_start_thread = monkey.get_original("_thread", "start_new_thread")
_sleep = monkey.get_original("time", "sleep")
_poll = monkey.get_original("select", "poll")

#: Lines in the queue, and as many again in the thread's hands: some MB at most. 10 s of a server with 250
#: logins a second, which log 4 lines each.
LIMIT = 10_000

#: Seconds that lines are collected for, from the first on: to wake the thread for each would cost a session
#: more than all its lines do.
WRITE_DELAY = 0.02

#: Seconds between two attempts to write after an error.
RETRY = 1.0

#: Bytes in one write to a file: a batch, where more at once gains nothing (Linux, ext4 and tmpfs).
WRITE_SIZE = 64 * 1024

#: Who may read a new log file: user names and file names are not everybody's business. As Debian's logrotate.
LOG_MODE = 0o640


def open_log(path: str) -> int:
    """A descriptor of *path*, to append to. Raises OSError, also for a named pipe that nobody reads."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    # Not blocking, or a named pipe without a reader would make us wait for one.
    fd = os.open(path, flags | os.O_NONBLOCK, LOG_MODE)
    os.set_blocking(fd, True)
    return fd


class Writer:
    """Writes lines to *path*, or to the descriptor *fd*, which is borrowed.

    - (str) path: absolute; opened here (OSError), closed by `close`, reopened by `reopen`.
    - (int) fd: when *path* is None.
    - notice: makes the line that says how many were dropped; called in the writer's thread. None for no line.

    `put`, `reopen` and `flush` are legal in every thread and process, and in the hub.
    """

    def __init__(
        self, path: str | None = None, fd: int = 2, notice: Callable[[int], str | None] = lambda number: None
    ) -> None:
        self._path = path
        self._notice = notice
        self._fd = fd if path is None else open_log(path)
        self._limit = _at_once(self._fd)
        self._starting = _allocate_lock()
        self._failing = self._stale = self._closing = False
        self._pid = 0  # whose thread writes; 0: none does
        self._clear()

    def _clear(self) -> None:
        self._queue: deque[str | Callable[[], object]] = deque()
        self._dropped = itertools.count()
        self._bell = _allocate_lock()  # released to wake the thread
        self._bell.acquire()
        self._idle = False

    # --- from everywhere: does not block

    def put(self, line: str) -> None:
        """Write *line*, which has no line end; some WRITE_DELAY seconds later, or never if too many wait."""
        if self._pid != os.getpid():
            self._start()
        if len(self._queue) < LIMIT:
            self._queue.append(line)
        else:
            next(self._dropped)  # in one step, also with several threads
        self._ring()

    def reopen(self) -> None:
        """Open the file again, under the same name, for what is put from now on.

        If that fails the old one stays, and stderr says so.
        """
        if self._path is not None:
            self._stale = True
            self._soon(self._reopen)

    # --- blocks the caller, up to *timeout* seconds

    def flush(self, timeout: float) -> bool:
        """Wait until what has been put is written; False if it was not in that time."""
        if self._pid != os.getpid():
            return True  # nothing has been put in this process
        written = _allocate_lock()
        written.acquire()
        self._soon(written.release)
        return bool(written.acquire(timeout=timeout))

    def close(self, timeout: float) -> None:
        """Flush, end the thread, close the file. What is not written by then is lost; twice is no harm."""
        flushed = self.flush(timeout)
        self._closing = True
        if self._pid == os.getpid():
            self._ring()
            if flushed:  # else the thread is in the middle of a write, and ends when that does
                self._ended.acquire(timeout=RETRY)
        else:
            self._close_file()

    # --- helpers

    def _soon(self, step: Callable[[], object]) -> None:
        if self._pid != os.getpid():
            self._start()
        self._queue.append(step)
        self._ring()

    def _ring(self) -> None:
        if self._idle:
            self._idle = False
            try:
                self._bell.release()
            except RuntimeError:
                pass  # another thread was faster

    def _start(self) -> None:
        """Begin in this process: the thread, if there was one, is the parent's."""
        with self._starting:
            if self._pid == os.getpid() or self._closing:
                return
            if self._pid:
                self._clear()
            self._ended = _allocate_lock()
            self._ended.acquire()
            try:
                _start_thread(self._run, ())
            except RuntimeError:
                return  # too many threads; the next line tries again, this one is in the queue
            self._pid = os.getpid()
        _at_the_end_of_a_child(self)

    # --- runs in the writer's native thread: no gevent

    def _run(self) -> None:
        # Signals are for the main thread: its system calls are to be interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self._closing:
                self._idle = True
                if not self._queue and not self._closing:
                    self._bell.acquire()
                self._idle = False
                if not self._closing:
                    _sleep(WRITE_DELAY)
                self._work_off()
        finally:
            self._pid = 0
            if self._closing:
                self._close_file()
            self._ended.release()

    def _work_off(self) -> None:
        """Write all that is queued now. What was dropped came behind it: only an empty queue takes more."""
        number = len(self._queue)
        counter, self._dropped = self._dropped, itertools.count()
        dropped = next(counter)
        lines: list[str] = []
        for _ in range(number):
            item = self._queue.popleft()
            if isinstance(item, str):
                lines.append(item)
            else:
                self._write(lines)
                lines = []
                item()
        notice = self._notice(dropped) if dropped else None
        self._write(lines if notice is None else [*lines, notice])

    def _write(self, lines: list[str]) -> None:
        for block in _blocks(lines, self._limit):
            while block:
                try:
                    written = os.write(self._fd, block)
                except BlockingIOError:  # somebody who shares a pipe with us has made it so
                    _sleep(WRITE_DELAY)
                except OSError as error:
                    self._wait_out(error)
                    if self._closing:
                        return
                else:
                    if self._failing:
                        self._failing = False
                        self._tell("works again")
                    block = block[written:]

    def _wait_out(self, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            self._tell(f"{error.strerror}; the next lines wait, and are dropped when they are too many")
        _sleep(RETRY)
        self._reopen()  # which may be what helps

    def _reopen(self) -> None:
        if not self._stale or self._path is None:
            return
        self._stale = False
        try:
            fd = open_log(self._path)
        except OSError as error:
            self._tell(f"cannot reopen it, goes on with the old file: {error.strerror}")
            return
        old, self._fd = self._fd, fd
        self._limit = _at_once(fd)
        os.close(old)

    def _close_file(self) -> None:
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _tell(self, problem: str) -> None:
        """Say it on stderr, unless that is what does not work, or nobody reads it."""
        if self._path is None:
            return
        poll = _poll()
        poll.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):  # stderr may be closed
            if poll.poll(0):
                os.write(2, f"log file {self._path!r}: {problem}\n".encode(errors="backslashreplace"))


def _at_once(fd: int) -> int:
    """Bytes that one write to *fd* puts there in one piece."""
    try:
        return WRITE_SIZE if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF
    except OSError:
        return select.PIPE_BUF  # stderr is closed


def _blocks(lines: list[str], limit: int) -> Iterator[bytes]:
    """*lines* as UTF-8, as many together as fit into *limit* bytes; a longer one alone."""
    block: list[bytes] = []
    size = 0
    for line in lines:
        data = line.encode(errors="backslashreplace") + b"\n"
        if block and size + len(data) > limit:
            yield b"".join(block)
            block, size = [], 0
        block.append(data)
        size += len(data)
    if block:
        yield b"".join(block)


def _at_the_end_of_a_child(writer: Writer) -> None:
    """A child of multiprocessing leaves by os._exit(), after what is registered with its own `util`."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, writer.flush, args=(RETRY,), exitpriority=0)
