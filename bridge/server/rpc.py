"""Asking the other worker processes: each answers on a Unix socket in a directory of this user's.

A question is one line of JSON; the answer is all that comes until the end of the connection, JSON too:

    <directory>/0.sock   <directory>/1.sock   ...   one for each slot

A process that does not answer within ANSWER_TIMEOUT seconds, or is gone (its socket's file may be left), is
not
counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import gevent
import gevent.socket
from gevent.server import StreamServer

from bridge.server.listeners import unix_listener

log = logging.getLogger(__name__)

#: What is asked and answered.
Answer = Callable[[dict[str, Any]], Any]

#: Seconds another process has for its answer. One that is not blocked needs 0.001 to 0.01.
ANSWER_TIMEOUT = 0.5

#: Bytes that a question may have.
MAX_QUESTION = 4096


def serve(directory: str, slot: int, answer: Answer) -> Callable[[], None]:
    """Answer questions of the other processes on this thread's hub; returns what ends it.

    *answer* is called in a greenlet. Owns `<slot>.sock` in *directory*; one that a dead process has left is
    replaced. Raises OSError.
    """
    path = os.path.join(directory, f"{slot}.sock")
    listener = unix_listener(path)
    listener.listen(64)

    def _on_connection(sock: Any, _: object) -> None:
        try:
            with gevent.Timeout(ANSWER_TIMEOUT), sock.makefile("rb") as file:
                question = json.loads(file.readline(MAX_QUESTION))
            sock.sendall(json.dumps(answer(question)).encode())
        except (OSError, ValueError, gevent.Timeout) as error:
            log.debug("another process asked and went: %r", error)  # it timed out, or died

    server = StreamServer(gevent.socket.socket(fileno=listener.detach()), _on_connection)
    server.start()

    def end() -> None:
        server.stop(0)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass  # with the directory, which is the parent's

    return end


def ask_all(directory: str, but: int, question: dict[str, Any]) -> list[Any]:
    """The answers of all processes with a socket in *directory*, except that of slot *but*. May wait."""
    try:
        names = [name for name in os.listdir(directory) if name.endswith(".sock") and name != f"{but}.sock"]
    except FileNotFoundError:
        return []  # the parent has removed it: all end
    asking = [gevent.spawn(_ask, os.path.join(directory, name), question) for name in sorted(names)]
    gevent.joinall(asking)
    return [each.value for each in asking if each.value is not None]


def _ask(path: str, question: dict[str, Any]) -> Any:
    try:
        with (
            gevent.Timeout(ANSWER_TIMEOUT),
            gevent.socket.socket(gevent.socket.AF_UNIX, gevent.socket.SOCK_STREAM) as sock,
        ):
            sock.connect(path)
            sock.sendall(json.dumps(question).encode() + b"\n")
            with sock.makefile("rb") as file:
                return json.loads(file.read())
    except (OSError, ValueError, gevent.Timeout) as error:
        log.debug("%s does not answer: %r", path, error)
        return None
