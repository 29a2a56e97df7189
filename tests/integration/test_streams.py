"""Large batches shared out among several connections: the same results, in order, and nothing goes on afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.errors import ConfigError
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess
from mmcache.testing.values import eventually
from mmcache.transport.base import Outcome
from tests.integration.support import blanks, keys_of, values_of

NBYTES, COUNT = 1 << 20, 24


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess("128MiB") as process:
        yield process


@pytest.mark.parametrize("options", ["?transport=tcp&streams=3", "?transport=shm&streams=3"])
def test_values_arrive_in_order_over_several_connections(server: ServerProcess, options: str) -> None:
    keys, missing = keys_of(COUNT, "streams"), keys_of(4, "not there")
    values = values_of(keys, NBYTES)
    with mmcache.connect(server.url + options, deadline_s=30) as cache:
        assert [one.outcome for one in cache.put(keys, values)] == [Outcome.STORED] * COUNT
        assert [one.outcome for one in cache.put(keys, values)] == [Outcome.PRESENT] * COUNT
        asked = Keys.of([*keys[:20], *missing, *keys[20:]])
        into = blanks(len(asked), NBYTES)
        outcomes = [one.outcome for one in cache.get_into(asked, into)]
        assert outcomes == [Outcome.HIT] * 20 + [Outcome.MISS] * 4 + [Outcome.HIT] * 4
        assert all(map(np.array_equal, values, into[:20] + into[24:]))
        assert (cache.counters["hits"], cache.counters["misses"]) == (COUNT, 4)
        assert cache.counters["put_stored"] == COUNT
        cache.delete(keys)

        def connections() -> int:  # a thread that begins late finds that of another, which is done already
            assert all(cache.put(keys, values))
            cache.delete(keys)
            return int(cache.stat()["counters"]["connections"])

        eventually(lambda: connections() == 3, "each of three has a connection of its own")


def test_small_batches_go_over_one(server: ServerProcess) -> None:
    with mmcache.connect(server.url + "?transport=tcp&streams=4") as cache:
        keys = keys_of(8, "small")
        assert all(cache.put(keys, values_of(keys, 1000)))
        assert all(cache.get_into(keys, blanks(8, 1000)))
        # Whoever asked whether the server was ready may be leaving still.
        eventually(lambda: cache.stat()["counters"]["connections"] == 1, "one connection is all there is")


def test_a_server_that_dies_ends_every_stream_within_the_deadline(server: ServerProcess) -> None:
    keys = keys_of(COUNT, "dies")
    values = values_of(keys, NBYTES)
    with mmcache.connect(server.url + "?transport=tcp&streams=4", deadline_s=10) as cache:
        assert all(cache.put(keys, values))
        stopping = threading.Timer(0.3, os.kill, (server.pid, signal.SIGKILL))
        stopping.start()
        began, lost = time.monotonic(), False
        while not lost and time.monotonic() - began < 30:
            into = blanks(COUNT, NBYTES)
            asked = time.monotonic()
            results = cache.get_into(keys, into)
            assert time.monotonic() - asked < 10 + 1
            for value, found, result in zip(values, into, results, strict=True):
                assert result.outcome in (Outcome.HIT, Outcome.UNAVAILABLE)
                assert result.outcome is Outcome.UNAVAILABLE or np.array_equal(value, found)
            lost = not any(results)
        stopping.join()
        assert lost
        assert [thread.name for thread in threading.enumerate() if thread.name == "mmcache-stream"] == []


@pytest.mark.parametrize("streams", ["0", "9", "-1"])
def test_more_streams_than_connections_are_refused(streams: str) -> None:
    with pytest.raises(ConfigError, match="max_connections"):
        mmcache.connect(f"mmcache://127.0.0.1:1?streams={streams}", lazy=True)
