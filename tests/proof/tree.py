"""A model of the files on a server, changed by what its replies say. No tests here.

Uploads are atomic: nothing is there until the 226, and then all of it, under the name that was asked for.
(What is there when they are not, test_differential.py compares with pyftpdlib.)
"""

from __future__ import annotations

import posixpath

from proof.grammar import TREE


class Upload:
    """One that runs. *connected*: has a data connection."""

    def __init__(self, path: str, *, ascii: bool, connected: bool) -> None:
        self.path, self.ascii, self.connected = path, ascii, connected
        self.sent = b""

    def result(self) -> bytes:
        """The file if all that was sent has come."""
        if not self.ascii:
            return self.sent
        # pyftpdlib holds a CR back until it has seen what follows, and forgets it if nothing does.
        return self.sent.removesuffix(b"\r").replace(b"\r\n", b"\n")


class Tree:
    """Paths as clients name them, absolute and normal; directories are None."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | None] = dict(TREE)

    def make_directory(self, path: str) -> None:
        assert path not in self.files, f"{path} was there already"
        self.files[path] = None

    def remove(self, path: str) -> None:
        assert path in self.files, f"{path} was not there"
        del self.files[path]

    def rename(self, old: str, new: str) -> None:
        if new == old:
            return
        moved = {name: what for name, what in self.files.items() if name == old or name.startswith(old + "/")}
        assert moved, f"{old} was not there"
        for name in moved:
            del self.files[name]
        self.files.update({new + name[len(old) :]: what for name, what in moved.items()})


def differences(expected: dict[str, bytes | None], found: dict[str, bytes | None]) -> list[str]:
    """What *found* has that should not be, and the other way round."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} should not be there" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {_short(found[name])}, not {_short(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    return problems


def _short(content: bytes | None) -> str:
    return "a directory" if content is None else f"{len(content)} bytes {content[:40]!r}"


def absolute(cwd: str, path: str) -> str:
    """What pyftpdlib makes of a client's path."""
    return "/" + posixpath.normpath(posixpath.join(cwd, path)).lstrip("/") if path else cwd
