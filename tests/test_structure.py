"""What the code stands on and how it hangs together."""

from __future__ import annotations

import argparse
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import gevent
import gevent._hub_local
import gevent._monitor
import pyftpdlib.exceptions
import pyftpdlib.ioloop
import pytest
from gevent.hub import Hub
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.handlers.ftp.producers import FileProducer
from pyftpdlib.servers import FTPServer

import bridge
from support.servers import Client, eventually, handler_class, serving, users

PACKAGE = Path(bridge.__file__).parent


def test_every_module_starts_with_its_job() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
        assert len(path.read_text().splitlines()) <= 400 or "Over 400 lines:" in path.read_text(), path.name


#: What 0.4 had beside each other, and where it is now.
DEPRECATED = {
    "handlers": ("bridge", "FTPHandler"),
    "monitor": ("bridge", "watch_hub"),
    "listeners": ("bridge.server", "systemd_sockets"),
    "virtual": ("bridge.filesystems", "Entry"),
    "uploads": ("bridge.filesystems", "remove_leftovers"),
    "threads": ("bridge.filesystems", "Threads"),
    "homes": ("bridge.filesystems", "HomeFS"),
}


@pytest.mark.parametrize("module", DEPRECATED)
def test_an_old_name_warns_and_is_the_new_one(module: str) -> None:
    place, name = DEPRECATED[module]
    sys.modules.pop(f"bridge.{module}", None)
    with pytest.warns(DeprecationWarning, match=rf"^bridge\.{module} is deprecated: .*{name}.* in {place}$"):
        old = importlib.import_module(f"bridge.{module}")
    assert getattr(old, name) is getattr(importlib.import_module(place), name)


@pytest.mark.parametrize("module", ["site", "options"])
def test_a_module_that_moved_says_where_to(module: str) -> None:
    with pytest.raises(ImportError, match=rf"^bridge\.{module} is now bridge\.ftp\."):
        importlib.import_module(f"bridge.{module}")


def test_importing_bridge_has_no_effects() -> None:
    """No hub, patch, log handler, change of pyftpdlib, `bridge.ftp`, fork hook or process."""
    code = """
import logging, multiprocessing, os, psutil, sys
hooks = []
os.register_at_fork = lambda **kwargs: hooks.append(kwargs)
import gevent.monkey, gevent._hub_local, pyftpdlib.ioloop
own = pyftpdlib.ioloop.IOLoop
import bridge
assert gevent._hub_local.get_hub_if_exists() is None
assert not gevent.monkey.saved
assert pyftpdlib.ioloop.IOLoop is own
assert not logging.getLogger("bridge").handlers and not logging.getLogger("bridge.loop.ioloop").handlers
assert "bridge.ftp" not in sys.modules
assert not [kwargs for kwargs in hooks if "bridge" in repr(kwargs)]
assert not psutil.Process().children()
assert multiprocessing.get_start_method() == multiprocessing.get_all_start_methods()[0]  # the default
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (argparse, "_AppendAction"),
        (argparse, "_ExtendAction"),
        (argparse.ArgumentParser(), "_actions"),
        (argparse.ArgumentParser(), "_action_groups"),
        (argparse.ArgumentParser().add_argument_group(), "_group_actions"),
        (argparse.ArgumentParser, "_get_formatter"),
        (argparse.HelpFormatter, "_expand_help"),
        (pyftpdlib.ioloop, "_IOLoop"),
        (pyftpdlib.ioloop, "_Scheduler"),
        (pyftpdlib.ioloop, "_CallLater"),
        (pyftpdlib.ioloop, "_CallEvery"),
        (pyftpdlib.ioloop, "asyncore"),
        (pyftpdlib.ioloop, "timer"),
        (pyftpdlib.ioloop._IOLoop, "_instance"),
        (pyftpdlib.ioloop._IOLoop, "_started_once"),
        (pyftpdlib.ioloop._Scheduler(), "_tasks"),
        (pyftpdlib.ioloop._Scheduler(), "_cancellations"),
        (pyftpdlib.ioloop._Scheduler, "reheapify"),
        (pyftpdlib.ioloop.AsyncChat(ioloop=bridge.GeventIOLoop()), "_fileno"),
        (pyftpdlib.ioloop.AsyncChat(ioloop=bridge.GeventIOLoop()), "_closed"),
        (pyftpdlib.ioloop.AsyncChat(ioloop=bridge.GeventIOLoop()), "ioloop"),
        (gevent._hub_local, "get_hub_if_exists"),
        (gevent._hub_local, "set_hub"),
        (gevent._monitor.PeriodicMonitoringThread, "_greenlet_tracer"),
        (gevent.get_hub(), "_threadpool"),
        (gevent.get_hub(), "thread_ident"),
        (gevent.get_hub(), "main_hub"),
        (gevent.get_hub().loop, "approx_timer_resolution"),
        (Hub, "handle_error"),
        (Hub, "start_periodic_monitoring_thread"),
        (FTPHandler, "_make_epasv"),
        (FTPHandler, "_make_eport"),
        (FTPHandler, "_on_dtp_close"),
        (FTPHandler, "_on_dtp_connection"),
        (FTPHandler, "_shutdown_connecting_dtp"),
        (FileProducer, "_posix_ascii_data_wrapper"),
        (FileProducer(None, "a"), "_prev_chunk_endswith_cr"),
        (pyftpdlib.exceptions, "_FileReadWriteError"),
        (pyftpdlib.exceptions, "_RetryError"),
        (FTPServer, "_accept_new_cons"),
        (FTPServer, "_log_start"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_the_names_we_stand_on_exist(owner: object, name: str) -> None:
    assert hasattr(owner, name)


def test_the_attributes_of_a_session_we_stand_on_exist(tmp_path: Path) -> None:
    with serving(handler_class(users(tmp_path))) as server, Client(server) as client, client.data():
        control = list(server.ioloop.socket_map.values())[1]
        eventually(lambda: control.data_channel)
        data = control.data_channel
        for name in (
            "_closed",
            "_closing",
            "_last_response",
            "_dtp_acceptor",
            "_dtp_connector",
            "_in_dtp_queue",
            "_out_dtp_queue",
            "_fileno",
            "_log_debug",
            "_in_buffer",
            "_in_buffer_len",
        ):
            assert hasattr(control, name)
        for name in (
            "_quit_pending",
            "_restart_position",
            "_rnfr",
            "_wanted_io_events",
            "producer_fifo",
            "_current_type",
        ):
            assert hasattr(control, name)
        for name in ("_resp", "_closed", "_initialized", "_data_wrapper"):
            assert hasattr(data, name)


def test_pyftpdlib_swallows_what_we_do_not() -> None:
    """When asyncore's read() lets GreenletExit through, channels.py may use it again."""

    class Channel:
        error = None

        def handle_read_event(self) -> None:
            raise gevent.GreenletExit

        def handle_error(self) -> None:
            self.error = sys.exc_info()[0]

    channel = Channel()
    pyftpdlib.ioloop._read(channel)
    assert channel.error is gevent.GreenletExit
