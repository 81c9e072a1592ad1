"""install() and uninstall()."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyftpdlib.ioloop
import pytest
from pyftpdlib.servers import FTPServer

import bridge
from support.servers import handler_class, users


@pytest.fixture(autouse=True)
def own_loop() -> Iterator[None]:
    before = pyftpdlib.ioloop.IOLoop
    yield
    bridge.uninstall()
    assert pyftpdlib.ioloop.IOLoop is before


def test_importing_bridge_installs_nothing() -> None:
    assert pyftpdlib.ioloop.IOLoop is not bridge.GeventIOLoop


def test_installed_it_is_the_loop_of_servers_made_without_one(tmp_path: Path) -> None:
    bridge.install()
    bridge.install()
    with FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path))) as server:
        assert type(server.ioloop) is bridge.GeventIOLoop
        assert server.ioloop is bridge.GeventIOLoop.instance()


def test_uninstalled_pyftpdlib_has_its_own_loop_again(tmp_path: Path) -> None:
    own = pyftpdlib.ioloop.IOLoop
    bridge.install()
    bridge.uninstall()
    bridge.uninstall()
    with FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path))) as server:
        assert type(server.ioloop) is own


def test_it_says_when_it_comes_too_late(tmp_path: Path) -> None:
    own = pyftpdlib.ioloop.IOLoop
    with FTPServer(("127.0.0.1", 0), handler_class(users(tmp_path))):
        with pytest.raises(RuntimeError, match=r"too late: 1 channel.*before the first FTPServer"):
            bridge.install()
        assert pyftpdlib.ioloop.IOLoop is own
    bridge.install()
