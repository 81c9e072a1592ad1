"""Options from a file: --config, --check and --print-config.

A part of the command (ftp/application.py), but one that acts before there is the application: ftp/command.py
lets `parse` read argv. The file is TOML; its keys are the long options without their dashes, and it has no
sections:

    directory = "/srv/ftp"
    range = "60000-60099"
    write = true

Each value goes through the parser as if it stood on the command line, so types, checks and error messages are
the same; errors name the file and the key. What stands on the command line wins, also over a list.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from bridge.ftp.application import Application
from bridge.ftp.options import Parser, suggestion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Options that are about this run of the command, or about the file itself.
COMMAND_LINE_ONLY = {"help", "version", "config", "check", "print-config"}
#: What --print-config does not show.
SECRETS = {"password", "http-admin"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="read options from a TOML file: long options without dashes, such as port = 2121, write = true, "
        'range = "60000-60099"; the command line wins',
    )
    group.add_argument(
        "--check", action="store_true", help="check options, files and users, but bind and serve nothing"
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print the options in force as a file for --config, without passwords",
    )


def configure(application: Application) -> None:
    """Nothing: options are read before there is the application."""


def parse(make_parser: Callable[[], Parser], argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line and of the file that its --config names.

    Exits as argparse does: 2 and one line for what is wrong. With --print-config it prints and exits with 0.
    """
    parser = make_parser()
    options: argparse.Namespace = parser.parse_args(argv)
    file = _File(make_parser(), options.config) if options.config is not None else None
    if file is not None:
        # An option that is not on the command line stays None; argparse sets defaults where nothing is.
        unset = dict.fromkeys(file.values)
        options = parser.parse_args(argv, argparse.Namespace(**unset))
        for dest, value in file.values.items():
            if getattr(options, dest) is None:
                setattr(options, dest, value)
    if options.print_config:
        try:
            print("\n".join(_printed(make_parser(), argv, options, file.written if file else {})))
        except UnicodeEncodeError:
            parser.error("--print-config: a value is no text in UTF-8, which TOML must be")
        parser.exit(0)
    return options


def _key(action: argparse.Action) -> str:
    return next((name[2:] for name in action.option_strings if name.startswith("--")), action.dest)


# --- reading


class _File:
    """What a file says: `values` as the parser made them, by destination, and as `written`, by key."""

    def __init__(self, parser: Parser, path: str) -> None:
        self._parser = parser
        self._parser.exit_on_error = False  # raise: the message lacks the file
        self._path = path
        options = {_key(action): action for action in parser.options()}
        self.values: dict[str, Any] = {}
        self.written: dict[str, Any] = self._load()
        for key, value in self.written.items():
            action = options.get(key)
            if action is None:
                near = suggestion(key.replace("_", "-"), sorted(options.keys() - COMMAND_LINE_ONLY))
                self._fail(f"{key}: no such option{near}")
            if key in COMMAND_LINE_ONLY:
                self._fail(f"{key}: only on the command line")
            self.values[action.dest] = self._value(key, action, value)

    def _fail(self, problem: str) -> NoReturn:
        self._parser.error(f"--config: {self._path}: {problem}")

    def _load(self) -> dict[str, Any]:
        try:
            with open(self._path, "rb") as file:
                return tomllib.load(file)
        except OSError as error:
            self._fail(f"cannot read: {error.strerror}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self._fail(f"no TOML: {error}")

    def _value(self, key: str, action: argparse.Action, value: Any) -> Any:
        if isinstance(value, dict):
            self._fail(f"[{key}] or a table: options are written without sections, {key} = ...")
        if isinstance(value, bool):
            return self._switched(key, action, value)
        if action.nargs == 0:
            self._fail(f"{key}: {value!r} is neither true nor false")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not self._parser.repeatable(action):
            self._fail(f"{key}: takes one value, no list")
        for item in values:
            if isinstance(item, bool) or not isinstance(item, (str, int, float)):
                self._fail(f"{key}: {item} is neither text nor a number")
        return self._parsed(key, action, [f"--{key}={item}" for item in values]) if values else []

    def _switched(self, key: str, action: argparse.Action, on: bool) -> Any:
        if action.nargs != 0 and action.nargs != "?":
            self._fail(f"{key}: takes a value, not {str(on).lower()}")
        if on:
            return self._parsed(key, action, [f"--{key}"])
        # a flag that is not given; a flag that is on by itself has another option to turn it off
        off = f"--no-{key}"
        return self._parsed(key, action, [off]) if off in action.option_strings else action.default

    def _parsed(self, key: str, action: argparse.Action, words: list[str]) -> Any:
        try:
            # (None: values are not added to those of a default)
            unset = argparse.Namespace(**{action.dest: None})
            return getattr(self._parser.parse_args(words, unset), action.dest)
        except argparse.ArgumentError as error:
            self._fail(f"{key}: {error.message}")


# --- printing


def _printed(
    parser: Parser, argv: Sequence[str] | None, options: argparse.Namespace, written: dict[str, Any]
) -> Iterable[str]:
    """The lines of a file that says what *options* say; an option without a value is a comment."""
    actions = [action for action in parser.options() if _key(action) not in COMMAND_LINE_ONLY]
    # As written on the command line: a type's result (a range as a list of ports) need not be its text.
    for action in parser.options():
        action.type = action.choices = None
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(action.dest for action in actions)))
    for action in actions:
        key, value = _key(action), getattr(options, action.dest)
        if key in SECRETS:
            if value is not None:
                yield f"# {key} = (not shown)"
            continue
        if value is not None and action.nargs == 0:
            value = value is True or value == action.const
        elif value is not None and not _is_itself(value, parser.repeatable(action)):
            as_given = getattr(given, action.dest)
            default = value if isinstance(value, str) else None  # no text: left out, as it is the default
            value = written.get(key, default) if as_given is None else as_given
        yield f"# {key} =" if value is None else f"{key} = {_toml(value)}"


def _is_itself(value: Any, repeatable: bool) -> bool:
    """Whether a type's result says in TOML what its text says; a list of ports from "8000-8009" does not."""
    if repeatable and isinstance(value, list):
        return all(isinstance(item, (str, int, float)) for item in value)
    return isinstance(value, (int, float))


def _toml(value: Any) -> str:
    """A TOML value. JSON's strings are TOML's but for DEL; its numbers and lists are the same.

    Raises UnicodeEncodeError for what has no UTF-8.
    """
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    text.encode()
    return text
