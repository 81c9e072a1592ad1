"""One channel on the ioloop: its watcher, and what an event of it does.

Sits on turns.py; ioloop.py owns the registrations and is not known here. A channel is any object that
pyftpdlib registers: a listener, a control connection, a data connection, an acceptor for PASV, a connector
for PORT.

- An event for a session that is busy stops that watcher; the end of the turn starts it again. Events are
  level-triggered: nothing is lost, and nothing spins meanwhile.
- asyncore's `read()` and `write()` swallow GreenletExit and gevent.Timeout in a bare `except:`, so a
  killed handler would live on. `Registration.handle` does what they do, except for these two.
- A channel that is ready but cannot use it rests instead of waking the hub for ever (the 100 % CPU of
  pyftpdlib #191 #245 #429 #613 #683), and so does a listener when accept() runs out of descriptors.
- One event of a data connection moves several of pyftpdlib's blocks of 64 KiB, as long as they are full: 0.80
  of the CPU for a RETR over one, 0.92 for a STOR. One event of a listener accepts as many connections as the
  kernel says are waiting: 0.95 for logins of 50 clients at once.
- A descriptor that is closed is not watched: libev and libuv abort the whole process when they find out. It
  takes a client that leaves at once: pyftpdlib's ThreadedFTPServer then registers what is closed already.
- A TLS handshake is watched for what it waits for and nothing else. pyftpdlib goes on watching for what it
  would like to do afterwards, writing above all, which a socket is always ready for.
"""

from __future__ import annotations

import contextvars
import errno
import logging
import socket
import sys
from fcntl import F_GETFD, fcntl
from typing import TYPE_CHECKING, Any

from gevent import GreenletExit, Timeout, getcurrent
from pyftpdlib.handlers import DTPHandler
from pyftpdlib.ioloop import Acceptor, asyncore

from bridge.loop.turns import Interrupt, Session, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist): of
# AsyncChat: _closed; of SSLConnectionMixin: _ssl_accepting, _ssl_want_read, _ssl_want_write.

log = logging.getLogger(__name__)

READ = 1  # gevent's and pyftpdlib's bits agree
WRITE = 2

#: What an exception must be to leave a turn for the caller of loop(); the rest ends in handle_error().
FOR_THE_CALLER = (KeyboardInterrupt, SystemExit, asyncore.ExitNow)

#: Seconds a channel rests that cannot make use of its events: the first time, and at most. The values
#: and the doubling are those of gevent.baseserver.BaseServer for accept errors.
MIN_DELAY = 0.01
MAX_DELAY = 1.0

#: Errors of accept() that will not go away (gevent.baseserver.BaseServer.fatal_errors). After any other,
#: above all EMFILE, ENFILE, ENOBUFS and ENOMEM, a listener rests and tries again; pyftpdlib closes it.
FATAL_FOR_LISTENER = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})


#: Bytes that one event of a data connection moves, in pyftpdlib's blocks, before others have their turn:
#: 0.5 ms, as many as `blocks.RECEIVING`.
BULK = 1 << 20

#: What a full block is: pyftpdlib's, and what TLS makes of it, one record (RFC 8446, 5.1).
CHUNK = 65536
TLS_RECORD = 16384

#: Connections that are accepted for one event, at most: gevent's BaseServer.max_accept.
ACCEPTS = 100

#: Linux: where struct tcp_info has tcpi_unacked, which for a listener is how many connections wait (tcp(7)).
_UNACKED = slice(24, 28)


