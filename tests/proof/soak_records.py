"""What the soak test's clients wrote down, and whether disk and transfer log agree. No tests in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.filesystems.atomic import is_hidden
from bridge.logs.records import _word
from proof.soak_client import content, digest


@dataclass
class Transfer:
    """One that a client began, or a deletion or renaming; *reply* is None if it never saw the end."""

    way: str
    path: str
    size: int
    tls: bool
    #: Its client process was killed.
    killed: bool
    #: The client meant to bring it to its end.
    whole: bool = True
    #: STOU: the file's name is *path* with what the server added; `named` once it is known.
    unique: bool = False
    named: bool = False
    #: What is in the file is that of this name; a download is from the byte *start* on.
    of: str = ""
    start: int = 0
    #: The new name.
    to: str = ""
    reply: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        self.of = self.of or self.path

    @property
    def content(self) -> bytes:
        return content(self.of, self.size)[self.start :]

    def has_name(self, name: str) -> bool:
        if self.unique and not self.named:
            return name.startswith(f"{self.path}.")
        return name == self.path

    @property
    def completed(self) -> bool:
        return (self.reply or "").startswith("226")

    @property
    def may_be_short(self) -> bool:
        """Whether it ended with its process, which without TLS looks like the end of the file (README)."""
        return (self.killed or not self.whole) and not self.tls and self.reply is None


class Records:
    """Of one round."""

    def __init__(self, files: list[tuple[Path, bool]]) -> None:
        self.sessions = self.logins = 0
        self.problems: list[str] = []
        self.lost: list[str] = []
        self.transfers: dict[str, Transfer] = {}
        for path, killed in files:
            for record in map(json.loads, path.read_text().splitlines()):
                self._take(record, killed)

    def _take(self, record: dict[str, Any], killed: bool) -> None:
        if "begin" in record:
            name = record.pop("begin")
            self.transfers[name] = Transfer(killed=killed, **record)
        elif "end" in record:
            transfer = self.transfers[record["end"]]
            transfer.reply, transfer.sha256 = record["reply"], record["sha256"]
        elif "named" in record:
            transfer = self.transfers[record["named"]]
            transfer.path, transfer.named = record["path"], True
        elif "login" in record:
            self.logins += 1
        elif "session" in record:
            self.sessions += 1
            if "problem" in record:
                self.problems.append(record["problem"])
            if "lost" in record:
                self.lost.append(record["lost"])

    def of(self, way: str) -> Iterator[Transfer]:
        return (each for each in self.transfers.values() if each.way == way)

    def completed(self, way: str) -> int:
        """How many the client saw completed."""
        return sum(each.completed for each in self.of(way))

    def unknown(self, way: str) -> int:
        """How many more the server may have completed: the client never heard."""
        return sum(not each.reply for each in self.of(way))

    # --- what is wrong

    def wrong_files(self, home: Path, directory: Path) -> list[str]:
        """What is in *directory* and should not be so, and the reverse. Hidden files are for others."""
        wrong = []
        there = {
            str(path.relative_to(home))
            for path in directory.rglob("*")
            if path.is_file() and not is_hidden(path.name)
        }
        changes = [*self.of("rename"), *self.of("delete")]
        for each in self.of("upload"):
            names, may_be_gone = self._names(each, there, changes)
            found = [name for name in there if name in names]
            there.difference_update(found)
            data = (home / found[0]).read_bytes() if found else None
            expected = each.content
            if len(found) > 1:
                holds = False
            elif each.completed:
                holds = may_be_gone if data is None else data == expected and digest(data) == each.sha256
            elif each.may_be_short:
                holds = data is None or expected.startswith(data)
            elif each.whole and each.reply is None:  # the reply may have been lost
                holds = data in (None, expected)
            else:
                holds = data is None
            if not holds:
                size = "not there" if data is None else f"there, {len(data)} bytes"
                wrong.append(f"{size}: {each}, now {sorted(names)}, found {found}")
        return wrong + [f"nobody's: {path}" for path in there]

    def _names(self, upload: Transfer, there: set[str], changes: list[Transfer]) -> tuple[set[str], bool]:
        """Which names the file may have by now, and whether it may have been deleted."""
        names = {name for name in (*there, upload.path) if upload.has_name(name)}
        gone = False
        for each in changes:
            if each.path in names:
                done = each.reply is not None
                names -= {each.path} if done else set()
                names |= {each.to} if each.to else set()
                gone = gone or each.way == "delete"
        return names, gone

    def wrong_downloads(self) -> list[str]:
        """Downloads that were reported complete and were not."""
        return [
            f"{each}"
            for each in self.of("download")
            if each.completed and each.whole and each.sha256 != digest(each.content)
        ]

    def wrong_lines(self, lines: list[str], home: Path) -> list[str]:
        """Lines of xferlog that say complete of an upload of this round that is not; broken lines."""
        uploads = {_word(str(home / each.path)): each for each in self.of("upload")}
        wrong = []
        for line in lines:
            fields = line.split()
            if len(fields) != 18 or fields[17] not in "ci":
                wrong.append(line)
                continue
            each = uploads.get(fields[8])
            if each is None or fields[11] != "i" or fields[17] == "i":
                continue
            whole = int(fields[7]) == each.size and each.whole
            if not (whole or each.may_be_short):
                wrong.append(f"{line}: {each}")
        return wrong

    def not_logged(self, logged: list[str], home: Path) -> list[str]:
        """Uploads that clients saw completed, and that are not once among those that are *logged* so."""
        uploads = [_word(str(home / each.path)) for each in self.of("upload") if each.completed]
        return [path for path in uploads if logged.count(path) != 1]


def logged_uploads(lines: list[str], directory: Path) -> list[str]:
    """The paths in *directory* that lines of xferlog call completely uploaded."""
    uploads = [fields[8] for fields in map(str.split, lines) if (fields[11], fields[17]) == ("i", "c")]
    return [path for path in uploads if path.startswith(_word(f"{directory}/"))]
