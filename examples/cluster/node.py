"""`python -m bridge.ftp` with users kept in Redis: how a program adds an option and what it does.

The users are those of ../redis_authorizer.py; its directory has to be on PYTHONPATH, as the script `node`
beside this file has it:

    python ../redis_authorizer.py --redis redis://10.0.0.20 add alice secret /srv/ftp
    ./node
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

from redis_authorizer import RedisAuthorizer, connect

from bridge import OffloadedAuthorizer
from bridge.ftp import command as ftp
from bridge.ftp.application import Application
from bridge.ftp.options import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --redis."""
    parser.add_argument("--redis", metavar="URL", required=True, help="where the users are: redis://HOST")


def configure(application: Application) -> None:
    """Ask Redis about users, each time one logs in. A connection is made then, not here.

    On threads: workers are forked before there is a hub, so nothing is patched for Redis' client.
    """
    try:
        application.authorizer = OffloadedAuthorizer(RedisAuthorizer(connect(application.options.redis)))
    except ValueError as error:
        raise UsageError(f"--redis: {error}") from None
    application.users = "users in Redis"
    application.client_options = "-u NAME:PASSWORD "


def main() -> int:
    """Run the server; return the exit code."""
    ftp.PARTS = (*ftp.PARTS, SimpleNamespace(add_options=add_options, configure=configure))
    return ftp.main()


if __name__ == "__main__":
    sys.exit(main())