class Registration:
    """One channel on the loop, with its watcher.

    The watcher is None before `attach`, while the ioloop has no hub, and after `detach`; it is stopped while
    `parked` (the session is busy) and while `resting` (a timer that ends a back-off).
    """

    __slots__ = (
        "accepts",
        "block",
        "channel",
        "context",
        "control",
        "delay",
        "events",
        "fd",
        "handshake",
        "listens",
        "parked",
        "ready",
        "resting",
        "session",
        "turns",
        "watcher",
    )

    def __init__(self, fd: int, channel: Any, events: int, *, has_hub: bool) -> None:
        fcntl(fd, F_GETFD)  # raises OSError (EBADF) if it is not open
        self.fd = fd
        self.channel = channel
        self.events = events
        #: The control connection this channel belongs to; for a control connection, itself.
        self.control = getattr(channel, "cmd_channel", channel)
        #: None for a listener: each accept is a session of its own, made from `context`.
        self.session: Session | None = None
        #: Of whoever registered the channel; needed by listeners, and until there is a session.
        self.context: contextvars.Context | None = None
        #: Bytes of a full block, if one event may move several; else 0.
        self.block = 0
        self.listens = self.control is channel and isinstance(channel, Acceptor)
        #: Turns of a listener that have been asked for, for connections that wait.
        self.accepts = 0
        if self.control is not channel:
            if isinstance(channel, DTPHandler) and not getattr(channel, "moves_in_bulk", False):
                self.block = TLS_RECORD if hasattr(channel, "_ssl_accepting") else CHUNK
        elif self.listens:
            self.control = None  # an accept that is killed must not close its listener
        if self.listens or not has_hub:
            self.context = contextvars.copy_context()
        #: Of the hub it is attached to.
        self.turns: Turns
        self.watcher: Any = None
        #: Events the watcher has seen, if it watches for more than one.
        self.ready = 0
        self.parked = False
        self.resting: Any = None
        self.delay = 0.0
        #: What a TLS handshake waits for, watched for instead of `events`; 0 when there is none.
        self.handshake = 0

    # --- runs in the hub's thread

    def attach(self, turns: Turns) -> None:
        """Make the watcher and start it. Raises OSError (EBADF) if the fd is not open."""
        self.turns = turns
        if not self.listens:
            self.session = turns.session_of(self.control, self.context)
        try:
            self.watcher = turns.hub.loop.io(self.fd, self.events)
        except ValueError as error:
            raise OSError(errno.EBADF, f"cannot watch file descriptor {self.fd}") from error
        self._start()

    def _start(self) -> None:
        """Start the watcher, which is not active; without Python code for each event, where possible."""
        turns = self.turns
        try:
            fcntl(self.fd, F_GETFD)
        except OSError:  # closed since, behind our back: the channel finds out when it is served
            turns.hub.loop.run_callback(turns.on_pass)
            turns.enqueue(self)
            return
        if turns.has_check_watcher and (self.handshake or self.events) != READ | WRITE:
            self.watcher.start(turns.enqueue, self)
        else:
            self.watcher.start(self._on_ready, pass_events=True)

    def modify(self, events: int) -> None:
        """Watch for other events; ends a rest."""
        self.events = events
        self.handshake = 0
        if self.resting is not None:
            self._end_rest()
        self._watch(events)

    def _watch(self, events: int) -> None:
        watcher = self.watcher
        if watcher is not None:
            watcher.stop()
            watcher.events = events
            if not self.parked and self.resting is None:
                self._start()

    def detach(self) -> None:
        """Release the watcher; before the fd is closed. Twice is no harm."""
        if self.resting is not None:
            self._end_rest()
        self.ready = self.accepts = 0
        self.parked = False
        watcher, self.watcher = self.watcher, None
        if watcher is not None:
            watcher.stop()
            watcher.close()

    def _end_rest(self) -> None:
        if self.resting is not None:
            self.resting.stop()
            self.resting.close()
            self.resting = None

    # --- runs in the hub: must not block

    def _on_ready(self, events: int) -> None:
        turns = self.turns
        turns.expect_pass()
        turns.enqueue(self)
        self.ready = events

    # --- runs in a worker greenlet: may wait

    def admit(self) -> Session | None:
        """The session an accept is to create; what is busy rests, what is unregistered stays so."""
        if self.watcher is None:
            return None
        if self.session is None:
            assert self.context is not None
            return Session(self.turns, self.context.copy(), vacant=True)
        self.ready = 0
        self.watcher.stop()
        self.parked = True
        self.session.defer(self.control, self._unpark, None)
        return None

    # --- runs in the hub: must not block

    def _on_rested(self) -> None:
        self._end_rest()
        if self.watcher is not None and not self.parked:
            self._start()

    # --- runs in a worker greenlet: may wait

    def _unpark(self, _: object) -> None:
        if self.parked:
            self.parked = False
            if self.watcher is not None and self.resting is None:
                self._start()

    def handle(self) -> None:
        """One turn for what is ready: what asyncore's read() and write() do, and pyftpdlib's poll()."""
        channel = self.channel
        consumed = False
        unwatched = not (self.watcher.active or self.resting or self.parked)  # 0.07 of a command's 77 us
        if unwatched:
            # epoll_ctl(2) has refused (ENOSPC, ENOMEM): libev gives the watcher up, with one last event.
            if not self.delay:
                log.error(
                    "%r cannot be watched; looking at it every %g to %g s", channel, MIN_DELAY, MAX_DELAY
                )
            self._rest(None)
        events = self.ready
        if not events:
            events = self.handshake or self.events
        else:
            self.ready = 0
            if not 0 < events <= READ | WRITE:
                # libuv reports an error as a negative number and stops watching; let the channel find out.
                self.modify(self.events)
                events = READ | WRITE
        try:
            if events & READ and channel.readable():
                consumed = True
                if self.block:
                    self._move(channel.handle_read_event, READ)
                else:
                    channel.handle_read_event()
                    if self.listens:
                        self._accept_more()
            if events & WRITE and self.watcher is not None and channel.writable():
                consumed = True
                if self.block:
                    self._move(channel.handle_write_event, WRITE)
                else:
                    channel.handle_write_event()
        except FOR_THE_CALLER:
            raise
        except Interrupt:
            return
        except (GreenletExit, Timeout) as error:
            worker = getcurrent()
            end_session(worker.control, error)
            return
        except BaseException as error:
            if self.session is None and isinstance(error, OSError) and error.errno not in FATAL_FOR_LISTENER:
                self._rest(error)
            else:
                self._handle_error()
            return
        if self.events & WRITE:
            handshake = _handshake(channel)
            if handshake != self.handshake:
                self.handshake = handshake
                self._watch(handshake or self.events)
        if not consumed:
            # Ready, but neither side wants it (a connection that hung up while its transfer is
            # throttled, say): the fd stays ready and would wake the hub for ever.
            self._rest(None)
        elif self.delay and not unwatched:
            self.delay = 0.0
            if self.session is None:
                log.warning("%r accepts connections again", channel)

    def _move(self, handle: Callable[[], None], event: int) -> None:
        """Handle an event of a data connection, and again while it moves full blocks."""
        channel = self.channel
        moved = channel.tot_bytes_received + channel.tot_bytes_sent
        until = moved + BULK - self.block
        while True:
            handle()
            before, moved = moved, channel.tot_bytes_received + channel.tot_bytes_sent
            if moved - before < self.block or moved > until:
                return
            if self.watcher is None or not self.events & event or not self.session or self.session.backlog:
                return  # closed, throttled, done; or something else is due in this session

    def _accept_more(self) -> None:
        """Ask for a turn for each connection that waits to be accepted."""
        if self.accepts:
            self.accepts -= 1
        elif self.watcher is not None:
            self.accepts = min(_waiting(self.channel.socket), ACCEPTS - 1)
            if self.accepts:
                self.turns.expect_pass()  # this turn may have waited, and nobody be there to go on with them
                self.turns.again(self, self.accepts)

    def _handle_error(self) -> None:
        """Let the channel deal with the exception being handled, and survive if it cannot."""
        try:
            self.channel.handle_error()
        except FOR_THE_CALLER:
            raise
        except (GreenletExit, Timeout) as error:
            end_session(getcurrent().control, error)
        except BaseException:
            log.critical("%r failed in handle_error(); closing it", self.channel, exc_info=True)
            close_quietly(self.channel)

    def _rest(self, error: OSError | None) -> None:
        """Stop watching for a while, longer every time in a row."""
        if error is not None and not self.delay:
            log.error(
                "%r cannot accept: %s; trying again every %g to %g s "
                "(descriptors: see RLIMIT_NOFILE and FTPServer.max_cons)",
                self.channel,
                error,
                MIN_DELAY,
                MAX_DELAY,
            )
        if self.watcher is None or self.resting is not None:
            return
        if error is not None:
            self.turns.on_accept_error()
        self.delay = min(self.delay * 2 or MIN_DELAY, MAX_DELAY)
        self.watcher.stop()
        self.resting = self.turns.hub.loop.timer(self.delay)
        self.resting.start(self._on_rested, update=True)  # the delay begins now, and not when this pass began


