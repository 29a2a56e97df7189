"""Placement: the view of the cluster and the owners of a home, decided by rendezvous hashing. Pure.

Placed are runs of blocks, by their home (the chain key of the run's first block), so that one run lives together.
Everyone who holds the same list of members computes the same owners, with no coordinator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import xxhash

from mmcache.errors import ConfigError

_TWO_64 = float(1 << 64)


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One shard: a stable id, its address (a client URL) and its weight (its share of memory, any positive scale)."""

    id: str
    address: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class View:
    """The members, sorted; `version` is a hash of them, so equal lists are equal views wherever they come from."""

    members: tuple[Member, ...]
    version: str = field(init=False)
    _names: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    _equal: bool = field(init=False, repr=False, compare=False)  # all weigh the same

    def __post_init__(self) -> None:
        members = tuple(sorted(Member(m.id, m.address, float(m.weight)) for m in self.members))
        if not members or len({member.id for member in members}) != len(members):
            raise ConfigError("a view needs at least one member, each with an id of its own")
        if any(not 0 < member.weight < math.inf for member in members):
            raise ConfigError("a member's weight must be greater than 0, and finite")
        if any(char in member.id + member.address for member in members for char in "\t\n"):
            raise ConfigError("a member's id and address cannot hold tabs or line breaks")
        object.__setattr__(self, "members", members)
        text = "\n".join(f"{m.id}\t{m.address}\t{m.weight!r}" for m in members)
        object.__setattr__(self, "version", xxhash.xxh3_128_hexdigest(text.encode()))
        object.__setattr__(self, "_names", tuple(member.id.encode() + b"\0" for member in members))
        object.__setattr__(self, "_equal", len({member.weight for member in members}) == 1)

    def owners(self, home: bytes, count: int = 1) -> tuple[int, ...]:
        """Positions in `members` of the `count` owners of `home`, best first (weighted rendezvous hashing).

        A member that leaves moves only what it owned; one that joins takes only what it will own.
        """
        if len(self.members) == 1:
            return (0,)
        digest = xxhash.xxh3_64_intdigest
        draws = [digest(name + home) for name in self._names]
        if self._equal:  # the score below grows with the draw
            if count == 1:
                return (draws.index(max(draws)),)
            return tuple(sorted(range(len(draws)), key=draws.__getitem__, reverse=True)[:count])
        scores = []
        for position, number in enumerate(draws):
            draw = (number + 1) / (_TWO_64 + 1)
            scores.append((-self.members[position].weight / math.log(draw) if draw < 1 else math.inf, position))
        scores.sort(reverse=True)
        return tuple(position for _, position in scores[:count])

    def group(self, homes: Iterable[bytes]) -> dict[int, Sequence[int]]:
        """Positions of the given homes, by owning member; order within an owner is kept."""
        if len(self.members) == 1:
            return {0: range(len(list(homes)))}
        groups: dict[int, list[int]] = {}
        owner_of: dict[bytes, int] = {}
        for position, home in enumerate(homes):
            owner = owner_of.get(home)
            if owner is None:
                owner = owner_of[home] = self.owners(home)[0]
            groups.setdefault(owner, []).append(position)
        return dict(groups)
