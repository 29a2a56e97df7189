"""The blocking client of a cluster: the calls of `Client`, each carried to the shards that own its keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from mmcache.client.calls import AnyKeys, AnyMedia, Get, Put
from mmcache.client.cluster_core import ClusterCore, Held, give_back
from mmcache.client.cluster_fill import copy
from mmcache.client.cluster_shard import Shard
from mmcache.client.cluster_steps import Read
from mmcache.client.lease import LeasedFrames
from mmcache.client.pin import Pinned
from mmcache.errors import MMCacheError, TransportError
from mmcache.keyset import Keys
from mmcache.transport.base import HIT, MISS, Result

COPY_S: Final = 1.0  # of one call at most, however much time it has
LARGEST_COPY_NBYTES: Final = 32 << 20  # of one value: it passes through memory of this process, twice
HURRY: Final = 0.1  # the share of a call's time that must be left for what the call can do without


class ClusterClient(ClusterCore):
    """A client of many shards. Use as a context manager, or call `close`, which closes the membership too.

    `counters` counts whole calls, as `Client.counters` does, and failures over all shards; besides `failovers`, keys
    that were read beside a shard that did not answer, and `copied`, keys that were copied to a shard that lacked them.
    Raises ConfigError for more replicas than there are shards.
    """

    def match_prefix(self, keys: AnyKeys) -> int:
        """As `Client.match_prefix`: one request a shard that owns runs of the prefix, all at the same time."""
        return self._leading(Keys.of(keys), Shard.count, self._deadline())

    def pin_prefix(self, keys: AnyKeys) -> Pinned:
        """As `Client.pin_prefix`; one object holds what is pinned on every shard."""
        held: list[tuple[int, Held]] = []  # the first row, and what is pinned from there on

        def pin(shard: Shard, digests: Sequence[bytes], until: float) -> int | None:
            pinned = shard.pin(digests, until)
            if pinned is None:
                return None
            count, lease_ids = pinned
            if lease_ids:
                held.append((position[digests[0]], (shard, lease_ids)))
            return count

        rows, deadline = Keys.of(keys), self._deadline()
        position = {digest: row for row, digest in reversed(list(enumerate(rows.digests)))}
        count = self._leading(rows, pin, deadline)
        if time.monotonic() < deadline - HURRY * self.config.deadline_s:  # else their leases end by themselves
            give_back([one for first, one in held if first >= count], deadline)  # behind a block that is nowhere
        kept = [one for first, one in held if first < count]
        return Pinned(count, range(len(kept)), lambda _: give_back(kept, self._deadline()))

    def _leading(self, rows: Keys, ask: Callable[[Shard, Sequence[bytes], float], int | None], deadline: float) -> int:
        return self._run(
            lambda now: self._conduct.leading(rows, now, deadline),
            lambda shard, wanted, until: ask(shard, [rows.digests[row] for row in wanted], until),
        )

    def contains(self, keys: AnyKeys) -> list[bool]:
        """As `Client.contains`."""
        rows, deadline = Keys.of(keys), self._deadline()

        def flags(shard: Shard, wanted: Sequence[int], until: float) -> list[Result] | None:
            there = shard.flags([rows.digests[row] for row in wanted], until)
            return None if there is None else [HIT if one else MISS for one in there]

        read = self._run(lambda now: self._conduct.read(rows, now, deadline), flags)
        return list(map(bool, read.search.found))

    def get_into(self, keys: AnyKeys, buffers: Sequence[Any], *, verify: bool | None = None) -> list[Result]:
        """As `Client.get_into`; what one shard lacks is read from the next that may have it."""
        get = Get.of(keys, buffers, self._verifies(verify), self._copier)
        deadline = self._deadline()

        def fetch(shard: Shard, wanted: Sequence[int], until: float) -> list[Result]:
            part = get.pick(wanted)
            shard.fetch(part, until)
            return part.results

        read = self._run(lambda now: self._conduct.read(get.rows, now, deadline), fetch)
        get.results[:] = read.results
        self._count(get.counts())
        if read.rescued:
            self._count({"failovers": read.rescued})
        self._fill(get, read, deadline)
        return get.results

    def _fill(self, get: Get, read: Read, deadline: float) -> None:
        """Copy some of what was found elsewhere to where it was looked for first, if there is time: not much, as the
        caller has what it asked for, and waits."""
        if not read.found_on:
            return
        now, sizes = time.monotonic(), get.sizes()
        left, until = (deadline - now) / self.config.deadline_s, min(deadline, now + COPY_S)
        for (source, target), wanted in self._conduct.copies(read, sizes, left).items():
            giver, taker = self._shards.get(source), self._shards.get(target)
            picked = [row for row in wanted if sizes[row] <= LARGEST_COPY_NBYTES]
            if picked and giver is not None and taker is not None and taker.answering:
                try:
                    copied = copy(get.rows.pick(picked), giver, taker, until)
                except MMCacheError:  # the read is done: nothing depends on this
                    continue
                self._count({"copied": copied})
                self._conduct.copied(get.rows, picked, target)

    def put(
        self, keys: AnyKeys, tensors: Sequence[Any], *, ttl_s: float | None = None, media: AnyMedia = None
    ) -> list[Result]:
        """As `Client.put`, on every owner of a key at the same time. A key counts as stored where one owner has it; the
        result then says which owners have not."""
        put = Put.of(keys, tensors, ttl_s, media, self._native.hasher)
        deadline = self._deadline()

        def store(shard: Shard, wanted: Sequence[int], until: float) -> list[Result]:
            part = put.pick(wanted)
            shard.store(part, until)
            return part.results

        put.results[:] = self._run(lambda now: self._conduct.store(put.rows, now, deadline), store)
        self._count(put.counts())
        return put.results

    def acquire(self, keys: AnyKeys) -> LeasedFrames:
        """As `Client.acquire`; one object holds the leases of all shards."""
        rows, deadline = Keys.of(keys), self._deadline()
        frames: list[Any] = [None] * len(rows)
        held: list[Held] = []

        def take(shard: Shard, wanted: Sequence[int], until: float) -> list[Result] | None:
            taken = shard.take([rows.digests[row] for row in wanted], until)
            if taken is None:
                return None
            found, lease_ids = taken
            if lease_ids:
                held.append((shard, lease_ids))
            for row, frame in zip(wanted, found, strict=True):
                frames[row] = frame
            return [MISS if frame is None else HIT for frame in found]

        self._run(lambda now: self._conduct.read(rows, now, deadline, note=False), take)
        return LeasedFrames(frames, range(len(held)), lambda _: give_back(held, self._deadline()))

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
