"""The blocking client of a cluster: the calls of `Client`, each carried to the shards that own its keys."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmcache.client.calls import AnyKeys, AnyMedia, Get, Put
from mmcache.client.cluster_answers import RESTING, together
from mmcache.client.cluster_core import ClusterCore, all_of, at_once
from mmcache.client.cluster_fill import chosen, copy
from mmcache.client.cluster_shard import Shard
from mmcache.client.lease import LeasedFrames
from mmcache.client.pin import Pinned
from mmcache.cluster.routes import by_member
from mmcache.cluster.search import Search
from mmcache.errors import MMCacheError, TransportError
from mmcache.keyset import Keys
from mmcache.transport.base import HIT, MISS, Outcome, Result


class ClusterClient(ClusterCore):
    """A client of many shards. Use as a context manager, or call `close`, which closes the membership too.

    `counters` counts whole calls, as `Client.counters` does, and failures over all shards; besides `failovers`, keys
    that were read beside a shard that did not answer, and `copied`, keys that were copied to a shard that lacked them.
    Raises ConfigError for more replicas than there are shards.
    """

    def match_prefix(self, keys: AnyKeys) -> int:
        """As `Client.match_prefix`: one request a shard that owns runs of the prefix, all at the same time."""
        return self._leading(Keys.of(keys), Shard.count)

    def pin_prefix(self, keys: AnyKeys) -> Pinned:
        """As `Client.pin_prefix`; one object holds what is pinned on every shard."""
        held: list[tuple[int, Pinned]] = []  # the first row, and what is pinned from there on

        def pin(shard: Shard, digests: Sequence[bytes], deadline: float) -> int | None:
            pinned = shard.pin(digests, deadline)
            if pinned is None:
                return None
            if pinned.count:
                held.append((position[digests[0]], pinned))
            return pinned.count

        rows = Keys.of(keys)
        position = {digest: row for row, digest in reversed(list(enumerate(rows.digests)))}
        count = self._leading(rows, pin)
        for first, pinned in held:
            if first >= count:
                pinned.release()  # it lies behind a block that is nowhere
        kept = [pinned for first, pinned in held if first < count]
        return Pinned(count, range(len(kept)), lambda _: all_of(kept))

    def contains(self, keys: AnyKeys) -> list[bool]:
        """As `Client.contains`."""
        rows = Keys.of(keys)
        deadline, search = self._deadline(), self._search(rows)
        while asks := search.asks():
            for member, wanted, flags in self._round(rows, search, asks, deadline, Shard.flags):
                self._mark(rows, search, member, wanted, flags)
        return list(map(bool, search.found))

    def get_into(self, keys: AnyKeys, buffers: Sequence[Any], *, verify: bool | None = None) -> list[Result]:
        """As `Client.get_into`; what one shard lacks is read from the next that may have it."""
        get = Get.of(keys, buffers, self._verifies(verify), self._copier)
        rows, results = get.rows, get.results
        deadline, search = self._deadline(), self._search(rows)

        def fetch(shard: Shard, part: Get, until: float) -> Get:
            shard.fetch(part, until)
            return part

        found_on: dict[int, str] = {}
        asked: set[int] = set()
        while asks := search.asks():
            parts = {member: get.pick(wanted) for member, wanted in asks.items()}
            for member, wanted, part in self._round(rows, search, asks, deadline, fetch, parts):
                assert part is not None
                asked.update(wanted)
                for row, result in zip(wanted, part.results, strict=True):
                    results[row] = result
                    if result is HIT:
                        found_on[row] = member
                self._mark_results(rows, search, member, wanted, part.results)
        for row, result in enumerate(results):
            if result is MISS and search.is_troubled(row) and row not in asked:
                results[row] = RESTING
        self._count(get.counts())
        self._fill(get, search, found_on, deadline)
        return results

    def _fill(self, get: Get, search: Search, found_on: Mapping[int, str], deadline: float) -> None:
        """Copy some of what was found elsewhere to where it was looked for first, if there is time."""
        wanted_on = {row: first for row in found_on if (first := search.lacking(row)) is not None}
        if not wanted_on or deadline - time.monotonic() < self.config.deadline_s / 2:
            return
        for (source, target), picked in chosen(found_on, wanted_on, get.sizes()).items():
            giver, taker = self._shards.get(source), self._shards.get(target)
            if giver is not None and taker is not None and taker.answering:
                try:
                    copied = copy(get.rows.pick(picked), giver, taker, deadline)
                except MMCacheError:  # the read is done: nothing depends on this
                    continue
                self._count({"copied": copied})
                for row in picked:
                    self._absent.stored(target, get.rows.digests[row])

    def put(
        self, keys: AnyKeys, tensors: Sequence[Any], *, ttl_s: float | None = None, media: AnyMedia = None
    ) -> list[Result]:
        """As `Client.put`, on every owner of a key at the same time. A key counts as stored where one owner has it; the
        result then says which owners have not."""
        put = Put.of(keys, tensors, ttl_s, media, self._native.hasher)
        deadline, rows = self._deadline(), put.rows
        routes = self._routes(rows)
        groups = by_member((row, route.owners) for row, route in enumerate(routes))
        shards = [(name, shard) for name in groups if (shard := self._shards.get(name)) is not None]
        parts = [put.pick(groups[name]) for name, _ in shards]
        at_once([partial(shard.store, part, deadline) for (_, shard), part in zip(shards, parts, strict=True)])
        said: list[dict[str, Result]] = [{} for _ in routes]
        for (name, _), part in zip(shards, parts, strict=True):
            for row, result in zip(groups[name], part.results, strict=True):
                said[row][name] = result
                if result:
                    self._absent.stored(name, rows.digests[row])
        self._hear(rows, [name for name, _ in shards])
        self._note_failures(
            name for answers in said for name, one in answers.items() if one.outcome is Outcome.UNAVAILABLE
        )
        put.results[:] = [together(route.owners, answers) for route, answers in zip(routes, said, strict=True)]
        self._count(put.counts())
        return put.results

    def acquire(self, keys: AnyKeys) -> LeasedFrames:
        """As `Client.acquire`; one object holds the leases of all shards."""
        rows = Keys.of(keys)
        deadline, search = self._deadline(), self._search(rows)
        frames: list[Any] = [None] * len(rows)
        held: list[LeasedFrames] = []
        while asks := search.asks():
            for member, wanted, leased in self._round(rows, search, asks, deadline, Shard.take):
                if leased is not None:
                    held.append(leased)
                    for row, frame in zip(wanted, leased.frames, strict=True):
                        frames[row] = frame
                flags = None if leased is None else [frame is not None for frame in leased.frames]
                self._mark(rows, search, member, wanted, flags, note=False)
        return LeasedFrames(frames, range(len(held)), lambda _: all_of(held))

    def delete(self, keys: AnyKeys) -> list[bool]:
        """As `Client.delete`, on every shard: copies may lie anywhere. Raises TransportError if one cannot be asked,
        after all others were."""
        rows = Keys.of(keys)
        deadline = self._deadline()
        self._look()
        answers = self.each(lambda shard: shard.remove(rows.digests, deadline))
        lost = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
        if lost or not answers:
            told = "; ".join(f"{name}: {error}" for name, error in sorted(lost.items()))
            raise TransportError(f"{len(lost)} of {len(answers)} shards could not be asked to delete ({told})")
        return [any(flags) for flags in zip(*answers.values(), strict=True)]
