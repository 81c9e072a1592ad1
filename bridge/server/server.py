"""GeventFTPServer: pyftpdlib's FTPServer with the life that a gevent program expects.

Its job: one server's life from bind to the last goodbye, and who may connect. Sits on loop/ioloop.py (which
serves), session/handlers.py (which gives every handler class what a drain needs) and sessions.py (what an
operator sees). It never blocks the hub and never touches a session's channels except in that session's turn.

The words are those of gevent's BaseServer, so it can stand in a list beside a WSGIServer. The state is one
variable; MOVES is the table of what may happen in it:

    created ---start---> started ---stop, close---> draining ---(the last session ends)---> closed
       '-----------------stop, close-----------------------------------------------------------^

In a drain the listener closes first. A session without a transfer gets 421 and closes when its turn, if
one runs, has ended; a session in a transfer gets 421 after that transfer's 226, with its next command or a
second later, so that its client may read to the end. At the timeout what is left gets 426 and 421, turns
that wait are ended by an exception, and files are closed.

What is whose: a loop that is passed in is borrowed; one that the server makes ends with it. A socket that is
passed in becomes the server's, as pyftpdlib has it.

(Over 400 lines: a server's life is one state, and one class.)
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import traceback
from collections import Counter
from typing import Any

import gevent
from gevent import getcurrent, monkey
from gevent.event import Event
from pyftpdlib.log import logger as pyftpdlib_logger

from bridge.loop import GeventIOLoop, close_quietly, current_session, hubs
from bridge.server import listeners
from bridge.server.drain import FAREWELL, KILL_GRACE, Drain, StopReport
from bridge.server.sessions import ClientSession, snapshot
from bridge.session import prepared

# pyftpdlib.servers creates two locks of multiprocessing when it is imported (pyftpdlib 2.2), for its
# MultiprocessFTPServer, which always forks. With the start method "forkserver", the default from Python 3.14
# on, a lock starts a process, the resource tracker, and has a file that is removed at exit, which fails after
# --user or --chroot. So the method is "fork" during this import. A method that the program has set stays.
_set_method = (
    multiprocessing.get_start_method(allow_none=True) is None
    and multiprocessing.get_all_start_methods()[0] == "forkserver"
)
if _set_method:
    multiprocessing.set_start_method("fork")
try:
    from pyftpdlib.servers import FTPServer
finally:
    if _set_method:
        multiprocessing.set_start_method(None, force=True)

log = logging.getLogger(__name__)

_get_ident = monkey.get_original("_thread", "get_ident")
_allocate_lock = monkey.get_original("_thread", "allocate_lock")

#: What each call does in each state; what is missing is refused with a RuntimeError and changes nothing.
MOVES = {
    "created": {"start": "started", "close": "closed"},
    "started": {"start": "started", "close": "draining"},
    "draining": {"close": "draining", "ended": "closed"},
    "closed": {"close": "closed", "ended": "closed"},
}


class AddressCounts(Counter[str]):
    """pyftpdlib's `ip_map`, a list that it scans for every connection; here a count for each address."""

    def append(self, ip: str) -> None:
        """One session more from *ip*."""
        self[ip] += 1

    def remove(self, ip: str) -> None:
        """One session less from *ip*."""
        self[ip] -= 1
        if self[ip] <= 0:
            del self[ip]

    def count(self, ip: str) -> int:
        """How many sessions come from *ip*."""
        return self[ip]


