"""Pages to and from the cache in calls of bounded size: each has the client's whole deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from mmcache.client.blocking import Client
from mmcache.keys import Keys
from mmcache_connectors.sglang.pages import cuts

CALL_NBYTES: Final = 256 << 20  # what a slow link still moves within the default deadline


def read_pages(cache: Client, keys: Keys, places: Sequence[Any], limit: int = CALL_NBYTES) -> list[bool]:
    """Fill `places`, for each page a tensor or a list of arrays; True for each that is there.

    Ends after the first call with a page that is not: SGLang uses none behind it.
    """
    found: list[bool] = []
    for cut in cuts([_nbytes(place) for place in places], limit):
        found += map(bool, cache.get_into(keys[cut], places[cut]))
        if not all(found):
            break
    return found + [False] * (len(keys) - len(found))


def write_pages(cache: Client, keys: Keys, values: Sequence[Any], limit: int = CALL_NBYTES) -> list[bool]:
    """Store pages; True for each that is stored now."""
    parts = cuts([_nbytes(value) for value in values], limit)
    return [bool(result) for cut in parts for result in cache.put(keys[cut], values[cut])]


def _nbytes(value: Any) -> int:
    return sum(array.nbytes for array in value) if isinstance(value, list) else int(value.nbytes)
