"""Counters that several processes share: how many sessions an address has in all of them, say.

A leaf of the package. A table is made before the fork, in an unlinked file that every child maps. Each row
is a key with a counter for each *slot*, and a process writes the counters of its own slot only, so that a
process which dies takes along nothing that cannot be set right: the parent clears its column.

Adding to a row takes a lock of fcntl(2) (5 us with the rest; held for less, released by the kernel if its
holder dies), reading takes none.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator

#: Bytes of a key; longer ones are stored as their digest.
KEY = 48

#: Rows in which a key may lie, from the one its hash names on. With four rows for each key in use, nearly
#: never are all of them taken.
WAYS = 32


class Full(Exception):
    """No row is free for this key: the table is too small for what is counted."""


class SharedTable:
    """Counters by key, the sum over all slots; one column for each slot.

    - (int) slots: processes that count at the same time.
    - (int) rows: about four times as many as keys that are not zero at once.

    A row whose counters are all zero is free. The memory goes with the last process that has it.
    """

    def __init__(self, slots: int, rows: int = 4096) -> None:
        self._row = struct.Struct(f"{KEY}s{slots}q")
        self._columns = struct.Struct(f"{slots}q")
        self._rows = rows
        with tempfile.TemporaryFile() as file:
            file.truncate(self._row.size * rows)
            self._memory = mmap.mmap(file.fileno(), 0)
            self._fd = os.dup(file.fileno())
        #: Where keys were seen last, and what lies there if they still are.
        self._known: dict[str, tuple[int, bytes]] = {}

    def add(self, key: str, amount: int, slot: int) -> int:
        """Change this slot's counter; the sum over all slots after it. Raises Full."""
        with self._locked():
            offset = self._find(key, make=bool(amount))
            if offset is None:
                return 0
            columns: tuple[int, ...] = self._columns.unpack_from(self._memory, offset + KEY)
            struct.pack_into("q", self._memory, offset + KEY + 8 * slot, columns[slot] + amount)
        return sum(columns) + amount

    def put(self, key: str, value: int, slot: int) -> None:
        """Set this slot's counter. Raises Full."""
        with self._locked():
            offset = self._find(key, make=bool(value))
            if offset is not None:
                struct.pack_into("q", self._memory, offset + KEY + 8 * slot, value)

    def total(self, key: str) -> int:
        """The sum over all slots."""
        return sum(self.columns(key))

    def columns(self, key: str) -> tuple[int, ...]:
        """The counter of each slot."""
        offset = self._find(key, make=False)
        return () if offset is None else self._columns.unpack_from(self._memory, offset + KEY)

    def items(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every key that is not zero in all slots, with the counter of each."""
        for offset in range(0, self._row.size * self._rows, self._row.size):
            name, *columns = self._row.unpack_from(self._memory, offset)
            if any(columns):
                yield name.rstrip(b"\0").decode(errors="replace"), tuple(columns)

    def clear_column(self, slot: int) -> None:
        """Forget what a process has counted that is gone."""
        with self._locked():
            for offset in range(0, self._row.size * self._rows, self._row.size):
                struct.pack_into("q", self._memory, offset + KEY + 8 * slot, 0)

    def close(self) -> None:
        """Release it in this process; also done when nobody has it any more. Twice is no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._memory.close()
            os.close(fd)

    __del__ = close

    def _locked(self) -> _Lock:
        return _Lock(self._fd)

    def _find(self, key: str, make: bool) -> int | None:
        offset, name = self._known.get(key, (0, b""))
        if name and self._memory[offset : offset + KEY] == name:
            return offset
        found = self._search(key, make)
        if found is not None:
            if len(self._known) >= self._rows:
                self._known.clear()
            self._known[key] = found, self._memory[found : found + KEY]
        return found

    def _search(self, key: str, make: bool) -> int | None:
        name = key.encode(errors="surrogateescape")
        digest = hashlib.blake2b(name, digest_size=KEY // 2).hexdigest()
        name = (name if len(name) <= KEY and b"\0" not in name else digest.encode()).ljust(KEY, b"\0")
        first = int(digest[:8], 16)
        free = None
        for way in range(min(WAYS, self._rows)):
            offset = (first + way) % self._rows * self._row.size
            if self._memory[offset : offset + KEY] == name:
                return offset
            if free is None and not any(self._columns.unpack_from(self._memory, offset + KEY)):
                free = offset
        if not make:
            return None
        if free is None:
            raise Full(f"no row for {key!r} in a table of {self._rows}")
        self._memory[free : free + KEY] = name
        return free


class _Lock:
    """Held by one process at a time; the processes' own threads do not count."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
