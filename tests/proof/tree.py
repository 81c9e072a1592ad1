"""A model of the files on a server, changed by what its replies say. No tests here.

Files are objects, as inodes are: an upload goes on into a file that has been renamed meanwhile. With
*atomic*, nothing is there until the 226, and then under the name that was asked for.
"""

from __future__ import annotations

import posixpath

from grammar import TREE


class File:
    """Content, or what the content begins with if nobody knows how much of it has come."""

    def __init__(self, content: bytes, *, whole: bool = True) -> None:
        self.content, self.whole = content, whole
        #: Uploads that were made side by side, into the same file: anything may be in it.
        self.anything = False

    def agrees(self, found: bytes) -> bool:
        return self.anything or (found == self.content if self.whole else self.content.startswith(found))


class Upload:
    """One that runs. *offset*: where in the file it begins."""

    def __init__(self, path: str, file: File | None, offset: int, ascii: bool) -> None:
        self.path, self.file, self.offset, self.ascii = path, file, offset, ascii
        self.before = file.content if file is not None else b""
        self.sent = b""

    def result(self) -> bytes:
        """The content if all that was sent has come."""
        data = self.sent
        if self.ascii:
            # pyftpdlib holds a CR back until it has seen what follows, and forgets it if nothing does.
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n")
        return self.before[: self.offset] + data + self.before[self.offset + len(data) :]


class Tree:
    """Paths as clients name them, absolute and normal; directories are None."""

    def __init__(self, *, atomic: bool) -> None:
        self.atomic = atomic
        self.entries: dict[str, File | None] = {
            name: None if content is None else File(content) for name, content in TREE.items()
        }
        self.uploads: list[Upload] = []

    def make_directory(self, path: str) -> None:
        assert path not in self.entries, f"{path} was there already"
        self.entries[path] = None

    def remove(self, path: str) -> None:
        assert path in self.entries, f"{path} was not there"
        del self.entries[path]

    def rename(self, old: str, new: str) -> None:
        if new == old:
            return
        moved = {
            name: what for name, what in self.entries.items() if name == old or name.startswith(old + "/")
        }
        assert moved, f"{old} was not there"
        for name in moved:
            del self.entries[name]
        self.entries.update({new + name[len(old) :]: what for name, what in moved.items()})

    def begin_upload(
        self, path: str, *, append: bool = False, offset: int = 0, ascii: bool = False
    ) -> Upload:
        file = self.entries.get(path)
        if self.atomic:
            upload = Upload(path, None, 0, ascii)
        else:
            if file is None:
                file = self.entries[path] = File(b"")
            if any(each.file is file for each in self.uploads):
                file.anything = True
            if not append and not offset:
                file.content = b""
            upload = Upload(path, file, len(file.content) if append else offset, ascii)
            file.whole = bool(offset)  # of an overwritten middle, any prefix may be new
            file.anything |= bool(offset)
        self.uploads.append(upload)
        return upload

    def end_upload(self, upload: Upload, *, complete: bool) -> None:
        self.uploads.remove(upload)
        if upload.file is None:
            if complete:
                self.entries[upload.path] = File(upload.result())
            return
        upload.file.content, upload.file.whole = upload.result(), complete
        if complete and not any(each.file is upload.file for each in self.uploads) and upload.offset:
            upload.file.anything = False

    def differences(self, found: dict[str, bytes | None]) -> list[str]:
        """What *found* has that should not be, and the other way round."""
        problems = [f"{name} is missing" for name in self.entries.keys() - found.keys()]
        problems += [f"{name} should not be there" for name in found.keys() - self.entries.keys()]
        for name in self.entries.keys() & found.keys():
            file, content = self.entries[name], found[name]
            if (file is None) != (content is None):
                problems.append(f"{name} is of another kind")
            elif file is not None and content is not None and not file.agrees(content):
                problems.append(
                    f"{name} has {len(content)} bytes {content[:40]!r}, not {file.content[:40]!r}"
                )
        return problems


def absolute(cwd: str, path: str) -> str:
    """What pyftpdlib makes of a client's path."""
    return "/" + posixpath.normpath(posixpath.join(cwd, path)).lstrip("/") if path else cwd
