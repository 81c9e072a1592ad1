"""Which reply codes a command may have, each with the section that says so. No tests here.

Used by test_fuzz.py. A command has one reply at once (FIRST); a transfer that was given a 1yz has another
when it ends (ENDS), an active data connection when it is there or is not (CONNECTS).
"""

from __future__ import annotations

#: For every command that is not understood, or has no argument, or one too many: RFC 959, 4.2.1 and 5.4.
SYNTAX = {500, 501}
#: For every command that needs a login: RFC 959, 5.4; RFC 2228, section 6.
LOGIN = {530}
#: When the server goes: RFC 959, 5.4, "for all commands".
GOING = {421}

#: 150: RFC 959, 5.4; 125: the data connection is there already. 425, 426, 450, 451, 550, 552, 553: ditto.
#: 503: a transfer runs (RFC 959, 4.2). 554, REST before it made no sense: RFC 1123, 4.1.3.4. 522: no TLS
#: session to resume (RFC 4217, 10.2). 504: RANG before it (draft-bryan-ftp-range-08, 4.3).
_TRANSFER = {125, 150, 425, 450, 451, 503, 504, 522, 550, 552, 553, 554}

#: The reply that a command has at once, besides SYNTAX and LOGIN.
FIRST: dict[str, set[int]] = {
    "ABOR": {225, 226},  # RFC 959, 5.4 and 4.1.3; 426 before it is the transfer's
    "ALLO": {200, 202, 504, 552},  # RFC 959, 5.4; 552: 4.2
    "APPE": _TRANSFER,  # RFC 959, 5.4
    "AUTH": {234, 334, 502, 503, 504, 534, 431},  # RFC 2228, section 3; 502, 503: RFC 4217, 4
    "CDUP": {200, 250, 550},  # RFC 959, 5.4 and 1123, 4.1.2.6
    "CWD": {250, 550},  # RFC 959, 5.4
    "DELE": {250, 450, 550},  # RFC 959, 5.4
    "EPRT": {200, 425, 522},  # RFC 2428, 2
    "EPSV": {229, 425, 522, 220, 200},  # RFC 2428, 3 and 4; 220: pyftpdlib's reply to EPSV ALL
    "FEAT": {211},  # RFC 2389, 3.2
    "HASH": {213, 450, 451, 504, 550, 553},  # draft-bryan-ftpext-hash-02, 3.1
    "HELP": {211, 214},  # RFC 959, 5.4
    "LIST": _TRANSFER,
    "MDTM": {213, 550},  # RFC 3659, 3.2
    "MFMT": {213, 504, 550},  # draft-somers-ftp-mfxx-04, 3.2
    "MKD": {257, 550},  # RFC 959, 5.4
    "MLSD": _TRANSFER,  # RFC 3659, 7.2.1
    "MLST": {250, 550},  # RFC 3659, 7.2.1
    "MODE": {200, 504},  # RFC 959, 5.4
    "NLST": _TRANSFER,
    "NOOP": {200},  # RFC 959, 5.4
    "OPTS": {200, 451},  # RFC 2389, 4.2
    "PASS": {202, 230, 332, 503, 530},  # RFC 959, 5.4
    "PASV": {227, 425},  # RFC 959, 5.4; 425: 4.2
    "PBSZ": {200, 503},  # RFC 2228, section 3
    "PORT": {200, 425},  # RFC 959, 5.4; 425: 4.2
    "PROT": {200, 502, 503, 504, 521, 536},  # RFC 2228, section 3; 521: RFC 4217, 10.2
    "PWD": {257, 550},  # RFC 959, 5.4
    "QUIT": {221},  # RFC 959, 5.4
    "RANG": {350, 501},  # draft-bryan-ftp-range-08, 3.1
    "REIN": {120, 220, 230},  # RFC 959, 5.4; 230: pyftpdlib
    "REST": {350},  # RFC 959, 5.4
    "RETR": _TRANSFER,
    "RMD": {250, 550},  # RFC 959, 5.4
    "RNFR": {350, 450, 550},  # RFC 959, 5.4
    "RNTO": {250, 503, 532, 550, 553},  # RFC 959, 5.4
    "SITE": {200, 202, 214, 550},  # RFC 959, 5.4
    "SIZE": {213, 550},  # RFC 3659, 4.2
    "STAT": {211, 212, 213, 450, 550},  # RFC 959, 5.4; 550: 4.2
    "STOR": _TRANSFER,
    "STOU": _TRANSFER,  # RFC 959, 5.4 and 1123, 4.1.2.9
    "STRU": {200, 504},  # RFC 959, 5.4
    "SYST": {215},  # RFC 959, 5.4
    "TYPE": {200, 504},  # RFC 959, 5.4
    "USER": {230, 331, 332},  # RFC 959, 5.4
}
for _old, _new in (("XCUP", "CDUP"), ("XCWD", "CWD"), ("XMKD", "MKD"), ("XPWD", "PWD"), ("XRMD", "RMD")):
    FIRST[_old] = FIRST[_new]  # RFC 1123, 4.1.3.1
for _checksum in ("XCRC", "XMD5", "XSHA1", "XSHA256", "XSHA512"):
    FIRST[_checksum] = {250, 450, 504, 550}  # no specification: as ProFTPD's mod_digest

#: How a transfer ends. RFC 959, 5.4; 450, 451, 452, 552, 553: 4.2; 522: RFC 4217, 10.2.
ENDS = {226, 250, 425, 426, 450, 451, 452, 522, 550, 551, 552, 553}
#: How a PORT or EPRT ends. RFC 959, 4.2.
CONNECTS = {200, 425, 421}
#: The reply to a checksum, when it is computed.
HASHES = {213, 250, 426, 450, 451, 550}


def name_of(line: bytes) -> str:
    """The command that a line is, as pyftpdlib reads it; "" for what is none.

    What ends in ABOR, STAT or QUIT is that: clients send Telnet's Interrupt Process and Synch before it
    (RFC 959, 4.1.3), and in between whatever they please.
    """
    name = line.decode("utf-8", "replace").split(" ")[0].upper()
    if name in FIRST:
        return name
    return name[-4:] if name[-4:] in ("ABOR", "STAT", "QUIT") else ""


def first_codes(line: bytes) -> set[int]:
    """What the reply to *line* may be."""
    name = name_of(line)
    if not name:
        return SYNTAX
    return FIRST[name] | SYNTAX | LOGIN
