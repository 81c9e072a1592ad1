"""--max-cons and --max-cons-per-ip over all worker processes, and a server that can retire.

Server mix-ins for run.py, on server/server.py and server/shared_table.py. A server counts through its
`ip_map` and its `session_count`; here both also count in the table `sessions`, which all workers share. A
table that is full fails safe: it is logged once, and what does not fit is counted in this process only.

Cost, measured (CPython 3.11, Linux): counting a session in and out and reading the sum takes
17 to 19 us with --max-cons (the default) and 27 to 30 us with both limits; AddressCounts alone takes 2.0.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from pyftpdlib.servers import FTPServer

from bridge.server import AddressCounts, Full, SharedTable

log = logging.getLogger(__name__)

#: The row with all sessions; no address has this name.
ALL = "*"

#: Rows for each key in use (server/shared_table.py), the fewest, and those for an unlimited number of
#: sessions.
ROWS_PER_KEY, FEWEST, UNLIMITED = 4, 4096, 65536


def table(slots: int, max_cons: int) -> SharedTable:
    """The table `sessions`, with room for as many addresses as there may be sessions."""
    return SharedTable(slots, max(FEWEST, ROWS_PER_KEY * max_cons) if max_cons else UNLIMITED)


class SharedCounts(AddressCounts):
    """A server's `ip_map` that counts for all workers.

    - (SharedTable) shared: borrowed.
    - (int) slot: this process's column.
    - (bool) total, by_ip: whether to count all sessions, and those of each address.
    """

    def __init__(self, shared: SharedTable, slot: int, total: bool, by_ip: bool) -> None:
        super().__init__()
        self._shared = shared
        self._slot = slot
        self._total = total
        self._by_ip = by_ip
        #: What did not fit into the table.
        self._local: Counter[str] = Counter()
        self._told = False

    def append(self, ip: str) -> None:
        """One session more from *ip*."""
        super().append(ip)
        for key in self._keys(ip):
            try:
                self._shared.add(key, 1, self._slot)
            except Full as error:
                self._local[key] += 1
                if not self._told:
                    self._told = True
                    log.error("%s: some sessions are limited in each worker by itself from now on", error)

    def remove(self, ip: str) -> None:
        """One session less from *ip*."""
        super().remove(ip)
        for key in self._keys(ip):
            if self._local[key] > 0:
                self._local[key] -= 1
            else:
                self._shared.add(key, -1, self._slot)

    def count(self, ip: str) -> int:
        """How many sessions come from *ip*, to all workers."""
        return self._shared.total(ip) + self._local[ip]

    def everywhere(self) -> int:
        """How many sessions there are, in all workers."""
        return self._shared.total(ALL) + self._local[ALL]

    def _keys(self, ip: str) -> list[str]:
        return [ALL] * self._total + [ip] * self._by_ip


class SharedLimits:
    """For a server class: its limits hold for all workers together.

    Class attribute `session_table`, a static method: gives the table of sessions and this process's column.
    """

    session_table: Callable[[], tuple[SharedTable, int]]
    max_cons: int
    max_cons_per_ip: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shared, slot = self.session_table()
        self.ip_map = SharedCounts(shared, slot, bool(self.max_cons), bool(self.max_cons_per_ip))

    def session_count(self) -> int:
        """Sessions in all workers."""
        return self.ip_map.everywhere()


class Retiring:
    """For a GeventFTPServer class: `retire` hands the port on to a successor, and nobody notices."""

    _retired = False
    _accepting = 0

    def retire(self) -> None:
        """Accept nothing more; stop when the last session has ended by itself, however long that takes.

        The state stays `started`, so that an accept which waits at this moment is served, and `stop()`
        drains what is left.
        """
        if not self._retired:
            self._retired = True
            server: Any = self
            FTPServer.close(server)  # the listener only
            self._end_if_idle()

    def handle_accepted(self, sock: Any, addr: Any) -> Any:
        """As it is; counts accepts that wait."""
        self._accepting += 1
        try:
            return super().handle_accepted(sock, addr)  # type: ignore[misc]
        finally:
            self._accepting -= 1
            self._end_if_idle()

    def session_ended(self, control: Any) -> None:
        """As it is; the last session takes a retired server with it."""
        super().session_ended(control)  # type: ignore[misc]
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        server: Any = self
        if self._retired and not self._accepting and server.started and not server.sessions():
            server.close()
