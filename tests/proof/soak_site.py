"""What the soak tests' servers serve: files to download, users, FTPS. No tests in here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bridge.users.file import Hash
from proof.soak_client import LARGE, SIZES, USERS, content
from support.cli import certificate

#: A password's hash that costs nothing: what it costs is not what these tests are about.
CHEAP = Hash(4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"p", salt=b"0123456789abcdef", n=16, r=1, p=1))

#: One with limits that are never reached, which needs its bytes counted in Python, and one without: sendfile
#: and splice.
LIMITS = ("sessions=400,up=10G,down=10G,quota=1T", "")


def make_site(directory: Path) -> list[str]:
    """Make it in *directory*; the options of the command. USERS share srv, their password is p."""
    files = directory / "srv/files"
    files.mkdir(parents=True)
    for size in (*SIZES, LARGE):
        (files / f"{size}").write_bytes(content(f"files/{size}", size))
    lines = (f"{name}:{CHEAP}:.:write:{limits}\n" for name, limits in zip(USERS, LIMITS, strict=True))
    (directory / "users").write_text("".join(lines))
    return [
        *("-i", "127.0.0.1", "-d", "srv", "--users", "users", "--atomic-uploads"),
        *("--tls", "--certfile", str(certificate(directory))),
        *("--log-file", "log", "--xferlog", "xferlog"),
    ]
