"""What clients send: commands with valid, odd and hostile arguments, for hypothesis. No tests here."""

from __future__ import annotations

import hypothesis.strategies as st

#: Few names, so that commands meet: files and directories of `TREE`, and of each other.
NAMES = [b"a", b"b", b"dir", b"dir/c", b"dir/sub", b"new", b"dir/new"]
#: The tree that each sequence starts from; None is a directory.
TREE: dict[str, bytes | None] = {
    "/a": b"line\r\nline\n" * 3,
    "/b": b"",
    "/dir": None,
    "/dir/c": bytes(range(256)) * 8,
    "/dir/sub": None,
}

#: Names that have led servers astray.
ODD_NAMES = [
    *(b".", b"..", b"/", b"//", b"../../../etc/passwd", b"/etc/passwd", b"./a", b"dir/../a", b"a/", b"a/b"),
    *(b"dir//c", b"...", b"-la", b"-a", b"~", b"*", b"[a]", b"?", b" a", b"a ", b"  ", b"\t", b'"', b'a"b'),
    *(
        b"%s%n%d",
        b"{0}",
        b"$HOME",
        b"`id`",
        b"a\\b",
        b"C:\\a",
        b"\xc3\xa9",
        b"\xe9",
        b"\xff\xfe",
        b"\xc0\xaf",
    ),
    *(b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xae", b"a\x00b", b"\x00", b"\x1b[2J", b"a\rb", b"\r"),
    *(b"a\nb", b"\x7f", b"\x85", b"x" * 255, b"x" * 256, b"d/" * 300, b"dir/" + b"y" * 200),
    *(b".a.0123456789abcdef.upload~", b"dir/.c.0123456789abcdef.upload~"),
]

#: Telnet: Interrupt Process, Synch, Are You There, a negotiation, an escaped 255, an unended Subnegotiation.
TELNET = [
    b"\xff\xf4",
    b"\xff\xf4\xff\xf2",
    b"\xf2",
    b"\xff\xf6",
    b"\xff\xfb\x01",
    b"\xff\xff",
    b"\xff\xfa\x18",
]

ODD_NUMBERS = [
    b"0",
    b"1",
    b"-1",
    b"00",
    b"1e3",
    b"0x10",
    b"9" * 30,
    b"\xd9\xa3",
    b"+1",
    b"1_0",
    b" 1",
]

_junk = st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"\r"))
names = st.one_of(*[st.sampled_from(NAMES)] * 3, st.sampled_from(ODD_NAMES), _junk)
numbers = st.one_of(st.integers(0, 4096).map(lambda n: b"%d" % n), st.sampled_from(ODD_NUMBERS))


