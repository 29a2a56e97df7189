"""What a shard has just said it does not have, so that it is not asked again at once. Pure.

A scheduler may ask for one prompt many times a second. Once is not enough, where nobody else is left to ask: it asks, a
worker stores, it asks again, and shall find. An entry here lasts a moment only, and is forgotten as soon as this client
stores the key; what another client stores meanwhile is missed for that moment at most.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

MAX_ABSENT: Final = 16_384  # a shard's


class Absent:
    """Keys by shard, each until its time. `keep_s` 0: nothing is kept."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._until: dict[str, dict[bytes, tuple[float, bool]]] = {}  # until when, and whether it lacked it twice

    def note(self, shard: str, digest: bytes, now: float) -> None:
        """The shard does not have it."""
        if self._keep_s > 0:
            held = self._until.setdefault(shard, {})
            before = held.pop(digest, None)
            held[digest] = now + self._keep_s, before is not None and before[0] > now
            if len(held) > MAX_ABSENT:
                for key in list(islice(held, MAX_ABSENT // 2)):
                    held.pop(key, None)

    def __call__(self, shard: str, digest: bytes, now: float, *, last: bool) -> bool:
        """Whether the shard is known not to have it; where it is the last to ask, it must have said so twice."""
        held = self._until.get(shard)
        entry = held.get(digest) if held else None
        return entry is not None and entry[0] > now and (entry[1] or not last)

    def stored(self, shard: str, digest: bytes) -> None:
        """The shard has it now."""
        if held := self._until.get(shard):
            held.pop(digest, None)

    def keep(self, shards: frozenset[str]) -> None:
        """Forget all other shards."""
        for gone in self._until.keys() - shards:
            self._until.pop(gone, None)
