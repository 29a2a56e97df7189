"""One shard: the real index over an arena of cells, the shell round it, and a record of claims kept beside the index.

The record knows only what was promised: each place that a reader was told under a lease, until when, and each place
that a writer was given. Whatever the index hands out is compared with it.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from mmcache.errors import StoreError
from mmcache.store.answers import Found, Refusal, Reserved
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES
from mmcache.store.restore import restore
from mmcache.store.rows import LIVE
from mmcache.store.table import tenant_prefix
from mmcache.testing.simulator.values import CELL_NBYTES, HEADER_NBYTES, Values, checksum
from mmcache.testing.simulator.world import CAPACITY, INTEGRITY, KEPT, REUSED, WRONG, Violation, World

TENANT: Final = 0
ROOM_TRIES: Final = 64  # as Shard's


class Taken(NamedTuple):
    """What an acquire told: the lease (0: none), where each key lies, and the memory that these places are in."""

    lease_id: int
    places: list[Found | None]
    cells: array[int]


@dataclass
class Claim:
    """A writer's place, until when it is his, and whether he is writing there."""

    digest: bytes
    first: int
    count: int
    expires_at: float
    is_writing: bool = False


@dataclass
class Record:
    """What was promised in one life of a shard: how many leases are on each cell, and writers' places."""

    pins: list[int]
    leases: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    expiries: list[tuple[float, int]] = field(default_factory=list)
    writers: dict[int, Claim] = field(default_factory=dict)

    def expire(self, now: float) -> None:
        """Forget leases that have ended by themselves."""
        while self.expiries and self.expiries[0][0] <= now:
            self.release(heapq.heappop(self.expiries)[1])

    def release(self, lease_id: int) -> None:
        """Forget a lease."""
        for first, count in self.leases.pop(lease_id, ()):
            for cell in range(first, first + count):
                self.pins[cell] -= 1

    def lease(self, lease_id: int, places: Sequence[Found], until: float) -> None:
        """These places stay as they are until then."""
        spans = [(place.offset // CELL_NBYTES, -(-place.nbytes // CELL_NBYTES)) for place in places]
        self.leases[lease_id] = spans
        heapq.heappush(self.expiries, (until, lease_id))
        for first, count in spans:
            for cell in range(first, first + count):
                self.pins[cell] += 1


class Node:
    """A shard that may be killed, stopped and started. `cells` is its arena, which outlives a warm restart."""

    def __init__(
        self, world: World, values: Values, name: str, *, cells: int, entries: int, lease_s: float, policy: str
    ) -> None:
        self.world, self.values, self.name = world, values, name
        self.capacity, self.entries, self.lease_s, self.policy = cells, entries, lease_s, policy
        self.life = 0
        self.up = False
        self.stopped_until = 0.0
        self.start(warm=False)

    # ------------------------------------------------------------------ lives

    def start(self, *, warm: bool) -> None:
        """Begin a life: with what the last one left in memory that outlives it, or with nothing."""
        before = self._known() if warm else (set(), set())
        if not warm:
            self.cells = array("q", [0]) * self.capacity
            self._columns: list[bytearray] = []
        self._taken = 0
        self.index = Index(
            capacity_bytes=self.capacity * CELL_NBYTES,
            max_entries=self.entries,
            seed=self.world.random.getrandbits(64),
            lease_s=self.lease_s,
            policy=POLICIES[self.policy],
            kept=self._kept,
        )
        if warm:
            restore(self.index, TENANT + 1, frozenset())
            self._check_kept(*before)
        self.record = Record([0] * self.capacity)
        self.life += 1
        self.up = True
        self.stopped_until = 0.0
        self.world.say(self.name, "starts", "warm" if warm else "empty", self.index.rows.live, "entries")

    def kill(self) -> None:
        """The process ends, between two events."""
        self.up = False
        self.world.say(self.name, "is killed")

    def _known(self) -> tuple[set[bytes], set[bytes]]:
        """The keys that are stored, and those that are forks."""
        rows = self.index.rows
        stored = {rows.table.name(row)[4:] for row in range(self.entries) if rows.state[row] == LIVE}
        return stored, set(rows.forks.get(tenant_prefix(TENANT), ()))

    def _check_kept(self, stored: set[bytes], forks: set[bytes]) -> None:
        """All that was stored is, and what was a fork is one if it is the name of anything that is stored, or of a
        parent."""
        table, (stored_now, forks_now) = self.index.rows.table, self._known()
        lost = {key for key in forks - forks_now if table.find(tenant_prefix(TENANT), key) >= 0}
        if stored != stored_now or lost:
            missing = [key.hex()[:8] for key in stored - stored_now]
            raise Violation(KEPT, f"{self.name} lost {missing} and the forks {[key.hex()[:8] for key in lost]}")

    def _kept(self, nbytes: int) -> memoryview:
        if self._taken == len(self._columns):
            self._columns.append(bytearray(nbytes))
        column = self._columns[self._taken]
        if len(column) != nbytes:
            raise StoreError("the columns of another life have other sizes")
        self._taken += 1
        return memoryview(column)

    # ------------------------------------------------------------------ messages

    def receive(
        self, client: str, reply: Callable[..., None], operation: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        """A request. A process that is stopped hears it when it goes on; to one that is dead no connection is made."""
        world = self.world
        if not self.up:
            world.send(client, self.name, reply, None)
        elif self.stopped_until > world.now:
            world.at(self.stopped_until, self.receive, client, reply, operation, arguments)
        else:
            operation(self, client, reply, *arguments)

    def _forks(self, digests: Sequence[bytes]) -> set[bytes]:
        return self.index.forks(TENANT, digests)

    def count(self, client: str, reply: Callable[..., None], digests: Sequence[bytes]) -> None:
        """How many leading keys are stored."""
        found = self.index.contains(TENANT, digests, self.world.now, prefix=True)
        self.world.send(client, self.name, reply, sum(found), self._forks(digests))

    def take(self, client: str, reply: Callable[..., None], digests: Sequence[bytes]) -> None:
        """Where these keys lie, under a lease."""
        world, lease_id = self.world, self.world.random.getrandbits(63) + 1
        found = self.index.acquire(TENANT, digests, lease_id=lease_id, now=world.now)
        places = [place if isinstance(place, Found) else None for place in found]
        told = [place for place in places if place is not None]
        self.record.expire(world.now)
        if told:
            self.record.lease(lease_id, told, world.now + self.lease_s)
        for digest, place in zip(digests, places, strict=True):
            if place is not None:
                self._check_place(place.offset, place.nbytes)
                if self.values.at(self.cells, place) != digest:
                    raise Violation(WRONG, f"{self.name} has other bytes where {digest.hex()[:8]} should be")
        taken = Taken(lease_id if told else 0, places, self.cells)
        world.send(client, self.name, reply, taken, self._forks(digests))

    def release(self, client: str, reply: Callable[..., None], lease_id: int) -> None:
        """Give a lease back; whether it was held until now."""
        held = self.index.release(TENANT, lease_id, self.world.now)
        self.record.release(lease_id)
        self.world.send(client, self.name, reply, held, frozenset())

    def store(
        self, client: str, reply: Callable[..., None], pairs: Sequence[tuple[bytes, bytes]], is_lost: bool
    ) -> None:
        """Room for keys (with their parents), then their bytes, in two pieces. `is_lost`: the writer goes away between
        them."""
        answers: list[Refusal | bool] = []
        wanted: list[int] = []
        for digest, parent in pairs:
            place = self._reserve(digest, parent)
            answers.append(place if isinstance(place, Refusal) else False)
            if not isinstance(place, Refusal):
                wanted.append(place)
        self.world.after(
            self.world.latency_s(), self._land, self.life, client, reply, pairs, answers, wanted, is_lost, True
        )

    # ------------------------------------------------------------------ the shell round the index

    def _reserve(self, digest: bytes, parent: bytes) -> Refusal | int:
        world, index, nbytes = self.world, self.index, self.values.nbytes(digest)
        reservation_id = world.random.getrandbits(63) + 1
        answer: Reserved | Refusal = Refusal.AGAIN
        for _ in range(ROOM_TRIES):
            answer = index.reserve(TENANT, digest, parent, nbytes, reservation_id=reservation_id, now=world.now, kind=1)
            if answer is not Refusal.AGAIN:
                break
        if isinstance(answer, Refusal):
            return answer
        self._check_place(answer.offset, nbytes)
        first, count = answer.offset // CELL_NBYTES, self.values.cells(digest)
        self._check_unclaimed(digest, first, count)
        self.record.writers[reservation_id] = Claim(digest, first, count, world.now + self.lease_s)
        return reservation_id

    def _check_place(self, offset: int, nbytes: int) -> None:
        if offset < 0 or offset % CELL_NBYTES or offset + nbytes > self.capacity * CELL_NBYTES:
            raise Violation(CAPACITY, f"{self.name} gave {nbytes} bytes at {offset}")

    def _check_unclaimed(self, digest: bytes, first: int, count: int) -> None:
        """A place that is handed out anew: nobody may read there, and nobody may write."""
        record, now = self.record, self.world.now
        record.expire(now)
        if any(record.pins[first : first + count]):
            raise Violation(REUSED, f"{self.name} gave leased cells {first}+{count} to {digest.hex()[:8]}")
        for reservation_id, claim in list(record.writers.items()):
            if claim.first < first + count and first < claim.first + claim.count:
                if claim.is_writing or claim.expires_at > now:
                    raise Violation(REUSED, f"{self.name} gave cells {first}+{count} to two writers")
                del record.writers[reservation_id]

    def _land(
        self,
        life: int,
        client: str,
        reply: Callable[..., None],
        pairs: Sequence[tuple[bytes, bytes]],
        answers: list[Refusal | bool],
        wanted: list[int],
        is_lost: bool,
        begins: bool,
    ) -> None:
        """One half of the bytes arrives; with the second, values are complete."""
        world = self.world
        if life != self.life or not self.up:
            return
        if self.stopped_until > world.now:
            world.at(self.stopped_until, self._land, life, client, reply, pairs, answers, wanted, is_lost, begins)
            return
        if begins:
            begun = self._begin(wanted)
            world.after(world.latency_s(), self._land, life, client, reply, pairs, answers, begun, is_lost, False)
            return
        if is_lost:  # the connection ends, and with it what was begun
            for reservation_id in filter(None, wanted):
                self.index.end_write(reservation_id)
                self.index.abort(reservation_id)
                self.record.writers.pop(reservation_id, None)
            return
        done = iter([self._finish(reservation_id) for reservation_id in wanted])
        said = [answer if isinstance(answer, Refusal) else next(done) for answer in answers]
        world.send(client, self.name, reply, said, self._forks([digest for pair in pairs for digest in pair]))

    def _begin(self, wanted: Sequence[int]) -> list[int]:
        """Write the first half of each; 0 in place of those whose place is not theirs any more."""
        begun = []
        for reservation_id in wanted:
            is_theirs = self.index.begin_write(reservation_id, self.world.now)
            claim = self.record.writers.get(reservation_id)
            if is_theirs and claim is None:
                raise Violation(REUSED, f"{self.name} lets a writer go on whose place it gave away")
            if is_theirs and claim is not None:
                claim.is_writing, claim.expires_at = True, self.world.now + self.lease_s
                self._write(claim, range(claim.count // 2))
            begun.append(reservation_id if is_theirs else 0)
        return begun

    def _write(self, claim: Claim, pieces: range) -> None:
        content = self.values.content(claim.digest)
        for piece in pieces:
            self.cells[claim.first + piece] = content[piece]

    def _finish(self, reservation_id: int) -> bool:
        """Write the rest, and make it visible."""
        if not reservation_id:
            return False
        claim = self.record.writers[reservation_id]
        self._write(claim, range(claim.count // 2, claim.count))
        claim.is_writing = False
        self.index.end_write(reservation_id)
        return self._commit(reservation_id)

    def _commit(self, reservation_id: int) -> bool:
        claim = self.record.writers.pop(reservation_id)
        return self.index.commit(
            reservation_id,
            header_nbytes=HEADER_NBYTES,
            header_sum=checksum(claim.digest),
            expires_at=math.inf,
            now=self.world.now,
        )

    # ------------------------------------------------------------------ looking at it from outside

    def has(self, digest: bytes) -> bool:
        """Whether it would answer that it has this key."""
        return self.up and self.index.contains(TENANT, [digest], self.world.now)[0]

    def audit(self) -> None:
        """Whether all that the index knows agrees, and is within its limits."""
        stats = self.index.stats()
        if stats.bytes_used > self.capacity * CELL_NBYTES or stats.entries > self.entries:
            raise Violation(CAPACITY, f"{self.name}: {stats}")
        try:
            self.index.check_integrity()
        except AssertionError as error:
            raise Violation(INTEGRITY, f"{self.name}: {error}") from error
