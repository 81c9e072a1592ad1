"""The file of users: what a line means, how it is written, and what a password has to match.

A leaf of the package; authorizer.py serves what is in here and passwd.py edits it. One user a line:

    # name:password hash:home:permissions:limits
    ada:$scrypt$ln=14,r=8,p=5$2fc1...$Hk0b...:ada:write:sessions=2,up=500K,down=2M,quota=10G
    guest:*::read:

- `\\:` is a colon in a field, `\\\\` a backslash. Lines that are empty or begin with `#` mean nothing.
- A hash is scrypt's, in the PHC string format as passlib writes it; `*` lets nobody in.
- A home that is relative lies below the shared directory; an empty one is that directory.
- Permissions are pyftpdlib's letters, or `read` or `write`; empty: what the command's --write says.
- Limits: `sessions` at once, bytes a second `up` and `down` (over all sessions of the user in one process),
  bytes of `quota`. K, M, G and T are 1024 and its powers.

Nothing here touches a disk or a hub.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

READ_ONLY = "elr"
WRITABLE = "elradfmwMT"

#: pyftpdlib's letters, and names for the two sets that are wanted mostly.
PERMISSIONS = {"read": READ_ONLY, "write": WRITABLE}

#: What a new hash costs: 16 MiB and 0.29 s of a core (measured). OWASP's least for scrypt with that memory
#: (Password Storage Cheat Sheet): as many logins as there are cores are checked at once, each with its own.
LN, R, P = 14, 8, 5

#: Bytes of a new salt and of a new digest: as passlib.
SALT, DIGEST = 16, 32

#: Bytes that one check may take. The most that OWASP names for scrypt takes 128 MiB.
MAX_MEMORY = 256 << 20

#: Times the work of a new hash that one check may take.
MAX_WORK = 32

#: Who gets in without a password is not a matter of the file.
ANONYMOUS = "anonymous"

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})([KMGT]?)B?", re.ASCII | re.IGNORECASE)
_PHC = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,4}),p=(\d{1,4})\$([\w+/.]+)\$([\w+/.]+)", re.ASCII)
_LOCKED = "*"


class UserFileError(Exception):
    """A line that means nothing. *line*: its number, from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


# --- passwords


@dataclass(frozen=True)
class Hash:
    """What is stored of a password. Checking takes `work()`; do it on a thread."""

    ln: int
    r: int
    p: int
    salt: bytes
    digest: bytes

    def __str__(self) -> str:
        return f"$scrypt$ln={self.ln},r={self.r},p={self.p}${_encode(self.salt)}${_encode(self.digest)}"

    @classmethod
    def parse(cls, text: str) -> Hash:
        """The hash that *text* is. Raises ValueError with what is wrong about it."""
        match = _PHC.fullmatch(text)
        if match is None:
            raise ValueError("no hash like $scrypt$ln=14,r=8,p=5$SALT$DIGEST; make one with passwd")
        ln, r, p = (int(match[each]) for each in (1, 2, 3))
        stored = cls(ln, r, p, _decode(match[4]), _decode(match[5]))
        if not (1 <= ln <= 63 and r >= 1 and p >= 1 and ln < 16 * r):
            raise ValueError("scrypt has no such parameters")
        if stored.memory() > MAX_MEMORY or stored.work() > MAX_WORK * (1 << LN) * R * P:
            raise ValueError(f"scrypt with ln={ln},r={r},p={p} takes too much memory or time for each login")
        if len(stored.salt) < 8 or not 16 <= len(stored.digest) <= 64:
            raise ValueError("the salt has to have 8 bytes, the digest 16 to 64")
        return stored

    @classmethod
    def of(cls, password: str) -> Hash:
        """A new one."""
        salt = os.urandom(SALT)
        return cls(LN, R, P, salt, _scrypt(password, salt, LN, R, P, DIGEST))

    def matches(self, password: str) -> bool:
        """Whether it is *password*'s. Takes the same time whether it is or not."""
        made = _scrypt(password, self.salt, self.ln, self.r, self.p, len(self.digest))
        return hmac.compare_digest(made, self.digest)

    def work(self) -> int:
        """What checking it costs, in scrypt's own unit."""
        return (1 << self.ln) * self.r * self.p

    def memory(self) -> int:
        """Bytes that checking it takes."""
        return 128 * self.r * ((1 << self.ln) + self.p + 2)


def _scrypt(password: str, salt: bytes, ln: int, r: int, p: int, length: int) -> bytes:
    secret = password.encode("utf-8", "surrogateescape")
    memory = 128 * r * ((1 << ln) + p + 2) + (1 << 16)  # with a little for OpenSSL itself
    return hashlib.scrypt(secret, salt=salt, n=1 << ln, r=r, p=p, maxmem=memory, dklen=length)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    text = text.replace(".", "+")  # passlib's own alphabet
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError("its salt or digest is no base64") from None


# --- users


@dataclass(frozen=True)
class Limits:
    """What a user may use; 0 for no limit. Spelled in the file as here."""

    #: At once.
    sessions: int = 0
    #: Bytes a second from the client, and to it.
    up: int = 0
    down: int = 0
    #: Bytes of the files in the home.
    quota: int = 0

    def __str__(self) -> str:
        values = ((each.name, getattr(self, each.name)) for each in fields(self))
        return ",".join(f"{name}={size_text(value)}" for name, value in values if value)

    @classmethod
    def parse(cls, text: str) -> Limits:
        """From `key=value,...`. Raises ValueError."""
        known = [each.name for each in fields(cls)]
        values: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = (each.strip() for each in part.partition("="))
            if name not in known or not equals:
                raise ValueError(f"no limit {part.strip()!r}; there are {', '.join(f'{n}=' for n in known)}")
            if name in values:
                raise ValueError(f"{name}= is there twice")
            values[name] = size(value)
        for name in ("up", "down"):
            if 0 < values.get(name, 0) < 1024:
                raise ValueError(f"{name}={values[name]}: bytes a second, 1K at least")
        return cls(**values)