class GeventFTPServer(FTPServer):
    """An FTP server on gevent's hub that starts, stops, drains and survives.

    - (tuple, str, os.PathLike, socket) address_or_socket: host and port to listen on, "" for all
      addresses, port 0 for any free one; the path of a Unix socket, whose file is made here and removed
      at the end; or a bound stream socket, which becomes the server's. Bound at once (OSError), served
      from `start()` on.
    - (class) handler: a subclass of pyftpdlib's FTPHandler. What it lacks of `bridge.session` is
      added in a subclass made for this server.
    - (GeventIOLoop) ioloop: borrowed; None for one of its own, which ends with the server.
    - (int) backlog: connections the kernel keeps until they are accepted (gevent's StreamServer: 256).

    Class attributes, besides pyftpdlib's:

    - (int) max_cons: sessions at once, 0 for no limit. pyftpdlib counts listeners and data connections too.
    - (int) max_cons_per_ip: sessions at once from one address, 0 for no limit.
    - (float) stop_timeout: seconds `stop()` lets sessions finish; None for no limit. gevent's is 1, which is
      short for a transfer; container managers kill after 10 (docker) to 90 (systemd).

    Logs to `bridge.server.server`; what pyftpdlib's server logs stays on `pyftpdlib`.
    """

    stop_timeout: float | None = 10.0

    def __init__(
        self, address_or_socket: Any, handler: Any, ioloop: GeventIOLoop | None = None, backlog: int = 256
    ) -> None:
        if ioloop is not None and not isinstance(ioloop, GeventIOLoop):
            raise TypeError(f"ioloop must be a bridge.GeventIOLoop, not {ioloop!r}")
        self._state = "created"
        self._owns_ioloop = ioloop is None
        self._unix_path: str | None = None
        self._sessions: dict[Any, None] = {}
        self._leaving = Event()  # set when no longer started
        self._drain: Drain | None = None
        if isinstance(address_or_socket, (str, os.PathLike)):
            self._unix_path = os.path.abspath(os.fspath(address_or_socket))
            address_or_socket = listeners.unix_listener(self._unix_path)
        try:
            super().__init__(address_or_socket, prepared(handler), ioloop or GeventIOLoop(), backlog)
        except BaseException:
            if self._unix_path is not None:
                address_or_socket.close()
                os.unlink(self._unix_path)
            raise
        self.ip_map = AddressCounts()
        self._address: Any = self.socket.getsockname()
        if isinstance(self._address, tuple):
            self._address = self._address[:2]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state}, {len(self._sessions)} session(s), at {self._where()}>"

    # --- gevent's words: what it is

    @property
    def state(self) -> str:
        """`created`, `started`, `draining` or `closed`."""
        return self._state

    @property
    def started(self) -> bool:
        """Whether connections are accepted."""
        return self._state == "started"

    @property
    def closed(self) -> bool:
        """Whether nothing is left: no listener and no session."""
        return self._state == "closed"

    @property
    def address(self) -> Any:
        """Host and port, or the path of a Unix socket; also when closed."""
        return self._address

    @property
    def server_host(self) -> str | None:
        """The address it is bound to; None for a Unix socket."""
        return self._address[0] if isinstance(self._address, tuple) else None

    @property
    def server_port(self) -> int | None:
        """The port it is bound to; None for a Unix socket."""
        return self._address[1] if isinstance(self._address, tuple) else None

    def sessions(self) -> list[ClientSession]:
        """A snapshot of each session, in the order in which they connected. From any thread."""
        return [snapshot(control) for control in list(self._sessions)]

    # --- gevent's words: what it does

    def start(self) -> None:
        """Accept connections, on the hub of this thread; return when they are. Twice is no harm.

        Raises RuntimeError when draining or closed, or if the loop runs in another thread.
        """
        if self._state == "started":
            return
        self._check("start")
        self.ioloop.attach()
        self._move("start")
        try:
            self.add_channel()
        except BaseException:
            self.close()
            raise
        self._log("starting")

    def stop(self, timeout: float | None = None) -> StopReport | None:
        """Drain: stop accepting, let transfers finish for *timeout* seconds, end the rest; say what was.

        - (float) timeout: None for `stop_timeout`. A second call may shorten a drain, but not prolong it.

        Legal from everywhere, in every state, more than once and concurrently: all callers get the same
        report. It returns when nothing is left, at most KILL_GRACE seconds after the timeout; except that
        in the hub, in a signal handler that interrupts it, and in a turn of one of this server's
        sessions (which it would wait for) it returns None at once. From another thread it blocks that
        thread; if the hub does not run until the timeout, it closes everything from there.

        The drain goes on when the greenlet that waits here is killed.
        """
        if timeout is None:
            timeout = self.stop_timeout
        hub = self.ioloop.hub
        if self._state in ("created", "closed") or hub is None:
            self._end_now()
            return self._report()
        if _get_ident() != hub.thread_ident:
            return self._stop_from_another_thread(timeout)
        self._begin_drain(timeout)
        if getcurrent() is hub or current_session() in self._sessions:
            return None
        return self._report()

    def close(self) -> None:
        """Stop accepting and close the listener; sessions go on until they end by themselves."""
        if self._state in ("draining", "closed"):
            return
        if self._state == "started":
            self._log("shutting down")
        self._move("close")
        super().close()
        if self._unix_path is not None:
            try:
                os.unlink(self._unix_path)
            except FileNotFoundError:
                pass  # somebody was faster
        self._leaving.set()
        if self._state == "closed" or not self._sessions:
            self._end()

    def close_all(self) -> None:
        """pyftpdlib's word for `stop(0)`."""
        self.stop(0)

    def serve_forever(self, stop_timeout: float | None = None) -> None:
        """Start if not started; return when the server is closed, after `stop(stop_timeout)` if need be.

        Unlike pyftpdlib's it takes no `handle_exit`: KeyboardInterrupt and what else ends the waiting is
        raised again when the server has stopped. As gevent's.
        """
        if not self.started:
            self.start()
        self._log_start()
        try:
            self._leaving.wait()
        finally:
            # Somebody's drain that runs already keeps its own timeout.
            stop = self._report if self._leaving.is_set() and self._drain is not None else self.stop
            gevent.spawn(stop, stop_timeout).join()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- the end

    def _begin_drain(self, timeout: float | None) -> None:
        """Start the drain or hasten it. Does not block."""
        if self._drain is not None:
            self._drain.hasten(timeout)
        elif self._sessions:
            self._drain = Drain(self._sessions, self.ioloop, timeout, self._end_now)
            self.close()
        else:
            self.close()

    def _stop_from_another_thread(self, timeout: float | None) -> StopReport | None:
        stopped = _allocate_lock()
        stopped.acquire()
        report: list[StopReport | None] = []

        def stop() -> None:
            try:
                report.append(self.stop(timeout))
            finally:
                stopped.release()

        def _on_hub() -> None:
            gevent.spawn(stop)

        if self.ioloop.post(_on_hub) and stopped.acquire(
            timeout=-1 if timeout is None else timeout + 2 * KILL_GRACE
        ):
            return report[0]
        with hubs.lock:  # nobody runs that hub
            self._end_now()
        return StopReport()

    def _end_now(self) -> None:
        """End everything, whether or not the hub runs."""
        self.close()
        if self._owns_ioloop:
            self.ioloop.close()
        for control in list(self._sessions):
            close_quietly(control)
            self.session_ended(control)

    def _end(self) -> None:
        """Nothing is left."""
        self._move("ended")
        if self._owns_ioloop:
            self.ioloop.close()

    def _report(self, _: object = None) -> StopReport:
        return StopReport() if self._drain is None else self._drain.join()

    # --- called by the handlers (bridge.session.control.SessionMixin)

    def session_ended(self, control: Any) -> None:
        """*control* is closed, and its last turn is over."""
        if control in self._sessions:
            del self._sessions[control]
            if not self._sessions and self._state == "draining":
                self._end()
            if self._drain is not None:
                self._drain.session_ended()

    def transfer_ended(self, control: Any, completed: bool) -> None:
        """A transfer of *control*, listings included, has had its last reply."""
        if self._drain is not None:
            self._drain.transfer_ended(control, completed)

    # --- runs in a worker greenlet: may wait

    def handle_accepted(self, sock: Any, addr: Any) -> Any:
        """As pyftpdlib's; limits count sessions, at the same cost however many there are."""
        if self._unix_path is not None or not isinstance(addr, tuple):
            sock = listeners.LocalConnection.of(sock)
            addr = sock.getpeername()
        ip = addr[0]
        self.ip_map.append(ip)
        try:
            handler = self.handler(sock, self, ioloop=self.ioloop)
        except Exception:
            # pyftpdlib's rule: a bug in an application's handler must not end the server.
            pyftpdlib_logger.error(traceback.format_exc())
            self.ip_map.remove(ip)
            sock.close()
            return None
        if not handler.connected:
            if not handler.remote_ip:  # else its close() has done it
                self.ip_map.remove(ip)
            return None
        self._sessions[handler] = None
        try:
            refusal = self.admit(ip)
            if self._state != "started":  # while its constructor waited
                handler.finish(FAREWELL)
            elif refusal is not None:
                handler.finish(refusal)
            elif self.max_cons and self.session_count() > self.max_cons:
                handler.handle_max_cons()
            elif self.max_cons_per_ip and self.ip_map.count(ip) > self.max_cons_per_ip:
                handler.handle_max_cons_per_ip()
            else:
                handler.handle()
                return handler
        except Exception:
            handler.handle_error()
        return None

    def admit(self, ip: str) -> str | None:
        """Asked for each new connection, before the limits: None, or the text of the 421 that it gets."""
        return None

    def session_count(self) -> int:
        """What `max_cons` limits."""
        return len(self._sessions)

    def handle_error(self) -> None:
        """Log what an accept raised; unlike pyftpdlib's, go on listening unless the socket is broken."""
        pyftpdlib_logger.error(traceback.format_exc())
        try:
            self.socket.getsockname()
        except OSError:
            self.close()

    # --- pyftpdlib's interface

    def add_channel(self, map: Any = None, events: Any = None) -> None:
        """Register the listener, once the server is started: before, nothing is accepted."""
        if self._state == "started":
            super().add_channel(map, events)

    def bind_af_unspecified(self, addr: Any) -> Any:
        """As pyftpdlib; the error says which address it was."""
        try:
            return super().bind_af_unspecified(addr)
        except OSError as error:
            # pyftpdlib wraps the error of the last address it tried in another OSError.
            reason = error.args[0] if error.args and isinstance(error.args[0], OSError) else error
            number = reason.errno or errno.EADDRNOTAVAIL
            raise OSError(number, f"cannot listen on {addr!r}: {reason.strerror or reason}") from error

    def _accept_new_cons(self) -> bool:
        """Asked for data connections: they do not count."""
        return True

    # --- helpers

    def _log(self, what: str) -> None:
        kind = "FTPS (FTP over SSL)" if hasattr(self.handler, "ssl_protocol") else "FTP"
        pyftpdlib_logger.info(">>> %s %s server on %s, pid=%d <<<", what, kind, self._where(), os.getpid())

    def _where(self) -> str:
        return f"{self.address[0]}:{self.address[1]}" if isinstance(self.address, tuple) else self.address

    def _check(self, call: str) -> str:
        state = MOVES[self._state].get(call)
        if state is None:
            raise RuntimeError(f"{self!r}: no {call}() when {self._state}; make a new server")
        return state

    def _move(self, call: str) -> None:
        self._state = self._check(call)
