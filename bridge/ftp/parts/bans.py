"""Failed logins: --ban. What counts, and what becomes of it, is in users/bans.py."""

from __future__ import annotations

import argparse

from bridge.ftp.application import Application
from bridge.ftp.options import argument
from bridge.server import SharedTable
from bridge.users import BanMixin, Bans, BanServerMixin, Policy
from bridge.users.bans import DEFAULT, ROWS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this module."""
    group = parser.add_argument_group("failed logins")
    group.add_argument(
        "--ban",
        type=argument(Policy.parse),
        metavar="FAILURES/SECONDS[/BANSECONDS]",
        default=DEFAULT,
        help="refuse an address (IPv6: a /64) after so many failed logins in so many seconds, "
        "for BANSECONDS or as long; 0 for never (default: %(default)s)",
    )


def configure(application: Application) -> None:
    """Count failed logins if the options say so."""
    rule: Policy = application.options.ban
    if not rule.failures:
        return
    bans = Bans(rule, lambda: (application.shared["failures"], application.shared["bans"], application.slot))

    def prepare() -> None:
        for name in ("failures", "bans"):
            application.shared[name] = SharedTable(application.slots, rows=ROWS)

    application.before_bind.append(prepare)
    application.services.append(bans.start)
    application.mixins.append(type("BanMixin", (BanMixin,), {"bans": bans}))
    application.server_mixins.append(type("BanServerMixin", (BanServerMixin,), {"bans": bans}))
