"""Shards that hang: how often they cost a caller its deadline, and how they are noticed when they are back."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import mmcache
from mmcache.keyset import Keys
from mmcache.testing.process import suspend
from tests.integration.cluster_bed import cluster, entries, hits, prompt, put
from tests.integration.support import NAMESPACE, eventually

SHARDS = 3
DEADLINE_S = 1.0


def keys_by_owner(cache: mmcache.Client, wanted: int) -> list[Keys]:
    """Keys of their own home, one after the other on each shard in turn."""
    made: dict[str, list[Keys]] = {}
    for number in range(200):
        keys = Keys.of([mmcache.opaque_key(NAMESPACE, b"again %d" % number)])
        owner = cache._router.routes(keys, time.monotonic())[0].owners[0]  # type: ignore[attr-defined]
        made.setdefault(owner, []).append(keys)
    assert len(made) == SHARDS
    return [keys for group in zip(*made.values(), strict=False) for keys in group][:wanted]


@pytest.mark.alone
def test_each_shard_that_hangs_costs_a_deadline_once_however_long_it_hangs() -> None:
    # A call may be slow because the machine stood still, but not at each try.
    assert SHARDS in (slow_calls() for _ in range(6))


def slow_calls() -> int:
    """How many took long before three shards that hang, for many deadlines."""
    with cluster(SHARDS) as made:
        patient, cache = made.connect(), made.connect(deadline_s=DEADLINE_S)
        wanted = keys_by_owner(cache, 30)
        for keys in wanted:
            assert all(put(patient, keys))
        for server in made.servers:
            assert server.pid
            suspend(server.pid)
        slow, until_s = 0, time.monotonic() + 6.0
        while time.monotonic() < until_s:
            for keys in wanted:
                began_s = time.monotonic()
                assert hits(cache, keys) == 0
                slow += time.monotonic() - began_s > DEADLINE_S / 2
            assert not cache.answering
            time.sleep(0.05)
        for server in made.servers:
            os.kill(server.pid or 0, signal.SIGCONT)
        eventually(lambda: sum(hits(cache, keys) for keys in wanted) == len(wanted), "all are asked again")
        assert cache.answering
        eventually(lambda: not asking_again(), "who asked again has ended")
        return slow


def asking_again() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mmcache-again"]


def test_who_only_asks_whether_any_shard_answers_hears_of_one_that_is_back() -> None:
    with cluster(2) as made:
        cache = made.connect(deadline_s=DEADLINE_S)
        assert all(put(made.connect(), prompt(1)))
        assert len(entries(made.connect())) == 2
        eventually(lambda: hits(cache, prompt(1)) == len(prompt(1)), "both answer")
        for server in made.servers:
            suspend(server.pid or 0)
        hits(cache, prompt(1))
        hits(cache, prompt(1))
        assert not cache.answering
        os.kill(made.servers[0].pid or 0, signal.SIGCONT)
        eventually(lambda: cache.answering, "it is noticed")
        os.kill(made.servers[1].pid or 0, signal.SIGCONT)
        eventually(lambda: hits(cache, prompt(1)) == len(prompt(1)), "so is the other")
