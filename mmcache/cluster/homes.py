"""Finer homes: what becomes of a run whose prompts part ways inside it. Pure.

A run is placed by the chain key of its first block, so a long prompt that many requests share, and leave before the run
ends, would bring all their tails to one shard. That shard sees it, as many stored blocks name one block as their
parent, and says so in its replies: such a block is a fork. From there on, each tail of the run is placed by the chain
key of its own first block. Whoever has not heard of a fork looks, and stores, under the run's own home: at worst, a
miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from math import inf
from typing import Any, Final, Protocol

from mmcache.keyset import NO_PARENT

FORK_S: Final = 600.0  # how long a fork is remembered after it was last heard of
MAX_FORKS: Final = 16_384
MAX_TRAILS: Final = 65_536


class Columns(Protocol):
    """What is needed of `Keys`."""

    @property
    def digests(self) -> Sequence[bytes]: ...
    @property
    def parents(self) -> Sequence[bytes]: ...
    @property
    def chains(self) -> Sequence[bytes]: ...
    @property
    def parent_chains(self) -> Sequence[bytes]: ...
    @property
    def homes(self) -> Sequence[bytes]: ...
    @property
    def namespaces(self) -> Sequence[bytes]: ...


class Forks:
    """The forks heard of, by chain key, and which blocks lie behind them, so that any later slice is placed alike."""

    def __init__(self, keep_s: float = FORK_S) -> None:
        self._keep_s = keep_s
        self._heard: dict[bytes, tuple[float, float]] = {}  # first, and until when it is remembered
        self._trails: dict[bytes, bytes] = {}  # chain key of a block behind a fork -> its finer home
        self._since: dict[bytes, float] = {}  # finer home -> when its fork was first heard of

    def __len__(self) -> int:
        return len(self._heard)

    def knows(self, chain: bytes, now: float) -> bool:
        """Whether the block with this chain key is a fork."""
        heard = self._heard.get(chain)
        return heard is not None and heard[1] > now

    def since(self, home: bytes) -> float:
        """When the fork before a finer home was first heard of; long ago, if that is not known."""
        return self._since.get(home, -inf)

    def splits(self, rows: Columns, now: float) -> frozenset[int]:
        """The rows that follow a fork."""
        heard = self._heard
        if not heard:
            return frozenset()
        return frozenset(
            [row for row, parent in enumerate(rows.parent_chains) if parent in heard and heard[parent][1] > now]
        )

    def hear(self, rows: Columns, stored_keys: Iterable[bytes], now: float) -> bool:
        """Note that these stored keys are forks, as far as they are among `rows` or their parents; True if one is new.

        What is not among them is left out: nobody can fill this memory with keys of their own.
        """
        new, told = False, set(stored_keys) - {NO_PARENT}
        for names, chains in ((rows.digests, rows.chains), (rows.parents, rows.parent_chains)):
            if told.isdisjoint(names):
                continue
            for digest, chain in zip(names, chains, strict=True):
                if digest in told:
                    told.remove(digest)
                    is_known = self.knows(chain, now)
                    first, _ = self._heard.pop(chain, (now, now))
                    self._heard[chain] = first if is_known else now, now + self._keep_s
                    new |= not is_known
        _bound(self._heard, MAX_FORKS)
        return new

    def homes(self, rows: Columns, now: float) -> Sequence[bytes]:
        """Where each row is placed: its home, or, behind a fork inside its run, the finer one. Rows in order of the
        chain; those that begin in the middle of a run are placed by what earlier calls showed of it."""
        if not self._heard:
            return rows.homes
        finer: list[bytes] = []
        heard, trails = self._heard, self._trails
        for chain, parent, home in zip(rows.chains, rows.parent_chains, rows.homes, strict=True):
            trail: bytes | None = None
            if chain != home:  # it does not begin its run
                fork = heard.get(parent)
                if fork is not None and fork[1] > now:
                    trail, self._since[chain] = chain, fork[0]
                else:
                    trail = trails.get(parent)
            trails.pop(chain, None)
            if trail is not None:
                trails[chain] = trail
            finer.append(trail or home)
        _bound(trails, MAX_TRAILS)
        _bound(self._since, MAX_TRAILS)
        return finer


def _bound(held: dict[bytes, Any], most: int) -> None:
    """Forget the oldest half of what is more than `most`."""
    if len(held) > most:
        for key in list(islice(held, len(held) - most // 2)):
            del held[key]
