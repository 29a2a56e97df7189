"""An engine's pages in the cache: SGLang's requests as one request each. Knows pools and keys; imports no SGLang.

What goes wrong here raises; hicache.py makes it a miss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from mmcache.client.blocking import Client
from mmcache.keys import Keys
from mmcache_connectors.sglang.policies import Kind, restorable
from mmcache_connectors.sglang.pools import FirstPool, FurtherPool
from mmcache_connectors.sglang.stats import Moved
from mmcache_connectors.sglang.transfer import nbytes_of, read_pages, write_pages

Prefix = Sequence[str] | None
Move = Callable[[Keys, Sequence[Any]], list[bool]]
FIRST: Final = "kv"  # SGLang's name of the first pool


class Wait(NamedTuple):
    """How long SGLang waits for a prompt's pages, seconds: at least, and more for each 1024 tokens."""

    base_s: float
    per_ki_token_s: float

    def of(self, tokens: int) -> float:
        """For so many tokens."""
        return self.base_s + self.per_ki_token_s * tokens / 1024


NO_LIMIT: Final = Wait(math.inf, 0.0)


class Found(NamedTuple):
    """After how many pages a prompt can go on, ascending, and how far each pool's pages reach; 0 is left out."""

    lengths: list[int]
    reach: dict[str, int]


