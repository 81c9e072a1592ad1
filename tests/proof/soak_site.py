"""What the soak tests' servers serve: files to download, a user, FTPS. No tests in here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cli import certificate
from soak_client import LARGE, SIZES, content

from bridge.userfile import Hash

#: A password's hash that costs nothing: what it costs is not what these tests are about.
CHEAP = Hash(4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"p", salt=b"0123456789abcdef", n=16, r=1, p=1))

#: Limits that are never reached, so that they are kept account of.
LIMITS = "sessions=400,up=10G,down=10G,quota=1T"


def make_site(directory: Path) -> list[str]:
    """Make it in *directory*; the options of the command. The home of ada, whose password is p, is srv."""
    files = directory / "srv/files"
    files.mkdir(parents=True)
    for size in (*SIZES, LARGE):
        (files / f"{size}").write_bytes(content(f"files/{size}", size))
    (directory / "users").write_text(f"ada:{CHEAP}:.:write:{LIMITS}\n")
    return [
        *("-i", "127.0.0.1", "-d", "srv", "--users", "users", "--atomic-uploads"),
        *("--tls", "--certfile", str(certificate(directory))),
        *("--log-file", "log", "--xferlog", "xferlog"),
    ]
