"""What a shard holds: which key lies where, who is reading or writing it, and what leaves when memory is short.

Rows (rows.py) name the entries, extents (extents.py) their bytes, leases.py who has a claim on them; here these are
brought together. RESERVED rows, rows with children and rows whose extent a lease pins are never evicted.

Leases pin extents, not rows. When a pinned entry is deleted, its row lets go of the extent at once (the key is a miss
and can be stored again) and the extent is freed with its last pin; an extent is doomed when its row no longer has it.

No call does unbounded work: beyond the keys it was given, a call drops about `ledger.EXPIRE_PINS` expired pins and
evicts `MAKE_ROOM_STEPS` entries at most; what is left waits for the next call. Not thread-safe: callers hold a lock.
`now` is monotonic seconds and never decreases. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

from mmcache.errors import KeyInputError, UsageError
from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from mmcache.store.ledger import Ledger
from mmcache.store.rows import LIVE, RECORD, RESERVED
from mmcache.store.table import KEY_NBYTES, tenant_prefix
from mmcache.store.usage import UNKNOWN
from mmcache.why import Why

HEADER_SUM_NBYTES = 16
ANY_NBYTES = 1 << 62
MAX_CLAIMS = 65_536  # open leases, and open reservations; of leases a tenant has at most as many as are left for others
MAKE_ROOM_STEPS = 256
SCAN_PER_STEP = 16
EXPIRE_STEPS = 128  # what dropping expired claims counts for among the steps of making room

T = TypeVar("T")


class Index(Ledger):
    """Entries, leases and reservations over `capacity_bytes` of arena; decides, and moves no bytes.

    At most `max_entries` rows, ghosts included. Leases and reservations last `lease_s`. `max_pinned_bytes` caps what
    one tenant may have leased and reserved together (None: no cap). `seed` keys the hash table and should be secret.
    Raises StoreError for sizes that cannot work, UsageError for a call that breaks its contract (nothing has changed
    then), and nothing else.
    """

    # Reading

    def contains(self, tenant: int, keys: Sequence[bytes], now: float, *, prefix: bool = False) -> list[bool]:
        """Whether each key is stored; with `prefix`, only the leading hits: the list ends before the first miss.

        Neither pins nor counts as a use.
        """
        state, expires_at, numbers = self.rows.state, self.rows.expires_at, self.rows.namespace
        unreadable = self.unreadable
        rows = self.rows.table.find_all(tenant_prefix(tenant), keys, prefix)
        found: list[bool] = []
        append = found.append
        for row in rows:
            hit = row >= 0 and state[row] == LIVE and not (unreadable and numbers[row] in unreadable)
            if hit and expires_at[row] <= now:
                hit = False
                self._expire_entry(row, now)
            if prefix and not hit:
                break
            append(hit)
        return found

    def acquire(
        self,
        tenant: int,
        keys: Sequence[bytes],
        *,
        lease_id: int,
        now: float,
        prefix: bool = False,
        max_nbytes: int | None = None,
        lasting: bool = False,
        counts: bool = True,
        stopped_too: bool = False,
    ) -> list[Found | Unpinned | None]:
        """Where each stored key lies (None: a miss), pinned under one lease until `release` or `now + lease_s`.

        With `prefix` only the leading hits: the list ends before the first miss. The keys count as used, the first
        one last. From the first key on that would bring the tenant's held bytes over its cap, or, unless it is the
        first to be found, this lease's values over `max_nbytes`, stored keys answer LATER; with `prefix` the list ends
        there. `refused_pins` counts calls the cap cut short. No lease is kept when nothing was pinned. A `lasting`
        lease does not expire: only for a holder that is sure to release it. Without `counts` this is no use of the
        keys, nor a hit. `stopped_too`: also keys whose namespace is unreadable. UsageError when `lease_id` is open.
        """
        if lease_id in self._leases:
            raise UsageError(f"lease id {lease_id} is in use; draw a new one for every acquire")
        self.expire(now)
        rows, pins, sizes = self.rows, self._pins, self._extents.size_bytes
        state, expires_at, nodes, records = rows.state, rows.expires_at, rows.node, rows.records
        unpack, width, new = RECORD.unpack_from, RECORD.size, tuple.__new__
        unreadable, numbers = () if stopped_too else self.unreadable, rows.namespace
        held, limit = self._held.get(tenant, 0), self._max_held
        if self._leases.count(tenant) >= MAX_CLAIMS - len(self._leases):  # no tenant takes the last ones from others
            limit = -1
        found: list[Found | Unpinned | None] = []
        pinned: list[int] = []
        room, later = ANY_NBYTES if max_nbytes is None else max_nbytes, False
        for row in rows.table.find_all(tenant_prefix(tenant), keys, prefix):
            if row >= 0 and state[row] == LIVE and not (unreadable and numbers[row] in unreadable):
                if expires_at[row] > now:
                    place = new(Found, unpack(records, row * width))
                    room -= place[1]
                    if not later and (room >= 0 or not pinned):
                        node = nodes[row]
                        pin_count = pins[node]
                        size = 0 if pin_count else sizes[node]
                        if held + size <= limit:
                            held += size
                            pins[node] = pin_count + 1
                            found.append(place)
                            pinned += row, node
                            continue
                        self._refused_pins += 1
                    later = True
                    found.append(Unpinned.LATER)
                    if prefix:
                        break
                    continue
                self._expire_entry(row, now)
            if prefix:
                break
            found.append(None)
        if pinned:
            self._held[tenant] = held
            until = math.inf if lasting else now + self._lease_s
            self._leases.add(lease_id, tenant, until, array("I", pinned))
            if counts:
                kind, media = rows.kind, rows.media
                rows.policy.note(pinned[-2::-2])
                self.usage.hit(bytes([kind[row] for row in pinned[::2]]), (media[row] for row in pinned[::2]))
        return found

    def forks(self, tenant: int, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys at which many of the tenant's stored values part ways: see Rows."""
        forks = self.rows.forks.get(tenant_prefix(tenant))
        return forks.intersection(keys) if forks else set()

    def release(self, tenant: int, lease_id: int, now: float) -> bool:
        """Ends a lease. True when it was `tenant`'s and had not expired, so that all that was read under it holds;
        a second call answers False. Another tenant's lease is left alone."""
        lease = self._leases.take(tenant, lease_id)
        if lease is None:
            return False
        self._unpin(lease)
        return lease.expires_at > now

    # Writing

    def reserve(
        self,
        tenant: int,
        key: bytes,
        parent: bytes,
        nbytes: int,
        *,
        reservation_id: int,
        now: float,
        kind: int = 0,
        namespace: int = UNKNOWN,
        media: int = 0,
    ) -> Reserved | Refusal:
        """Memory to write a value of `nbytes` >= 1 to, reserved until `commit`, `abort` or `now + lease_s`.

        Evicts what it must; what was evicted stays evicted when the call is refused. PRESENT counts as a use.
        `parent` is the key of the entry this one is useless without; 32 zero bytes, or none at all: there is none.
        UsageError when `reservation_id` is open or a number out of range, KeyInputError for keys that are not 32 bytes.
        """
        if len(key) != KEY_NBYTES or len(parent) not in (0, KEY_NBYTES):
            raise KeyInputError(f"key and parent have {len(key)} and {len(parent)} bytes; give {KEY_NBYTES} each")
        if nbytes < 1 or not 0 <= kind < 256:
            raise UsageError(f"nbytes is {nbytes} and kind {kind}; give nbytes >= 1 and 0 <= kind < 256")
        if reservation_id in self._reservations:
            raise UsageError(f"reservation id {reservation_id} is in use; draw a new one for every reserve")
        self.expire(now)
        rows, extents = self.rows, self._extents
        prefix = tenant_prefix(tenant)
        row = rows.table.find(prefix, key)
        if row >= 0:
            if rows.state[row] == LIVE:
                if rows.expires_at[row] > now:
                    rows.policy.touch(row)
                    return Refusal.PRESENT
                self._expire_entry(row, now)
            elif rows.state[row] == RESERVED:
                return Refusal.BUSY
        if not self.usage.fits(tenant, namespace, nbytes):
            return Refusal.QUOTA
        size = extents.rounded(nbytes)
        if nbytes > extents.capacity_bytes or size > self._max_held:
            return Refusal.TOO_LARGE
        too_many = len(self._reservations) >= MAX_CLAIMS or self._held.get(tenant, 0) + size > self._max_held
        if too_many or sum(self._held.values()) + size > extents.capacity_bytes:  # evicting all would not help
            return Refusal.AGAIN if self.expire(now) else Refusal.FULL
        if parent in (bytes(KEY_NBYTES), key):
            parent = b""
        if rows.table.available() < 2:
            enough = self._make_room(lambda: self._has_rows(prefix, key, parent) or None, now, Refusal.NO_ENTRIES)
            if isinstance(enough, Refusal):
                return enough
        row = rows.claim(prefix, key, parent)
        place = self._make_room(lambda: extents.alloc(nbytes), now, Refusal.FULL)
        if isinstance(place, Refusal):
            rows.vacate(row)
            return place
        node, offset = place
        rows.node[row] = node
        rows.kind[row], rows.namespace[row], rows.media[row] = kind, namespace, media
        self.usage.claim(tenant, namespace, nbytes)
        RECORD.pack_into(rows.records, row * RECORD.size, offset, nbytes, 0, b"")
        self._held[tenant] = self._held.get(tenant, 0) + size  # by now claims may have expired
        self._reservations.add(reservation_id, row, tenant, now + self._lease_s)
        return Reserved(offset)

    def begin_write(self, reservation_id: int, now: float) -> bool:
        """Call before copying into the reserved memory: it cannot be reclaimed, even past its expiry, until as many
        `end_write`. Renews the expiry. False: the reservation is gone; write nothing."""
        return self._reservations.begin_write(reservation_id, now + self._lease_s)

    def end_write(self, reservation_id: int) -> None:
        """The copy begun with `begin_write` has ended, well or not."""
        self._cancel(self._reservations.end_write(reservation_id))

    def commit(
        self,
        reservation_id: int,
        *,
        header_nbytes: int,
        header_sum: bytes,
        expires_at: float,
        now: float,
        namespace: int = UNKNOWN,
    ) -> bool:
        """Makes the reserved entry visible until `expires_at` (monotonic seconds; inf: for ever).

        `namespace` is its number, where `reserve` was not told one.

        False, and nothing is stored: the reservation is gone, is still being written (it stays), or `expires_at` has
        passed (it ends). A reservation past its expiry that was not reclaimed yet is as good as any: its memory was
        never anyone else's. UsageError when the header's size or checksum has an impossible size.
        """
        if not 0 <= header_nbytes < 1 << 32 or len(header_sum) != HEADER_SUM_NBYTES:
            raise UsageError(
                f"header_nbytes is {header_nbytes} and header_sum has {len(header_sum)} bytes; "
                f"give 0 <= header_nbytes < 2**32 and {HEADER_SUM_NBYTES} bytes"
            )
        reservation = self._reservations.take(reservation_id)
        if reservation is None or expires_at <= now:
            self._cancel(reservation)
            return False
        rows, row = self.rows, reservation.row
        offset, nbytes, _, _ = RECORD.unpack_from(rows.records, row * RECORD.size)
        RECORD.pack_into(rows.records, row * RECORD.size, offset, nbytes, header_nbytes, header_sum)
        rows.expires_at[row] = expires_at
        self._unhold(reservation.tenant, self._extents.size_bytes[rows.node[row]])
        self.usage.by_kind[rows.kind[row]] += nbytes
        if not rows.namespace[row]:
            self.usage.free(reservation.tenant, UNKNOWN, nbytes)
            self.usage.claim(reservation.tenant, namespace, nbytes)
            rows.namespace[row] = namespace
        rows.stored_at_s[row] = int(now)
        self.usage.stored(rows.kind[row], rows.media[row])
        rows.settle(row)
        return True

    def abort(self, reservation_id: int) -> None:
        """Gives a reservation back, after the copies under way have ended. Unknown ids are ignored."""
        self._cancel(self._reservations.abandon(reservation_id))

    def delete(self, tenant: int, keys: Sequence[bytes], now: float, why: Why = Why.DELETED) -> list[bool]:
        """Removes entries; True for each key that was stored. Leased ones are misses at once, and their memory is
        freed with the last lease. A key being written is not stored yet: False, and the write goes on."""
        deleted: list[bool] = []
        for row in self.rows.table.find_all(tenant_prefix(tenant), keys, False):
            live = row >= 0 and self.rows.state[row] == LIVE
            deleted.append(live and self.rows.expires_at[row] > now)
            if live:
                self.drop(row, why, now)
        return deleted

    # Room

    def _make_room(self, attempt: Callable[[], T | None], now: float, none_left: Refusal) -> T | Refusal:
        """Evicts until `attempt` answers something; that, or why not."""
        policy, steps = self.rows.policy, MAKE_ROOM_STEPS
        while (got := attempt()) is None:
            if steps <= 0:
                return Refusal.AGAIN
            steps -= 1
            victim = policy.victim(self._evictable, SCAN_PER_STEP)
            if victim is not None:
                self.drop(victim, Why.EVICTED, now)
                self._evictions += 1
            elif policy.exhausted():
                if not self.expire(now):
                    return none_left
                steps -= EXPIRE_STEPS
        return got

    def _has_rows(self, prefix: bytes, key: bytes, parent: bytes) -> bool:
        return self.rows.needed(prefix, key, parent) <= self.rows.table.available()

    def _evictable(self, row: int) -> bool:
        return not self.rows.children[row] and not self._pins[self.rows.node[row]]
