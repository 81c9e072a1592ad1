"""What holds for every test: nothing is left behind, the hub is not blocked, a hang shows itself.

BRIDGE_TEST_PATCHED=1 runs the whole suite under `patch_all()`. `--proof` and `--long` make the tests under
tests/proof go on for minutes, or for hours, where they otherwise take seconds.
"""

from __future__ import annotations

import os

if os.environ.get("BRIDGE_TEST_PATCHED"):
    from gevent import monkey

    monkey.patch_all()

import contextlib
import faulthandler
import gc
import site
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gevent
import psutil
import pytest
from gevent import monkey
from gevent.util import format_run_info
from pyftpdlib.ioloop import IOLoop

import bridge.web.auth
from bridge import GeventIOLoop
from bridge.loop.turns import Worker
from support import honesty
from support.effort import Effort
from support.servers import short_directory

#: Seconds in which a native thread that was joined, or that ends by itself, is gone, and what it had opened.
GONE = 10.0

#: Seconds after which a test counts as hanging.
HANG = 120.0

_start_native_thread = monkey.get_original("_thread", "start_new_thread")
_native_lock = monkey.get_original("_thread", "allocate_lock")
_this = psutil.Process()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bridge")
    group.addoption("--proof", action="store_true", help="tests/proof: minutes instead of seconds")
    group.addoption("--long", action="store_true", help="tests/proof: hours")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "blocks: blocks the hub on purpose")
    # What the process opens once, at the first hub of the main thread and of another one.
    gevent.sleep(0.001)
    gevent.get_hub().threadpool.apply(gevent.sleep, (0.001,))
    gevent.sleep(0.001)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_soak.py")  # takes longest, so it begins first


def pytest_collection_finish() -> None:
    # From here on `gc.get_objects()` leaves out what was imported: looking at that took half the time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest) -> Effort:
    """How much of a test under tests/proof to do."""
    options = request.config.option
    return "long" if options.long else "proof" if options.proof else "short"


def pytest_report_header() -> str:
    loop = gevent.get_hub().loop
    patched = "patched" if monkey.is_module_patched("socket") else "unpatched"
    return f"gevent {gevent.__version__} on {type(loop).__module__} ({loop.backend}), {patched}"


# --- what tests and the programs that they start find around them

