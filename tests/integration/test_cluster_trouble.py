"""Several real servers behind one client, killed, stopped, new, gone. A miss at worst, in time, never an error."""

from __future__ import annotations

import operator
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmcache
import mmcache.client.cluster
from mmcache.client.blocking import Client
from mmcache.client.cluster import COPY_S, LARGEST_COPY_NBYTES, ClusterClient
from mmcache.client.cluster_fill import copy
from mmcache.client.plan import LONGEST_PAUSE_S
from mmcache.cluster.settings import ClusterConfig, parse_cluster_url
from mmcache.errors import TransportError
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess, suspend
from mmcache.transport.base import Outcome
from tests.integration.cluster_bed import Told, cluster, entries, hits, prompt, put
from tests.integration.support import NAMESPACE, eventually, in_time

HANGS_S = 7.0  # a deadline where shards hang
ONE_DEADLINE_S = 1.8 * HANGS_S  # what takes longer had two, even where the machine stood still for seconds


# ------------------------------------------------------------------------------------------ some are not
def test_a_killed_shard_costs_its_own_keys_and_no_more() -> None:
    with cluster(3) as made:
        cache, keys = made.connect(), [prompt(label) for label in range(6)]
        for one in keys:
            put(cache, one)
        made.servers[0].stop(signal.SIGKILL)
        left = [hits(cache, one) for one in keys]
        assert 0 < sum(left) < sum(map(len, keys))
        assert cache.answering
        found = [cache.match_prefix(one) for one in keys]
        assert all(count <= len(one) for count, one in zip(found, keys, strict=True))
        results = put(cache, prompt(50))
        assert {result.outcome for result in results} == {Outcome.STORED, Outcome.UNAVAILABLE}
        with cache.acquire(keys[0]) as leased:
            assert sum(frame is not None for frame in leased.frames) == left[0]
        with pytest.raises(TransportError, match="1 of 3 shards could not be asked to delete"):
            cache.delete(keys[0])
        for server in made.servers[1:]:
            server.stop(signal.SIGKILL)
        assert hits(cache, keys[0]) == cache.match_prefix(keys[0]) == sum(cache.contains(keys[0])) == 0
        assert {result.outcome for result in put(cache, keys[0])} == {Outcome.UNAVAILABLE}
        assert not cache.answering


def test_with_two_replicas_a_killed_shard_costs_nothing_and_is_filled_again_when_it_is_back() -> None:
    with cluster(3) as made:
        writer, keys = made.connect(replicas=2), [prompt(label) for label in range(4)]
        assert all(all(put(writer, one)) for one in keys)
        address, killed_s = made.address(0), time.monotonic()
        made.servers[0].stop(signal.SIGKILL)
        for cache in (writer, made.connect(replicas=2)):
            assert [cache.match_prefix(one) for one in keys] == [len(one) for one in keys]
            assert [hits(cache, one) for one in keys] == [len(one) for one in keys]
            asked_again = (time.monotonic() - killed_s) / LONGEST_PAUSE_S
            assert cache.counters["failures"] <= 8 + asked_again  # then it is left alone
        results = put(writer, prompt(50))
        assert all(results)
        assert any("not on s0" in result.reason for result in results)
        made.stack.enter_context(ServerProcess("128MiB", listen=address))
        eventually(lambda: writer.answering and writer._shards.open_to("s0"), "it is asked again")

        def copied() -> int:
            assert [hits(writer, one) for one in keys] == [len(one) for one in keys]
            return writer.counters["copied"]

        eventually(copied, "it is filled")
        assert entries(writer)["s0"] > 0


def test_a_shard_that_hangs_leaves_time_for_its_replica() -> None:
    with cluster(2, deadline_s=8.0) as made:  # half of it for each
        cache, keys = made.connect(replicas=2), prompt(1)
        assert all(put(cache, keys))
        suspend(made.servers[0].pid)
        try:
            assert hits(cache, keys) == len(keys)
            assert cache.match_prefix(keys) == len(keys)
            alone = made.connect(deadline_s=4.0)
            assert hits(alone, keys) <= len(keys)
            assert alone.match_prefix(keys) <= len(keys)
        finally:
            os.kill(made.servers[0].pid, signal.SIGCONT)


