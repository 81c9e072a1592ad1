"""Authorizers, file systems, files and callbacks that wait, raise and are killed as a seed says. No tests.

Each call that pyftpdlib makes of a program goes through `Mischief.call`, which knows whose turn it runs in,
notes begin and end, and does what the seed, the client and the number of the call say. So a seed repeats what
is done to each client, though not in which order the kernel tells of their packets.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Group
from pyftpdlib.authorizers import AuthenticationFailed
from pyftpdlib.exceptions import FilesystemError

from bridge import current_session

#: The address from which the witness comes: its calls wait, but never fail.
WITNESS = "127.0.0.1"

#: Seconds that something waits for a timer, at least (libuv's unit) and at most: long enough for the hub to
#: do something else meanwhile.
NAPS = 0.001, 0.003

#: Passes of the hub that something waits for another greenlet, at most.
PASSES = 5

#: In the text of every exception that is raised here on purpose.
MARK = "on purpose"

#: What file systems raise; what of it bridge.session.data.REPLY_CODES names, and what not.
ERRNOS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EMFILE, errno.ETIMEDOUT, errno.EDQUOT)

CALLBACKS = (
    *("on_connect", "on_disconnect", "on_login", "on_login_failed", "on_logout", "on_file_sent"),
    *("on_file_received", "on_incomplete_file_sent", "on_incomplete_file_received"),
)
#: bridge.session.hooks.Events
EVENTS = (
    *("on_file_deleted", "on_file_renamed", "on_directory_made", "on_directory_removed"),
    *("on_transfer_started", "on_transfer_progress", "quota_left"),
)
AUTHORIZER = (
    *("validate_authentication", "get_home_dir", "impersonate_user", "terminate_impersonation", "has_user"),
    *("has_perm", "get_perms", "get_msg_login", "get_msg_quit"),
)
FILES = (
    *("chdir", "mkdir", "listdir", "rmdir", "remove", "rename", "chmod", "stat", "lstat", "utime", "isfile"),
    *("isdir", "getsize", "getmtime", "realpath", "lexists", "validpath"),
)
#: What changes something of the whole process, and must not be left in between: pyftpdlib's file system goes
#: to the directory and back, and an authorizer that impersonates its users is one of them.
ATOMIC = frozenset({"chdir", "terminate_impersonation"})
#: The end of a data connection: after a failure there pyftpdlib does not reply, or takes the transfer for one
#: that still runs, and waits with QUIT for its end.
CLOSING = frozenset({"close", *(name for name in CALLBACKS if "_file_" in name)})


class Seen:
    """What was seen of one session in the server."""

    def __init__(self, handler: Any) -> None:
        self.address: str = handler.remote_ip
        self.port: int = handler.remote_port
        #: Whether pyftpdlib has closed it.
        self.ended: Callable[[], bool] = lambda: bool(handler._closed)
        #: Calls that have begun and not ended: the name, and the greenlet.
        self.open: list[tuple[str, Any]] = []
        #: What was handled of the commands that no server knows (driver.py), in order.
        self.fences: list[str] = []
        #: "error": a call has raised what it may raise. "kill", "disconnect", "abort": ended from elsewhere.
        self.faults: set[str] = set()
        self.over = False
        #: Every call, and what was done to it.
        self.story: list[str] = []


class Mischief:
    """What is done in one example, and what was seen.

    *seed* decides; *rates*: by address, the part of the calls that fail. *careful*: only wait where pyftpdlib
    does not survive a failure: in CLOSING, and when the session has ended (it forgets the rest of the end).
    And no login is refused, since its 530 comes when the next command may have had its reply.
    """

    def __init__(self, seed: int, rates: dict[str, float], careful: bool = False) -> None:
        self.seed, self.rates, self.careful = seed, rates, careful
        self.sessions: dict[Any, Seen] = {}
        self.calls: dict[str, int] = {}
        self.files: list[Any] = []
        self.problems: list[str] = []
        self.timeouts: list[gevent.Timeout] = []
        #: Calls that began while one of another session waited.
        self.interleaved = 0
        #: Of calls that wait for another session's next call.
        self.curious: list[tuple[Seen, Event]] = []
        self.helpers = Group()
        #: While it is set, what is called waits for it, and does nothing else.
        self.held: Event | None = None
        self.holding = 0

    def of(self, address: str, port: int) -> Seen | None:
        """The last session with the client that is there."""
        there = [each for each in self.sessions.values() if (each.address, each.port) == (address, port)]
        return there[-1] if there else None

    # --- runs in a worker greenlet: may wait

    def seen(self) -> Seen | None:
        """Of the session whose turn runs; None outside of turns, and before its address is known."""
        handler = current_session()
        if handler is None or not handler.remote_ip:
            return None
        if handler not in self.sessions:
            self.sessions[handler] = Seen(handler)
        return self.sessions[handler]

    @contextlib.contextmanager
    def noted(self, seen: Seen, name: str) -> Iterator[None]:
        """Begin and end of a call: those of a session nest or follow each other."""
        this = gevent.getcurrent()
        if seen.open and seen.open[-1][1] is not this:
            self.problems.append(f"{seen.address}: {name} began during {[each for each, _ in seen.open]}")
        if seen.over and not seen.open:
            self.problems.append(f"{seen.address}: {name} came after on_disconnect")
        seen.over |= name == "on_disconnect"
        self.interleaved += any(each.open for each in self.sessions.values() if each is not seen)
        for other, event in self.curious:
            if other is not seen:
                event.set()
        seen.story.append("  " * len(seen.open) + name)
        seen.open.append((name, this))
        try:
            yield
        except BaseException as error:
            seen.story.append("  " * len(seen.open) + f"{error!r}")
            raise
        finally:
            seen.open.remove((name, this))

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call *function*, and before it or behind it what the seed says."""
        seen = self.seen()
        if seen is None:
            return function(*args, **kwargs)
        with self.noted(seen, name):
            chance = self.chance(seen)
            if chance.random() < 0.7 or name in ATOMIC:
                self.happen(seen, name, chance)
                return function(*args, **kwargs)
            result = function(*args, **kwargs)
            try:
                self.happen(seen, name, chance)
            except BaseException:
                if name in ("open", "mkstemp"):
                    result.close()
                raise
            return result

    def chance(self, seen: Seen) -> random.Random:
        number = self.calls[seen.address] = self.calls.get(seen.address, 0) + 1
        return random.Random(f"{self.seed} {seen.address} {number}")

    def happen(self, seen: Seen, name: str, chance: random.Random) -> None:
        """Wait, raise, or be killed; or nothing."""
        if self.held is not None and seen.address != WITNESS:
            self.holding += 1
            self.held.wait()
            self.holding -= 1
            return
        if name == "terminate_impersonation" or any(each in ATOMIC for each, _ in seen.open[:-1]):
            return
        fails = chance.random() < self.rates.get(seen.address, 0.0)
        fails = fails and not self.spared(seen)
        how = chance.choice(("raise", "raise", "kill", "timeout", "forgotten", "disconnect", "abort"))
        if self.careful and how == "forgotten":  # nobody knows when that strikes
            how = "timeout"
        if fails:
            seen.story.append("  " * len(seen.open) + how)
        if fails and how == "raise":
            if chance.random() < 0.5:
                self.wait(seen, chance)
            self.fail(seen, name, chance)
        if fails and how == "timeout":
            seen.faults.add("kill")
            raise gevent.Timeout(None, gevent.Timeout(None, MARK))
        if fails and how == "forgotten":
            seen.faults.add("kill")
            self.timeouts.append(gevent.Timeout.start_new(chance.uniform(*NAPS)))
        if fails and how == "kill":
            error = chance.choice((gevent.GreenletExit, gevent.Timeout))
            self.helpers.spawn(self.kill, seen, gevent.getcurrent(), error, chance.randint(0, PASSES))
        if fails and how in ("disconnect", "abort"):
            end = getattr(current_session(), "disconnect" if how == "disconnect" else "abort_transfer", None)
            if end is not None:  # one of ours
                self.helpers.spawn(self.end, seen, how, end, chance.randint(0, PASSES))
        if fails or chance.random() < 0.5:
            self.wait(seen, chance)

    def spared(self, seen: Seen) -> bool:
        return self.careful and (seen.ended() or any(name in CLOSING for name, _ in seen.open))

    def fail(self, seen: Seen, name: str, chance: random.Random) -> None:
        seen.faults.add("error")
        if name == "validate_authentication" and chance.random() < 0.5 and not self.careful:
            raise AuthenticationFailed(MARK)
        if chance.random() < 0.2:
            raise FilesystemError(MARK) if name in FILES else ValueError(MARK)
        if chance.random() < 0.7:
            raise OSError(chance.choice(ERRNOS), MARK)
        raise ValueError(MARK)

    def wait(self, seen: Seen, chance: random.Random) -> None:
        how = chance.choice(("passes", "nap", "event", "another"))
        if how == "passes":
            _pass(chance.randint(1, PASSES))
        elif how == "nap":
            gevent.sleep(chance.uniform(*NAPS))
        else:
            event, latest = Event(), 0.0
            if how == "another":
                latest = NAPS[1]
                self.curious.append((seen, event))
            self.helpers.spawn(self.set, event, latest, chance.randint(0, PASSES))
            event.wait()
            self.curious = [each for each in self.curious if each[1] is not event]

    # --- runs in greenlets of their own

    def set(self, event: Event, seconds: float, passes: int) -> None:
        gevent.sleep(seconds)
        _pass(passes)
        event.set()

    def kill(self, seen: Seen, worker: Any, error: Any, passes: int) -> None:
        _pass(passes)
        if not worker.dead and worker.control is not None and not self.spared(seen):
            seen.faults.add("kill")
            gevent.kill(worker, error)

    def end(self, seen: Seen, how: str, end: Callable[[str], None], passes: int) -> None:
        _pass(passes)
        seen.faults.add(how)
        end(MARK)


