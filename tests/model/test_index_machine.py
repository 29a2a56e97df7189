"""The index against a plain-dict model: every answer, and that no two values ever share a byte.

The model does not say which entry leaves; it checks that what left was allowed to, and that nothing is refused while
something could leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES

UNIT = 64
LEASE_S = 10.0
TENANTS = st.integers(0, 1)
KEYS = st.integers(1, 7).map(lambda n: bytes([n]) * 32)
PARENTS = st.integers(0, 7).map(lambda n: bytes([n]) * 32)
NO_PARENT = bytes(32)
Name = tuple[int, bytes]


@dataclass
class Entry:
    """A stored or reserved value; as an object it goes on existing under a lease after it is deleted."""

    name: Name
    parent: Name | None
    offset: int
    nbytes: int
    header: tuple[int, bytes] = (0, b"")
    expires_at: float = math.inf

    def end(self) -> int:
        return self.offset + -(-self.nbytes // UNIT) * UNIT


@dataclass
class Claim:
    """A reservation."""

    entry: Entry
    expires_at: float
    writers: int = 0
    aborted: bool = False


@dataclass
class Lease:
    tenant: int
    expires_at: float
    entries: list[Entry] = field(default_factory=list)


class IndexMachine(RuleBasedStateMachine):
    index: Index

    @initialize(
        units=st.integers(1, 40),
        max_entries=st.sampled_from([2, 3, 5, 9, 16, 16]),
        cap=st.sampled_from([None, 4 * UNIT, 12 * UNIT]),
        seed=st.integers(0, 3),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def build(self, units: int, max_entries: int, cap: int | None, seed: int, policy: str) -> None:
        self.capacity, self.max_entries = units * UNIT, max_entries
        self.cap = self.capacity if cap is None else cap
        self.index = Index(
            capacity_bytes=self.capacity,
            max_entries=max_entries,
            seed=seed,
            lease_s=LEASE_S,
            max_pinned_bytes=cap,
            policy=POLICIES[policy],
        )
        self.now = 0.0
        self.ids = 0
        self.live: dict[Name, Entry] = {}
        self.claims: dict[int, Claim] = {}
        self.leases: dict[int, Lease] = {}
        self.evictions = 0

    # The model

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    def family(self) -> dict[Name, Entry]:
        """Stored and being written."""
        return self.live | {claim.entry.name: claim.entry for claim in self.claims.values()}

    def leased(self, tenant: int | None = None) -> dict[int, Entry]:
        leases = [lease for lease in self.leases.values() if tenant in (None, lease.tenant)]
        return {id(entry): entry for lease in leases for entry in lease.entries}

    def expire(self) -> None:
        self.leases = {i: lease for i, lease in self.leases.items() if lease.expires_at > self.now}
        self.claims = {i: c for i, c in self.claims.items() if c.expires_at > self.now or c.writers}

    def hit(self, name: Name) -> Entry | None:
        """Looks up as the index must: an entry past its time is removed."""
        entry = self.live.get(name)
        if entry is not None and entry.expires_at <= self.now:
            del self.live[name]
            return None
        return entry

    def held(self, tenant: int) -> int:
        claimed = {id(c.entry): c.entry for c in self.claims.values() if c.entry.name[0] == tenant}
        return sum(entry.end() - entry.offset for entry in (self.leased(tenant) | claimed).values())

    def occupied(self) -> list[Entry]:
        """Every value whose bytes must not change now."""
        return list({id(entry): entry for entry in [*self.family().values(), *self.leased().values()]}.values())

    def largest_gap(self) -> int:
        gaps, end = [0], 0
        for entry in sorted(self.occupied(), key=lambda entry: entry.offset):
            assert entry.offset >= end, f"{entry} overlaps another value"
            gaps.append(entry.offset - end)
            end = entry.end()
        assert end <= self.capacity
        return max(*gaps, self.capacity - end)

    def evictable(self, newcomer_parent: Name | None) -> list[Name]:
        parents = {newcomer_parent} | {entry.parent for entry in self.family().values()}
        leased = self.leased()
        return [name for name, entry in self.live.items() if name not in parents and id(entry) not in leased]

    def rows(self) -> int:
        family = self.family()
        return len(family.keys() | {entry.parent for entry in family.values() if entry.parent})

    def in_ring(self, name: Name, parent: Name | None) -> bool:
        family = self.family()
        while parent is not None and parent != name:
            parent = family[parent].parent if parent in family else None
        return parent == name

    def observe_evictions(self, newcomer_parent: Name | None) -> None:
        """Takes over what the index evicted, and checks that each could leave once those after it had."""
        # Before all time nothing has expired: presence alone.
        gone = {n for n in self.live if not self.index.contains(n[0], [n[1]], -math.inf)[0]}
        while gone:
            leaving = gone.intersection(self.evictable(newcomer_parent))
            assert leaving, f"{gone} left before their children, or under a lease"
            for name in leaving:
                del self.live[name]
            gone -= leaving
            self.evictions += len(leaving)

    # The operations

    @rule(tenant=TENANTS, keys=st.lists(KEYS, max_size=5), prefix=st.booleans())
    def contains(self, tenant: int, keys: list[bytes], prefix: bool) -> None:
        want = []
        for key in keys:
            want.append(self.hit((tenant, key)) is not None)
            if prefix and not want[-1]:
                want.pop()
                break
        assert self.index.contains(tenant, keys, self.now, prefix=prefix) == want

    @rule(
        tenant=TENANTS,
        keys=st.lists(KEYS, max_size=5),
        prefix=st.booleans(),
        max_nbytes=st.none() | st.integers(0, 12 * UNIT),
        lasting=st.booleans(),
    )
    def acquire(self, tenant: int, keys: list[bytes], prefix: bool, max_nbytes: int | None, lasting: bool) -> None:
        lease_id = self.new_id()
        self.expire()
        entries: list[Entry] = []
        want: list[Found | Unpinned | None] = []
        for key in keys:
            entry = self.hit((tenant, key))
            if entry is None:
                if prefix:
                    break
                want.append(None)
                continue
            taken = [*entries, entry]
            self.leases[lease_id] = Lease(tenant, self.now + LEASE_S, taken)
            too_many = max_nbytes is not None and sum(one.nbytes for one in taken) > max_nbytes and len(taken) > 1
            if Unpinned.LATER in want or too_many or self.held(tenant) > self.cap:
                want.append(Unpinned.LATER)
                if prefix:
                    break
            else:
                entries = taken
                want.append(Found(entry.offset, entry.nbytes, *entry.header))
        self.leases.pop(lease_id, None)
        if entries:
            self.leases[lease_id] = Lease(tenant, math.inf if lasting else self.now + LEASE_S, entries)
        got = self.index.acquire(
            tenant, keys, lease_id=lease_id, now=self.now, prefix=prefix, max_nbytes=max_nbytes, lasting=lasting
        )
        assert got == want

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), tenant=TENANTS)
    def release(self, data: st.DataObject, tenant: int) -> None:
        lease_id = data.draw(st.sampled_from([*self.leases, self.ids]))
        lease = self.leases.get(lease_id)
        held = lease is not None and lease.tenant == tenant and lease.expires_at > self.now
        if lease is not None and lease.tenant == tenant:
            del self.leases[lease_id]
        assert self.index.release(tenant, lease_id, self.now) == held
        assert not self.index.release(tenant, lease_id, self.now)

    @rule(tenant=TENANTS, key=KEYS, parent=PARENTS, nbytes=st.integers(1, 8 * UNIT), write=st.booleans())
    def reserve(self, tenant: int, key: bytes, parent: bytes, nbytes: int, write: bool) -> None:
        name = (tenant, key)
        if self.max_entries < 16 and parent >= key:  # rings of parents only where rows cannot run out
            parent = NO_PARENT
        above = (tenant, parent) if parent not in (NO_PARENT, key) else None
        reservation_id = self.new_id()
        self.expire()
        present = self.hit(name)
        busy = name in self.family() and present is None
        if self.in_ring(name, above):
            above = None
        scarce = self.max_entries - self.rows() < 2
        before, held = self.held(tenant), self.held(0) + self.held(1)
        size = -(-nbytes // UNIT) * UNIT
        got = self.index.reserve(tenant, key, parent, nbytes, reservation_id=reservation_id, now=self.now)
        if present is not None:
            assert got is Refusal.PRESENT
        elif busy:
            assert got is Refusal.BUSY
        elif nbytes > self.capacity or size > self.cap:
            assert got is Refusal.TOO_LARGE
        elif before + size > self.cap or held + size > self.capacity:
            assert got is Refusal.FULL
        else:
            self.observe_evictions(None if scarce else above)
            if got is Refusal.NO_ENTRIES:
                assert not self.evictable(None)
                assert self.rows() + 2 > self.max_entries
            elif got is Refusal.FULL:
                assert not self.evictable(above)
                assert self.largest_gap() < size or len(self.occupied()) == self.max_entries
            else:
                assert isinstance(got, Reserved)
                entry = Entry(name, above, got.offset, nbytes)
                self.claims[reservation_id] = Claim(entry, self.now + LEASE_S)
                if write:
                    self.commit(reservation_id, None)

    def some_claim(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from([*self.claims, self.ids]))

    @rule(data=st.data())
    def begin_write(self, data: st.DataObject) -> None:
        reservation_id = self.some_claim(data)
        claim = self.claims.get(reservation_id)
        going_on = claim is not None and not claim.aborted
        assert self.index.begin_write(reservation_id, self.now) == going_on
        if claim is not None and going_on:
            claim.writers += 1
            claim.expires_at = self.now + LEASE_S

    @rule(data=st.data())
    def end_write(self, data: st.DataObject) -> None:
        reservation_id = self.some_claim(data)
        claim = self.claims.get(reservation_id)
        self.index.end_write(reservation_id)
        if claim is not None:
            claim.writers = max(claim.writers - 1, 0)
            if claim.aborted and not claim.writers:
                del self.claims[reservation_id]

    @rule(data=st.data(), ttl_s=st.sampled_from([None, None, 0.0, 3.0, 12.0]))
    def commit_some(self, data: st.DataObject, ttl_s: float | None) -> None:
        self.commit(self.some_claim(data), ttl_s)

    def commit(self, reservation_id: int, ttl_s: float | None) -> None:
        expires_at = math.inf if ttl_s is None else self.now + ttl_s
        header = (reservation_id, reservation_id.to_bytes(16, "little"))
        claim = self.claims.get(reservation_id)
        committable = claim is not None and not claim.writers
        stored = committable and expires_at > self.now
        assert stored == self.index.commit(
            reservation_id, header_nbytes=header[0], header_sum=header[1], expires_at=expires_at, now=self.now
        )
        if claim is not None and committable:
            del self.claims[reservation_id]
            if stored:
                claim.entry.header, claim.entry.expires_at = header, expires_at
                self.live[claim.entry.name] = claim.entry

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        reservation_id = self.some_claim(data)
        self.index.abort(reservation_id)
        self.index.abort(reservation_id)
        claim = self.claims.get(reservation_id)
        if claim is not None and claim.writers:
            claim.aborted = True
        elif claim is not None:
            del self.claims[reservation_id]

    @rule(tenant=TENANTS, keys=st.lists(KEYS, max_size=3))
    def delete(self, tenant: int, keys: list[bytes]) -> None:
        want = []
        for key in keys:
            want.append(self.hit((tenant, key)) is not None)
            self.live.pop((tenant, key), None)
        assert self.index.delete(tenant, keys, self.now) == want

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire_now(self) -> None:
        self.expire()
        self.index.expire(self.now)

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        stats = self.index.stats()
        assert stats.entries == len(self.live)
        assert stats.reservations == len(self.claims)
        assert stats.evictions == self.evictions
        assert stats.leases == len(self.leases)
        assert stats.held_bytes == self.held(0) + self.held(1)
        assert stats.bytes_used == sum(entry.end() - entry.offset for entry in self.occupied())
        assert self.rows() == stats.entries + stats.reservations + stats.ghosts <= self.max_entries
        self.largest_gap()


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