def test_killing_a_shard_under_load_is_never_an_error_nor_wrong() -> None:
    with cluster(3) as made:
        keys, stop = [prompt(label, 3000) for label in range(8)], threading.Event()
        errors: list[BaseException] = []
        rounds = [0] * 3

        def work(cache: Client, number: int) -> None:
            try:
                while not stop.is_set():
                    for one in keys[number::3]:
                        hits(cache, one)
                        put(cache, one)
                    rounds[number] += 1
            except BaseException as error:
                errors.append(error)

        def go_on() -> None:
            """Until each has been through all of its own at least once from now on."""
            time.sleep(0.5)
            begun = [count + 2 for count in rounds]
            eventually(lambda: errors or all(map(operator.ge, rounds, begun)), "all go on")

        cache = made.connect(replicas=2)
        workers = [threading.Thread(target=work, args=(cache, number)) for number in range(3)]
        for worker in workers:
            worker.start()
        go_on()
        made.servers[1].stop(signal.SIGKILL)
        go_on()
        stop.set()
        for worker in workers:
            worker.join()
        assert errors == []
        assert all(hits(cache, one) == len(one) for one in keys)


# ------------------------------------------------------------------------------------------ views that change
def test_a_newcomer_is_read_through_and_takes_over_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcache.client.cluster, "COPY_S", 10.0)
    with cluster(4) as made:
        membership = Told(made.view(0, 1, 2))
        config: ClusterConfig = parse_cluster_url(made.url())
        with ClusterClient(config, membership) as cache:
            keys = [prompt(label) for label in range(6)]
            for one in keys:
                put(cache, one)
            membership.now = made.view(0, 1, 2, 3)
            assert [cache.match_prefix(one) for one in keys] == [len(one) for one in keys]
            assert entries(cache)["s3"] == 0
            for _ in range(8):
                assert [hits(cache, one) for one in keys] == [len(one) for one in keys]
            moved = entries(cache)["s3"]
            total = sum(map(len, keys))
            assert 0 < moved == cache.counters["copied"] < 0.6 * total
        with ClusterClient(config, Told(made.view(0, 1, 2, 3))) as knows_only_the_new:
            assert sum(hits(knows_only_the_new, one) for one in keys) == total
        with ClusterClient(config, Told(made.view(0, 1, 2))) as knows_only_the_old:
            assert sum(hits(knows_only_the_old, one) for one in keys) == total


def test_a_member_that_leaves_is_closed_and_its_keys_are_stored_anew() -> None:
    with cluster(3) as made:
        membership = Told(made.view(0, 1, 2))
        with ClusterClient(parse_cluster_url(made.url()), membership) as cache:
            keys = prompt(1, 30_000)
            put(cache, keys)
            membership.now = made.view(0, 1)
            found = hits(cache, keys)
            assert found < len(keys)
            assert len(cache._shards.opened()) == 2
            assert all(put(cache, keys))
            assert hits(cache, keys) == len(keys)


def test_views_that_change_during_calls_are_no_errors() -> None:
    with cluster(3) as made:
        views = [made.view(0, 1, 2), made.view(0, 1), made.view(1, 2)]
        membership, stop = Told(views[0]), threading.Event()
        errors: list[BaseException] = []
        with ClusterClient(parse_cluster_url(made.url()), membership) as cache:

            def work(label: int) -> None:
                keys = prompt(label, 4000)
                try:
                    while not stop.is_set():
                        put(cache, keys)
                        hits(cache, keys)
                        cache.pin_prefix(keys).release()
                        cache.acquire(keys).release()
                        cache.contains(keys)
                except BaseException as error:
                    errors.append(error)

            workers = [threading.Thread(target=work, args=(label,)) for label in range(3)]
            for worker in workers:
                worker.start()
            for turn in range(60):
                membership.now = views[turn % 3]
                time.sleep(0.03)
            stop.set()
            for worker in workers:
                worker.join()
        assert errors == []