@dataclass(frozen=True)
class User:
    """A line of the file, its fields as written; `permissions` and `home_in` say what they mean."""

    name: str
    #: None: nobody gets in.
    password: Hash | None = field(repr=False, default=None)
    home: str = ""
    perm: str = ""
    limits: Limits = Limits()

    def __str__(self) -> str:
        parts = (self.name, str(self.password or _LOCKED), self.home, self.perm, str(self.limits))
        return ":".join(part.replace("\\", "\\\\").replace(":", "\\:") for part in parts)

    def permissions(self, default: str = READ_ONLY) -> str:
        """pyftpdlib's letters; *default* if the file says nothing."""
        return PERMISSIONS.get(self.perm, self.perm) or default

    def home_in(self, directory: str) -> str:
        """The home's absolute path."""
        return os.path.normpath(os.path.join(directory, self.home))

    @classmethod
    def parse(cls, line: str) -> User:
        """The user of *line*. Raises ValueError with what is wrong about it."""
        parts = list(_split(line))
        if not 2 <= len(parts) <= 5:
            raise ValueError(
                f"{len(parts)} fields; write name:hash:home:permissions:limits (\\: for a colon)"
            )
        name, stored, home, perm, limits = (*parts, *[""] * (5 - len(parts)))
        check_name(name)
        check_home(home)
        check_perm(perm)
        password = None if stored == _LOCKED else Hash.parse(stored)
        return cls(name, password, home, perm, Limits.parse(limits))


def parse(text: str) -> dict[str, User]:
    """The users of a file by name. Raises UserFileError for the first line that is wrong."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not is_user(line):
            continue
        try:
            user = User.parse(line.strip())
        except ValueError as error:
            raise UserFileError(number, str(error)) from None
        if user.name in users:
            raise UserFileError(number, f"user {user.name!r} is there twice")
        users[user.name] = user
    return users


def is_user(line: str) -> bool:
    """Whether *line* is neither empty nor a comment."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be a user's name."""
    if not name or name != name.strip() or name.startswith("#") or not _printable(name):
        raise ValueError(f"{name!r} is no name of a user: characters that print, no # or space at its ends")
    if name == ANONYMOUS:
        raise ValueError(f"{ANONYMOUS!r} has no password; let everybody in with --anonymous")


def check_home(home: str) -> None:
    """Raise ValueError for what cannot be a home."""
    if not _printable(home) or home != home.strip():
        raise ValueError(
            f"{home!r} is no path: there are characters that do not print, or spaces at its ends"
        )
    if not os.path.isabs(home) and os.path.normpath(home).split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"home {home!r} leads out of the shared directory; write it from / on if that is meant"
        )


def check_perm(perm: str) -> None:
    """Raise ValueError for what are no permissions."""
    if perm not in PERMISSIONS and set(perm) - set(WRITABLE):
        raise ValueError(f"permissions {perm!r}; write read, write or some of {WRITABLE}")


def size(text: str) -> int:
    """A number with K, M, G or T after it, or without. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number like 5, 500K, 2M or 10G")
    return int(match[1]) * _UNITS[match[2].upper()]


def size_text(value: int) -> str:
    """As `size` reads it, as short as possible."""
    for unit in ("T", "G", "M", "K"):
        if value and value % _UNITS[unit] == 0:
            return f"{value // _UNITS[unit]}{unit}"
    return str(value)


def _printable(text: str) -> bool:
    """No control characters; what is no UTF-8 in the file may be in a name."""
    return all(each.isprintable() or "\udc80" <= each <= "\udcff" for each in text)


def _split(line: str) -> Iterator[str]:
    """The fields, without their backslashes."""
    part, escaped = "", False
    for each in line:
        if escaped:
            if each not in "\\:":
                raise ValueError(f"\\{each} means nothing; a backslash is written \\\\")
            part, escaped = part + each, False
        elif each == "\\":
            escaped = True
        elif each == ":":
            yield part
            part = ""
        else:
            part += each
    if escaped:
        raise ValueError("a backslash at the end; it is written \\\\")
    yield part


# --- who is not there


class DummyHashes:
    """Hashes for users who do not exist, so that refusing them takes what refusing the others does.

    Which parameters a name gets depends on the name and on the file, so that it is the same in all processes
    and at each try, and as various as those of the users there are.
    """

    def __init__(self, users: dict[str, User]) -> None:
        self._hashes = [each.password for each in users.values() if each.password is not None]
        secret = hashlib.sha256(b"".join(each.salt + each.digest for each in self._hashes))
        self._key = secret.digest()

    def hash_for(self, name: str) -> Hash:
        """What *name* is checked against, which nothing matches."""
        number = hmac.digest(self._key, name.encode("utf-8", "surrogateescape"), "sha256")
        if not self._hashes:
            return _default_dummy()
        like = self._hashes[int.from_bytes(number[:8], "big") % len(self._hashes)]
        return Hash(like.ln, like.r, like.p, number[:SALT], os.urandom(len(like.digest)))


@functools.cache
def _default_dummy() -> Hash:
    return Hash(LN, R, P, os.urandom(SALT), os.urandom(DIGEST))
