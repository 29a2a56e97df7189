"""A writer whose clock is wrong: its values may end early, never late, and the reason names the clocks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from mmcache.client import batch
from mmcache.client.blocking import Client
from mmcache.config import ClientConfig
from mmcache.embedded import EmbeddedClient
from tests.integration.support import eventually, keys_of, values_of

HOUR_S = 3600


class Skewed:
    """The time module of a host whose clock is off by some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self._seconds

    def time_ns(self) -> int:
        return time.time_ns() + int(self._seconds * 1e9)


@pytest.fixture
def cache() -> Client:
    return EmbeddedClient(ClientConfig(scheme="embedded", memory_nbytes=1 << 20))


def test_a_writer_whose_clock_is_behind_hears_that_the_clocks_differ(
    cache: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(2, "behind")
    with cache:
        monkeypatch.setattr(batch, "time", Skewed(-HOUR_S))
        refused = cache.put(keys[:1], values_of(keys[:1], 10), ttl_s=60)[0]
        assert str(refused.outcome) == "refused"
        assert "the clocks of this host and the server's differ" in refused.reason
        assert cache.put(keys[1:], values_of(keys[1:], 10), ttl_s=2 * HOUR_S)[0]  # lives, but for an hour less
        assert cache.contains(keys) == [False, True]


def test_a_writer_whose_clock_is_ahead_makes_nothing_live_longer(
    cache: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(1, "ahead")
    with cache:
        monkeypatch.setattr(batch, "time", Skewed(HOUR_S))
        assert cache.put(keys, values_of(keys, 10), ttl_s=4.0)[0]
        assert cache.contains(keys) == [True]
        eventually(lambda: cache.contains(keys) == [False], "it expires after its own seconds, not an hour later")


def test_without_a_ttl_no_clock_matters(cache: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(1, "for ever")
    with cache:
        monkeypatch.setattr(batch, "time", Skewed(-1000 * HOUR_S))
        assert cache.put(keys, [np.zeros(3, np.uint8)])[0]
        assert cache.contains(keys) == [True]
