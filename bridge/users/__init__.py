"""Accounts: who may log in, and what they may use.

file.py is the users file, authorizer.py logs in by it; `python -m bridge.ftp passwd` edits it.
quota.py limits sessions and bytes, throttle.py the rate, bans.py those who guess passwords.

Passwords are checked on threads, never on the hub. Begin with authorizer.py.

Public names: Accounts, Bans, Policy, UserAuthorizer, WatchedFile, and the mix-ins that apply them to a
server.
"""

from bridge.users.authorizer import UserAuthorizer, WatchedFile, reason_for
from bridge.users.bans import BanMixin, Bans, BanServerMixin, Policy
from bridge.users.file import READ_ONLY, WRITABLE, UserFileError
from bridge.users.quota import AccountDataMixin, AccountMixin, Accounts, AccountServerMixin

__all__ = [
    "READ_ONLY",
    "WRITABLE",
    "AccountDataMixin",
    "AccountMixin",
    "AccountServerMixin",
    "Accounts",
    "BanMixin",
    "BanServerMixin",
    "Bans",
    "Policy",
    "UserAuthorizer",
    "UserFileError",
    "WatchedFile",
    "reason_for",
]
