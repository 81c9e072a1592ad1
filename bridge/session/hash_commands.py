"""Checksums of files on the server, for handlers that want them: HASH, RANG and the older XCRC, XMD5, XSHA...

`class Handler(HashMixin, FTPHandler)`; off where it is not mixed in. Sits on checksums.py, which computes.
HASH is draft-bryan-ftpext-hash-02, RANG draft-bryan-ftp-range-08; what starts with X has no specification
and is as ProFTPD's mod_digest has it.

- **The session goes on.** Only the file is opened in the session's turn; the reply comes between others, as
  a transfer's 226 does. Meanwhile NOOP, STAT (which tells how far it is) and ABOR (426, 226) are answered.
- **A hash ends with its session**: QUIT, a client that leaves and a server that stops cut it. (A drain waits
  for transfers, but a hash can be asked for again at no loss.)
- **RANG is for HASH only.** The other commands that the draft wants it for would transfer the wrong bytes:
  RETR, STOR, STOU and APPE after RANG get 504 (4.3: "an error response"), and FEAT does not announce it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pyftpdlib.exceptions import FilesystemError
from pyftpdlib.log import logger
from pyftpdlib.utils import strerror

from bridge.session.checksums import ALGORITHMS, HASH_THREADS, Checksum
from bridge.session.data import REPLY_CODES

# --- private names of pyftpdlib this module stands on (tests/test_structure.py checks that they exist).
# Of FTPHandler: _closed, _extra_feats, _idler.

if TYPE_CHECKING:
    from pyftpdlib.handlers import FTPHandler as _FTPHandler
else:  # a mix-in: what it extends is the class it is put before
    _FTPHandler = object

#: The older commands, each with its algorithm. They are answered with 504 if that is not offered.
OLDER = {
    "XCRC": "CRC32",
    "XMD5": "MD5",
    "XSHA": "SHA-1",
    "XSHA1": "SHA-1",
    "XSHA256": "SHA-256",
    "XSHA512": "SHA-512",
}


def _command(perm: str | None, help: str) -> dict[str, Any]:
    return {"perm": perm, "auth": True, "arg": True, "help": f"Syntax: {help}."}


#: Added to the handler's `proto_cmds`.
COMMANDS = {
    "HASH": _command("r", "HASH <SP> file-name (checksum of file)"),
    "RANG": _command(None, "RANG <SP> first <SP> last (bytes for HASH)"),
}
for _name, _algorithm in OLDER.items():
    COMMANDS[_name] = _command(
        "r", f'{_name} <SP> "file-name" [<SP> start [<SP> end]] ({_algorithm} of file)'
    )

_RANG = re.compile(r"(\d+) (\d+)", re.ASCII)
_QUOTED = re.compile(r'"((?:[^"]|"")+)"(?: (\d+)(?: (\d+))?)?', re.ASCII)
_PLAIN = re.compile(r"(.+?)(?: (\d+) (\d+))?", re.ASCII)


class HashMixin(_FTPHandler):
    """For a handler class; put it before pyftpdlib's class, or bridge's. Needs a GeventIOLoop.

    - (tuple) hash_algorithms: names of ALGORITHMS that may be asked for; HASH begins with the first. SHA-1,
      which the draft demands (section 5), is left out by default, being broken.
    - (int) hash_max_size: bytes of one hash; more is refused: 556 to HASH (3.5), 550 to the older commands.
      None for no limit. Default 1 GiB, which takes a core up to 2 s (measured): enough for a line of text.
    - (Threads) hash_threads: where it is computed. Default: as many threads as there are cores.

    A session computes one hash at a time, else 450. Permission is `r`, as for RETR. A block that takes longer
    than the file system's `fs_timeout`, if it has one, is 451; 450 if no thread gets free in time.

    HASH tells the range it has hashed, its last byte included, "0-0" for an empty file. In XCRC and the like
    *end* is not included; of a name without quotes two numbers at its end are taken for the range.
    """

    hash_algorithms: tuple[str, ...] = ("SHA-256", "SHA-512", "MD5", "CRC32")
    hash_max_size: int | None = 1 << 30
    hash_threads = HASH_THREADS

    proto_cmds: dict[str, dict[str, Any]]
    _extra_feats: list[str]
    #: The hash that is being computed.
    _hash: Checksum | None = None
    #: What OPTS HASH has chosen; None: the first.
    _hash_algorithm: str | None = None
    #: Of RANG, until the next HASH: the first byte, and the one after the last. None: all.
    _hash_range: tuple[int, int | None] | None = None
    #: The same of the older command that is being handled.
    _older_range: tuple[int, int | None] | None = None
    #: The name as the client has it.
    _hash_name = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unknown = [name for name in cls.hash_algorithms if name not in ALGORITHMS]
        if unknown or not cls.hash_algorithms:
            raise ValueError(f"hash_algorithms must be some of {', '.join(ALGORITHMS)}, not {unknown}")
        commands = getattr(cls, "proto_cmds", None)  # None: a mix-in made of this one
        if commands is not None and "HASH" not in commands:
            cls.proto_cmds = {**commands, **COMMANDS}

    # --- runs in a worker greenlet: may wait. The commands

    def ftp_HASH(self, path: str) -> None:
        """Compute the selected hash of a file, or of the range that RANG has set."""
        chosen, self._hash_range = self._hash_range, None
        self._begin_hash("HASH", self._hash_algorithm or self.hash_algorithms[0], path, chosen)

    def ftp_RANG(self, line: str) -> None:
        """Set the range of the next HASH; "1 0" is the whole file."""
        match = _RANG.fullmatch(line)
        first, last = map(int, match.groups()) if match else (2, 1)
        self._hash_range = (first, last + 1) if first <= last else None
        if self._hash_range:
            self.respond(f"350 Bytes {first} to {last} for the next HASH.")
        elif (first, last) == (1, 0):
            self.respond("350 The whole file for the next HASH.")
        else:
            self.respond("501 Give the first and the last byte, or 1 0 for the whole file.")

    def _older_command(self, command: str, path: str) -> None:
        if OLDER[command] in self.hash_algorithms:
            self._begin_hash(command, OLDER[command], path, self._older_range)
        else:
            self.respond(f"504 {OLDER[command]} is not offered here.")

    def _begin_hash(self, command: str, algorithm: str, path: str, chosen: Any) -> None:
        if self._hash is not None:
            self.respond("450 One hash at a time; wait for the other or send ABOR.")
            return
        job = Checksum(
            *(self, command, algorithm, self._hash_name, self._hash_done),
            threads=self.hash_threads,
            max_size=self.hash_max_size,
        )
        try:
            refused = job.open(path, chosen)
        except (OSError, FilesystemError) as error:
            refused = f"{REPLY_CODES.get(getattr(error, 'errno', 0), '550')} {strerror(error)}."
        if refused:
            self.respond(refused)
        else:
            self._hash = job
            job.start()

    def _hash_done(self, job: Checksum) -> None:
        """As a turn of its own: the reply."""
        if self._closed or job is not self._hash:
            return
        self._hash = None
        if self._idler is not None and not self._idler.cancelled:
            self._idler.reset()
        reply = job.reply()
        self.respond(reply, logger.debug if reply[0] == "2" else logger.warning)
        self.log_cmd(job.command, job.path, int(reply[:3]), reply[4:])

    def _cancel_hash(self) -> bool:
        job, self._hash = self._hash, None
        if job is not None:
            job.cancel()
        return job is not None

    # --- pyftpdlib's methods

    def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
        """As pyftpdlib; what follows the file's name is taken off."""
        if cmd == "HASH":
            self._hash_name = arg
        elif arg and cmd in OLDER:
            match = (_QUOTED if arg[0] == '"' else _PLAIN).fullmatch(arg)
            if match is None:
                self.respond(f'501 Syntax error: {cmd} "file-name" start end.')
                return
            name, start, end = match.groups()
            arg = self._hash_name = name.replace('""', '"') if arg[0] == '"' else name
            self._older_range = (int(start), int(end) if end else None) if start else None
        super().pre_process_command(line, cmd, arg)

    def process_command(self, cmd: str, *args: Any, **kwargs: Any) -> None:
        """As pyftpdlib; a transfer that RANG was meant for is refused."""
        if cmd in ("RETR", "STOR", "STOU", "APPE") and self._hash_range:
            self._hash_range = None
            self.respond_w_warning("504 RANG is for HASH only here; the range is forgotten.")
        else:
            super().process_command(cmd, *args, **kwargs)

    def ftp_FEAT(self, line: str) -> None:
        """As pyftpdlib; also what is here."""
        others = self._extra_feats
        selected = self._hash_algorithm or self.hash_algorithms[0]
        names = ";".join(name + "*" * (name == selected) for name in self.hash_algorithms)
        older = [command for command, algorithm in OLDER.items() if algorithm in self.hash_algorithms]
        self._extra_feats = [*others, f"HASH {names}", *older]
        try:
            super().ftp_FEAT(line)
        finally:
            self._extra_feats = others

    def ftp_OPTS(self, line: str) -> None:
        """As pyftpdlib; OPTS HASH tells or selects the algorithm (draft, 3.2)."""
        command, _, name = line.partition(" ")
        if command.upper() != "HASH":
            super().ftp_OPTS(line)
        elif name and name.upper() not in self.hash_algorithms:
            self.respond("501 Unknown algorithm, current selection not changed.")
        else:
            self._hash_algorithm = name.upper() or self._hash_algorithm
            self.respond(f"200 {self._hash_algorithm or self.hash_algorithms[0]}")

    def ftp_STAT(self, path: str) -> None:
        """As pyftpdlib; the session's status begins with the hash that is computed."""
        if self._hash is not None and not path:
            self.push(f"211-{self._hash.progress()}\r\n")
        super().ftp_STAT(path)

    def ftp_ABOR(self, line: str) -> None:
        """As pyftpdlib; ends the hash, if one is computed."""
        if self._cancel_hash():
            self.respond("426 Hash aborted via ABOR.")
            self.respond("226 ABOR command successful.")
        else:
            super().ftp_ABOR(line)

    def flush_account(self) -> None:
        """As pyftpdlib, and ends a checksum under way; the next user has the default algorithm."""
        if self._cancel_hash():
            self.respond("426 Hash aborted.")
        self._hash_algorithm = self._hash_range = None
        super().flush_account()

    def handle_timeout(self) -> None:
        """As pyftpdlib; a client that waits for a hash is not idle."""
        if self._hash is None:
            super().handle_timeout()
        else:
            self._idler = self.ioloop.call_later(
                self.timeout, self.handle_timeout, _errback=self.handle_error
            )

    def close(self) -> None:
        """As pyftpdlib; ends the hash."""
        self._cancel_hash()
        super().close()


def _older(command: str) -> Any:
    def method(self: HashMixin, path: str) -> None:
        self._older_command(command, path)

    method.__name__ = f"ftp_{command}"
    method.__qualname__ = f"HashMixin.ftp_{command}"
    method.__doc__ = f"Compute the {OLDER[command]} of a file, or of a part of it."
    return method


for _name in OLDER:
    setattr(HashMixin, f"ftp_{_name}", _older(_name))
