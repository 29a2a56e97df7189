"""What the scheduler's side remembers of one request, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from mmcache.chain import ChainHasher
from mmcache.client.pin import Pinned
from mmcache.keyset import Keys
from mmcache_connectors.vllm.background import Ticket
from mmcache_connectors.vllm.misses import Missed

TAIL_BLOCKS: Final = 256


class Chain:
    """A request's block keys so far, which grow with it. Blocks at or past `limit_blocks` touch a media item of unknown
    identity, or were computed with weights of unknown identity: they must not be looked up or stored."""

    def __init__(self, hasher: ChainHasher, keys: Keys, given: int, limit_blocks: int) -> None:
        """`given` tokens are in `hasher` already; `keys` are those of the blocks they filled."""
        self.limit_blocks = limit_blocks
        self._hasher, self._given = hasher, given
        self._keys, self._tail = keys, keys[:0]  # apart, as joining costs a copy of all columns

    def __len__(self) -> int:
        return len(self._keys) + len(self._tail)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Hash what the request grew by: `token_ids` is the whole sequence."""
        new = token_ids[self._given :]
        if new:
            self._tail = self._tail + self._hasher.extend(list(new))
            self._given += len(new)
            if len(self._tail) >= TAIL_BLOCKS:
                self._keys, self._tail = self._keys + self._tail, self._tail[:0]

    def keys(self, first: int, stop: int) -> Keys:
        """The keys of blocks first .. stop, as far as there are any."""
        count = len(self._keys)
        if stop <= count or not len(self._tail):
            return self._keys[first:stop]
        if first >= count:
            return self._tail[first - count : stop - count]
        return self._keys[first:] + self._tail[: stop - count]


class Answer(NamedTuple):
    """How many leading blocks are a hit, what is pinned for it, why the first that is in neither cache is not there:
    None if there is none."""

    hit: int
    pinned: Pinned
    missed: Missed | Ticket[Missed] | None


class Admitted(NamedTuple):
    """What became of a request's prompt when it first ran: tokens that the engine held itself, tokens loaded, and why
    not all others were."""

    local: int
    cached: int
    missed: Missed | Ticket[Missed] | None


@dataclass(slots=True, eq=False)
class Tracked:
    """One request. Only the scheduler's thread changes it."""

    request: Any
    identified: Ticket[Chain | None] | None = None  # None again once `chain` has the result
    chain: Chain | None = None
    answer: Ticket[Answer] | None = None  # of the question how much is stored
    asked_s: float = 0.0  # when the question that is open now was first asked; 0: no question is open
    waiting_for: bytes = b""  # digest of a block that another request loads and this one needs next
    local: int = 0  # blocks the engine itself held when the answer was given
    loading: tuple[bytes, ...] = ()  # digests of the blocks being loaded
    loading_ids: frozenset[int] = field(default_factory=frozenset)  # and where they lie
    adapter_kept: Ticket[bool] | None = None  # whether its adapter's files were the same when it was admitted
    off: bool = False  # nothing more is loaded for it: something took too long, or failed
    saved: int = 0  # leading blocks known to be stored, or on their way
    audit: bool | None = None  # whether its hit is not used, to be compared instead; None: not drawn yet
    audit_stop: int = 0  # blocks before this one are compared when they are saved
    admitted: Admitted | None = None  # None: it has not run yet
    missed: Missed | Ticket[Missed] | None = None  # why not all of it was found, when it was looked up last
