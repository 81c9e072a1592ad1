"""Tells systemd how the process is: READY, RELOADING, STOPPING, and that it lives.

A part of the command (ftp/application.py) without options: it does something if NOTIFY_SOCKET is set, as
in a unit with Type=notify. The protocol is sd_notify(3)'s, a datagram for each change; it never blocks, and
it is no error if systemd does not listen. The watchdog (WatchdogSec=) is fed by a timer on the hub, so a hub
that is blocked gets the process restarted. Of several processes each feeds it, which needs NotifyAccess=all,
and only the main process tells the rest.

The socket is connected at once: after a chroot its path is gone. It stays open until the process ends.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable

import gevent

from bridge.ftp.application import Application
from bridge.ftp.options import UsageError
from bridge.ftp.start_lines import summary

#: Feed the watchdog this many times in the time after which it bites, as sd_watchdog_enabled(3) recommends.
FEEDINGS = 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """None: systemd says what it wants in environment variables."""


def configure(application: Application) -> None:
    """Tell systemd if it wants to know. Raises UsageError if its socket cannot be used."""
    path = os.environ.pop("NOTIFY_SOCKET", "")  # not meant for child processes either
    interval = _feeding_interval()
    if not path or application.options.check:
        return
    try:
        notifier = Notifier(path)
    except OSError as error:
        raise UsageError(
            f"NOTIFY_SOCKET: cannot connect to {path!r}: {error.strerror}; unset it outside of systemd"
        ) from None
    application.state_observers.append(lambda state: notifier.notify(state, lambda: summary(application)))
    # Around what other parts do on SIGHUP: this one is the last.
    application.reload.insert(0, lambda: application.report_state("reloading"))
    application.reload.append(lambda: application.report_state("ready"))
    if interval is not None:
        application.services.append(lambda: notifier.feed(interval))


def _feeding_interval() -> float | None:
    """Seconds between two feedings of the watchdog; None if it does not watch this process."""
    text, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", str(os.getpid()))
    try:
        if not text or int(pid) != os.getpid():
            return None
        microseconds = int(text)
    except ValueError:
        raise UsageError(f"WATCHDOG_USEC={text!r}, WATCHDOG_PID={pid!r}: no numbers") from None
    return microseconds / 1e6 / FEEDINGS if microseconds > 0 else None


class Notifier:
    """A connection to systemd's socket at *path* (`@name` for an abstract one). Raises OSError."""

    def __init__(self, path: str) -> None:
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect("\0" + path[1:] if path.startswith("@") else path)
        except BaseException:
            self._socket.close()
            raise

    def notify(self, state: str, status: Callable[[], str]) -> None:
        """Send `ready` (with the *status* that systemctl shows), `reloading` or `stopping`.

        Nothing in a child process.
        """
        if os.getpid() != self._pid:
            return
        if state == "ready":
            self._send(f"READY=1\nSTATUS={status()}")
        elif state == "reloading":
            self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        elif state == "stopping":
            self._send("STOPPING=1\nSTATUS=letting transfers finish")

    def feed(self, interval: float) -> Callable[[], None]:
        """Feed the watchdog now and every *interval* seconds of this hub; return what ends it."""
        timer = gevent.get_hub().loop.timer(interval, interval)
        timer.start(self._on_feeding_time)
        self._on_feeding_time()

        def end() -> None:
            timer.stop()
            timer.close()

        return end

    # --- runs in the hub, or in a signal handler: must not block

    def _on_feeding_time(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        try:
            self._socket.send(message.encode(errors="replace"))
        except OSError:
            pass  # full, or systemd is being restarted; the next message tells it
