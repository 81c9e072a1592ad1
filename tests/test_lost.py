"""A session that ends in the middle of a command, with the reply that begins or ends a transfer; and a data
connection that fails while it is accepted.

pyftpdlib goes on with the session and stumbles over what is gone. What is promised: the file is closed,
the transfer is counted, nothing is logged as a bug and no timer is left; a client that is there gets a reply.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.handlers import FTPHandler
from support import Client, eventually, handler_class, started, users


def breaking(home: Path, code: str, **attributes: Any) -> Any:
    """A handler class whose connection is gone as soon as *code* has been said."""

    def respond(self: Any, resp: str, logfun: Any = logging.debug) -> None:
        FTPHandler.respond(self, resp)
        if resp.startswith(code):
            self.close()

    return handler_class(users(home), respond=respond, **attributes)


@pytest.mark.parametrize("code", ["125", "226"])
@pytest.mark.parametrize("command", ["RETR old", "STOR new", "STOU", "APPE new", "LIST"])
def test_the_session_ends_with_a_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str, code: str
) -> None:
    (tmp_path / "old").write_bytes(b"x" * 1000)
    descriptors = len(os.listdir("/proc/self/fd"))
    with started(breaking(tmp_path, code)) as server:
        calls = len(server.ioloop.sched._tasks)
        with Client(server) as client, client.data() as data:
            (control,) = server._sessions
            eventually(lambda: control.data_channel)
            client.send(command)
            data.shutdown(1)
            assert client.ended()
            eventually(lambda: not server._sessions)
        eventually(lambda: len(os.listdir("/proc/self/fd")) == descriptors + 1)  # the listener
        left = [each for each in server.ioloop.sched._tasks[calls:] if not each.cancelled]
        assert not left
    assert not [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


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
