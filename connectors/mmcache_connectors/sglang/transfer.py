"""Pages to and from the cache in calls of bounded size: each has the client's whole deadline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError
from mmcache.keys import Keys
from mmcache.transport.base import Outcome
from mmcache_connectors.sglang.pages import cuts

CALL_NBYTES: Final = 256 << 20  # what a slow link still moves within the default deadline


def read_pages(cache: Client, keys: Keys, places: Sequence[Any], wait_s: float, limit: int = CALL_NBYTES) -> list[bool]:
    """Fill `places`, for each key a tensor or a list of arrays; True for each that is there.

    No call begins when `wait_s` has passed, as nobody waits any more, nor after one in which something was missing. An
    entry of another form than its place is deleted: it would fail every time, and keep the right one from being stored.
    """
    found: list[bool] = []
    give_up_s = time.monotonic() + wait_s
    for cut in cuts([nbytes_of(place) for place in places], limit):
        results = cache.get_into(keys[cut], places[cut])
        found += map(bool, results)
        odd = [row for row, result in enumerate(results) if result.outcome is Outcome.MISMATCH]
        if odd:
            with contextlib.suppress(MMCacheError):
                cache.delete([keys[cut][row] for row in odd])
        if not all(found) or time.monotonic() >= give_up_s:
            break
    return found + [False] * (len(keys) - len(found))


def write_pages(cache: Client, keys: Keys, values: Sequence[Any], limit: int = CALL_NBYTES) -> list[bool]:
    """Store pages; True for each that is stored now."""
    parts = cuts([nbytes_of(value) for value in values], limit)
    return [bool(result) for cut in parts for result in cache.put(keys[cut], values[cut])]


def nbytes_of(value: Any) -> int:
    """The size of a page's tensor, or of its arrays together."""
    return sum(array.nbytes for array in value) if isinstance(value, list) else int(value.nbytes)
