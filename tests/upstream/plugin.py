"""pytest plugin: run pyftpdlib's own test suite with GeventIOLoop in place of pyftpdlib's loop.

Loaded with `-p plugin` by run.py before anything of pyftpdlib is imported. BRIDGE_UPSTREAM says how:

    own          pyftpdlib's own loop, nothing patched: what ours is compared with
    own-patched  pyftpdlib's own loop after `patch_all()`: says which tests can pass at all when patched
    unpatched    GeventIOLoop
    patched      GeventIOLoop after `patch_all()`

BRIDGE_UPSTREAM_OUTCOMES, if set, names a file for run.py to read: one JSON object a line, written as it
happens, so that a run that hangs or crashes has said how far it came. SIGUSR1 prints every thread's and
every greenlet's stack.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

MODE = os.environ["BRIDGE_UPSTREAM"]
if MODE not in ("own", "own-patched", "unpatched", "patched"):
    raise ValueError(f"BRIDGE_UPSTREAM={MODE!r}: it must be own, own-patched, unpatched or patched")
OWN = MODE in ("own", "own-patched")

if MODE in ("patched", "own-patched"):
    from gevent import monkey

    monkey.patch_all()

import gevent  # noqa: E402 (after patch_all())
import pytest  # noqa: E402

if not OWN:
    import bridge

    bridge.install()
    # Have open, before upstream counts descriptors, what is the process's and not the loop's: the main
    # thread's hub, and what libuv opens once, at the first hub of another thread.
    gevent.sleep(0.001)
    gevent.get_hub().threadpool.apply(gevent.sleep, (0.001,))

if MODE == "patched" and gevent.config.loop.__module__.startswith("gevent.libuv"):
    # gevent's os.waitpid() can wait for ever on libuv: its loop reaps a child in one pass and tells the
    # child's watchers in the next, and a watcher that waitpid() starts in between is not told. (Seen with
    # gevent 26.9 and os.fork() alone, nothing of ours imported; compare gevent issue 1104.)
    # MultiprocessFTPServer.close_all() joins its processes that way: without this, one run in three hangs.
    from gevent import os as gevent_os

    def _waitpid(pid: int, options: int) -> tuple[int, int]:
        while not options and hasattr(gevent_os._watched_children.get(pid), "rpid"):  # (a watcher: no result)
            gevent.sleep(0.001)
        result: tuple[int, int] = gevent_os.waitpid(pid, options)
        return result

    os.waitpid = _waitpid

# pytest captures descriptor 2 later; stacks of a run that hangs must not be lost with what it captured.
_stderr = os.fdopen(os.dup(2), "w", buffering=1)
# Line by line, and none of it left in a buffer for the processes that upstream's tests fork.
_outcomes = open(os.environ.get("BRIDGE_UPSTREAM_OUTCOMES", os.devnull), "a", buffering=1)  # noqa: SIM115


def _on_sigusr1(number: int, frame: object) -> None:
    from gevent import util

    util.print_run_info(file=_stderr)


signal.signal(signal.SIGUSR1, _on_sigusr1)


def _record(**facts: Any) -> None:
    _outcomes.write(json.dumps(facts) + "\n")


def pytest_plugin_registered(plugin: object) -> None:
    if hasattr(plugin, "assert_closed_resources") and MODE != "own-patched":
        # Upstream's conftest: make its leak warnings failures.
        plugin.FAIL = True  # type: ignore[attr-defined]
        if MODE == "patched":
            # The patched os.close() leaves some closing to the hub's next pass.
            collect = plugin.collect_resources  # type: ignore[attr-defined]
            plugin.collect_resources = lambda: (gevent.sleep(0.001), collect())[1]  # type: ignore[attr-defined]


# Upstream's TestCallbacks.test_on_incomplete_file_received sends 32 KiB and ABOR, and closes the data
# connection at once: a server that sees ABOR before the first byte says 225, one that sees the end
# before ABOR 226. Upstream runs it again when it loses that race (@retry_on_failure), but on a busy
# machine it has lost 15 times in a row. In every mode this test sends more than a connection's buffers
# hold: ABOR comes in the middle.
RACE = "test_on_incomplete_file_received"
#: Bytes, of the 10 MB the test has: Linux gives a sender 4 MiB, and less to a receiver who does not read.
MORE_THAN_BUFFERS = 9_000_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    if "MProcMixin::" in item.nodeid:
        # All servers of the class share one event with all their processes. close_all() kills those, and one
        # that is killed while it asks the event (half of those that do nothing else; on any loop) takes its
        # lock along: the next server that is started never gets past `_exit.clear()`.
        server: Any = sys.modules["pyftpdlib.servers"].MultiprocessFTPServer
        server._exit, server._lock = server._mp_context.Event(), server._mp_context.Lock()
    if item.name != RACE:
        return (yield)
    # The class is defined in test_functional and inherited elsewhere: its globals are what it uses.
    module: Any = sys.modules["tests.test_functional"]
    upstream, module.INTERRUPTED_TRANSF_SIZE = module.INTERRUPTED_TRANSF_SIZE, MORE_THAN_BUFFERS
    try:
        return (yield)
    finally:
        module.INTERRUPTED_TRANSF_SIZE = upstream


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not items:
        raise pytest.UsageError("no test of pyftpdlib was collected")
    _record(collected=[item.nodeid for item in items])
    if MODE == "own-patched":
        # Patched, pyftpdlib's own loop does not survive the fork of MultiprocessFTPServer: these tests time
        # out, leave their servers behind, and the process then crashes or hangs. With ours they must pass.
        items[:] = [item for item in items if "MProcMixin::" not in item.nodeid]
    if OWN:
        return
    from exceptions import EXCEPTIONS

    by_id = {item.nodeid: item for item in items}
    for nodeid, (condition, reason) in EXCEPTIONS.items():
        if nodeid not in by_id:
            raise pytest.UsageError(f"exceptions.py lists {nodeid}, which does not exist")
        if condition:
            # strict: a listed test that passes is an error.
            by_id[nodeid].add_marker(pytest.mark.xfail(reason=reason, strict=True))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome: str = report.outcome
    if report.skipped and hasattr(report, "wasxfail"):
        outcome = "xfailed"
    _record(test=report.nodeid, when=report.when, outcome=outcome)


def pytest_report_header(config: pytest.Config) -> str:
    import pyftpdlib
    import pyftpdlib.ioloop

    loop = pyftpdlib.ioloop.IOLoop
    engine = "" if OWN else f", {gevent.config.loop.__module__}"
    _record(pyftpdlib=pyftpdlib.__file__, bridge=None if OWN else bridge.__file__)
    return (
        f"pyftpdlib {pyftpdlib.__ver__} from {pyftpdlib.__file__}\n"
        f"{MODE}: {loop.__module__}.{loop.__name__}, gevent {gevent.__version__}{engine}"
    )
