"""Users of a file: --users and --anonymous.

Who may log in is in users/authorizer.py, what users may use in users/quota.py, what keeps them in their homes
in filesystems/jail.py.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from pyftpdlib.authorizers import DummyAuthorizer

from bridge.filesystems import ConfinedFS, HomeFS, remove_leftovers
from bridge.filesystems.jail import available
from bridge.ftp.application import Application, add_anonymous
from bridge.ftp.options import UsageError
from bridge.server import SharedTable
from bridge.users import (
    READ_ONLY,
    WRITABLE,
    AccountDataMixin,
    AccountMixin,
    Accounts,
    AccountServerMixin,
    UserAuthorizer,
    UserFileError,
    WatchedFile,
    reason_for,
)

#: Rows of the shared tables for each user of the file, and at least: see SharedTable.
ROWS_FOR_EACH, ROWS = 8, 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("users of a file")
    group.add_argument(
        "--users",
        metavar="FILE",
        help="users with passwords, homes, permissions and limits, one on each line; edit it with "
        "`python -m bridge.ftp passwd FILE USER`",
    )
    group.add_argument(
        "--anonymous",
        action="store_true",
        help="let anonymous in too, to --directory (default: only if there are no other users)",
    )


def configure(application: Application) -> None:
    """Let in whom the options say. Raises UsageError."""
    options = application.options
    if options.users is None:
        if options.anonymous and options.username:
            _add_anonymous(application, application.authorizer)
        return
    if options.username:
        raise UsageError(
            "--username cannot be used with --users: add the user to the file, "
            "with `python -m bridge.ftp passwd FILE USER`"
        )
    if not available():
        raise UsageError("--users needs Linux with /proc, or users could leave their homes")
    authorizer = UserAuthorizer(application.directory, WRITABLE if options.write else READ_ONLY)
    file = WatchedFile(os.path.abspath(options.users), authorizer)
    try:
        file.load()
    except (OSError, UserFileError) as error:
        raise UsageError(f"--users: {reason_for(options.users, error)}") from None
    application.authorizer = authorizer
    count = len(authorizer.users)
    application.users = f"{count} {'user' if count == 1 else 'users'} of {options.users}"
    application.access = "as the file says"
    application.client_options = "-u USER:PASSWORD " + application.client_options
    application.before_bind.append(file.warn)
    application.reload.append(file.reload)
    application.services.append(file.start)
    if options.anonymous:
        _add_anonymous(application, authorizer)
    _account(application, authorizer)
    below = application.attributes["abstracted_fs"]
    application.attributes["abstracted_fs"] = ConfinedFS if below is HomeFS else _over(below)
    if options.atomic_uploads:
        application.before_bind.append(lambda: _remove_leftovers(application.directory, authorizer))


def _account(application: Application, authorizer: UserAuthorizer) -> None:
    accounts = Accounts(
        authorizer.limits_of,
        lambda: (application.shared["user sessions"], application.shared["user bytes"], application.slot),
    )

    def prepare() -> None:
        rows = max(ROWS, ROWS_FOR_EACH * len(authorizer.users))
        for name in ("user sessions", "user bytes"):
            application.shared[name] = SharedTable(application.slots, rows)

    application.before_bind.append(prepare)
    application.mixins.append(type("AccountMixin", (AccountMixin,), {"accounts": accounts}))
    application.data_mixins.append(AccountDataMixin)
    application.server_mixins.append(AccountServerMixin)


def _over(file_system: Any) -> Any:
    return type("FileSystem", (file_system, ConfinedFS), {})


def _add_anonymous(application: Application, authorizer: DummyAuthorizer) -> None:
    add_anonymous(authorizer, application.directory, application.options.write)
    application.users += " and anonymous"


def _remove_leftovers(directory: str, authorizer: UserAuthorizer) -> None:
    """What ftp/application.py does for the shared directory, for the homes that are elsewhere."""
    homes = {os.path.realpath(user.home_in(directory)) for user in authorizer.users.values()}
    for home in sorted(homes):
        if os.path.commonpath((home, directory)) != directory and os.path.isdir(home):
            remove_leftovers(home)