def _waiting(listener: Any) -> int:
    """How many connections the kernel has for *listener*; 0 where it does not say."""
    if sys.platform != "linux":
        return 0
    try:
        info = listener.getsockopt(socket.SOL_TCP, socket.TCP_INFO, _UNACKED.stop)
    except OSError:  # a Unix socket
        return 0
    return int.from_bytes(info[_UNACKED], sys.byteorder)


def _handshake(channel: Any) -> int:
    """What a channel's TLS handshake (pyftpdlib's SSLConnectionMixin) waits for; 0 if there is none."""
    if not getattr(channel, "_ssl_accepting", False):
        return 0
    return READ if channel._ssl_want_read else WRITE if channel._ssl_want_write else 0


def end_session(control: Any, error: BaseException) -> None:
    """A turn was killed or timed out: say so if the client can still hear it, and close."""
    if isinstance(error, Timeout):
        log.warning("%r ends: nobody caught %s (%r)", control, type(error).__name__, error, exc_info=error)
    else:
        log.info("%r ends: its turn was killed", control)
    if control is None or getattr(control, "_closed", False):
        return
    respond = getattr(control, "respond", None)
    if respond is not None:
        try:
            respond("421 Service closing control connection.")
        except (Exception, GreenletExit, Timeout):
            log.debug("%r could not be told", control, exc_info=True)
    close_quietly(control)


def close_quietly(channel: Any) -> None:
    """Close a channel whose own code may be what failed, or whose turn is killed once more."""
    try:
        channel.close()
    except (GreenletExit, Timeout) as error:
        log.info("%r was closing when its turn was ended: %r", channel, error)
    except Exception:
        log.critical("%r failed to close", channel, exc_info=True)
