"""FTP users kept in Redis: every login asks the Redis server, and a slow one stalls only that login.

The `redis` client (pip install redis) knows nothing of gevent; `patch_all()` makes its sockets wait
cooperatively, and GeventIOLoop lets the session that logs in wait without the others. Try it:

    python examples/redis_authorizer.py add alice secret /tmp
    python examples/redis_authorizer.py &
    curl ftp://alice:secret@127.0.0.1:2121/
    redis-cli client pause 10000        # Redis says nothing for 10 s: logins wait, transfers do not
    redis-cli hset ftp:user:alice perm elr                 # in force from alice's next login on

Both commands take `--redis URL` first: redis://HOST:PORT/DB (default: redis://localhost), unix:///PATH.
"""

if __name__ == "__main__":  # before any other import; who imports this module decides for himself
    from gevent import monkey

    monkey.patch_all()

import argparse
import hashlib
import hmac
import os
import secrets
import signal
from typing import Any

import gevent
import redis
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.exceptions import AuthenticationFailed
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
from redis.backoff import NoBackoff
from redis.retry import Retry

from bridge import GeventIOLoop

PATIENCE = 30.0  # seconds a login waits for a connection to Redis, and then for each answer
NOBODY = {"salt": "", "hash": "", "home": "", "perm": ""}  # as slow to refuse as a wrong password


def connect(url: str) -> Any:
    """A Redis client; it connects at its first command, and once more if Redis was restarted."""
    pool: Any = redis.BlockingConnectionPool.from_url(  # the usual pool raises when it has none left
        url,
        max_connections=20,
        timeout=PATIENCE,
        socket_timeout=PATIENCE,
        decode_responses=True,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )
    return redis.Redis.from_pool(pool)


def digest(password: str, salt: str) -> str:
    """The scrypt hash, in hexadecimal; made in a native thread, since it takes some 50 ms."""
    parameters = {"salt": salt.encode(), "n": 2**14, "r": 8, "p": 1}
    done: bytes = gevent.get_hub().threadpool.apply(hashlib.scrypt, (password.encode(),), parameters)
    return done.hex()


def add(client: Any, name: str, password: str, home: str) -> None:
    """Store a user who may read and write in *home*; one who exists is replaced."""
    salt = secrets.token_hex(16)
    user = {"salt": salt, "hash": digest(password, salt), "home": home, "perm": "elradfmwMT"}
    client.hset(f"ftp:user:{name}", mapping=user)


class RedisAuthorizer(DummyAuthorizer):
    """Users as stored in Redis when they log in; between logins Redis is not asked."""

    def __init__(self, client: Any) -> None:
        super().__init__()
        self.client = client

    def validate_authentication(self, username: str, password: str, handler: FTPHandler) -> None:
        """Ask Redis and take the user's home and permissions from there. May wait."""
        try:
            user = NOBODY | self.client.hgetall(f"ftp:user:{username}")
        except redis.RedisError as error:
            handler.logerror(f"Redis: {error}")
            raise AuthenticationFailed("Users cannot be checked now, try again later.") from error
        if not hmac.compare_digest(digest(password, user["salt"]).encode(), user["hash"].encode()):
            raise AuthenticationFailed("Wrong user name or password.")
        fresh = DummyAuthorizer()  # if the entry is no good, sessions of this user keep the earlier one
        try:
            fresh.add_user(username, "", user["home"], user["perm"])
        except ValueError as error:
            handler.logerror(f"ftp:user:{username} in Redis: {error}")
            raise AuthenticationFailed("This account is not set up correctly.") from error
        self.user_table.update(fresh.user_table)


def build(url: str, port: int = 0) -> FTPServer:
    """An FTP server on 127.0.0.1 that asks the Redis server at *url*."""
    authorizer = RedisAuthorizer(connect(url))
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    return FTPServer(("127.0.0.1", port), handler, ioloop=GeventIOLoop())


def main() -> None:
    """Add a user, or serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="FTP users kept in Redis. Without a command: serve.")
    parser.add_argument("--redis", metavar="URL", default="redis://localhost", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=2121, help="0 for any free one (default: %(default)s)")
    command = parser.add_subparsers(dest="command").add_parser("add", help="add or replace a user")
    for name in ("name", "password", "home"):
        command.add_argument(name, metavar=name.upper())
    options = parser.parse_args()

    if options.command == "add":
        add(connect(options.redis), options.name, options.password, os.path.abspath(options.home))
        return
    server = build(options.redis, options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.close_all)
    print(f"FTP: ftp://127.0.0.1:{server.address[1]}/", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
