"""In every Python program that a test starts: a `honesty.Watch` over each hub.

conftest.py puts this directory into PYTHONPATH, and into BRIDGE_TEST_BLOCKS the file that blocks are written
to. A hub is watched from its first run on, when gevent starts its monitor thread. The file is opened at once,
since a program may change its user. Programs with --chroot are not watched: their tests are about what they
import before and after.
"""

from __future__ import annotations

import os
import sys

if "BRIDGE_TEST_BLOCKS" in os.environ and "--chroot" not in sys.orig_argv:
    import gevent
    import gevent.events

    # For the life of the process. (No file object: Python would warn at its end that nobody has closed it.)
    _fd = os.open(os.environ["BRIDGE_TEST_BLOCKS"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _on_event(event: object) -> None:
        if isinstance(event, gevent.events.PeriodicMonitorThreadStartedEvent):
            sys.path.append(os.path.dirname(os.path.dirname(__file__)))
            try:
                from support import honesty
            finally:
                sys.path.pop()
            watch = honesty.Watch(event.monitor.hub, _write)
            watch.monitor()
            watch.start()

    def _write(block: object) -> None:
        os.write(_fd, f"{' '.join(sys.orig_argv)[:200]}: {block}\n".encode(errors="surrogateescape"))

    gevent.config.monitor_thread = True
    gevent.events.subscribers.append(_on_event)
