"""Small objects that wait when told to, to stand in for slow authorizers, file systems and callbacks."""

from __future__ import annotations

from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from pyftpdlib.authorizers import AuthenticationFailed, DummyAuthorizer
from pyftpdlib.filesystems import AbstractedFS
from pyftpdlib.handlers import FTPHandler

from support.servers import eventually

#: Seconds after which a gate gives up, so that a broken test ends with an error instead of a hang. More than
#: all that a test does before it opens the gate.
PATIENCE = 100.0

_allocate_lock = monkey.get_original("_thread", "allocate_lock")


class Gate:
    """Code under test waits here; the test sees it arrive and lets it go on."""

    def __init__(self) -> None:
        self._arrived = Event()
        self._open = Event()
        self.arrivals = 0

    def wait(self) -> None:
        self.arrivals += 1
        self._arrived.set()
        if not self._open.wait(PATIENCE):
            raise RuntimeError("nobody opened the gate")

    def arrived(self) -> None:
        """Return once somebody waits."""
        assert self._arrived.wait(PATIENCE), "nobody came to the gate"

    def open(self) -> None:
        self._open.set()


class WaitingAuthorizer(DummyAuthorizer):
    """Users named `slow...` wait at the gate when they log in; or everybody for some seconds."""

    def __init__(self, gate: Gate | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        self.gate = gate
        self.seconds = seconds

    def validate_authentication(self, username: str, password: str, handler: Any) -> None:
        if self.seconds:
            gevent.sleep(self.seconds)
        if self.gate is not None and username.startswith("slow"):
            self.gate.wait()
        if not self.has_user(username) or password != "p":
            raise AuthenticationFailed("Authentication failed.")


class WaitingFS(AbstractedFS):
    """Opening a file whose name starts with `slow` waits at the gate of the handler's class."""

    gate: Gate

    def open(self, filename: str, mode: str) -> Any:
        if "/slow" in filename:
            self.gate.wait()
        return super().open(filename, mode)


class RecordingHandler(FTPHandler):
    """Writes down the callbacks it gets; subclasses override `events`."""

    events: list[tuple[Any, ...]]

    def on_connect(self) -> None:
        self.events.append(("connect",))

    def on_disconnect(self) -> None:
        self.events.append(("disconnect",))

    def on_login(self, username: str) -> None:
        self.events.append(("login", username))

    def on_file_received(self, file: str) -> None:
        self.events.append(("received", file))

    def on_incomplete_file_received(self, file: str) -> None:
        self.events.append(("incomplete", file))


class NativeGate:
    """Code that blocks its thread for real stops here, until the test lets it go on."""

    def __init__(self) -> None:
        self.arrivals = 0
        self._lock = _allocate_lock()
        self._lock.acquire()

    def wait(self) -> None:
        self.arrivals += 1
        assert self._lock.acquire(timeout=PATIENCE), "nobody opened the gate"
        self._lock.release()

    def arrived(self, count: int = 1) -> None:
        eventually(lambda: self.arrivals >= count)

    def open(self) -> None:
        self._lock.release()
