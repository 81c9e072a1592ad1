"""What an operator sees of a session: a snapshot, and two things to do with it.

Sits on session/hooks.py, session/data.py and loop/turns.py, which know what runs and who waits; the handler
does the two things. Reads pyftpdlib's handlers from any thread and changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from bridge.loop import waiting_since
from bridge.session import Transfer, transfer_of, transferring


@dataclass(frozen=True)
class ClientSession:
    """A session at one moment. Times are `time.time()`."""

    #: The control connection, to act on or to look closer.
    handler: Any
    #: "" before USER; see `handler.authenticated`.
    user: str
    #: IP address and port.
    remote_address: tuple[str, int]
    connected_since: float
    #: None while a command or a transfer is under way.
    idle_since: float | None
    #: The command that is being handled, or whose transfer runs.
    command: str | None
    transfer: Transfer | None
    #: Since when its turn waits; None if it does not.
    waiting_since: float | None

    def disconnect(self, reason: str = "Disconnected by the server.") -> None:
        """End the session: 426 for its transfer, 421 with *reason*, close. Legal from anywhere."""
        self.handler.disconnect(reason)

    def abort_transfer(self, reason: str = "Transfer aborted by the server.") -> None:
        """End its transfer, if it has one, with 426 and *reason*. Legal from anywhere."""
        self.handler.abort_transfer(reason)


def snapshot(handler: Any) -> ClientSession:
    """The session of *handler*, now."""
    transfer = transfer_of(handler) if transferring(handler) else None
    command = handler.command or (transfer.command if transfer is not None else None)
    waits = waiting_since(handler)
    return ClientSession(
        handler=handler,
        user=handler.username,
        remote_address=(handler.remote_ip, handler.remote_port),
        connected_since=handler.started,
        idle_since=handler.last_active if command is None else None,
        command=command,
        transfer=transfer,
        waiting_since=None if waits is None else time.time() - (time.monotonic() - waits),
    )
