"""A data connection that fails while it is accepted: the client that waits for its transfer gets a reply."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from pyftpdlib.handlers import FTPHandler
from support import Client, handler_class, started, users


def test_a_connection_that_fails_when_it_is_accepted(tmp_path: Path) -> None:
    """As accept(2) says of Linux: it has the errors of the connection, such as EPROTO."""

    def accept(self: Any) -> Any:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))

    passive = type("Passive", (FTPHandler.passive_dtp,), {"accept": accept})
    with started(handler_class(users(tmp_path), passive_dtp=passive)) as server, Client(server) as client:
        with client.data():
            client.send("STOR new")
            replies = [client.reply()]
            if replies[0].startswith("150"):
                replies.append(client.reply())
            assert replies[-1].startswith("425"), replies
        client.command("NOOP", "200")
