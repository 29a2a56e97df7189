"""What a shard has just said it does not have, so that it is not asked again at once. Pure.

A scheduler may ask for one prompt many times a second. Once is not enough, where nobody else is left to ask: it asks, a
worker stores, it asks again, and shall find. An entry here lasts a moment only, and is forgotten as soon as this client
stores the key; what another client stores meanwhile is missed for that moment at most.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

MAX_ABSENT: Final = 16_384  # a shard's
Generation = dict[str, dict[bytes, tuple[float, bool]]]  # until when, and whether it lacked it twice


class Absent:
    """Keys by shard, each until its time. `keep_s` 0: nothing is kept.

    Two generations: at the end of `keep_s` the younger becomes the older one, whose entries are all past their time
    when it goes. So what is kept is what was noted lately, however many shards there are, and however long it runs.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._young: Generation = {}
        self._old: Generation = {}
        self._turns_at = 0.0

    def __len__(self) -> int:
        return sum(len(held) for generation in (self._young, self._old) for held in generation.values())

    def note(self, shard: str, digest: bytes, now: float) -> None:
        """The shard does not have it."""
        if self._keep_s <= 0:
            return
        if now >= self._turns_at:
            self._old = self._young if now < self._turns_at + self._keep_s else {}
            self._young, self._turns_at = {}, now + self._keep_s
        before = self.stored(shard, digest)
        held = self._young.setdefault(shard, {})
        held[digest] = now + self._keep_s, before is not None and before[0] > now
        if len(held) > MAX_ABSENT:
            for key in list(islice(held, MAX_ABSENT // 2)):
                held.pop(key, None)

    def __call__(self, shard: str, digest: bytes, now: float, *, last: bool) -> bool:
        """Whether the shard is known not to have it; where it is the last to ask, it must have said so twice."""
        for generation in (self._young, self._old):
            held = generation.get(shard)
            if held and (entry := held.get(digest)):
                return entry[0] > now and (entry[1] or not last)
        return False

    def stored(self, shard: str, digest: bytes) -> tuple[float, bool] | None:
        """The shard has it now: what was noted of it is forgotten, and returned."""
        entry = None
        for generation in (self._old, self._young):
            if held := generation.get(shard):
                entry = held.pop(digest, entry)
        return entry

    def keep(self, shards: frozenset[str]) -> None:
        """Forget all other shards."""
        for generation in (self._young, self._old):
            for gone in generation.keys() - shards:
                del generation[gone]
