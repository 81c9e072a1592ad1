"""GeventIOLoop: pyftpdlib's IOLoop as watchers on gevent's hub.

Its job: pyftpdlib's loop interface, the order in which ready channels and due calls get their turns, and
the end of it all. What one channel's watcher does is in registration.py, who may run in turns.py, timers in
scheduler.py, the choice of the hub in hubs.py. It never blocks the hub, never calls pyftpdlib from the
hub, and never patches anything.

    hub.loop.io watchers --> Turns.ready, a list --> GeventIOLoop._on_pass --> Turns.serve --.
                                                                                              >-- worker
    hub.loop.timer --------> Scheduler._on_due ------------------------------> Turns.run ----'

(Over 400 lines: pyftpdlib's interface is one class there, and has to be one here.)

Why it is built this way:

- pyftpdlib under `patch_all()` falls back to `gevent.select.poll`, which makes and destroys a watcher for
  every channel in every poll. A persistent watcher is changed by stop, set, start; libev collects these
  and most cost no syscall.
- Channels that became ready in one pass of the hub are served in the order in which they did. libev calls
  watchers last come, first served, which would handle the ABOR of an upload before the data sent ahead
  of it, and data before the STOR it belongs to (for which pyftpdlib drops the data connection).
- On libev (not its CFFI binding) a watcher's callback is that list's `append`, and a check watcher of the
  lowest priority calls when all others of the pass have called: 0.97 of the CPU to echo a byte, against a
  callback in Python that asks for another, as elsewhere. All that is done for each event is in two frames,
  `turns._work` and `Registration.handle`: 0.93 for a command of one session.

What is whose: the hub is borrowed. Channels belong to pyftpdlib; `close()` closes them, as upstream's
does. Watchers, timers and workers are ours and end with `close()`.

Threads: everything happens in the thread that last called `poll()` or `loop()`; only `close()` is meant
for others. (`register()`, `modify()` and `unregister()` from another thread reach the watchers safely,
but pyftpdlib's channels are not made for that: a listener is registered before it is bound.)
"""

from __future__ import annotations

import contextvars
import errno
import logging
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pyftpdlib.ioloop
from gevent import GreenletExit, Timeout, getcurrent, monkey, sleep
from gevent.hub import Waiter
from gevent.socket import socket as GeventSocket
from pyftpdlib.ioloop import Acceptor, AsyncChat, asyncore
from pyftpdlib.log import config_logging, is_logging_configured
from pyftpdlib.log import logger as pyftpdlib_logger

from bridge.loop import hubs, wakeups
from bridge.loop.monitor import LongWaits
from bridge.loop.native_socket import native
from bridge.loop.registration import READ, WRITE, Registration, close_quietly, end_session
from bridge.loop.scheduler import Call, RepeatedCall, Scheduler
from bridge.loop.turns import Interrupt, Session, Turns, Worker

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Besides these: AsyncChat._fileno, AsyncChat._closed, _IOLoop._instance, _IOLoop._started_once.
from pyftpdlib.ioloop import _IOLoop  # isort: skip

log = logging.getLogger(__name__)

_get_ident = monkey.get_original("_thread", "get_ident")
_allocate_lock = monkey.get_original("_thread", "allocate_lock")


