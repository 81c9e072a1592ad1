"""pyftpdlib's IOLoop on gevent's hub, enough by itself for pyftpdlib's own servers.

A channel's watcher (registration.py) asks for a turn, turns.py runs it on a worker greenlet, scheduler.py
does the same for timers, hubs.py chooses the hub, wakeups.py wakes it from outside, monitor.py says what
waits or blocks. ioloop.py is pyftpdlib's interface to all of it.

It never calls pyftpdlib in the hub, never patches, and knows nothing of FTP beyond pyftpdlib's channels.
Begin with turns.py, whose header argues why this is right.

Public names: GeventIOLoop, current_session, install, uninstall, watch_hub. (The rest is for other rooms.)
"""

from bridge.loop.hubs import seconds_until
from bridge.loop.install import install, uninstall
from bridge.loop.ioloop import GeventIOLoop
from bridge.loop.monitor import watch_hub
from bridge.loop.native_socket import NativeSocket
from bridge.loop.registration import TLS_RECORD, close_quietly
from bridge.loop.turns import Interrupt, current_session, waiting_since
from bridge.loop.wakeups import wake_on_signals

__all__ = [
    "TLS_RECORD",
    "GeventIOLoop",
    "Interrupt",
    "NativeSocket",
    "close_quietly",
    "current_session",
    "install",
    "seconds_until",
    "uninstall",
    "waiting_since",
    "wake_on_signals",
    "watch_hub",
]
