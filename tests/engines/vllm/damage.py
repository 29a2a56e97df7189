"""Damage to what a cache holds, while engines use it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mmcache
from mmcache.tensors import as_numpy
from tests.engines.cache import Cache, stored_keys

PAYLOAD_BIT = 8 * 4096  # well inside every payload


def harm(cache: Cache, how: str, share: float, seed: float) -> int:
    """Flip a bit of, swap, reshape, exchange or forget a share of the entries, two at least, drawn by the seed; how
    many were harmed."""
    digests = cache.digests()
    some = random.Random(seed).sample(digests, min(len(digests), max(2, round(share * len(digests)))))
    if how == "forget":
        cache.forget(some)
        return len(some)
    if how == "flip":
        return cache.flip(some, PAYLOAD_BIT)
    if how == "swap":
        return cache.swap(some)
    return {"reshape": reshape, "exchange": exchange}[how](cache, some)


def reshape(cache: Cache, digests: Sequence[bytes]) -> int:
    """Under each of these keys a valid frame of another shape; how many were stored."""
    return _rewrite(cache, digests, [np.zeros((2, 2, 16, 64), np.float32)] * len(digests))


def exchange(cache: Cache, digests: Sequence[bytes]) -> int:
    """Under each of these keys the values of the next one, with a checksum that is right: nobody can notice but by what
    a model makes of them. How many were stored."""
    with mmcache.connect(cache.url) as client, client.acquire(stored_keys(client, digests)) as lease:
        frames = [frame for frame in lease.frames if frame is not None]
        assert len(frames) == len(digests), "something was evicted, or does not fit in what may be leased"
        values = [as_numpy(one.spec, frame.payload(one)).copy() for frame in frames for one in frame.header.tensors]
    return _rewrite(cache, digests, values[1:] + values[:1])


def _rewrite(cache: Cache, digests: Sequence[bytes], values: Sequence[NDArray[Any]]) -> int:
    with mmcache.connect(cache.url) as client:
        keys = stored_keys(client, digests)
        client.delete(keys)
        return sum(result.outcome == "stored" for result in client.put(keys, list(values)[: len(keys)]))
