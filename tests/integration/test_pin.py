"""pin_prefix and contains against a real server: what is promised to a scheduler is still there for its worker."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.client.pin import Pinned
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess
from tests.integration.support import blanks, eventually, keys_of, reserved_address, values_of

NBYTES = 60_000


@contextlib.contextmanager
def served(path: str, lease_s: int) -> Iterator[Client]:
    environment = {"MMCACHE_LEASE_S": str(lease_s), "MMCACHE_MAX_BATCH_KEYS": "16"}
    with (
        ServerProcess("4MiB", environment=environment) as server,
        mmcache.connect(f"{server.url}?transport={path}", deadline_s=7) as cache,
    ):
        yield cache


@pytest.fixture(params=["shm", "tcp"], ids=["unix", "tcp"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(path: str) -> Iterator[Client]:
    with served(path, lease_s=60) as cache:
        yield cache


def press(cache: Client, label: str) -> None:
    """Store more than the whole memory holds."""
    keys = keys_of(120, label)
    for start in range(0, len(keys), 8):
        cache.put(keys[start : start + 8], values_of(keys[start : start + 8], NBYTES))


def test_what_is_pinned_survives_pressure_until_it_is_released(cache: Client) -> None:
    keys = keys_of(10, "promised")
    assert all(cache.put(keys, values_of(keys, NBYTES)))
    pinned = cache.pin_prefix(keys + keys_of(2, "absent") + keys)
    assert pinned.count == 10
    press(cache, "pressure")
    buffers = blanks(10, NBYTES)
    assert all(cache.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))
    assert pinned.release()
    assert pinned.release()  # and again: nothing is held any more, nothing was lost
    cache.pin_prefix(keys_of(1, "absent"))  # the read's own lease ends with the next request of its kind
    press(cache, "more pressure")
    assert cache.contains(keys) == [False] * 10


def test_a_pin_that_is_forgotten_ends_with_the_lease(path: str) -> None:
    with served(path, lease_s=3) as cache:
        keys = keys_of(10, "forgotten")
        assert all(cache.put(keys, values_of(keys, NBYTES)))
        pinned = cache.pin_prefix(keys)
        eventually(lambda: cache.stat()["counters"]["leases"] == 0, "the lease has ended")
        assert not pinned.release()


def test_a_prefix_longer_than_a_batch_and_than_may_be_pinned_is_counted_whole(cache: Client) -> None:
    keys = keys_of(50, "long")
    for start in range(0, 50, 10):
        assert all(cache.put(keys[start : start + 10], values_of(keys[start : start + 10], NBYTES)))
    pinned = cache.pin_prefix(keys + keys_of(3, "not there"))
    assert pinned.count == 50  # 3 MB, of which half the memory, 2 MiB, may be pinned
    assert 1 << 20 < cache.stat()["counters"]["held_bytes"] <= 2 << 20  # over several requests of at most 1 MiB each
    pinned.release()
    assert cache.stat()["counters"]["held_bytes"] == 0


def test_contains_says_which(cache: Client) -> None:
    keys = keys_of(40, "holes")
    there = [row % 3 != 1 for row in range(40)]
    for row, stored in enumerate(there):
        if stored:
            assert all(cache.put(keys[row], values_of(Keys.of(keys[row]), 100)))
    assert cache.contains(keys) == there
    assert cache.contains([]) == []
    assert cache.pin_prefix([]).count == 0


def test_without_a_server_nothing_is_there_and_nothing_raises(caplog: pytest.LogCaptureFixture) -> None:
    server = ServerProcess("4MiB").start()
    keys = keys_of(3, "gone")
    with mmcache.connect(server.url, deadline_s=7) as cache:
        assert all(cache.put(keys, values_of(keys, 100)))
        assert server.stop() == 0
        for _ in range(5):
            assert cache.contains(keys) == [False] * 3
            assert cache.pin_prefix(keys).count == 0
        assert isinstance(cache.pin_prefix(keys), Pinned)
        said = [one.getMessage() for one in caplog.records if f"{cache!r} does not answer" in one.getMessage()]
    assert len(said) == 1  # one line for the change, not one for each call


def test_a_server_that_comes_back_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of(3, "back")
    with (
        reserved_address() as place,
        ServerProcess("4MiB", listen=place) as server,
        mmcache.connect(server.url, deadline_s=7) as cache,
    ):
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        assert cache.contains(keys) == [False] * 3
        with ServerProcess("4MiB", listen=place):
            eventually(lambda: all(cache.put(keys, values_of(keys, 100))), "the server is found again")
            assert cache.contains(keys) == [True] * 3
        said = [record.getMessage() for record in caplog.records]
        assert len([line for line in said if f"{cache!r} does not answer" in line]) == 1
        assert len([line for line in said if f"{cache!r} answers again" in line]) == 1
