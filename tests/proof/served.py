"""The server that is abused: what `python -m bridge.ftp` serves, in this process. No tests here."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bridge.ftp.command
from bridge.ftp.options import parser_of
from proof.grammar import TREE
from support.ftps_clients import Authority

#: Bytes that user u may store: more than a sequence does mostly, but not always.
QUOTA = 400_000


def phc(password: str) -> str:
    """A hash for the file of users that costs next to nothing to check."""
    salt = b"s" * 16
    digest = hashlib.scrypt(password.encode(), salt=salt, n=2, r=1, p=1, dklen=32)
    return "$scrypt$ln=1,r=1,p=1$" + "$".join(b64encode(each).decode().rstrip("=") for each in (salt, digest))


class Served:
    """A server that listens: its `address`, the `home` of users u (may write) and v (may read), its log."""

    def __init__(self, directory: Path, home: Path) -> None:
        self.directory, self.home = directory, home
        self.log_file = directory / "log"
        self.address: tuple[str, int] = ("", 0)
        self.server: Any = None

    def log(self) -> str:
        """What it has logged."""
        return self.log_file.read_text(errors="replace")


@contextlib.contextmanager
def served(
    directory: Path, *options: str, quota: int = 0, change: Callable[[Any], None] = lambda site: None
) -> Iterator[Served]:
    """Serve on this hub with *options*; *change* may alter the site before it is bound."""
    directory.mkdir(exist_ok=True)
    home = directory / "home"
    fill(home)
    limits = f"quota={quota}" if quota else ""
    users = directory / "users"
    users.write_text(
        "".join(
            f"{name}:{phc('p')}:home:{perm}\n" for name, perm in (("u", f"write:{limits}"), ("v", "read:"))
        )
    )
    users.chmod(0o600)
    result = Served(directory, home)
    argv = ["-i", "127.0.0.1", "-p", "0", "-d", str(directory), "--users", str(users), "--ban", "0"]
    argv += ["--log-file", str(result.log_file), "--xferlog", str(directory / "xferlog")]
    argv += ["--tls", "--certfile", str(Authority(directory).issue("server")), "--max-login-attempts", "4"]
    site = bridge.ftp.command.application_of(
        parser_of(bridge.ftp.command.PARTS).parse_args([*argv, *options])
    )
    site.attributes["auth_failed_timeout"] = 0.0
    change(site)
    with site.logs.installed():
        site.bind()
        endings = [start() for start in site.services]
        result.server = site.server
        result.address = site.server.address[:2]
        site.server.start()
        try:
            yield result
        finally:
            site.server.stop(0)
            for end in reversed(endings):
                end()
            site.close()
            site.server.ioloop.close()  # the command's process ends with it


def fill(home: Path) -> None:
    """Make *home* anew, with `TREE` in it."""
    if home.exists():
        make_removable(home)
        shutil.rmtree(home)
    home.mkdir()
    for name, content in TREE.items():
        path = home / name[1:]
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def make_removable(home: Path) -> None:
    """Undo SITE CHMOD."""
    home.chmod(0o700)
    for path in home.iterdir():
        if path.is_dir() and not path.is_symlink():
            make_removable(path)


def tree_of(home: Path) -> dict[str, bytes | None]:
    """What is there, in the form of `TREE`."""
    make_removable(home)
    found: dict[str, bytes | None] = {}
    for path in sorted(home.rglob("*")):
        path.chmod(0o700)
        found["/" + str(path.relative_to(home))] = None if path.is_dir() else path.read_bytes()
    return found
