"""The tables of options in README.md, made from the parser.

    python -m tests.options_table            print them
    python -m tests.options_table --update   write them into README.md, between its two marks

One table for each group of --help. What an option does and its default are taken from its help: the default
is what stands there in brackets, also if it is no value ("the current one").
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import bridge.ftp.command
from bridge.ftp.options import Parser, parser_of

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"

#: What a metavar says of the unit.
UNITS = {"SECONDS": "s", "BYTES": "bytes", "BYTES/S": "bytes/s", "MS": "ms"}

_DEFAULT = re.compile(r"\s*\((?:(?P<before>[^()]*);\s+)?default: (?P<default>[^()]*)\)")


def tables(parser: Parser) -> str:
    """Markdown: a table for each group of options."""
    return "\n\n".join("\n".join(_table(parser, title, actions)) for title, actions in parser.groups())


def _table(parser: Parser, title: str, actions: Sequence[argparse.Action]) -> Iterator[str]:
    rows = [(spelled(action), *explained(parser, action), _unit(action)) for action in actions]
    columns = ["option", "what it does", "default"]
    if any(unit for *_, unit in rows):
        columns.append("unit")
    yield f"**{title[0].upper()}{title[1:]}**"
    yield ""
    yield _row(columns)
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield _row(row[: len(columns)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _unit(action: argparse.Action) -> str:
    return UNITS.get(_metavar(action), "")


def spelled(action: argparse.Action) -> str:
    """An option with its short name and its value, as code."""
    value = _metavar(action)
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    names = ", ".join(action.option_strings)
    if not value:
        return f"`{names}`"
    return f"`{names} [{value}]`" if action.nargs == "?" else f"`{names} {value}`"


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    return str(action.metavar or action.dest.upper())


def explained(parser: Parser, action: argparse.Action) -> tuple[str, str]:
    """What an option does, and its default; a flag's is off."""
    text = parser.explanation(action)
    found = _DEFAULT.search(text)
    if found is None:
        return text, "off" if action.nargs == 0 and action.default is False else ""
    before = f" ({found['before']})" if found["before"] else ""
    return text[: found.start()] + before + text[found.end() :], found["default"]


def updated(readme: str, parser: Parser) -> str:
    """The text of README.md with tables that are current. Raises ValueError if a mark is missing."""
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:start]}\n\n{tables(parser)}\n\n{readme[end:]}"


def main(argv: Sequence[str]) -> int:
    """Print the tables, or write them into README.md."""
    parser = parser_of(bridge.ftp.command.PARTS)
    if argv == ["--update"]:
        README.write_text(updated(README.read_text(), parser))
    elif argv:
        print("usage: python -m tests.options_table [--update]", file=sys.stderr)
        return 2
    else:
        print(tables(parser))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