class GeventIOLoop(_IOLoop):
    """pyftpdlib's IOLoop on the hub of the thread that runs it.

    Pass it where pyftpdlib takes an ioloop::

        FTPServer(address, handler, ioloop=GeventIOLoop()).serve_forever()

    It takes the hub at the first `poll()` or `loop()`, not before: a server may be built in one thread
    or process and run in another. From then on its channels are served whenever the hub runs, also
    while nobody is inside `poll()` or `loop()`, until `close()`.

    Handlers, authorizers, file systems and callbacks run on worker greenlets and may wait cooperatively;
    only their own session stalls. Loggers: `bridge.loop.ioloop` and `bridge.loop.registration`; what
    pyftpdlib's loop logs stays on `pyftpdlib`.
    """

    READ = READ
    WRITE = WRITE

    #: Seconds a turn may wait before the log names its session and the line it waits at, once for each
    #: turn (logger `bridge.loop.monitor`, WARNING); 0 for never. Longer than what a user calls slow.
    long_wait = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.sched: Scheduler = Scheduler(self._run_call, self._defer_call)
        self.socket_map: dict[Any, Any]
        self._registrations: dict[Any, Registration] = {}
        #: Channels that have ever taken themselves off the loop without closing: throttled, QUIT during a
        #: transfer, waiting out a failed login. close() must find them.
        self._away: weakref.WeakSet[Any] = weakref.WeakSet()
        self._hub: Any = None
        self._turns: Turns
        self._long_waits: LongWaits
        self._mailbox: wakeups.Mailbox
        self._libev = False
        self._passes: Any = None  # libev's: a watcher that calls when all others of a pass have called
        self._runners: list[Waiter] = []  # greenlets inside loop()
        self._pollers: list[Waiter] = []  # greenlets inside poll()
        self._closed = False
        #: How often a listener has rested because accept() failed.
        self.accept_rests = 0
        hubs.register(self)

    # --- pyftpdlib's interface: channels

    def register(self, fd: Any, instance: Any, events: int) -> None:
        """Serve channel *instance* when *fd*, an int or an object with `fileno()`, is ready for *events*.

        Raises OSError (EBADF) if the descriptor is not open or this loop is closed.
        """
        if self._closed:
            raise OSError(errno.EBADF, f"{self!r} is closed; make a new GeventIOLoop", str(fd))
        old = self._registrations.pop(fd, None)
        if old is not None:
            self._in_hub_thread(old.detach)
        if isinstance(instance, Acceptor) and type(instance.socket) is GeventSocket:
            instance.socket = native(instance.socket)
        hub = self._hub
        number = fd if isinstance(fd, int) else fd.fileno()
        registration = Registration(number, instance, events, has_hub=hub is not None)
        if hub is not None:
            if hub.thread_ident == _get_ident():
                registration.attach(self._turns)
            else:
                self._in_hub_thread(registration.attach, self._turns)
        self._registrations[fd] = registration
        self.socket_map[fd] = instance

    def unregister(self, fd: Any) -> None:
        """Forget *fd*; an unknown one is ignored."""
        self.socket_map.pop(fd, None)
        registration = self._registrations.pop(fd, None)
        if registration is not None:
            hub = self._hub
            if hub is None or hub.thread_ident == _get_ident():
                registration.detach()
            else:
                self._in_hub_thread(registration.detach)
            channel = registration.channel
            if not getattr(channel, "_closed", True):
                self._away.add(channel)
            if not self.socket_map:
                self._on_quiet()

    def modify(self, fd: Any, events: int) -> None:
        """Change what *fd* is watched for; an unknown one is ignored, as pyftpdlib's Select does."""
        registration = self._registrations.get(fd)
        if registration is not None:
            hub = self._hub
            if hub is None or hub.thread_ident == _get_ident():
                registration.modify(events)
            else:
                self._in_hub_thread(registration.modify, events)

    def fileno(self) -> int:
        """The descriptor of the hub's own poller. Takes this thread's hub if there is none yet."""
        return int((self._hub or self._attach()).loop.fileno())

    # --- pyftpdlib's interface: running

    def poll(self, timeout: float | None = None) -> None:
        """Let the hub run until something was served, at most *timeout* seconds (None: no limit).

        A turn that waits does not keep `poll` from returning, except when it is the last thing left.
        """
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")
        hub = self._attach()
        waiter = Waiter(hub)
        self._pollers.append(waiter)
        timer = None
        try:
            if timeout is not None:
                timer = hub.loop.timer(max(timeout, hub.loop.approx_timer_resolution))
                timer.start(waiter.switch, None)
            waiter.get()
        finally:
            _discard(self._pollers, waiter)
            if timer is not None:
                timer.stop()
                timer.close()
        if not self.socket_map:
            # The last channel has gone, and pyftpdlib is about to end its loop; the on_disconnect that
            # still waits must not be cut off.
            self._wait_until_quiet(hub)

    def loop(self, timeout: float | None = None, blocking: bool = True) -> float | None:
        """Serve until no channel is left or the loop is closed; or, if not *blocking*, poll once.

        - (float) timeout: for `blocking=False`, seconds to wait at most; else of no effect, since this
          loop needs no polling interval.

        Returns the seconds to the next scheduled call if not blocking (None if there is none). A
        KeyboardInterrupt or SystemExit raised in a turn is raised here. Killing the greenlet that is in
        here closes the loop.
        """
        if not _IOLoop._started_once:
            _IOLoop._started_once = True
            if not is_logging_configured():  # pyftpdlib logs to stderr unless told otherwise
                config_logging()
        if not blocking:
            if self.socket_map:
                self.poll(timeout)
            return self.sched.poll()
        if self.socket_map and not self._closed:
            try:
                self._wait_until_quiet(self._attach())
            except GreenletExit:
                self.close()
                raise
        return None

    # --- pyftpdlib's interface: timers

    def call_later(
        self, seconds: float, target: Callable[..., Any], *args: Any, _errback: Any = None, **kwargs: Any
    ) -> Call:
        """Call *target* in *seconds*, as a turn of the session it belongs to.

        That is the session of the channel whose method *target* (or else `_errback`) is, or else the
        session whose turn makes the call, or else none.
        """
        owner = getattr(target, "__self__", None)
        if not isinstance(owner, AsyncChat):
            owner = _owner(_errback)
        return Call(seconds, target, args, kwargs, _errback, self.sched, owner)

    def call_every(
        self, seconds: float, target: Callable[..., Any], *args: Any, _errback: Any = None, **kwargs: Any
    ) -> RepeatedCall:
        """Call *target* every *seconds* until cancelled or until it raises."""
        owner = getattr(target, "__self__", None)
        if not isinstance(owner, AsyncChat):
            owner = _owner(_errback)
        return RepeatedCall(seconds, target, args, kwargs, _errback, self.sched, owner)

    # --- pyftpdlib's interface: the end

    def close(self) -> None:
        """Close every channel, cancel every call, end every turn; wake `loop()` and `poll()`.

        Legal from everywhere and more than once. In the hub and in signal handlers that interrupt it,
        it only asks for the close, which happens in the hub's next pass. From another thread it returns
        when the loop's own thread has done it. Turns that wait are killed: their clients get a 421.
        """
        hub = self._hub
        if self._closed:
            return
        if hub is None:
            self._close()
        elif _get_ident() != hub.thread_ident:
            closed = _allocate_lock()
            closed.acquire()
            if self._hub_is_at_rest() or not self._mailbox.post(lambda: self._on_close(closed.release)):
                with hubs.lock:
                    self._close()
            else:
                closed.acquire()
        elif getcurrent() is hub:
            hub.loop.run_callback(self._on_close, _nothing)
        else:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        hub = self._hub
        instance = type(self)._instance
        if hub is not None:
            self._turns.close()  # no worker is used again
            self._kill_waiting_turns(hub)
        away = list(self._away)
        super().close()  # every channel, then every call; logs what they raise
        for channel in away:
            # (ThreadedFTPServer takes handlers to a loop of their own.)
            if channel.ioloop is self and not channel._closed:
                close_quietly(channel)
        if instance is not self:
            # Upstream forgets the class's instance whichever loop is closed.
            type(self)._instance = instance
        self._wake(self._runners)
        self._wake(self._pollers)
        self._detach()  # with channels that failed to close
        self._registrations.clear()

    def _kill_waiting_turns(self, hub: Any) -> None:
        current = getcurrent()
        waiting = [worker for worker in self._turns.waiting if worker is not current]
        if waiting and _get_ident() == hub.thread_ident:
            for worker in waiting:
                hub.loop.run_callback(worker.throw, GreenletExit)
            sleep(0)  # they end in this pass of the hub, or they refuse to: then they end on their own

    # --- ours, beyond pyftpdlib's interface

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called: a closed loop serves nothing ever again."""
        return self._closed

    @property
    def turns_waiting(self) -> int:
        """How many turns wait now."""
        return 0 if self._hub is None else len(self._turns.waiting)

    @property
    def hub(self) -> Any:
        """The hub it serves on (borrowed); None before it has one, after a fork and when closed."""
        return self._hub

    def attach(self) -> Any:
        """Take the hub of this thread, or move to it, and serve whenever it runs; return it.

        `poll()` and `loop()` do it themselves. Raises RuntimeError if the loop is closed or is running
        in another thread.
        """
        if self._closed:
            raise RuntimeError(f"{self!r} is closed; make a new GeventIOLoop")
        return self._attach()

    def submit(self, target: Callable[..., Any], *args: Any, interrupt: bool = False) -> bool:
        """Call *target*, a method of a channel, as a turn of that channel's session.

        From everywhere: a greenlet, the hub, a signal handler, another thread. The call is made in the
        hub's next pass, or when the session's running turn has ended; with *interrupt* a turn that waits
        is ended for it by an `Interrupt`. False, and no call, if the loop has no hub (any more).
        """
        hub = self._hub
        if hub is None or self._closed:
            return False
        if _get_ident() == hub.thread_ident:
            hub.loop.run_callback(self._on_submit, target, args, interrupt)
            return True
        return self._mailbox.post(lambda: self._on_submit(target, args, interrupt))

    def after_turn(self, control: Any, job: Callable[[Any], None]) -> None:
        """Call *job* with *control* as the last of what its session's running turn has made due.

        In the hub's thread; *job* must not raise. Without a turn it has one of its own.
        """
        session = self._turns.session_of(control)
        if session.worker is None:
            self.call_later(0, lambda: job(control), _errback=control.handle_error)
        else:
            session.defer(control, job, control)

    def post(self, call: Callable[[], None]) -> bool:
        """Have *call* called in the hub, from any thread; False if the loop has no hub (any more).

        It must neither block nor raise. It is called at the latest when the loop gives the hub up.
        """
        return self._hub is not None and self._mailbox.post(call)

    # --- runs in the hub: must not block

    def _on_submit(self, target: Callable[..., Any], args: tuple[Any, ...], interrupt: bool) -> None:
        if self._closed or self._hub is None:
            return
        call = self.call_later(0, target, *args)
        worker = self._turns.waiting_turn_of(getattr(call.owner, "cmd_channel", call.owner))
        if interrupt and worker is not None:
            worker.throw(Interrupt)

    def _on_pass(self) -> None:
        """Serve the channels that became ready in one pass of the hub, in the order they did."""
        ready = self._turns.ready
        if ready:
            try:
                self._turns.serve(oldest_last=self._libev)
            finally:
                # (More is due, or a signal handler raised in here.)
                if ready and self._passes is None and self._hub is not None:
                    self._hub.loop.run_callback(self._on_pass)
                if self._pollers:
                    self._wake(self._pollers)

    def _on_close(self, when_done: Callable[[], None]) -> None:
        """Close on a worker, since the channels' callbacks may wait."""
        if self._closed:
            when_done()
            return

        def job(_: object) -> None:
            try:
                self._close()
            finally:
                when_done()

        self._turns.run(Session(self._turns, contextvars.copy_context()), None, job, None)

    def _run_call(self, call: Call) -> None:
        owner = call.owner
        if owner is None:
            assert call.context is not None
            session = Session(self._turns, call.context)
            control = None
        else:
            control = getattr(owner, "cmd_channel", owner)
            session = self._turns.session_of(control)
        if session.worker is not None:
            session.defer(control, self._handle_call, call)
        else:
            self._turns.run(session, control, self._handle_call, call)
        if self._pollers:
            self._wake(self._pollers)

    # --- runs in a worker greenlet: may wait

    def _handle_call(self, call: Call) -> None:
        """One turn for one due call: what pyftpdlib's scheduler does."""
        if call.cancelled or self.sched.put_back(call):  # by the turn that its session had
            return
        try:
            call.call()
        except Interrupt:
            if not call.cancelled:
                call.cancel()
        except (GreenletExit, Timeout) as error:
            if not call.cancelled:
                call.cancel()
            end_session(getcurrent().control, error)
        except Exception as error:
            if isinstance(error, asyncore.ExitNow):
                raise
            pyftpdlib_logger.error(traceback.format_exc())

    def _escape(self, error: BaseException) -> None:
        """Raise what a job raised where loop() or poll() was called; else where gevent raises it."""
        hub = self._hub
        waiters = self._runners or self._pollers
        if waiters and hub is not None:
            hub.loop.run_callback(waiters[0].throw, error)
        else:
            hub = hubs.current()
            hub.loop.run_callback(hub.handle_error, None, type(error), error, error.__traceback__)

    def _on_accept_error(self) -> None:
        self.accept_rests += 1

    # --- runs anywhere in the hub's thread

    def _defer_call(self, call: Call) -> bool:
        owner = call.owner
        if owner is None:
            return False
        control = getattr(owner, "cmd_channel", owner)
        session = self._turns.session_of(control)
        if session.worker is None:
            return False
        session.defer(control, self._handle_call, call)
        return True

    def _on_quiet(self) -> None:
        """The last channel or the last waiting turn has gone."""
        if self._hub is not None and not self.socket_map and not self._turns.waiting:
            self._wake(self._runners)
            self._wake(self._pollers)

    def _wake(self, waiters: list[Waiter]) -> None:
        while waiters:
            self._hub.loop.run_callback(waiters.pop().switch, None)

    def _wait_until_quiet(self, hub: Any) -> None:
        while not self._closed and (self.socket_map or self._turns.waiting):
            waiter = Waiter(hub)
            self._runners.append(waiter)
            try:
                waiter.get()
            finally:
                _discard(self._runners, waiter)

    def _attach(self) -> Any:
        """Take this thread's hub, or move to it."""
        hub = hubs.current()
        if hub is self._hub:
            return hub
        if self._hub is not None:
            if self._runners or self._pollers:
                raise RuntimeError(f"{self!r} already runs in another thread, on {self._hub!r}")
            log.debug("%r moves from %r", self, self._hub)
            self._detach()
        self._hub = hub
        self._long_waits = LongWaits(hub, self.long_wait)
        callbacks = (self._escape, self._on_quiet, self._long_waits.on_wait, self._on_pass)
        self._turns = Turns(hub, *callbacks, self._on_accept_error)
        self._mailbox = wakeups.Mailbox(hub)
        module = type(hub.loop).__module__
        self._libev = "libev" in module
        if module == "gevent.libev.corecext":  # (libev-cffi's watchers call in another order)
            self._passes = hub.loop.check(ref=False, priority=hub.loop.MINPRI)
            self._passes.start(self._on_pass)
            self._turns.has_check_watcher = True
        for registration in list(self._registrations.values()):
            try:
                registration.attach(self._turns)
            except OSError as error:  # closed since it was registered
                log.debug("%r cannot be watched: %s", registration.channel, error)
                hub.loop.run_callback(self._on_submit, registration.channel.handle_close, (), False)
        self.sched.attach(hub)
        log.debug("%r runs on %s", self, _describe(hub))
        return hub

    def after_fork(self) -> None:
        """In a forked child: the watchers are the parent's; the channels stay registered."""
        current = getcurrent()
        in_a_turn = self._hub is not None and isinstance(current, Worker) and current.turns is self._turns
        self._detach()
        if in_a_turn:
            # gevent lets Python's signal handlers run at once on its default loop only (libev/callbacks.c,
            # gevent_check_signals); on this one a signal would wait for the next event.
            wakeups.wake_on_signals(hubs.replace())

    def leave_hub(self, hub: Any) -> None:
        """The hub's thread ends; the loop may be run in another one."""
        if hub is self._hub:
            self._detach()

    def _detach(self) -> None:
        """Give up the hub, but not the channels and the calls. Nobody waits here any more."""
        if self._hub is not None:
            with hubs.lock:
                for registration in list(self._registrations.values()):
                    registration.detach()
                self.sched.detach()
                self._turns.close()
                self._long_waits.close()
                if self._passes is not None:
                    self._passes.stop()
                    self._passes.close()
                    self._passes = None
                self._runners, self._pollers = [], []
                self._hub = None
            self._mailbox.close()

    # --- runs in any thread

    def _hub_is_at_rest(self) -> bool:
        """Whether the hub's thread cannot touch our watchers now, so that another thread may."""
        return not (self._runners or self._pollers or hubs.running(self._hub))

    def _in_hub_thread(self, function: Callable[..., None], *args: Any) -> None:
        """Call *function*, which touches watchers, without getting in the hub's way."""
        hub = self._hub
        if hub is None or _get_ident() == hub.thread_ident:
            function(*args)
            return
        done = _allocate_lock()
        done.acquire()
        raised: list[Exception] = []

        def _on_hub() -> None:
            try:
                function(*args)
            except Exception as error:
                raised.append(error)
            finally:
                done.release()

        if self._hub_is_at_rest() or not self._mailbox.post(_on_hub):
            with hubs.lock:
                function(*args)
        else:
            done.acquire()
            if raised:
                raise raised[0]


def _nothing() -> None:
    pass


def _owner(errback: Any) -> Any:
    """The channel that a call to a function belongs to, or None."""
    owner = getattr(errback, "__self__", None)
    if isinstance(owner, AsyncChat):
        return owner
    worker = getcurrent()
    return worker.control if isinstance(worker, Worker) else None


def _discard(waiters: list[Waiter], waiter: Waiter) -> None:
    if waiter in waiters:
        waiters.remove(waiter)


def _describe(hub: Any) -> str:
    """Event loop, its backend, and what is patched, for the one debug line at start."""
    kind = type(hub.loop)
    if not monkey.is_module_patched("socket"):
        patched = "unpatched"
    elif hasattr(pyftpdlib.ioloop, "Epoll") or hasattr(pyftpdlib.ioloop, "Kqueue"):
        patched = "patched after pyftpdlib was imported"
    else:
        patched = "patched before pyftpdlib was imported"
    return f"{kind.__module__}.{kind.__qualname__} ({hub.loop.backend}), {patched}"


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("bridge needs a POSIX system: gevent cannot watch sockets by descriptor on Windows")