def test_a_token_file_that_is_just_being_written_costs_a_shard_for_a_moment_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shard is reached for the first time while the file is empty."""
    token = tmp_path / "token"
    token.write_text("a" * 40)
    token.chmod(0o600)
    with cluster(2) as made:
        told = Told(made.view(0))
        with ClusterClient(parse_cluster_url(made.url(token_file=token)), told) as cache:
            assert all(put(cache, prompt(1)))
            token.write_text("")
            told.now = made.view()
            assert not all(put(cache, prompt(2)))
            token.write_text("a" * 40)
            eventually(lambda: all(put(cache, prompt(3))), "it is tried again")
            assert entries(cache).keys() == {"s0", "s1"}
    assert caplog.text.count("shard s1 cannot be used") == 1


def test_a_newcomer_that_hangs_while_it_is_given_copies_does_not_hold_up_who_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_time(lambda: copies_to_who_hangs_s(monkeypatch), COPY_S + 1.0)


def copies_to_who_hangs_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long who reads is held up."""
    with cluster(2, deadline_s=8.0) as made:
        told, keys = Told(made.view(0)), prompt(1)
        with ClusterClient(parse_cluster_url(made.url()), told) as cache:
            assert all(put(cache, keys))
            told.now = made.view()

            def copy_to_who_hangs(*given: Any) -> int:
                suspend(made.servers[1].pid)
                return copy(*given)

            monkeypatch.setattr(mmcache.client.cluster, "copy", copy_to_who_hangs)
            began = time.monotonic()
            assert hits(cache, keys) == len(keys)
            took_s = time.monotonic() - began
            os.kill(made.servers[1].pid, signal.SIGCONT)
    assert took_s > COPY_S - 0.1
    return took_s


def test_a_value_that_is_too_large_to_pass_through_this_process_is_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mmcache.client.cluster, "COPY_S", 20.0)
    with cluster(2) as made:
        told = Told(made.view(0))
        keys = Keys.of([mmcache.opaque_key(NAMESPACE, b"%d" % number) for number in range(2)])
        with ClusterClient(parse_cluster_url(made.url(deadline_s=20)), told) as cache:
            for nbytes, copied in ((LARGEST_COPY_NBYTES + 1, False), (LARGEST_COPY_NBYTES, True)):
                cache.delete(keys)
                told.now = made.view(0)
                assert all(cache.put(keys, [np.zeros(nbytes, np.uint8)] * 2))
                told.now = made.view()
                into = np.empty(nbytes, np.uint8)
                for key in keys:
                    assert all(cache.get_into([key], [into]))
                assert bool(cache.counters["copied"]) == copied


# ------------------------------------------------------------------------------------------ leases of several shards
@pytest.mark.alone
@pytest.mark.parametrize("call", ["pin_prefix", "acquire"])
def test_leases_on_shards_that_hang_are_given_back_within_one_deadline(call: str) -> None:
    with cluster(3, deadline_s=HANGS_S) as made:
        cache, keys = made.connect(), prompt(5, 40_000)
        assert all(put(cache, keys))
        held = getattr(cache, call)(keys)
        for server in made.servers:
            assert server.pid
            suspend(server.pid)
        try:
            began_s = time.monotonic()
            assert not held.release()
            assert time.monotonic() - began_s < ONE_DEADLINE_S
        finally:
            for server in made.servers:
                os.kill(server.pid, signal.SIGCONT)
        assert cache.counters["failures"] == 3, "the prompt lay on every shard"


@pytest.mark.alone
def test_what_was_pinned_behind_a_shard_that_hangs_is_not_waited_for_beyond_the_deadline() -> None:
    with cluster(3, deadline_s=HANGS_S) as made:
        cache, keys = made.connect(), prompt(5, 40_000)
        assert all(put(cache, keys))
        first = next(iter(cache._router.routes(keys, time.monotonic())[0].owners))
        others = [server for number, server in enumerate(made.servers) if f"s{number}" != first]
        suspend(made.servers[int(first[1:])].pid)

        def later() -> None:
            time.sleep(0.4 * HANGS_S)
            for server in others:
                suspend(server.pid)

        thread = threading.Thread(target=later)
        thread.start()
        try:
            began_s = time.monotonic()
            assert cache.pin_prefix(keys).count == 0
            assert time.monotonic() - began_s < ONE_DEADLINE_S
        finally:
            thread.join()
            for server in made.servers:
                os.kill(server.pid, signal.SIGCONT)
