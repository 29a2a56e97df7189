"""A shard: the thin shell that joins the pure index to the arena, under one lock.

It owns time, randomness and memory; the index decides. Bytes are only ever written into the arena by `Landing`,
inside a write the index knows to be in flight, so an expired reservation is never reused under a copy.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from mmcache.config import ServerConfig
from mmcache.errors import FrameError, KeyInputError
from mmcache.frame import FrameMeta
from mmcache.frame_view import Frame
from mmcache.hashing import Hasher, PlainHasher
from mmcache.keys import namespace_id
from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from mmcache.store.arena import Arena, Progress
from mmcache.store.columns import heap
from mmcache.store.explain import Miss, reason_for
from mmcache.store.history import Reason
from mmcache.store.index import Index
from mmcache.store.kept import Kept
from mmcache.store.landing import Landing
from mmcache.store.namespaces import Known, Namespaces, Stopped
from mmcache.store.policies import POLICIES
from mmcache.store.restore import Restored, restore
from mmcache.store.usage import UNKNOWN
from mmcache.transport.base import SLICE_NBYTES
from mmcache.why import Why

COUNTERS: Final = (
    "hits", "misses", "lookups", "stored", "bytes_read", "bytes_written", "bytes_lent", "corrupt_dropped",
)  # fmt: skip
RECENT_MISSES: Final = 1024
MAX_FORKS_TOLD: Final = 64  # in one reply
REFUSAL_CODES: Final = tuple(Refusal)  # what the history keeps as a detail: a refusal's place here
READS_STOPPED: Final = Reason(Why.READS_STOPPED)
STOPPED_BY_MODE: Final = {
    "both": Stopped.NOTHING,
    "read": Stopped.WRITES,
    "write": Stopped.READS,
    "off": Stopped.BOTH,
}
ROOM_TRIES: Final = 64  # one index call evicts a bounded number; the lock is free between tries


class Shard:
    """Stores frames by (tenant, key). Thread-safe; the lock is held for index work only, never while bytes move."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        progress: Progress | None = None,
        hasher: Callable[[], Hasher] = PlainHasher,
        arena: Arena | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.config, self.hasher = config, hasher
        self.arena = arena or Arena(
            config.memory_nbytes, prefault=config.prefault, huge_pages=config.huge_pages, progress=progress
        )
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.longest_step_nbytes = 0  # the most bytes copied or hashed in one go
        self.lock = threading.Lock()
        self._clock = clock
        self._wall_ms = wall_ms
        self.namespaces = Namespaces()
        self.stopped = STOPPED_BY_MODE[config.mode]
        self.recent: deque[Miss] = deque(maxlen=RECENT_MISSES)
        self._kept = kept
        self.restored = Restored(0, 0, 0)
        self.index = self._new_index()
        if kept is not None:
            self._take_over(kept)
        self.index.unreadable = self.namespaces.unreadable

    def _new_index(self) -> Index:
        config, kept = self.config, self._kept
        return Index(
            capacity_bytes=config.memory_nbytes,
            max_entries=config.entries,
            alignment=config.alignment,
            seed=secrets.randbits(64),
            lease_s=config.lease_s,
            max_pinned_bytes=int(config.memory_nbytes * config.pinned_share),
            policy=POLICIES[config.policy],
            kept=heap if kept is None else kept.memory,
        )

    def _take_over(self, kept: Kept) -> None:
        """Go on with what a server before this one left, if that can be; either way, keep what comes for the next."""
        if not kept.why_cold:
            try:
                self.restored = restore(self.index, len(kept.notes.tenants), kept.notes.known.keys())
            except Exception as error:  # whatever lies there, it must not keep a server from starting
                kept.forget(f"what the server before left could not be read: {error!r}")
                self.index = self._new_index()
        notes = kept.notes
        self.namespaces = Namespaces(notes.namespace)
        self.namespaces.restore(notes.known, notes.rules)
        if notes.stopped is not None:
            self.stopped = notes.stopped
        kept.begin()

    def stop_changed(self) -> None:
        """What is stopped has changed: note it for the next life. Under the lock."""
        if self._kept is not None:
            self._kept.notes.stop(self.stopped, self.namespaces.rules())

    def declare(self, tenant: int, namespace: bytes, kind: str, facts: Mapping[str, str]) -> None:
        """Keep a namespace's facts so that entries can be explained. Raises KeyInputError if they are not its own."""
        if namespace_id(kind, facts) != namespace:
            raise KeyInputError(
                "the namespace id is not the digest of these facts; the client must be of another keys version"
            )
        with self.lock:
            self.namespaces.declare(self.number(tenant, namespace), kind, facts)

    def number(self, tenant: int, namespace: bytes) -> int:
        """The number of a tenant's namespace. Under the lock."""
        return self.namespaces.number(tenant, namespace, self.index.usage.by_namespace)

    def declared(self, tenant: int, namespace: bytes) -> Known | None:
        """The facts a client of this tenant declared, if any did."""
        known = self.namespaces.find(tenant, namespace)
        return known if known is not None and known.kind else None

    def contains(self, tenant: int, keys: Sequence[bytes], *, prefix: bool) -> list[bool]:
        """Presence of each key; with prefix, of the leading present ones only. Recency does not change."""
        with self.lock:
            now = self._clock()
            if self.stopped and self.stopped & Stopped.READS:
                present = [] if prefix else [False] * len(keys)
            else:
                present = self.index.contains(tenant, keys, now, prefix=prefix)
                self.counters["lookups"] += len(present)
            if prefix and len(present) < len(keys):
                self._note_miss(tenant, keys, len(present), keys[len(present)], prefix, now)
        return present

    @property
    def has_forks(self) -> bool:
        """Whether `forks` could answer anything."""
        return bool(self.index.rows.forks)

    def forks(self, tenant: int, keys: Sequence[bytes]) -> bytes:
        """Those of the keys at which many stored values part ways, MAX_FORKS_TOLD of them at most, back to back."""
        if not self.has_forks:
            return b""
        with self.lock:
            forks = self.index.forks(tenant, keys)
        return b"".join(sorted(forks)[:MAX_FORKS_TOLD])

    def _note_miss(
        self, tenant: int, keys: Sequence[bytes], found: int, first: bytes, prefix: bool, now: float
    ) -> None:
        reason = READS_STOPPED if self.stopped & Stopped.READS else reason_for(self.index, tenant, first, now)
        self.recent.append(Miss(now, tenant, len(keys), found, prefix, first, reason))

    def acquire(
        self,
        tenant: int,
        keys: Sequence[bytes],
        *,
        prefix: bool = False,
        max_nbytes: int | None = None,
        lasting: bool = False,
        counts: bool = True,
    ) -> tuple[int, list[Found | Unpinned | None]]:
        """Find and pin at most `max_nbytes`, but at least one; the lease id is 0 when nothing was pinned.

        Found extents stay as they are while the lease is held. A lasting lease does not expire: release it for sure.
        Without `counts` this is neither a use nor a lookup.
        """
        lease_id = secrets.randbits(63) + 1
        with self.lock:
            now = self._clock()
            if self.stopped and self.stopped & Stopped.READS:
                entries: list[Found | Unpinned | None] = [] if prefix else [None] * len(keys)
            else:
                entries = self.index.acquire(
                    tenant,
                    keys,
                    lease_id=lease_id,
                    now=now,
                    prefix=prefix,
                    max_nbytes=max_nbytes,
                    lasting=lasting,
                    counts=counts,
                )
            found = [entry[1] for entry in entries if type(entry) is Found]
            if counts:
                counters = self.counters
                counters["hits"] += len(found)
                counters["bytes_read"] += sum(found)
                if len(found) < len(keys):
                    counters["misses"] += entries.count(None)
                    self._note_first_miss(tenant, keys, entries, prefix, now)
        return (lease_id if found else 0), entries

    def _note_first_miss(
        self, tenant: int, keys: Sequence[bytes], entries: Sequence[Found | Unpinned | None], prefix: bool, now: float
    ) -> None:
        """Of a lookup that found less than all; one that only has to be asked again has missed nothing."""
        first = entries.index(None) if None in entries else len(entries)
        if first < len(keys) and Unpinned.LATER not in entries[:first]:
            found = len(entries) - entries.count(None)
            self._note_miss(tenant, keys, found, keys[first], prefix, now)

    def release(self, tenant: int, lease_id: int) -> bool:
        """Give a lease back; True if it was valid until now."""
        with self.lock:
            return self.index.release(tenant, lease_id, self._clock())

    def reserve(
        self,
        tenant: int,
        key: bytes,
        parent: bytes,
        nbytes: int,
        kind: int,
        namespace: bytes = b"",
        media: int = 0,
        *,
        sums_last: bool = False,
    ) -> Landing | Refusal:
        """Room for a frame of `nbytes`, or why there is none. The caller lands bytes, then commits or aborts.

        `namespace`: what the frame's header will say, if it is known; `media`: see answers.pack_media; `sums_last`: see
        Landing.
        """
        reservation_id = secrets.randbits(63) + 1
        answer: Reserved | Refusal = Refusal.AGAIN
        for _ in range(ROOM_TRIES):
            with self.lock:
                now = self._clock()
                number = self.number(tenant, namespace) if namespace else UNKNOWN
                if self.may_not_write(number):
                    answer = Refusal.STOPPED
                else:
                    answer = self.index.reserve(
                        tenant,
                        key,
                        parent,
                        nbytes,
                        reservation_id=reservation_id,
                        now=now,
                        kind=kind,
                        namespace=number,
                        media=media,
                    )
            if answer is not Refusal.AGAIN:
                break
        if isinstance(answer, Reserved):
            view = self.arena.view[answer.offset : answer.offset + nbytes]
            names = (key, parent, kind, namespace)
            return Landing(self, tenant, names, reservation_id, view, sums_last=sums_last)
        with self.lock:
            self.refused(tenant, key, answer)
        return answer

    def may_not_write(self, number: int) -> bool:
        """Whether the operator has stopped writes, of all or of this namespace."""
        return bool(self.stopped and self.stopped & Stopped.WRITES) or number in self.namespaces.unwritable

    def refused(self, tenant: int, key: bytes, refusal: Refusal) -> None:
        """Count a refusal, and keep it for `explain`. Under the lock."""
        self.counters[f"put_{refusal.name.lower()}"] += 1
        if refusal not in (Refusal.PRESENT, Refusal.BUSY):
            self.index.note(tenant, key, Why.REFUSED, self._clock(), REFUSAL_CODES.index(refusal))

    def delete(self, tenant: int, keys: Sequence[bytes]) -> list[bool]:
        """Forget these keys; memory under a lease is freed when the lease ends."""
        with self.lock:
            return self.index.delete(tenant, keys, self._clock())

    def recheck(self, tenant: int, key: bytes) -> bool | None:
        """Verify the stored bytes of `key` and drop the entry if they are bad. True if it was dropped; None if it
        could not be checked: it is not there (any more), or the tenant has leased all it may.

        Also where reads are stopped. Hashes the whole frame, under a lease of its own; it counts neither as a use nor
        as a hit.
        """
        lease_id = secrets.randbits(63) + 1
        with self.lock:
            (found,) = self.index.acquire(
                tenant, [key], lease_id=lease_id, now=self._clock(), lasting=True, counts=False, stopped_too=True
            )
        if not isinstance(found, Found):
            return None
        try:
            if self._is_sound(key, found):
                return False
            with self.lock:
                # The lease keeps the extent: if the key still lies there, it is the entry that was checked.
                again_id, now = secrets.randbits(63) + 1, self._clock()
                again = self.index.acquire(tenant, [key], lease_id=again_id, now=now, counts=False, stopped_too=True)
                same = again == [found]
                self.index.release(tenant, again_id, now)
                self.counters["corrupt_dropped"] += same
                return same and self.index.delete(tenant, [key], now, Why.BAD_BYTES)[0]
        finally:
            self.release(tenant, lease_id)

    def _is_sound(self, key: bytes, found: Found) -> bool:
        with self.lock:
            self.longest_step_nbytes = max(self.longest_step_nbytes, min(found.nbytes, SLICE_NBYTES))
        try:
            frame = Frame.parse(self.view(found), checksum=found.header_sum)
            frame.verify(step_nbytes=SLICE_NBYTES)
        except FrameError:
            return False
        return frame.header.meta.key == key

    def view(self, found: Found) -> memoryview:
        """The bytes of a found frame; valid while its lease is held."""
        return self.arena.view[found.offset : found.offset + found.nbytes]

    def tick(self) -> None:
        """Drop expired leases and reservations; call it now and then."""
        with self.lock:
            self.index.expire(self._clock())
        self.tell_uses()

    def tell_uses(self) -> None:
        """Have the policy told what was used: call it after a reply, when nobody waits. Harmless to leave out."""
        with self.lock:
            self.index.rows.policy.tell()

    def stat(self) -> dict[str, int]:
        """Counters and gauges by name."""
        with self.lock:
            return {
                **self.index.stats()._asdict(),
                **self.index.usage.numbers(),
                **self.counters,
                "longest_step_bytes": self.longest_step_nbytes,
                "restored_entries": self.restored.entries,
                "restored_dropped": self.restored.dropped,
                "namespaces_forgotten": self.namespaces.forgotten,
            }

    def stat_of(self, tenant: int) -> dict[str, int]:
        """What one tenant may know: its own bytes."""
        with self.lock:
            return {"bytes_used": self.index.usage.by_tenant[tenant]}

    def expiry(self, meta: FrameMeta) -> float:
        """The monotonic instant at which a frame that is stored now expires; inf: never.

        Where the writer's clock is ahead of this host's, its own two times say how long the value may live: clocks that
        differ let it end early, never late.
        """
        if not meta.expires_ms:
            return math.inf
        left_ms = min(meta.expires_ms - self._wall_ms(), meta.expires_ms - meta.created_ms)
        return self._clock() + left_ms / 1000

    def now(self) -> float:
        """The shard's monotonic clock, seconds."""
        return self._clock()

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()
