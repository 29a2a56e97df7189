"""What a shard holds and how it ends: rows, their extents, claims on them, and the accounts that must agree.

The index (index.py) decides; here entries and claims end, so that whatever ends one leaves every account right. PURE:
no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Set

from mmcache.errors import StoreError
from mmcache.store.answers import IndexStats
from mmcache.store.columns import NIL, Memory, column32, heap
from mmcache.store.extents import Extents
from mmcache.store.history import History
from mmcache.store.integrity import check
from mmcache.store.leases import Lease, Leases, Reservation, Reservations
from mmcache.store.policy import LRU, Factory
from mmcache.store.rows import RECORD, Rows
from mmcache.store.table import tenant_of, tenant_prefix
from mmcache.store.usage import Usage
from mmcache.why import Why

MAX_HISTORY_KEYS = 65_536
EXPIRE_PINS = 4096
EXPIRE_CLAIMS = 256


class Ledger:
    """See Index, whose state this is. `rows`, `usage` and `history` may be read by anyone.

    `history_keys`: how many keys that left or were refused are remembered; None: one for 8 entries, 65,536 at most.
    `unreadable` holds numbers of namespaces whose entries are misses, `usage.quotas` what tenants may have; both may
    be replaced at any time. `kept`: memory for the columns that outlive the process, where that is wanted; see Rows.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        max_entries: int,
        alignment: int = 64,
        seed: int,
        lease_s: float = 30.0,
        max_pinned_bytes: int | None = None,
        policy: Factory = LRU,
        history_keys: int | None = None,
        memory: Memory = heap,
        kept: Memory = heap,
    ) -> None:
        if not 2 <= max_entries < 1 << 30:
            raise StoreError(f"max_entries is {max_entries}; give 2 to 2**30 - 1")
        self._lease_s = lease_s
        self._extents = Extents(capacity_bytes, alignment, max_entries, memory)
        self._max_held = self._extents.capacity_bytes if max_pinned_bytes is None else max_pinned_bytes
        self.rows = Rows(max_entries, seed, policy, memory, kept)
        self._pins = column32(memory, 2 * max_entries + 1)  # how many leases pin it, by extent node
        self._leases = Leases()
        self._reservations = Reservations()
        self._held: dict[int, int] = {}  # bytes pinned and reserved, by tenant
        self.usage = Usage()
        self.history = History(history_keys or min(MAX_HISTORY_KEYS, max(8, max_entries // 8)), seed, memory)
        self.unreadable: Set[int] = frozenset()
        self._latest = 0.0  # the last `now` that was told
        self._evictions = 0
        self._expired_entries = 0
        self._expired_leases = 0
        self._expired_reservations = 0
        self._refused_pins = 0

    # Time

    def expire(self, now: float) -> bool:
        """Drops expired leases and reservations, oldest first, up to the limits of one call; whether there were any.
        `acquire` and `reserve` begin with this, but an idle index holds memory until somebody calls it."""
        self._latest = now
        pins = claims = 0
        while pins < EXPIRE_PINS and claims < EXPIRE_CLAIMS:
            lease = self._leases.take_expired(now)
            reservation = self._reservations.take_expired(now)
            if lease is None and reservation is None:
                break
            claims += 1
            if lease is not None:
                self._expired_leases += 1
                pins += self._unpin(lease)
            if reservation is not None:
                self._expired_reservations += 1
                self._cancel(reservation)
        return claims > 0

    def drop(self, row: int, why: Why, now: float) -> None:
        """Ends a LIVE row. Its extent is freed now, or with its last pin."""
        rows, node = self.rows, self.rows.node[row]
        nbytes: int = RECORD.unpack_from(rows.records, row * RECORD.size)[1]
        name = rows.table.name(row)
        self.usage.by_kind[rows.kind[row]] -= nbytes
        self.usage.free(tenant_of(name), rows.namespace[row], nbytes)
        self.history.note(name, why, now)
        rows.vacate(row, evicted=why is Why.EVICTED)
        rows.node[row] = NIL
        if not self._pins[node]:
            self._extents.free(node)

    def note(self, tenant: int, key: bytes, why: Why, now: float, detail: int = 0) -> None:
        """Remember what became of a key that is not stored."""
        self.history.note(tenant_prefix(tenant) + key, why, now, detail)

    def _expire_entry(self, row: int, now: float) -> None:
        self.drop(row, Why.TTL_PASSED, now)
        self._expired_entries += 1

    def _unpin(self, lease: Lease) -> int:
        """Ends a lease already taken from the table; the number of its pins."""
        rows, pins, count, freed_bytes = self.rows, self._pins, 0, 0
        # The order of acquire's touches, so that rows set aside meanwhile come back parents last.
        for row, node in lease.pairs():
            count += 1
            pins[node] -= 1
            if not pins[node]:
                freed_bytes += self._extents.size_bytes[node]
                if rows.node[row] != node:
                    self._extents.free(node)
                elif not rows.children[row]:
                    rows.policy.unshelve(row)
        self._unhold(lease.tenant, freed_bytes)
        return count

    def _cancel(self, reservation: Reservation | None) -> None:
        """Ends a reservation already taken from the table, if one was."""
        if reservation is None:
            return
        rows, row = self.rows, reservation.row
        node = rows.node[row]
        self._unhold(reservation.tenant, self._extents.size_bytes[node])
        nbytes = RECORD.unpack_from(rows.records, row * RECORD.size)[1]
        self.usage.free(reservation.tenant, rows.namespace[row], nbytes)
        self.history.note(rows.table.name(row), Why.TIMED_OUT, self._latest)
        rows.node[row] = NIL
        rows.vacate(row)
        self._extents.free(node)

    def _unhold(self, tenant: int, size: int) -> None:
        held = self._held.pop(tenant, 0) - size
        if held:
            self._held[tenant] = held

    # Looking at it

    def stats(self) -> IndexStats:
        """A snapshot of sizes and counts."""
        return IndexStats(
            entries=self.rows.live,
            ghosts=self.rows.ghosts,
            bytes_used=self._extents.capacity_bytes - self._extents.free_bytes,
            bytes_capacity=self._extents.capacity_bytes,
            largest_free_bytes=self._extents.largest_free_bytes(),
            held_bytes=sum(self._held.values()),
            leases=len(self._leases),
            reservations=len(self._reservations),
            evictions=self._evictions,
            expired_entries=self._expired_entries,
            expired_leases=self._expired_leases,
            expired_reservations=self._expired_reservations,
            refused_pins=self._refused_pins,
        )

    def check_integrity(self) -> None:
        """Walks everything; raises AssertionError saying what is wrong. For tests: O(entries)."""
        check(self.rows, self._extents, self._pins, self._leases, self._reservations, self._held, self.usage)
