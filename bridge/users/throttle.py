"""Data connections with a limit of bytes a second, with TLS or without.

A leaf of the package: `Rate`, which any number of connections share, and a mix-in for data connections that
keeps to it. pyftpdlib's ThrottledDTPHandler limits each connection by itself, is no TLS handler, and sends
for a second before it looks.

A connection that has moved *n* bytes stops for as long as *n* bytes may take; of several that share a rate
each waits for those before it. Its watcher is off meanwhile: nothing is polled, and TCP slows the client.
Bytes go through Python (no sendfile, no splice), so that they can be counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of DTPHandler: _closed, _fileno.
from pyftpdlib.exceptions import _RetryError  # isort: skip
from pyftpdlib.ioloop import timer  # isort: skip

if TYPE_CHECKING:
    from pyftpdlib.handlers import DTPHandler as _DTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _DTPHandler = object

#: Bytes at a time: a fraction of a second's, so that it flows; at least a TLS record, of which OpenSSL keeps
#: what is not taken where no event tells of it; at most what pyftpdlib moves at a time.
FRACTION = 8
LEAST, MOST = 16 << 10, 64 << 10


class Rate:
    """So many bytes a second, for all who share it.

    - (int) limit: bytes a second, 0 for no limit. May be changed at any time.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._free_at = 0.0

    @property
    def block(self) -> int:
        """Bytes to move at a time."""
        return min(max(self.limit // FRACTION, LEAST), MOST)

    def spend(self, count: int) -> float:
        """Note *count* bytes; the time (pyftpdlib's `timer`) at which who moved them may go on."""
        if not self.limit:
            return 0.0
        self._free_at = max(self._free_at, timer()) + count / self.limit
        return self._free_at


class ThrottledMixin(_DTPHandler):
    """For a `dtp_handler` class; put it first. The control connection has the rates as `up` and `down`."""

    cmd_channel: Any
    ioloop: Any
    _fileno: int
    _closed: bool
    _alarm: Any = None

    # --- runs in a worker greenlet: may wait. pyftpdlib's methods

    def use_sendfile(self) -> bool:
        """As pyftpdlib; not if it is to be slow."""
        return not self.cmd_channel.down.limit and bool(super().use_sendfile())

    def recv(self, buffer_size: int) -> bytes:
        """As pyftpdlib, and wait then."""
        if self._waits():  # an event that was under way, or TLS has asked for
            raise _RetryError
        rate = self.cmd_channel.up
        if rate.limit:
            buffer_size = min(buffer_size, rate.block)
        chunk: bytes = super().recv(buffer_size)
        self._wait_until(rate.spend(len(chunk)))
        return chunk

    def send(self, data: Any) -> int:
        """As pyftpdlib, and wait then."""
        if self._waits():
            return 0
        rate = self.cmd_channel.down
        sent: int = super().send(data[: rate.block] if rate.limit else data)
        self._wait_until(rate.spend(sent))
        return sent

    def handle_timeout(self) -> None:
        """As pyftpdlib; it is not the client who is slow while this waits."""
        if self._alarm is None:
            super().handle_timeout()

    def close(self) -> None:
        """As pyftpdlib."""
        self._stop_alarm()
        super().close()

    # --- waiting

    def _waits(self) -> bool:
        if self._alarm is None:
            return False
        if not self._closed and self._fileno in self.ioloop.socket_map:
            self.del_channel()
        return True

    def _wait_until(self, when: float) -> None:
        left = when - timer()
        if left <= 0 or self._closed:
            return
        self.del_channel()
        self._alarm = self.ioloop.call_later(left, self._go_on, _errback=self.handle_error)

    def _go_on(self) -> None:
        self._alarm = None
        if not self._closed and self._fileno not in self.ioloop.socket_map:
            self.add_channel(events=self.ioloop.READ if self.receive else self.ioloop.WRITE)

    def _stop_alarm(self) -> None:
        if self._alarm is not None and not self._alarm.cancelled:
            self._alarm.cancel()
        self._alarm = None
