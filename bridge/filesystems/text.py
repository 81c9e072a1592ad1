"""Names and errors as text for replies and log lines.

A leaf of the package. File names are whatever bytes a client has sent (PEP 383), and errors are whatever a
storage library says.
"""

import re

_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

#: A byte that is no text in the session's encoding, as `surrogateescape` decodes it.
_INVALID = re.compile("[\ud800-\udfff]")


def one_line(text: object) -> str:
    """Join the lines of *text*, an error for example, for a reply."""
    return " ".join(str(text).split())


def printable(text: str) -> str:
    r"""Write what cannot be printed as `\n`, `\xNN`, `\uNNNN`; a byte of invalid UTF-8 as `\xNN`."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def encodable(text: str) -> str:
    r"""Write bytes of invalid UTF-8 as `\xNN`: log handlers and JSON readers may take UTF-8 only."""
    return text if text.isascii() else _INVALID.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # os.fsdecode
        number -= 0xDC00
    if number < 0x100:
        return _ESCAPES.get(character, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