#: Variables of who runs the tests, that mean something to programs: to Python's urllib, curl and wget; to a
#: service of systemd; to argparse, and to `--http-admin`.
_FOREIGN = ("XDG_", "NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "COLUMNS", bridge.web.auth.ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home that is empty and can be written to, the usual umask, no proxy, and no systemd."""
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())  # packages may be there
    os.environ["HOME"] = str(tmp_path_factory.mktemp("home"))
    for name in [*os.environ]:
        if name.startswith(_FOREIGN) or name.lower().endswith("_proxy"):
            del os.environ[name]
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A new directory for Unix sockets (support/servers.py)."""
    with short_directory() as path:
        yield path


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A new directory that every user can enter. (pytest's are closed to others, and TMPDIR may be.)"""
    places = [Path(each).resolve() for each in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    for place in places:
        if all(each.exists() and each.stat().st_mode & 0o001 for each in (place, *place.parents)):
            break
    else:
        pytest.skip(f"not every user can reach one of {', '.join(map(str, places))}")
    with tempfile.TemporaryDirectory(dir=place) as path:
        os.chmod(path, 0o755)
        yield Path(path)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names of files in a report may be no UTF-8; pytest-xdist gives up the whole run then."""
    report = yield
    text = f"{report.longrepr}" if report.failed else ""
    if text != _encodable(text):
        report.longrepr = _encodable(text)
    report.sections = [(title, _encodable(output)) for title, output in report.sections]
    return report


# --- nothing is left behind


def _greenlets() -> int:
    return sum(1 for each in gc.get_objects() if isinstance(each, (Worker, gevent.Greenlet)) and each)


def _resources() -> dict[str, Any]:
    hub = gevent.get_hub()
    left = {
        "descriptors": _this.num_fds(),
        "native threads": _this.num_threads() - hub.threadpool.size,
        "child processes": len(_this.children(recursive=True)),
        "greenlets": _greenlets(),
        "channels on pyftpdlib's default loop": len(IOLoop.instance().socket_map),
        "calls on pyftpdlib's default loop": len(IOLoop.instance().sched._tasks),
    }
    with contextlib.suppress(AttributeError):  # libuv does not count
        left["active watchers"] = hub.loop.activecnt
    return left


def _settle() -> None:
    """Let the hub finish what was left to its next pass (gevent closes some descriptors there)."""
    gevent.sleep(0)
    gevent.sleep(0.001)
    gevent.idle()


#: What other threads change for a moment.
_CHANGING = ("native threads", "descriptors")


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    IOLoop.instance()
    _settle()
    before = _resources()
    yield
    _settle()
    after = _resources()
    if after != before:
        gc.collect()  # a cycle that only the collector frees is worth knowing, but is no leak
        _settle()
        after = _resources()
    deadline = time.monotonic() + GONE
    # join() does not wait for the kernel, and the guard of the hub opens a file for a moment.
    while any(after[name] > before[name] for name in _CHANGING) and time.monotonic() < deadline:
        gevent.sleep(0.001)
        after = _resources()
    grown = {name: (before[name], count) for name, count in after.items() if count > before[name]}
    if grown:
        details = [repr(each) for each in gc.get_objects() if isinstance(each, (Worker, GeventIOLoop))]
        files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _is_open(n)]
        pytest.fail(f"left behind (before, after): {grown}\n{details}\n{files}", pytrace=False)


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


# --- the hub is not blocked


_blocks: list[object] = []
_watch = honesty.Watch(gevent.get_hub(), _blocks.append, collector=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before `_no_leaks` counts threads. (A test that blocks may watch by itself.)
    if item.get_closest_marker("blocks"):
        _watch.rest()
    else:
        _watch.monitor()


@pytest.fixture(scope="session")
def _blocks_of_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which programs that are started from now on note what blocks their hubs."""
    file = tmp_path_factory.mktemp("honest") / "blocks"
    file.touch()
    paths = [str(Path(__file__).parent / "honest"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"BRIDGE_TEST_BLOCKS": str(file), "PYTHONPATH": os.pathsep.join(paths)}
    return file


@pytest.fixture(autouse=True)
def _no_block(request: pytest.FixtureRequest, _blocks_of_programs: Path) -> Iterator[None]:
    _watch.start()
    try:
        yield
    finally:
        _watch.stop()
        blocks, _blocks[:] = [*map(str, _blocks), *filter(None, [_blocks_of_programs.read_text()])], []
        os.truncate(_blocks_of_programs, 0)
    if blocks and "blocks" not in request.keywords:
        pytest.fail("\n".join(blocks), pytrace=False)


# --- a hang shows itself


class _Watchdog:
    """A native thread that prints every stack and ends the process when a test hangs."""

    def __init__(self) -> None:
        self._stop = _native_lock()
        self._stop.acquire()
        self._test: tuple[str, float] | None = None
        _start_native_thread(self._run, ())

    def test(self, name: str | None) -> None:
        self._test = (name, time.monotonic()) if name else None

    def stop(self) -> None:
        self._stop.release()

    def _run(self) -> None:
        while not self._stop.acquire(timeout=1.0):
            test = self._test
            if test is not None and time.monotonic() - test[1] > HANG:
                print(f"\n{test[0]} hangs\n", *format_run_info(), sep="\n", file=sys.__stderr__)
                faulthandler.dump_traceback(2)
                os._exit(70)


@pytest.fixture(scope="session")
def _watchdog() -> Iterator[_Watchdog]:
    watchdog = _Watchdog()
    yield watchdog
    watchdog.stop()


@pytest.fixture(autouse=True)
def _no_hang(_watchdog: _Watchdog, request: pytest.FixtureRequest) -> Iterator[None]:
    _watchdog.test(request.node.nodeid)
    yield
    _watchdog.test(None)