class PageStore:
    """Pages of one engine process. Hashes are SGLang's, of consecutive pages; `prefix` those of all pages before them,
    None if unknown. Thread-safe."""

    def __init__(self, cache: Client, first: FirstPool, wait: Wait) -> None:
        self._cache, self._first, self._wait = cache, first, wait
        self.further: dict[str, FurtherPool] = {}
        self.moved = Moved()

    def count_leading(self, hashes: Sequence[str], prefix: Prefix, *, flat: bool) -> int:
        """How many leading pages of the first pool are stored, those that are passed as tensors if `flat`."""
        if flat:
            return self._cache.match_prefix(self._first.flat_keys(hashes))
        if not self._first.holds_pages:
            return len(hashes)
        return self._cache.match_prefix(self._first.keys(hashes, prefix)) // len(self._first.parts)

    def find(self, hashes: Sequence[str], transfers: Sequence[Any], prefix: Prefix, *, flat: bool) -> Found:
        """How far the pages of all pools reach, each pool by the policy of its PoolTransfer; one question for all."""
        asked = [self.further[transfer.name].keys(self._first, hashes, prefix) for transfer in transfers]
        pieces = 1 if flat else len(self._first.parts)
        mine = self._first.flat_keys(hashes) if flat else self._first.keys(hashes, prefix)
        if not flat and not self._first.holds_pages:
            mine = mine[:0]
        there = self._cache.contains(_joined([mine, *asked]))
        pages = [*there[: len(mine)], False].index(False) // pieces if len(mine) else len(hashes)
        kinds = []
        for place, transfer in enumerate(transfers):
            start = len(mine) + place * len(hashes)
            kinds.append(_kind(transfer, there[start : start + len(hashes)]))
        found = restorable(pages, kinds)
        names_reach = [(FIRST, pages), *zip((str(one.name) for one in transfers), found.reach, strict=True)]
        return Found(found.lengths, {name: reach for name, reach in names_reach if reach})

    def read(self, hashes: Sequence[str], host_indices: Any, prefix: Prefix) -> list[bool]:
        """Fill pages of the first pool; True for each that is there."""
        return self._move_first(hashes, host_indices, prefix, self._reading(len(hashes), len(self._first.parts)))

    def write(self, hashes: Sequence[str], host_indices: Any, prefix: Prefix) -> list[bool]:
        """Store pages of the first pool; True for each that is stored now."""
        return self._move_first(hashes, host_indices, prefix, self._writing(len(self._first.parts)))

    def read_flat(self, hashes: Sequence[str], targets: Sequence[Any]) -> list[bool]:
        """Fill tensors with pages of the first pool; True for each that is there."""
        return self._reading(len(hashes))(self._first.flat_keys(hashes), targets)

    def write_flat(self, hashes: Sequence[str], values: Sequence[Any]) -> list[bool]:
        """Store tensors, a page of the first pool each; True for each that is stored now."""
        return self._writing()(self._first.flat_keys(hashes), values)

    def read_all(self, transfers: Sequence[Any], prefix: Prefix) -> dict[Any, list[bool]]:
        """Fill pages as PoolTransfers ask; by pool True for each page that is there."""
        pages = max((len(transfer.keys or ()) for transfer in transfers), default=0)
        return self._move_all(transfers, prefix, self._reading(pages))

    def write_all(self, transfers: Sequence[Any], prefix: Prefix) -> dict[Any, list[bool]]:
        """Store pages as PoolTransfers say; by pool True for each page that is stored now."""
        return self._move_all(transfers, prefix, self._writing())

    def _move_first(self, hashes: Sequence[str], host_indices: Any, prefix: Prefix, move: Move) -> list[bool]:
        if not self._first.holds_pages:
            return [True] * len(hashes)
        keys, places = self._first.keys(hashes, prefix), self._first.places(host_indices, len(hashes))
        return _whole(move(keys, places), len(self._first.parts))

    def _move_all(self, transfers: Sequence[Any], prefix: Prefix, move: Move) -> dict[Any, list[bool]]:
        keys: list[Keys] = []
        places: list[Any] = []
        counts: list[int] = []
        for transfer in transfers:
            hashes = transfer.keys or []
            if transfer.name == FIRST:
                keys.append(self._first.keys(hashes, prefix))
                places += self._first.places(transfer.host_indices, len(hashes))
            else:
                pool = self.further[transfer.name]
                keys.append(pool.keys(self._first, hashes, prefix))
                places += pool.places(transfer.host_indices, len(hashes))
            counts.append(len(keys[-1]))
        done = iter(move(_joined(keys), places))
        results: dict[Any, list[bool]] = {}
        for transfer, count in zip(transfers, counts, strict=True):
            pieces = count // max(len(transfer.keys or ()), 1)
            results[transfer.name] = _whole([next(done) for _ in range(count)], max(pieces, 1))
        return results

    def _reading(self, pages: int, pieces: int = 1) -> Move:
        """Reads what belongs to so many pages, each in so many pieces."""
        wait_s = self._wait.of(pages * self._first.pool.page_size)
        return self._timed(lambda keys, places: read_pages(self._cache, keys, places, wait_s), pieces, written=False)

    def _writing(self, pieces: int = 1) -> Move:
        return self._timed(lambda keys, values: write_pages(self._cache, keys, values), pieces, written=True)

    def _timed(self, move: Move, pieces: int, *, written: bool) -> Move:
        def timed(keys: Keys, places: Sequence[Any]) -> list[bool]:
            started = time.perf_counter()
            done = move(keys, places)
            seconds = time.perf_counter() - started
            nbytes = sum(nbytes_of(place) for place, good in zip(places, done, strict=True) if good)
            self.moved.note(sum(_whole(done, pieces)), nbytes, seconds, written=written)
            return done

        return timed


def _joined(keys: Sequence[Keys]) -> Keys:
    return sum(keys[1:], keys[0]) if keys else Keys.of([])


def _whole(done: Sequence[bool], pieces: int) -> list[bool]:
    """A page is there if all its pieces are."""
    return [all(done[start : start + pieces]) for start in range(0, len(done), pieces)]


def _kind(transfer: Any, present: Sequence[bool]) -> Kind:
    policy = getattr(transfer.hit_policy, "value", transfer.hit_policy)
    window = len(transfer.keys) if transfer.keys else 1
    return Kind(str(policy), present, window, transfer.block_pages, transfer.group_pages)
