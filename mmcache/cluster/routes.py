"""Where a call goes: for each key who is to store it, who is asked for it, and in which order. Pure.

A `Router` knows what one client knows: the view and the one before it, which shards may be emptier than they should be,
which runs are hot, and the forks it heard of. Two routers that know different things ask different shards: a miss at
worst, as keys name contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import xxhash

from mmcache.cluster.heat import Heat
from mmcache.cluster.homes import Columns, Forks
from mmcache.cluster.placement import View
from mmcache.errors import ConfigError

MAX_REPLICAS: Final = 16
RAMP_S: Final = 300.0  # how long a shard that has joined, or was away, may lack what others have
FORMER_VIEWS: Final = 2
MAX_KNOWN_OWNERS: Final = 65_536
KINDS: Final = ("kv", "embedding", "prompt", "latent")
_REPLICAS_HELP: Final = (
    "give a count, and others for kinds or for namespaces by the first digits of their ids: 1,embedding:2,0a1b2c3d:3"
)


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many owners store a value: by namespace, else by kind, else `default`."""

    default: int = 1
    of: Mapping[str, int] = field(default_factory=dict)  # a kind, or the first 8 hex digits or more of a namespace's id

    def __post_init__(self) -> None:
        for name, count in (("", self.default), *self.of.items()):
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_REPLICAS:
                raise ConfigError(f"replicas={name}{':' if name else ''}{count}: give 1 to {MAX_REPLICAS}")
            if name and name not in KINDS and not re.fullmatch(r"[0-9a-f]{8,64}", name):
                raise ConfigError(f"replicas: {name!r} is no kind and no namespace's id; {_REPLICAS_HELP}")

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """From "2" or "1,embedding:2,0a1b2c3d:3". Raises ConfigError."""
        default, of = 1, {}
        for word in text.split(","):
            name, _, count = word.strip().rpartition(":")
            if not count.isdecimal():
                raise ConfigError(f"replicas={text!r}: {word!r} has no count; {_REPLICAS_HELP}")
            if name in of or (not name and word != text.split(",")[0]):
                raise ConfigError(f"replicas={text!r} says {name or 'the count of all'} twice; {_REPLICAS_HELP}")
            if name:
                of[name] = int(count)
            else:
                default = int(count)
        return cls(default, of)

    @property
    def most(self) -> int:
        """The largest of them."""
        return max(self.default, *self.of.values()) if self.of else self.default

    def count(self, namespace: bytes) -> int:
        """For one namespace's id; its kind counts where the id knows it, as those of `Namespace` do."""
        if not self.of:
            return self.default
        digits = namespace.hex()
        for name, count in self.of.items():
            if digits.startswith(name):
                return count
        return self.of.get(getattr(namespace, "kind", ""), self.default)


class Route(NamedTuple):
    """Members by id. `owners` store it; `reads` are asked, one after the other, until one has it; `spares` after them,
    if one of `reads` could not be asked."""

    owners: tuple[str, ...]
    reads: tuple[str, ...]
    spares: tuple[str, ...]


class Router:
    """What one client knows of its cluster. Not thread-safe. `draw`, any number, makes clients choose among equals
    differently. Raises ConfigError for more replicas than the view has members."""

    def __init__(self, view: View, replicas: Replicas, draw: int, now: float, ramp_s: float = RAMP_S) -> None:
        self.view, self.replicas = view, replicas
        if replicas.most > len(view.members):
            raise ConfigError(
                f"replicas={replicas.most} needs as many shards, and there are {len(view.members)}: "
                "start more of them, or ask for fewer replicas"
            )
        self._draw, self._ramp_s = draw, ramp_s
        self.forks, self.heat = Forks(), Heat()
        self._formers: list[tuple[View, float]] = []
        self._ids = frozenset(member.id for member in view.members)
        # Until then they may lack what their replicas have: a client that just began knows of none that they do not.
        self._unsettled = dict.fromkeys(self._ids, now + ramp_s) if replicas.most > 1 else {}
        self._owners: dict[tuple[bytes, int], tuple[str, ...]] = {}

    @property
    def ids(self) -> frozenset[str]:
        """The members' ids."""
        return self._ids

    def take(self, view: View, now: float) -> None:
        """From now on this is the view. The one before it is remembered: who owned a run then may still have it."""
        former = [kept for kept in self._formers if kept[1] > now and kept[0].version != view.version]
        self._formers = [(self.view, now + self._ramp_s), *former][:FORMER_VIEWS]
        before, self.view = self._ids, view
        self._ids = frozenset(member.id for member in view.members)
        self._unsettled = {name: until for name, until in self._unsettled.items() if name in self._ids}
        self._unsettled |= dict.fromkeys(self._ids - before, now + self._ramp_s)
        self._owners.clear()

    def failed(self, member: str, now: float) -> None:
        """It could not be asked: when it is back, it lacks what was stored meanwhile, and perhaps everything."""
        if member in self._ids:
            self._unsettled[member] = now + self._ramp_s

    def routes(self, rows: Columns, now: float, *, counts: bool = False) -> list[Route]:
        """One a row. Rows of one run share one object. `counts`: this is a read, of which hot runs are told."""
        homes = self.forks.homes(rows, now)
        if counts:
            self.heat.note(homes)
        made: dict[tuple[bytes, bytes, bytes], Route] = {}
        routes: list[Route] = []
        last = None
        for names in zip(homes, rows.homes, rows.namespaces, strict=True):
            if names != last:
                route = made.get(names) or made.setdefault(names, self._route(*names, now))
                last = names
            routes.append(route)
        return routes

    def _route(self, home: bytes, run: bytes, namespace: bytes, now: float) -> Route:
        count = min(self.replicas.count(namespace), len(self.view.members))
        owners = self.owners(home, count)
        first, others = owners[:1], owners[1:]
        reads: list[str] = []
        copies = self.heat.copies(home, len(self.view.members))
        if copies > count:
            hot = self.owners(home, copies)
            reads.append(hot[xxhash.xxh3_64_intdigest(home, self._draw & 0xFFFFFFFFFFFFFFFF) % copies])
        reads += first
        spares = list(others)
        if self._unsettled.get(owners[0], 0.0) > now:
            reads += others
        places = [home]
        if home != run and self.forks.since(home) + self._ramp_s > now:  # stored before its writer heard of the fork
            places.append(run)
            before, *replicas = self.owners(run, count)
            reads.append(before)
            spares += replicas
        for view, until in self._formers:
            if until > now:
                formers = [self._owned(view, place, 1)[0] for place in places]
                reads += [name for name in formers if name in self._ids]
        unique = tuple(dict.fromkeys(reads))
        return Route(owners, unique, tuple(name for name in dict.fromkeys(spares) if name not in unique))

    def owners(self, home: bytes, count: int) -> tuple[str, ...]:
        """The ids of the `count` owners of a home, best first."""
        known = self._owners.get((home, count))
        if known is None:
            if len(self._owners) >= MAX_KNOWN_OWNERS:
                self._owners.clear()
            known = self._owners[home, count] = self._owned(self.view, home, count)
        return known

    def _owned(self, view: View, home: bytes, count: int) -> tuple[str, ...]:
        return tuple(view.members[position].id for position in view.owners(home, count))


def by_member(wanted: Iterable[tuple[int, Iterable[str]]]) -> dict[str, list[int]]:
    """Rows with the members that each goes to, the other way round."""
    groups: dict[str, list[int]] = {}
    for row, members in wanted:
        for member in members:
            groups.setdefault(member, []).append(row)
    return groups