def _pass(count: int) -> None:
    """Let the hub run so often."""
    for _ in range(count):
        gevent.sleep(0)


class Hooks:
    """What is put between pyftpdlib and a program's classes. *mischief*: another one for each example."""

    def __init__(self, careful: bool = False) -> None:
        self.careful = careful
        self.mischief = Mischief(0, {})

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.mischief.call(name, function, *args, **kwargs)

    def authorizer(self, authorizer: Any) -> Any:
        """One that passes everything on to *authorizer*."""
        hooks = self

        class Authorizer:
            def __getattr__(self, name: str) -> Any:
                found = getattr(authorizer, name)
                return hooks.hooked(name, found) if name in AUTHORIZER else found

        return Authorizer()

    def hooked(self, name: str, function: Any) -> Any:
        return lambda *args, **kwargs: self.call(name, function, *args, **kwargs)

    def file_system(self, base: Any) -> Any:
        """A subclass of *base*."""
        hooks = self

        class FileSystem(base):
            def open(self, *args: Any) -> Any:
                return hooks.call("open", lambda: hooks.file(super(FileSystem, self).open(*args)))

            def mkstemp(self, *args: Any, **kwargs: Any) -> Any:
                return hooks.call(
                    "mkstemp", lambda: hooks.file(super(FileSystem, self).mkstemp(*args, **kwargs))
                )

            def format_list(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
                return hooks.each("format_list", super().format_list(*args, **kwargs))

            def format_mlsx(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
                return hooks.each("format_mlsx", super().format_mlsx(*args, **kwargs))

        for name in FILES:
            setattr(FileSystem, name, self.method(base, name))
        return FileSystem

    def handler(self, base: Any) -> Any:
        """A subclass of *base*, or a mix-in for a handler class if it is None."""
        hooks = self

        class Handler(base):
            def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
                seen = hooks.mischief.sessions.get(self)
                if seen is None:
                    super().pre_process_command(line, cmd, arg)
                    return
                if cmd.startswith("FENCE"):
                    seen.fences.append(cmd)
                with hooks.mischief.noted(seen, line):
                    super().pre_process_command(line, cmd, arg)

        for name in (*CALLBACKS, *EVENTS):
            if hasattr(base, name):
                setattr(Handler, name, self.method(base, name))
        return Handler

    def method(self, base: Any, name: str) -> Any:
        original = getattr(base, name)
        return lambda *args, **kwargs: self.call(name, original, *args, **kwargs)

    def each(self, name: str, items: Any) -> Iterator[bytes]:
        end = object()
        items = iter(items)
        while (item := self.call(name, next, items, end)) is not end:
            yield item

    def file(self, file: Any) -> Any:
        """*file* without a descriptor, so that pyftpdlib reads and writes it itself."""
        hooks = self

        class File:
            def __getattr__(self, name: str) -> Any:
                if name == "fileno":
                    raise AttributeError(name)
                return getattr(file, name)

            def read(self, size: int) -> Any:
                return hooks.call("read", file.read, size)

            def write(self, content: bytes) -> Any:
                return hooks.call("write", file.write, content)

            def close(self) -> None:
                try:
                    hooks.call("close", bool)
                finally:
                    file.close()

        self.mischief.files.append(file)
        return File()