def _command(name: bytes, *parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(st.just(name), *parts).map(b" ".join)


def _one_of(*words: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(words)


#: Commands with one path.
PATHS = b"APPE CWD DELE LIST MDTM MKD MLSD MLST NLST RETR RMD RNFR RNTO SIZE STAT STOR STOU XCWD XMKD".split()
PATHS += [b"XRMD"]
BARE = b"ABOR CDUP FEAT HELP LIST MLSD NLST NOOP PWD QUIT REIN STAT STOU SYST XCUP XPWD".split()
#: Commands that pyftpdlib does not have; bridge has these with --hash.
CHECKSUMS = b"HASH XCRC XMD5 XSHA1 XSHA256 XSHA512".split()
UNKNOWN = [
    b"",
    b" ",
    b"SMNT",
    b"ACCT",
    b"SITE",
    b"EHLO",
    b"GET",
    b"\x16\x03\x01",
    b"ABORT",
    b"NOOP\r",
    b"XXABOR",
]

_modes = _one_of(b"644", b"755", b"0", b"0000", b"999", b"-1", b"\xd9\xa3\xd9\xa3\xd9\xa3")
_times = _one_of(
    b"20200101000000", b"00010101000000", b"20201301000000", b"2020", b"2" * 14, b"-0200101000000"
)
_hosts = _one_of(b"127,0,0,1", b"8,8,8,8", b"127,0,0,999", b"0,0,0,0", b"a,b,c,d", b"1")
_addresses = _one_of(b"127.0.0.1", b"8.8.8.8", b"::1", b"", b"1.2.3", b"127.0.0.1\x00")

#: Commands that say something of one of the others' arguments, or whose arguments have a form.
_formed = st.one_of(
    _command(b"TYPE", _one_of(b"A", b"I", b"I", b"L8", b"L 7", b"A N", b"E", b"i", b"", b"\xff")),
    _command(b"MODE", _one_of(b"S", b"B", b"C", b"s", b"?")),
    _command(b"STRU", _one_of(b"F", b"R", b"P", b"f", b"?")),
    _command(b"REST", numbers),
    _command(b"ALLO", numbers | _one_of(b"1 R 1", b" ")),
    _command(
        b"OPTS", _one_of(b"UTF8 ON", b"MLST size;type;", b"MLST", b"MLST x", b"HASH", b"a b c", b"MLST ;")
    ),
    _command(b"HELP", _one_of(b"RETR", b"retr", b"NONE", b"SITE", b"%s", b"SITE CHMOD")),
    _command(b"SITE", _one_of(b"HELP", b"HELP CHMOD", b"CHMOD", b"CHMOD 644", b"EXEC id", b"help", b" ")),
    _command(b"SITE CHMOD", _modes, names),
    _command(b"MFMT", _times, names),
    _command(b"EPSV", _one_of(b"1", b"2", b"3", b"ALL", b"all x", b"-1")),
    _command(
        b"PORT", st.tuples(_hosts, _one_of(b"0,1", b"0,0", b"4,0", b"300,1", b"1", b"-1,2")).map(b",".join)
    ),
    _command(
        b"EPRT", st.tuples(_one_of(b"1", b"2", b"3"), _addresses, numbers).map(lambda t: b"|%s|%s|%s|" % t)
    ),
    _command(b"EPRT", _one_of(b"|", b"||||", b"1", b"|1|127.0.0.1|1", b"\xff\xff")),
    _command(b"USER", _one_of(b"u", b"v", b"anonymous", b"nobody", b"\xff", b"u" * 500)),
    _command(b"PASS", _one_of(b"p", b"p", b"wrong", b"\x00", b"\xff")),
    _command(b"PBSZ", _one_of(b"0", b"1", b"x")),
    _command(b"PROT", _one_of(b"S", b"E", b"X")),
    _command(b"AUTH", _one_of(b"KERBEROS_V4", b"GSSAPI", b"tls1", b"\xff")),
)

_pathed = st.builds(lambda name, path: name + b" " + path, st.sampled_from(PATHS), names)
_bare = st.one_of(st.sampled_from(BARE), st.builds(lambda a, b: a + b" " + b, st.sampled_from(BARE), names))
_hostile = st.one_of(
    st.sampled_from(UNKNOWN),
    st.builds(
        lambda iac, line: iac + line,
        st.sampled_from(TELNET),
        st.sampled_from([b"ABOR", b"STAT", b"NOOP", b"PWD"]),
    ),
    st.builds(
        lambda line, iac: line + iac, st.sampled_from([b"ABOR", b"NOOP", b"CWD a"]), st.sampled_from(TELNET)
    ),
    st.builds(
        lambda name, n: name + b" " + b"A" * n,
        st.sampled_from(PATHS),
        st.sampled_from([2040, 2041, 2048, 4096, 9000]),
    ),
    _junk,
)
_checksums = st.builds(
    lambda name, path: name + b" " + path, st.sampled_from(CHECKSUMS), names
) | st.sampled_from(
    [
        b"RANG 0 3",
        b"RANG 1 0",
        b"RANG 5 2",
        b"RANG x y",
        b"OPTS HASH MD5",
        b"OPTS HASH x",
        b'XCRC "a" 0 5',
        b"XMD5 a 9 1",
    ]
)


def is_quit(line: bytes) -> bool:
    """Whether pyftpdlib takes *line* for QUIT: see legal.name_of."""
    return line.decode("utf-8", "replace").split(" ")[0].upper()[-4:] == "QUIT"


def _without_end(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A line feed after a carriage return would be two lines, and what is told of the first, of both."""
    return lines.map(lambda line: line.replace(b"\r\n", b"\n")).map(
        lambda line: line.rstrip(b"\r") or b"NOOP"
    )


#: What a client sends before CR LF. QUIT is a rule of its own.
theirs = _without_end(st.one_of(_pathed, _pathed, _bare, _formed, _formed, _hostile)).filter(
    lambda line: not is_quit(line)
)
lines = theirs | _without_end(_checksums)
contents = st.one_of(
    st.binary(max_size=64),
    _one_of(b"", b"\r", b"\n", b"\r\n", b"a\r\nb\rc\n"),
    st.builds(
        lambda text, times: text * times,
        _one_of(b"z", b"\r\r\n\n", b"\x00\xff\r"),
        st.sampled_from([40, 70_000]),
    ),
)
