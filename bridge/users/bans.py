"""Failed logins: who has many gets slower answers, then none.

A feature of the command (ftp/application.py), for whatever users there are. What counts is the address that a
client comes from, for IPv6 its /64, which one household has:

    login fails ─► one more for its network, for so many seconds ─► the reply comes later with each
                                     │ too many
                   banned for so many seconds ─► 421 to its connections, and to sessions that log in

Counted in all processes together (server/shared_table.py); a process that dies takes its part along. A
failure counts when it happens, not when it is replied to, so that connections side by side gain nothing.
Nobody waits for somebody else's delay. Sessions that are logged in go on.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from bridge.loop import seconds_until
from bridge.server import Full, SharedTable
from bridge.session import plain

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
    from pyftpdlib.servers import FTPServer as _FTPServer
else:  # mix-ins: what they extend is the class they are put before
    _FTPHandler = _FTPServer = object

log = logging.getLogger(__name__)

#: By default: fail2ban's 600 s of looking back and of being banned; twice its 5 failures, because a client
#: that tries `anonymous` first has one with each connection, and several people may share an address.
DEFAULT = "10/600/600"

#: Seconds that the answer to a failed login takes at most. The first takes pyftpdlib's `auth_failed_timeout`
#: (3 s), each further one of the same network twice as long as the one before.
MAX_DELAY = 30.0

#: Rows of each table: four times the networks that are counted, or banned, at once. 10 failures each take a
#: core 3 s of scrypt, which is 2000 networks in 600 s with 10 cores, if attackers are many and we busy.
ROWS = 8192

#: Bits of an IPv6 address that one customer has (RFC 6177).
V6_PREFIX = 64

REFUSAL = "Too many failed logins; try again later."


@dataclass(frozen=True)
class Policy:
    """When a network is banned: at so many failures (0: never) in so many seconds, for so many seconds."""

    failures: int
    seconds: float
    ban: float

    @classmethod
    def parse(cls, text: str) -> Policy:
        """FAILURES/SECONDS[/BANSECONDS], or 0 for never. Raises ValueError."""
        if text == "0":
            return cls(0, 0, 0)
        parts = text.split("/")
        try:
            if not 2 <= len(parts) <= 3:
                raise ValueError
            failures, seconds = int(parts[0]), float(parts[1])
            ban = float(parts[2]) if len(parts) == 3 else seconds
        except ValueError:
            raise ValueError(
                f"{text!r} is no FAILURES/SECONDS or FAILURES/SECONDS/BANSECONDS, and not 0 for never"
            ) from None
        if failures < 1 or not all(0 < each <= 1e9 for each in (seconds, ban)):
            raise ValueError(f"{text!r}: all of it has to be more than 0")
        return cls(failures, seconds, ban)


def network_of(ip: str) -> str:
    """What *ip* is counted as."""
    try:
        address = plain(ip)
    except ValueError:  # none: a Unix socket's, say
        return ip
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address), V6_PREFIX), strict=False))


class Bans:
    """What is known of networks whose logins fail.

    *tables* gives the table of failures, that of bans, and this process's column in both. A failure is 1 in
    the first, for `policy.seconds`; a ban is the time.monotonic() of its end in ms, which all processes of
    a machine share (Linux), in the second, until then.
    """

    def __init__(self, policy: Policy, tables: Callable[[], tuple[SharedTable, SharedTable, int]]) -> None:
        self.policy = policy
        self._tables = tables
        #: When to take something back: the time, and what to do.
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._added = Event()
        self._full_until = 0.0

    # --- runs in a worker greenlet, and in a thread (is_banned)

    def is_banned(self, ip: str) -> bool:
        """Whether logins from *ip* are refused now."""
        _, bans, _ = self._tables()
        return max(bans.columns(network_of(ip)), default=0) > time.monotonic() * 1000

    def failed(self, ip: str) -> int:
        """Count a failed login; how many the network of *ip* has had."""
        network = network_of(ip)
        failures, bans, slot = self._tables()
        now = time.monotonic()
        try:
            count = failures.add(network, 1, slot)
            self._later(now + self.policy.seconds, lambda: failures.add(network, -1, slot))
            if count >= self.policy.failures and not self.is_banned(ip):
                until = now + self.policy.ban
                bans.put(network, int(until * 1000), slot)
                self._later(until, lambda: self._lift(network))
                log.warning(
                    *("%s is banned for %g s: %d failed logins in %g s", network),
                    *(self.policy.ban, count, self.policy.seconds),
                )
        except Full as error:  # nobody else is to suffer from it
            if now >= self._full_until:
                self._full_until = now + 60
                log.error("failed logins are not counted: %s", error)
            return self.policy.failures
        return count

    def _lift(self, network: str) -> None:
        _, bans, slot = self._tables()
        columns = bans.columns(network)
        if columns and columns[slot] <= time.monotonic() * 1000:  # else it was banned again
            bans.put(network, 0, slot)

    def _later(self, when: float, action: Callable[[], object]) -> None:
        heappush(self._due, (when, id(action), action))
        self._added.set()

    # --- runs in a greenlet of its own: may wait

    def start(self) -> Callable[[], object]:
        """Take back in time what has been counted, from now on; returns what ends that."""
        greenlet = gevent.spawn(self._run)
        return lambda: greenlet.kill()

    def _run(self) -> None:
        while True:
            self._added.clear()
            while self._due and self._due[0][0] <= time.monotonic():
                heappop(self._due)[2]()
            self._added.wait(seconds_until(self._due[0][0]) if self._due else None)


class BanMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class."""

    bans: Bans
    auth_failed_timeout: float

    # --- runs in a worker greenlet: may wait. pyftpdlib's methods

    def ftp_PASS(self, line: str) -> None:
        """As pyftpdlib; 421 for who is banned by now."""
        if self.login_refused():
            self.finish(REFUSAL)
        else:
            super().ftp_PASS(line)

    def login_refused(self) -> bool:
        """Whether a password need not be looked at. From any thread."""
        return not self.authenticated and self.bans.is_banned(self.remote_ip)

    def handle_auth_failed(self, msg: str, password: str) -> None:
        """As pyftpdlib; the answer takes longer each time."""
        count = self.bans.failed(self.remote_ip)
        first = type(self).auth_failed_timeout
        self.auth_failed_timeout = min(first * 2 ** min(count - 1, 30), max(first, MAX_DELAY))
        super().handle_auth_failed(msg, password)


class BanServerMixin(_FTPServer):
    """For a GeventFTPServer class; put it first."""

    bans: Bans

    def admit(self, ip: str) -> str | None:
        """As GeventFTPServer's; refuses who is banned."""
        return REFUSAL if self.bans.is_banned(ip) else super().admit(ip)
