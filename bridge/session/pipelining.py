"""Commands that come faster than their replies are read, or than others get their turns; and what is none.

A mix-in for control connections, part of `handlers.SessionMixin`; a leaf of the package. It decides when the
next command of what was read is handled; what a command does is not its business.

- **A client that does not read its replies is not read either.** pyftpdlib answers whatever it has read, 64
  KiB of pipelined STATs with a directory listing each, into memory.
- **Pipelined commands take turns with other sessions.** pyftpdlib handles all it has read at once: 64 KiB of
  NLSTs of 2000 names each stop every session for 11 s (measured).
- **What follows a failed login waits for its reply**, which comes late. pyftpdlib goes on with what it has.
- **What follows AUTH TLS in the clear is dropped.** pyftpdlib obeys it, whoever put it there.
- **The rest of a command that is too long is no command.** pyftpdlib says 500 after 2048 bytes and obeys what
  comes behind them: whoever gets a victim to send a long line (a link, a form) chooses the next command.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from bridge.loop import Interrupt

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _in_buffer, _in_buffer_len, _wanted_io_events, _fileno; of
# SSLConnectionMixin: _ssl_accepting.

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _FTPHandler = object

#: Seconds of one client's pipelined commands before others have their turns: a tenth of what gevent's monitor
#: calls a blocked hub (gevent.config.max_blocking_time).
COMMANDS_SLICE = 0.01

#: pyftpdlib's reply to a command that is too long, when it has thrown away what has come of it.
_TOO_LONG = "500 Command too long."


class Replies(list[Any]):
    """What asynchat uses of a deque, for a queue that is empty nearly always.

    An empty deque has 760 bytes, a sixth of what an idle session has (CPython 3.11), this one 56.
    """

    __slots__ = ()

    def appendleft(self, item: Any) -> None:
        """As deque."""
        self.insert(0, item)

    def popleft(self) -> Any:
        """As deque."""
        return self.pop(0)


class PipeliningMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class."""

    ac_in_buffer: bytes
    producer_fifo: Any
    _wanted_io_events: int
    _in_buffer: list[bytes]
    _in_buffer_len: int
    _leaving: str | None
    #: What comes belongs to a command that was too long.
    _skipping = False

    def __init__(self, conn: Any, server: Any, ioloop: Any = None) -> None:
        self._slice_ends = 0.0
        #: Input that waits: until the replies to what came before are sent, or others had their turns.
        self._held = b""
        super().__init__(conn, server, ioloop)
        if not self.producer_fifo:
            self.producer_fifo = Replies()

    def found_terminator(self) -> None:
        """As pyftpdlib; then the rest of the input may have to wait, or is not to be obeyed."""
        try:
            if self._skipping:
                self._skipping = False
                self._in_buffer, self._in_buffer_len = [], 0
            else:
                super().found_terminator()
        except Interrupt:  # of this command, and not of those behind it
            if self.ac_in_buffer:
                self._hold()
            raise
        if self._leaving is not None or getattr(self, "_ssl_accepting", False):
            self.ac_in_buffer = b""
        if self.producer_fifo or (self.ac_in_buffer and (self._is_unregistered() or self._slice_is_over())):
            self._hold()

    def respond_w_warning(self, resp: str) -> None:
        """As pyftpdlib; after its 500 the rest of the line is thrown away."""
        if resp == _TOO_LONG:
            if self._skipping:
                return
            self._skipping = True
        super().respond_w_warning(resp)

    def _hold(self) -> None:
        self._held, self.ac_in_buffer = self.ac_in_buffer, b""
        self._watch_for_writing_only()

    def _is_unregistered(self) -> bool:
        """Whether pyftpdlib reads nothing now, as the reply to a failed login comes first."""
        return self._fileno not in self.ioloop.socket_map

    def _slice_is_over(self) -> bool:
        now = time.monotonic()
        if not self._slice_ends:  # this was the first of several commands
            self._slice_ends = now + COMMANDS_SLICE
        return now > self._slice_ends

    def writable(self) -> bool:
        """As pyftpdlib; input that waits goes on when the client could be sent a reply."""
        return bool(self._held) or bool(super().writable())

    def handle_read(self) -> None:
        """As pyftpdlib, once all replies are sent and what was read before is handled."""
        if self.producer_fifo or self._held:
            self._watch_for_writing_only()
        else:
            self._slice_ends = 0.0
            super().handle_read()

    def handle_write(self) -> None:
        """As pyftpdlib; then goes on with the input that had to wait."""
        super().handle_write()
        if self._held and not (self.producer_fifo or self._closed):
            held, self._held = self._held, b""

            def recv(_: int) -> bytes:
                del self.recv
                return held

            self.recv = recv  # for one call
            self.handle_read()
            if not (self._held or self.producer_fifo):  # also if that was half a command, which has no reply
                self._watch_for(self.ioloop.READ)
        if self.producer_fifo:
            self._watch_for_writing_only()

    # pyftpdlib watches for reading again when a reply is sent that no command of the input has (a transfer's,
    # say), and after a failed login.

    def initiate_send(self) -> None:
        """As pyftpdlib; input that waits is not forgotten."""
        super().initiate_send()
        if self._held:
            self._watch_for_writing_only()

    def add_channel(self, map: Any = None, events: int | None = None) -> None:
        """As pyftpdlib; input that waits is not forgotten."""
        super().add_channel(map, events)
        if self._held:
            self._watch_for_writing_only()

    def _watch_for_writing_only(self) -> None:
        self._watch_for(self.ioloop.WRITE)

    def _watch_for(self, events: int) -> None:
        if not (self._closed or self._is_unregistered()) and self._wanted_io_events != events:
            self._wanted_io_events = events
            self.ioloop.modify(self._fileno, events)

    def handle_timeout(self) -> None:
        """As pyftpdlib; a client that reads no replies is not sent one more."""
        if self.producer_fifo:
            self.log("Control connection timed out, with replies that were never read.")
            self.close()
        else:
            super().handle_timeout()
