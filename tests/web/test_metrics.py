"""What /metrics counts, and that it is right: by what clients did."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey

from bridge.filesystems.threads import THREADS, Threads
from bridge.web.counts import FIELDS, LAG, Counts
from bridge.web.metrics import HISTORY, LISTED, Sampler
from support.exhaustion import no_descriptors
from support.fakes import Gate
from support.servers import FORKS_BESIDE_THREADS, Client, eventually, reset
from support.web import serving_site

_allocate_lock = monkey.get_original("_thread", "allocate_lock")

USER = ("-u", "u", "-P", "p", "-w")


@pytest.fixture
def counts() -> Iterator[Counts]:
    counts = Counts()
    counts.make(3)
    counts.take(1)
    yield counts
    counts.close()


# --- counters


def test_a_counter_is_of_its_slot_and_others_see_it(counts: Counts) -> None:
    counts.add("starts")
    counts.add("bytes_upload", 7)
    assert counts["bytes_upload"] == 7
    assert list(counts.columns()) == [1]
    assert counts.columns()[1]["bytes_upload"] == 7
    assert counts.columns()[1]["bytes_download"] == 0


@pytest.mark.filterwarnings(FORKS_BESIDE_THREADS)
def test_a_process_counts_for_all_and_goes_on_where_a_dead_one_stopped(counts: Counts) -> None:
    for expected in (1, 2):
        pid = os.fork()
        if not pid:
            counts.take(2)
            counts.add("starts")
            counts.add("logins_ok", 5)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert counts.columns()[2]["starts"] == expected
        assert counts.columns()[2]["logins_ok"] == 5 * expected


def test_after_its_end_counting_does_no_harm(counts: Counts) -> None:
    counts.close()
    counts.add("logins_ok")
    assert counts.columns() == {}


@pytest.mark.parametrize(
    ("seconds", "field"), [(0, "lag:0.001"), (0.001, "lag:0.001"), (0.0011, "lag:0.005"), (99, "lag:inf")]
)
def test_a_histogram_counts_in_the_bucket_of_the_next_bound(
    counts: Counts, seconds: float, field: str
) -> None:
    LAG.observe(counts, seconds)
    assert {each for each in LAG.fields[:-1] if counts[each]} == {field}
    assert counts["lag:us"] == round(seconds * 1e6)


def test_every_field_has_a_place_of_its_own() -> None:
    assert len(set(FIELDS)) == len(FIELDS)


# --- what clients did


def test_sessions_and_logins_are_counted(tmp_path: Path) -> None:
    with serving_site(tmp_path, *USER, "--max-cons", "2") as (server, web):
        with Client(server), Client(server, login=False) as stranger:
            stranger.reply()
            stranger.command("USER u", "331")
            stranger.command("PASS wrong", "530")
            with Client(server, login=False) as third:
                assert third.reply().startswith("421")
            metrics = web.metrics()
        eventually(lambda: not server.sessions())
        after = web.metrics()
    assert metrics["bridge_sessions"] == 2
    assert metrics['bridge_worker_sessions{worker="0"}'] == 2
    assert metrics["bridge_connections_total"] == 2
    assert metrics['bridge_logins_total{outcome="ok"}'] == 1
    assert metrics['bridge_logins_total{outcome="failed"}'] == 1
    assert metrics['bridge_refused_total{limit="max_cons"}'] == 1
    assert metrics['bridge_refused_total{limit="max_cons_per_ip"}'] == 0
    assert metrics["bridge_up"] == 1
    assert metrics['bridge_workers{state="started"}'] == 1
    assert metrics["bridge_open_fds"] > 3
    assert metrics["bridge_resident_memory_bytes"] > 10e6
    assert metrics['bridge_worker_cpu_seconds_total{worker="0"}'] > 0
    assert (after["bridge_sessions"], after["bridge_connections_total"]) == (0, 2)


def test_a_session_refused_for_its_address_is_counted(tmp_path: Path) -> None:
    with serving_site(tmp_path, "--max-cons-per-ip", "1", *USER) as (server, web), Client(server):
        with Client(server, login=False) as second:
            assert second.reply().startswith("421")
        assert web.metrics()['bridge_refused_total{limit="max_cons_per_ip"}'] == 1


def test_transfers_are_counted_by_direction_and_outcome(tmp_path: Path) -> None:
    def counted(metrics: dict[str, float], name: str, way: str, how: str) -> float:
        return metrics[f'bridge_{name}_total{{direction="{way}",outcome="{how}"}}']

    (tmp_path / "large").write_bytes(bytes(20_000_000))
    with serving_site(tmp_path, *USER) as (server, web):
        with Client(server) as client:
            client.store("one", b"x" * 1000)
            client.store("two", b"x" * 2000)
            assert len(client.retrieve("one")) == 1000
            client.retrieve("one")
            with client.data() as data:
                client.command("RETR large", "1")
                assert data.recv(1)
                reset(data)
            assert client.reply().startswith("426")
            with client.data():
                client.command("NLST", "1")
            assert client.reply().startswith("226")
        eventually(lambda: not server.sessions())
        metrics = web.metrics()
    assert counted(metrics, "transfers", "upload", "completed") == 2
    assert counted(metrics, "transfer_bytes", "upload", "completed") == 3000
    assert counted(metrics, "transfers", "upload", "failed") == 0
    assert counted(metrics, "transfers", "download", "completed") == 2
    assert counted(metrics, "transfer_bytes", "download", "completed") == 2000
    assert counted(metrics, "transfers", "download", "failed") == 1
    broken = counted(metrics, "transfer_bytes", "download", "failed")
    assert 0 < broken < 20_000_000
    assert metrics['bridge_bytes_total{direction="upload"}'] == 3000
    assert metrics['bridge_bytes_total{direction="download"}'] == 2000 + broken
    assert metrics['bridge_transfer_seconds_count{direction="upload"}'] == 2
    assert metrics['bridge_transfer_seconds_count{direction="download"}'] == 3
    assert metrics['bridge_transfer_seconds_bucket{direction="upload",le="+Inf"}'] == 2
    assert metrics['bridge_worker_transfer_seconds_bucket{direction="upload",le="3600.0",worker="0"}'] == 2
    assert 0 <= metrics['bridge_transfer_seconds_sum{direction="upload"}'] < 60


def test_a_transfer_without_its_data_connection_has_failed_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with serving_site(tmp_path, *USER) as (server, web), Client(server) as client:
        client.command("EPSV", "229")
        client.command("RETR file", "150")
        client.send("ABOR")
        assert client.reply().startswith("426")
        client.reply()
        client.retrieve("file")
        client.command("EPSV", "229")
        client.command("STOR new", "150")
        client.send("ABOR")
        assert client.reply().startswith("426")
        metrics = web.metrics()
    assert metrics['bridge_transfers_total{direction="download",outcome="failed"}'] == 1
    assert metrics['bridge_transfers_total{direction="download",outcome="completed"}'] == 1
    assert metrics['bridge_transfers_total{direction="upload",outcome="failed"}'] == 1
    assert metrics['bridge_transfer_seconds_count{direction="download"}'] == 1


def test_bytes_are_counted_while_they_pass_and_not_twice(tmp_path: Path) -> None:
    with serving_site(tmp_path, *USER) as (server, web), Client(server) as client:

        def counted() -> float:
            return web.metrics()['bridge_bytes_total{direction="upload"}']

        with client.data() as data:
            client.command("STOR file", "1")
            data.sendall(b"x" * 5000)
            eventually(lambda: counted() == 5000)  # by a beat
            assert web.metrics()['bridge_transfers_running{direction="upload"}'] == 1
            data.sendall(b"x" * 300)
        assert client.reply().startswith("226")
        assert counted() == 5300
        assert web.metrics()['bridge_transfers_running{direction="upload"}'] == 0


def test_turns_that_wait_are_told(tmp_path: Path) -> None:
    gate = Gate()
    with serving_site(tmp_path, *USER) as (server, web), Client(server) as client:

        def noop(self: Any, line: str) -> None:
            gate.wait()
            self.respond("200 Waited.")

        server.handler.ftp_NOOP = noop
        client.send("NOOP")
        gate.arrived()
        metrics = web.metrics()
        (session,) = web.status()["listed"]
        gate.open()
        assert client.reply().startswith("200")
        after = web.metrics()
    assert metrics["bridge_turns_waiting"] == 1
    assert session["command"] == "NOOP"
    assert "waits for" in session["shown"]["amount"]
    assert after["bridge_turns_waiting"] == 0


def test_threads_are_told_at_work_and_in_line() -> None:
    hub, threads = gevent.get_hub(), Threads(size=1)
    assert threads.load(hub) == (0, 0, 0)
    lock = _allocate_lock()
    lock.acquire()
    callers = [gevent.spawn(threads.call, lock.acquire) for _ in range(2)]
    eventually(lambda: threads.load(hub) == (1, 1, 1))
    for caller in callers:
        lock.release()
        caller.join()
    assert threads.load(hub) == (1, 0, 0)
    threads.kill()
    lock.release()


def test_both_pools_are_told(tmp_path: Path) -> None:
    with serving_site(tmp_path, *USER) as (_, web):
        gevent.get_hub().threadpool.apply(int)
        THREADS.call(int)
        try:
            metrics = web.metrics()
        finally:
            THREADS.kill()
    for pool in ("bridge", "gevent"):
        assert metrics[f'bridge_threadpool_size{{pool="{pool}"}}'] >= 1
        assert metrics[f'bridge_threadpool_busy{{pool="{pool}"}}'] == 0
        assert metrics[f'bridge_worker_threadpool_queued{{pool="{pool}",worker="0"}}'] == 0


def test_a_listener_that_cannot_accept_is_told_and_so_is_the_rest(tmp_path: Path) -> None:
    """On a connection of better times: a scrape must not fail for want of a descriptor."""
    with serving_site(tmp_path, *USER) as (server, web), web.connected() as ask:
        assert ask("/metrics").status == 200
        with gevent.socket.socket() as waiting:
            with no_descriptors():
                waiting.connect(server.address)
                eventually(lambda: server.ioloop.accept_rests)
                answer = ask("/metrics")
            assert waiting.recv(3) == b"220"
        assert answer.status == 200
        assert "bridge_open_fds" in answer.text
        eventually(lambda: web.metrics()["bridge_accept_rests_total"] >= 1)  # by a beat


# --- the sampler


class _Server:
    """What a Sampler wants to know."""

    class ioloop:
        accept_rests = 0

    def own_session_count(self) -> int:
        return 4


@pytest.fixture
def sampler(counts: Counts) -> Iterator[Sampler]:
    sampler = Sampler(counts, _Server())
    yield sampler
    sampler.stop()


def test_the_history_has_a_point_for_each_beat_and_an_end(counts: Counts, sampler: Sampler) -> None:
    counts.add("bytes_upload", 3000)
    sampler.beat(2.0, 0.25)
    counts.add("bytes_download", 100)
    sampler.beat(1.0, 0.0)
    (first, up, down, sessions, lag), second = sampler.history
    assert abs(first - time.time()) < 60
    assert (up, down, sessions, lag) == (1500, 0, 4, 0.25)
    assert second[1:3] == (0, 100)
    assert counts["lag:0.5"] == 1
    for _ in range(HISTORY):
        sampler.beat(1.0, 0.0)
    assert len(sampler.history) == HISTORY


def test_rests_of_the_listener_are_counted(counts: Counts, sampler: Sampler) -> None:
    _Server.ioloop.accept_rests = 3
    try:
        sampler.beat(1.0, 0.0)
        sampler.beat(1.0, 0.0)
        assert counts["accept_rests"] == 3
    finally:
        _Server.ioloop.accept_rests = 0


@pytest.mark.blocks
def test_the_hub_s_lag_is_measured(counts: Counts, sampler: Sampler) -> None:
    """In any 1.6 s a beat is due in the first second, and late by the rest."""
    eventually(lambda: sampler.history)
    end = time.monotonic() + 1.6
    while time.monotonic() < end:
        pass
    eventually(lambda: sampler.history[-1][4] >= 0.5)
    assert sum(counts[field] for field in ("lag:1", "lag:5")) == 1


# --- what is shown of a session


def test_a_status_lists_sessions_with_what_they_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50_000_000))
    with serving_site(tmp_path, *USER) as (server, web), Client(server) as client, Client(server, False):
        client.command("TYPE I", "200")
        client.command("REST 10000000", "350")
        with client.data() as data:
            client.command("RETR file", "1")
            assert data.recv(1)
            first, second = web.status()["listed"]
            client.command("STAT", "211")
    assert (first["user"], first["address"], first["worker"]) == ("u", "127.0.0.1", 0)
    transfer: dict[str, Any] = first["transfer"]
    assert (transfer["path"], transfer["direction"], transfer["size"]) == ("/file", "download", 50_000_000)
    assert transfer["position"] == 10_000_000 + transfer["bytes"] > 10_000_000
    assert 0.2 < first["shown"]["progress"] < 1
    assert (second["user"], second["transfer"]) == ("", None)
    assert second["shown"]["user"] == "not logged in"


def test_of_too_many_sessions_those_that_transfer_are_listed(tmp_path: Path) -> None:
    with serving_site(tmp_path, *USER, "--max-cons", "0") as (server, web):
        clients = [Client(server) for _ in range(3)]
        data = clients[0].data()
        clients[0].command("STOR file", "1")
        eventually(lambda: web.metrics()['bridge_transfers_running{direction="upload"}'])
        first, second, third = (session.handler for session in server.sessions())
        live = {first: None}
        assert server.session_handlers(live, 1) == [first]
        assert server.session_handlers(live, 2) == [first, third]
        assert server.session_handlers(live, LISTED) == [first, second, third]
        data.close()
        for client in clients:
            client.close()
