"""A small file written whole or not at all: beside the old one, then renamed over it.

A leaf of the package, for files that nobody may read half of: certificates and lists of users. Blocks; no
gevent. (For uploads, which are large and may be aborted, see atomic.py.)
"""

from __future__ import annotations

import contextlib
import os
import tempfile


def replace(path: str, content: bytes, owner: tuple[int, int] | None = None) -> None:
    """Make *content* the file *path*, on the disk when this returns; only its owner may read it (0600).

    - (tuple) owner: user id and group id that it should have; kept to as far as this process may.

    Raises OSError; then what was there still is.
    """
    directory = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)
    try:
        with open(fd, "wb") as file:
            if owner is not None and owner != (os.geteuid(), os.getegid()):
                with contextlib.suppress(PermissionError):  # only for root to give
                    os.fchown(fd, *owner)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    fsync_directory(directory)


def fsync_directory(path: str) -> None:
    """Make the names in directory *path* survive a power cut; blocks. Raises OSError."""
    fd = os.open(path or os.curdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
