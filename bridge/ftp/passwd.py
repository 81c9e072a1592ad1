"""`python -m bridge.ftp passwd FILE USER`: edit a file of users (users/file.py) by hand or by a script.

Called by command.py, before its own options are looked at. A file is written whole, beside the old one,
and renamed, so that a server never reads half of it; comments and order stay. Two who edit at once take turns
(flock on the file). No gevent.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import getpass
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from bridge.filesystems import replace as replacing
from bridge.ftp.options import UsageError, argument
from bridge.users import file as userfile
from bridge.users.file import Hash, Limits, User, UserFileError, is_user

PROG = "python -m bridge.ftp passwd"

#: Of a new file: it has hashes, which are for nobody to guess at.
FILE_MODE = 0o600


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """*check* as argparse's `type`, for text that stays as it is."""

    def convert(value: str) -> str:
        check(value)
        return value

    return argument(convert)


def _rate(value: str) -> int:
    """Bytes a second, as the file has them after `up=`. Raises ValueError."""
    try:
        return Limits.parse(f"up={value}").up
    except ValueError as error:
        raise ValueError(str(error).removeprefix("up=")) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Add USER to FILE, change its password, or change what is told of the options and keep "
        "its password. A server that has the file takes it up by itself.",
    )
    parser.add_argument("file", metavar="FILE", help="made if it is not there")
    parser.add_argument("user", metavar="USER", nargs="?")
    parser.add_argument(
        "--stdin", action="store_true", help="the password is the first line of stdin (default: ask twice)"
    )
    parser.add_argument("--lock", action="store_true", help="no password lets USER in any more")
    parser.add_argument("--delete", action="store_true", help="remove USER")
    parser.add_argument("--list", action="store_true", help="print all users, without their hashes")
    group = parser.add_argument_group("what USER may do (0 for no limit)")
    group.add_argument(
        "--home",
        metavar="PATH",
        type=_checked(userfile.check_home),
        help="below the server's --directory, or absolute (default: that directory)",
    )
    group.add_argument(
        "--perm",
        type=_checked(userfile.check_perm),
        help="read, write or pyftpdlib's letters (default: what the server's --write says)",
    )
    group.add_argument(
        "--max-sessions", dest="sessions", metavar="COUNT", type=argument(userfile.size), help="at once"
    )
    group.add_argument(
        "--max-upload", dest="up", metavar="RATE", type=argument(_rate), help="bytes a second: 500K, 2M"
    )
    group.add_argument(
        "--max-download", dest="down", metavar="RATE", type=argument(_rate), help="bytes a second"
    )
    group.add_argument(
        "--quota", metavar="SIZE", type=argument(userfile.size), help="bytes of files in the home: 500M, 10G"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Do what *argv* says; return the exit code. Wrong options exit with 2 (SystemExit), as argparse does."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _run(options)
    except UsageError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except UserFileError as error:
        parser.exit(2, f"{parser.prog}: error: {options.file}, {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {options.file}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.list:
        if options.user is not None:
            raise UsageError("--list takes no USER")
        for user in userfile.parse(_read(options.file)).values():
            print(_shown(user))
        return
    name = options.user
    if name is None:
        raise UsageError("USER is missing")
    try:
        userfile.check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.lock + options.stdin + options.delete > 1:
        raise UsageError("--stdin, --lock and --delete: only one of them")
    if options.delete:
        with _edited(options.file, make=False) as lines:
            lines[_index(lines, name, options.file)] = None
        return
    edit = _Edit(options)
    wants_password = options.stdin or not (options.lock or (edit and _is_there(options.file, name)))
    password = Hash.of(_ask(options.stdin)) if wants_password else None
    with _edited(options.file, make=True) as lines:
        index = _find(lines, name)
        old = User(name) if index is None else User.parse((lines[index] or "").strip())
        if not wants_password and not options.lock:
            password = old.password
        line = str(edit.of(replace(old, password=password)))
        if index is None:
            lines.append(line)
        else:
            lines[index] = line


class _Edit:
    """What the options change of a user."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._fields = _given(options, "home", "perm")
        self._limits = _given(options, *(each.name for each in fields(Limits)))

    def __bool__(self) -> bool:
        return bool(self._fields or self._limits)

    def of(self, user: User) -> User:
        return replace(user, **self._fields, limits=replace(user.limits, **self._limits))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _shown(user: User) -> str:
    locked = "locked" if user.password is None else ""
    parts = (f"home={user.home or '.'}", f"perm={user.perm or 'default'}", str(user.limits), locked)
    return " ".join((user.name, *filter(None, parts)))


def _ask(stdin: bool) -> str:
    if stdin:
        line = sys.stdin.readline()
        if not line.rstrip("\r\n"):
            raise UsageError("--stdin: there is no password in the first line")
        return line.rstrip("\r\n")
    if not sys.stdin.isatty():
        raise UsageError("no terminal to ask for the password; give it with --stdin")
    password = getpass.getpass("Password: ")
    if not password:
        raise UsageError("an empty password; --lock lets nobody in")
    if getpass.getpass("Again: ") != password:
        raise UsageError("the two passwords differ; nothing has changed")
    return password


def _is_there(path: str, name: str) -> bool:
    try:
        return name in userfile.parse(_read(path))
    except FileNotFoundError:
        return False


def _find(lines: Sequence[str | None], name: str) -> int | None:
    for index, line in enumerate(lines):
        if line is not None and is_user(line) and User.parse(line.strip()).name == name:
            return index
    return None


def _index(lines: Sequence[str | None], name: str, path: str) -> int:
    index = _find(lines, name)
    if index is None:
        raise UsageError(f"there is no user {name!r} in {path}")
    return index


def _read(path: str | int) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()


@contextlib.contextmanager
def _edited(path: str, make: bool) -> Iterator[list[str | None]]:
    """The lines of a file; when the block ends, what has become of them (None: removed) is the file.

    Other editors wait meanwhile. If the block raises, nothing has changed.
    """
    path = os.path.realpath(path)
    fd, fresh = _locked(path, make)
    try:
        text = _read(os.dup(fd))
        userfile.parse(text)  # a file that is wrong is not made worse
        lines: list[str | None] = [*text.removesuffix("\n").split("\n")] if text else []
        yield lines
        text = "".join(f"{line}\n" for line in lines if line is not None)
        old = os.fstat(fd)
        replacing.replace(path, text.encode("utf-8", "surrogateescape"), (old.st_uid, old.st_gid))
    except BaseException:
        if fresh and os.path.samestat(os.fstat(fd), os.stat(path)):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def _locked(path: str, make: bool) -> tuple[int, bool]:
    """The file, open and locked, and whether it was made for that."""
    while True:
        fresh = False
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if not make:
                raise
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            except FileExistsError:
                continue  # somebody was faster
            fresh = True
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd, fresh
        except FileNotFoundError:
            pass  # somebody else's, who made it and changed their mind
        os.close(fd)  # it was replaced while we waited
