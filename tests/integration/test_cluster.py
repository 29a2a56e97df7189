"""Several real servers behind one client, all of them there: runs, pins, leases, forks, hot runs, operators, views."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

import mmcache
import mmcache.client.cluster
from mmcache.client.cluster import ClusterClient
from mmcache.client.operations import Operations
from mmcache.cluster.heat import LEAST_CALLS
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.errors import ConfigError, LeaseLost, TransportError, UsageError
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Op, Outcome
from mmcache.why import Why
from tests.integration.cluster_bed import Cluster, Told, cluster, entries, hits, prompt, put
from tests.integration.support import eventually, run_cli


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """Three servers that nobody kills."""
    with cluster(3) as made:
        yield made


# ------------------------------------------------------------------------------------------ all are there
def test_what_one_client_puts_another_reads_over_many_runs(three: Cluster) -> None:
    writer, reader, keys = three.connect(), three.connect(transport="tcp"), prompt(1, 20_000)
    assert {result.outcome for result in put(writer, keys)} == {Outcome.STORED}
    assert all(count > 0 for count in entries(writer).values())
    assert len(keys) == reader.match_prefix(keys) == sum(reader.contains(keys)) == hits(reader, keys) == 1250
    longer = prompt(1, 24_000)
    assert reader.match_prefix(longer) == len(keys)
    assert hits(reader, longer) == len(keys)
    assert reader.delete(keys[40]) == [True]
    assert reader.match_prefix(keys) == 40
    with reader.acquire(keys) as leased:
        assert [row for row, frame in enumerate(leased.frames) if frame is None] == [40]


def test_a_url_of_several_hosts_is_a_cluster(three: Cluster) -> None:
    keys = prompt(12)
    with mmcache.connect(three.url()) as writer, mmcache.connect(three.url()) as reader:
        assert isinstance(writer, ClusterClient)
        assert set(entries(writer)) == {three.address(number) for number in range(3)}
        assert all(put(writer, keys))
        assert hits(reader, keys) == len(keys)
        assert "3 shards" in repr(reader)


def test_pins_and_leases_of_several_shards_are_one(three: Cluster) -> None:
    cache, keys = three.connect(), prompt(2)
    put(cache, keys[:500])

    def leases() -> int:
        return int(cache.stat()["counters"]["leases"])

    pinned = cache.pin_prefix(keys)
    assert pinned.count == 500
    assert leases() >= 2
    assert pinned.release()
    assert pinned.release()
    eventually(lambda: leases() == 0, "all pins are given back")
    with cache.acquire(keys) as leased:
        assert sum(frame is not None for frame in leased.frames) == 500
        assert leases() >= 2
    assert leases() == 0


def test_a_pin_behind_a_gap_is_given_back_at_once(three: Cluster) -> None:
    cache, keys = three.connect(), prompt(3)
    put(cache, keys)
    cache.delete(keys[0])
    assert cache.pin_prefix(keys).count == 0
    eventually(lambda: cache.stat()["counters"]["leases"] == 0, "nothing is pinned")


def test_a_lease_that_one_shard_lost_is_lost() -> None:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess("64MiB", environment={"MMCACHE_LEASE_S": lease_s}))
            for lease_s in ("0.2", "30")
        ]
        cache = Cluster(stack, servers).connect()
        keys = prompt(4)
        eventually(lambda: all(put(cache, keys)), "all are stored before their reservations end")
        leased = cache.acquire(keys)
        assert all(leased.frames)
        time.sleep(0.5)
        with pytest.raises(LeaseLost):
            leased.__exit__(None, None, None)


def test_operators_ask_all_shards(three: Cluster) -> None:
    cache, keys = three.connect(), prompt(5)
    put(cache, keys[:300])
    reasons = Operations(cache).explain([keys.digests[0], keys.digests[299], keys.digests[400]])
    assert [reason.why for reason in reasons] == [Why.HERE, Why.HERE, Why.NEVER_STORED]
    assert cache.inspect(keys.digests[299]).found
    assert not cache.inspect(keys.digests[300]).found
    cache.match_prefix(keys)
    assert any(miss.key == keys.digests[300] for miss in Operations(cache).recent())
    assert Operations(cache).set_mode("read").mode == 1
    try:
        refused = put(cache, keys[400:410])
        assert {result.outcome for result in refused} == {Outcome.REFUSED}
    finally:
        Operations(cache).set_mode("both")
    with pytest.raises(UsageError, match="ask each of"):
        cache.ask(Op.LIST, pb.ListRequest(), pb.ListReply())
    assert "entries" in run_cli("stat", "-c", three.url(), "--json").stdout


def test_a_closed_client_says_so_and_members_that_cannot_be_are_refused(three: Cluster) -> None:
    cache = three.connect()
    cache.close()
    with pytest.raises(UsageError, match="closed"):
        cache.match_prefix(prompt(6))
    with pytest.raises(ConfigError, match="replicas=4 needs as many shards, and there are 3"):
        three.connect(replicas=4)
    with pytest.raises(ConfigError, match="an AsyncClient has one server"):
        mmcache.AsyncClient(three.url())
    with pytest.raises(TransportError, match="none of 2 shards answers"):
        mmcache.connect("mmcache://127.0.0.1:1,127.0.0.1:2?deadline_s=0.5")


def test_prompts_that_part_ways_inside_a_run_are_spread_and_found_by_those_who_did_not_know(three: Cluster) -> None:
    writer, keys = three.connect(), [prompt(100 + label, 6000, 4500) for label in range(60)]
    before = entries(writer)
    for one in keys:
        put(writer, one[writer.match_prefix(one) :])
    gained = sorted(count - before[name] for name, count in entries(writer).items())
    assert gained[-1] < 0.6 * sum(gained)  # of all tails, in one run, which one shard would own
    reader = three.connect()
    assert [reader.match_prefix(one) for one in keys] == [len(one) for one in keys]
    assert all(hits(reader, one) == len(one) for one in keys[::10])


def test_a_hot_beginning_is_copied_to_where_it_is_read(three: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmcache.client.cluster, "COPY_S", three.deadline_s)
    keys = prompt(7, 512)
    put(three.connect(), keys)
    copied = 0
    for draw in range(6):
        cache = three.connect()
        cache._router._draw = draw  # as on another host
        for _ in range(LEAST_CALLS + 2):
            assert hits(cache, keys) == len(keys)
        copied += cache.counters["copied"]
    assert copied == 2 * len(keys)
    for server in three.servers:
        with mmcache.connect(server.url) as one:
            assert all(one.contains(keys))
    assert three.connect().delete(keys) == [True] * len(keys)
    assert three.connect().match_prefix(keys) == 0


def test_a_forked_child_has_connections_of_its_own(three: Cluster) -> None:
    cache, keys = three.connect(), prompt(8)
    put(cache, keys)
    child = os.fork()
    if not child:
        os._exit(0 if hits(cache, keys) == len(keys) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert hits(cache, keys) == len(keys)


def test_clients_with_different_views_miss_at_worst(three: Cluster) -> None:
    keys = prompt(9)
    put(three.connect(0, 1), keys)
    other = three.connect(1, 2)
    assert other.match_prefix(keys) <= hits(other, keys) < len(keys)
    put(other, keys)
    assert hits(other, keys) == len(keys)
    assert hits(three.connect(0, 1), keys) == len(keys)


def test_a_member_whose_address_cannot_be_used_costs_its_own_keys(
    three: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    odd = View((*three.view(0, 1).members, Member("odd", "gopher://nowhere")))
    with ClusterClient(parse_cluster_url(three.url()), Told(odd)) as cache:
        keys = prompt(10)
        outcomes = {result.outcome for result in put(cache, keys)}
        assert outcomes == {Outcome.STORED, Outcome.UNAVAILABLE}
        assert 0 < hits(cache, keys) < len(keys)
    assert sum("shard odd cannot be used" in record.getMessage() for record in caplog.records) == 1


def test_a_miss_is_not_asked_again_at_once_but_what_is_put_is_found(three: Cluster) -> None:
    cache, keys = three.connect(absent_s=60), prompt(11, 160)
    lookups = three.connect()

    def asked() -> int:
        return int(lookups.stat()["counters"]["lookups"]) + len(Operations(lookups).recent(1000))

    assert cache.match_prefix(keys) == cache.match_prefix(keys) == 0
    before = asked()
    assert cache.match_prefix(keys) == 0
    assert asked() == before
    put(cache, keys)
    assert cache.match_prefix(keys) == len(keys)
    assert asked() > before


def test_what_another_stores_after_one_miss_is_found_at_once(three: Cluster) -> None:
    cache, keys = three.connect(absent_s=60), prompt(13, 160)
    assert cache.match_prefix(keys) == 0
    put(three.connect(), keys)
    assert cache.match_prefix(keys) == len(keys)
