"""Metrics as Prometheus' text, made of what the processes report (metrics.py) by prometheus_client.

Every metric is there twice: `bridge_NAME` is the sum over all worker processes, `bridge_worker_NAME` has
the label `worker`, a process's slot. A registry is made for each scrape; prometheus_client's global one is
not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from bridge.web.counts import DIRECTIONS, DURATIONS, LAG, OUTCOMES, Histogram

#: What processes report of now (`Reporter.gauges`), and their counters (`Counts.columns`).
Gauges = list[dict[str, Any]]
Columns = dict[int, dict[str, int]]

#: Name, help, and for each series its labels' values and the counter.
COUNTERS: tuple[tuple[str, str, tuple[str, ...], dict[tuple[str, ...], str]], ...] = (
    ("starts", "Processes that began to serve.", (), {(): "starts"}),
    ("connections", "Sessions that were let in.", (), {(): "connections"}),
    (
        "refused",
        "Connections refused, by limit.",
        ("limit",),
        {("max_cons",): "refused_max_cons", ("max_cons_per_ip",): "refused_max_cons_per_ip"},
    ),
    ("logins", "Logins.", ("outcome",), {("ok",): "logins_ok", ("failed",): "logins_failed"}),
    ("disconnects", "Sessions that an operator ended on the page.", (), {(): "disconnects"}),
    ("accept_rests", "Rests of the listener, because accept() failed.", (), {(): "accept_rests"}),
    (
        "bytes",
        "Bytes of files, as they pass; a second late.",
        ("direction",),
        {(way,): f"bytes_{way}" for way in DIRECTIONS},
    ),
    (
        "transfers",
        "Transfers of files that have ended.",
        ("direction", "outcome"),
        {(way, how): f"transfers_{way}_{how}" for way in DIRECTIONS for how in OUTCOMES},
    ),
    (
        "transfer_bytes",
        "Bytes of transfers that have ended.",
        ("direction", "outcome"),
        {(way, how): f"bytes_{way}_{how}" for way in DIRECTIONS for how in OUTCOMES},
    ),
)

#: Name, help, label, and for each value of it the key of a report.
GAUGES: tuple[tuple[str, str, str | None, dict[str, str]], ...] = (
    ("sessions", "Sessions now.", None, {"": "sessions"}),
    (
        "transfers_running",
        "Transfers of files now.",
        "direction",
        {"upload": "uploads", "download": "downloads"},
    ),
    (
        "turns_waiting",
        "Turns that wait (for files, logins, ...).",
        None,
        {"": "waiting"},
    ),
    ("open_fds", "Open file descriptors.", None, {"": "descriptors"}),
    ("resident_memory_bytes", "Resident memory; processes share some of it.", None, {"": "memory"}),
)


#: The same for the thread pools, whose label is their name.
POOLS = (
    ("size", "Threads for blocking calls."),
    ("busy", "Threads that are at work."),
    ("queued", "Calls that wait for a thread."),
)

HISTOGRAMS: tuple[tuple[str, str, tuple[str, ...], dict[tuple[str, ...], Histogram]], ...] = (
    (
        "transfer_seconds",
        "How long transfers of files took.",
        ("direction",),
        {(way,): histogram for way, histogram in DURATIONS.items()},
    ),
    ("hub_lag_seconds", "How late the hub came to a timer that was due; each second.", (), {(): LAG}),
)


def expose(gauges: Gauges, columns: Columns, accept: str) -> tuple[bytes, str]:
    """The text and its content type, for a client whose header Accept is *accept*."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reports(gauges, columns))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Reports(Collector):
    def __init__(self, gauges: Gauges, columns: Columns) -> None:
        self._gauges = sorted(gauges, key=lambda each: each["slot"])
        self._columns = columns

    def collect(self) -> Iterator[Metric]:
        """Every metric, as prometheus_client wants it."""
        yield from self._processes()
        for name, text, labels, series in COUNTERS:
            yield from _both(
                *(CounterMetricFamily, name, text, labels),
                [
                    (slot, values, column[field])
                    for slot, column in self._columns.items()
                    for values, field in series.items()
                ],
            )
        for name, text, label, keys in GAUGES:
            yield from _both(
                *(GaugeMetricFamily, name, text, (label,) if label else ()),
                [
                    (each["slot"], (value,) if label else (), each[key])
                    for each in self._gauges
                    for value, key in keys.items()
                    if each[key] is not None
                ],
            )
        for name, text in POOLS:
            yield from _both(
                *(GaugeMetricFamily, f"threadpool_{name}", text, ("pool",)),
                [
                    (each["slot"], (pool,), load[name])
                    for each in self._gauges
                    for pool, load in each["threads"].items()
                ],
            )
        for name, text, labels, histograms in HISTOGRAMS:
            yield from self._histogram(name, text, labels, histograms)

    def _processes(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("bridge_up", "Whether connections are accepted: 0 while draining.")
        up.add_metric((), int(any(each["state"] == "started" for each in self._gauges)))
        yield up
        workers = GaugeMetricFamily("bridge_workers", "Processes that serve and answer.", labels=("state",))
        for state in ("started", "draining"):
            workers.add_metric((state,), sum(each["state"] == state for each in self._gauges))
        yield workers
        cpu = CounterMetricFamily(
            "bridge_worker_cpu_seconds", "Processor time of a process, user and system.", labels=("worker",)
        )
        for each in self._gauges:
            cpu.add_metric((str(each["slot"]),), each["cpu"])
        yield cpu

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...], histograms: dict[tuple[str, ...], Histogram]
    ) -> Iterator[Metric]:
        total = HistogramMetricFamily(f"bridge_{name}", text, labels=labels)
        workers = HistogramMetricFamily(f"bridge_worker_{name}", text, labels=("worker", *labels))
        for values, histogram in histograms.items():
            columns = {
                slot: [column[field] for field in histogram.fields] for slot, column in self._columns.items()
            }
            for slot, column in columns.items():
                workers.add_metric((str(slot), *values), *_cumulated(histogram, column))
            sums = [sum(each) for each in zip(*columns.values(), strict=True)]
            total.add_metric(values, *_cumulated(histogram, sums or [0] * len(histogram.fields)))
        yield total
        yield workers


def _both(
    kind: Any, name: str, text: str, labels: tuple[str, ...], rows: list[tuple[int, tuple[str, ...], int]]
) -> Iterator[Metric]:
    """The sums of *rows* (slot, labels' values, amount), and they themselves."""
    total = kind(f"bridge_{name}", text, labels=labels)
    workers = kind(f"bridge_worker_{name}", text, labels=("worker", *labels))
    sums: dict[tuple[str, ...], int] = {}
    for slot, values, amount in rows:
        workers.add_metric((str(slot), *values), amount)
        sums[values] = sums.get(values, 0) + amount
    for values, amount in sums.items():
        total.add_metric(values, amount)
    yield total
    yield workers


def _cumulated(histogram: Histogram, counters: list[int]) -> tuple[list[tuple[str, float]], float]:
    """Buckets and sum as Prometheus has them: each bucket with all that are smaller."""
    bounds = (*(str(float(bound)) for bound in histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(counters[:-1]), strict=True)), counters[-1] / 1e6
