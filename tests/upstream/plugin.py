"""pytest plugin: run pyftpdlib's own test suite with GeventIOLoop in place of pyftpdlib's loop.

Loaded with `-p plugin` by run.py before anything of pyftpdlib is imported. BRIDGE_UPSTREAM says how:
`own` (pyftpdlib's own loop, to compare with), `unpatched` or `patched` (`patch_all()` first).
"""

from __future__ import annotations

import os

MODE = os.environ["BRIDGE_UPSTREAM"]

if MODE == "patched":
    from gevent import monkey

    monkey.patch_all()

import pytest

if MODE != "own":
    import gevent

    import bridge

    bridge.install()
    # Have open, before upstream counts descriptors, what is the process's and not the loop's: the main
    # thread's hub, and what libuv opens once, at the first hub of another thread.
    gevent.sleep(0.001)
    gevent.get_hub().threadpool.apply(gevent.sleep, (0.001,))


def pytest_plugin_registered(plugin: object) -> None:
    if hasattr(plugin, "assert_closed_resources"):
        # Upstream's conftest: make its leak warnings failures.
        plugin.FAIL = True  # type: ignore[attr-defined]
        if MODE == "patched":
            # The patched os.close() leaves some closing to the hub's next pass.
            collect = plugin.collect_resources  # type: ignore[attr-defined]
            plugin.collect_resources = lambda: (gevent.sleep(0.001), collect())[1]  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not items:
        raise pytest.UsageError("no test of pyftpdlib was collected")
    if MODE == "own":
        return
    from exceptions import EXCEPTIONS

    by_id = {item.nodeid: item for item in items}
    for nodeid, (condition, reason) in EXCEPTIONS.items():
        if nodeid not in by_id:
            raise pytest.UsageError(f"exceptions.py lists {nodeid}, which does not exist")
        if condition:
            # strict: a listed test that passes is an error.
            by_id[nodeid].add_marker(pytest.mark.xfail(reason=reason, strict=True))


def pytest_report_header(config: pytest.Config) -> str:
    import gevent
    import pyftpdlib
    import pyftpdlib.ioloop

    loop = gevent.config.loop
    return (
        f"pyftpdlib {pyftpdlib.__ver__} on {pyftpdlib.ioloop.IOLoop.__name__} ({MODE}, "
        f"gevent {gevent.__version__}, {loop.__module__})"
    )
