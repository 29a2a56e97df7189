"""A shard: the thin shell that joins the pure index to the arena, under one lock.

It owns time, randomness and memory; the index decides. Bytes are only ever written into the arena here, by `Landing`,
inside a write the index knows to be in flight, so an expired reservation is never reused under a copy.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mmcache.config import ServerConfig
from mmcache.errors import FrameError, KeyInputError
from mmcache.frame import FrameMeta, Kind
from mmcache.frame_view import Frame, FrameCheck
from mmcache.keys import namespace_id
from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from mmcache.store.arena import Arena, Progress
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES

MAX_NAMESPACES: Final = 65536
MAX_NAMESPACES_NBYTES: Final = 64 << 20  # of facts; the oldest declared are forgotten first
COUNTERS: Final = ("hits", "misses", "lookups", "stored", "bytes_read", "bytes_written", "corrupt_dropped")
ROOM_TRIES: Final = 64  # one index call evicts a bounded number; the lock is free between tries


@dataclass(frozen=True, slots=True)
class Declared:
    """A namespace's facts as a client declared them; their digest is the namespace's id."""

    kind: str
    facts: Mapping[str, str]
    nbytes: int


class Shard:
    """Stores frames by (tenant, key). Thread-safe; the lock is held for index work only, never while bytes move."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.arena = Arena(config.memory_nbytes, prefault=config.prefault, progress=progress)
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.lock = threading.Lock()
        self._clock = clock
        self._wall_ms = wall_ms
        self._namespaces: dict[tuple[int, bytes], Declared] = {}
        self._namespaces_nbytes = 0
        self.index = Index(
            capacity_bytes=config.memory_nbytes,
            max_entries=config.entries,
            alignment=config.alignment,
            seed=secrets.randbits(64),
            lease_s=config.lease_s,
            max_pinned_bytes=int(config.memory_nbytes * config.pinned_share),
            policy=POLICIES[config.policy],
        )

    def declare(self, tenant: int, namespace: bytes, kind: str, facts: Mapping[str, str]) -> None:
        """Keep a namespace's facts so that entries can be explained. Raises KeyInputError if they are not its own."""
        if namespace_id(kind, facts) != namespace:
            raise KeyInputError(
                "the namespace id is not the digest of these facts; the client must be of another keys version"
            )
        nbytes = sum(len(name.encode()) + len(text.encode()) for name, text in facts.items())
        with self.lock:
            if (tenant, namespace) in self._namespaces:
                return
            self._namespaces[tenant, namespace] = Declared(kind, dict(facts), nbytes)
            self._namespaces_nbytes += nbytes
            while len(self._namespaces) > MAX_NAMESPACES or self._namespaces_nbytes > MAX_NAMESPACES_NBYTES:
                oldest = self._namespaces.pop(next(iter(self._namespaces)))
                self._namespaces_nbytes -= oldest.nbytes
                self.counters["namespaces_forgotten"] += 1

    def declared(self, tenant: int, namespace: bytes) -> Declared | None:
        """The facts a client of this tenant declared, if any did."""
        return self._namespaces.get((tenant, namespace))

    def contains(self, tenant: int, keys: Sequence[bytes], *, prefix: bool) -> list[bool]:
        """Presence of each key; with prefix, of the leading present ones only. Recency does not change."""
        with self.lock:
            present = self.index.contains(tenant, keys, self._clock(), prefix=prefix)
            self.counters["lookups"] += len(present)
        return present

    def acquire(
        self,
        tenant: int,
        keys: Sequence[bytes],
        *,
        prefix: bool = False,
        max_nbytes: int | None = None,
        lasting: bool = False,
    ) -> tuple[int, list[Found | Unpinned | None]]:
        """Find and pin at most `max_nbytes`, but at least one; the lease id is 0 when nothing was pinned.

        Found extents stay as they are while the lease is held. A lasting lease does not expire: release it for sure.
        """
        lease_id = secrets.randbits(63) + 1
        with self.lock:
            entries = self.index.acquire(
                tenant,
                keys,
                lease_id=lease_id,
                now=self._clock(),
                prefix=prefix,
                max_nbytes=max_nbytes,
                lasting=lasting,
            )
            found = [entry.nbytes for entry in entries if isinstance(entry, Found)]
            self.counters["hits"] += len(found)
            self.counters["misses"] += entries.count(None)
            self.counters["bytes_read"] += sum(found)
        return (lease_id if found else 0), entries

    def release(self, tenant: int, lease_id: int) -> bool:
        """Give a lease back; True if it was valid until now."""
        with self.lock:
            return self.index.release(tenant, lease_id, self._clock())

    def reserve(self, tenant: int, key: bytes, parent: bytes, nbytes: int, kind: int) -> Landing | Refusal:
        """Room for a frame of `nbytes`, or why there is none. The caller lands bytes, then commits or aborts."""
        reservation_id = secrets.randbits(63) + 1
        for _ in range(ROOM_TRIES):
            with self.lock:
                answer = self.index.reserve(
                    tenant, key, parent, nbytes, reservation_id=reservation_id, now=self._clock(), kind=kind
                )
            if answer is not Refusal.AGAIN:
                break
        if isinstance(answer, Reserved):
            view = self.arena.view[answer.offset : answer.offset + nbytes]
            return Landing(self, (key, parent, kind), reservation_id, view)
        with self.lock:
            self.counters[f"put_{answer.name.lower()}"] += 1
        return answer

    def delete(self, tenant: int, keys: Sequence[bytes]) -> list[bool]:
        """Forget these keys; memory under a lease is freed when the lease ends."""
        with self.lock:
            return self.index.delete(tenant, keys, self._clock())

    def recheck(self, tenant: int, key: bytes) -> bool:
        """Verify the stored bytes of `key` and drop the entry if they are bad. True if it was dropped.

        Hashes the whole frame, under a lease of its own, and counts as a use but not as a hit.
        """
        lease_id = secrets.randbits(63) + 1
        with self.lock:
            (found,) = self.index.acquire(tenant, [key], lease_id=lease_id, now=self._clock(), lasting=True)
        if not isinstance(found, Found):
            return False
        try:
            if self._is_sound(key, found):
                return False
            with self.lock:
                # The lease keeps the extent: if the key still lies there, it is the entry that was checked.
                again_id, now = secrets.randbits(63) + 1, self._clock()
                same = self.index.acquire(tenant, [key], lease_id=again_id, now=now) == [found]
                self.index.release(tenant, again_id, now)
                self.counters["corrupt_dropped"] += same
                return same and self.index.delete(tenant, [key], now)[0]
        finally:
            self.release(tenant, lease_id)

    def _is_sound(self, key: bytes, found: Found) -> bool:
        try:
            frame = Frame.parse(self.view(found), checksum=found.header_sum)
            frame.verify()
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

    def stat(self) -> dict[str, int]:
        """Counters and gauges by name."""
        with self.lock:
            nbytes_by_kind = self.index.nbytes_by_kind()
            by_kind = {f"bytes_{kind.name.lower()}": nbytes_by_kind.get(kind, 0) for kind in Kind}
            return {**self.index.stats()._asdict(), **by_kind, **self.counters}

    def expiry(self, expires_ms: int) -> float:
        """The monotonic instant of a frame's expiry time (Unix ms; 0: never)."""
        return math.inf if not expires_ms else self._clock() + (expires_ms - self._wall_ms()) / 1000

    def now(self) -> float:
        """The shard's monotonic clock, seconds."""
        return self._clock()

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()


class Landing:
    """One frame on its way into its extent: bytes land front to back, are hashed as they land, then commit.

    `refusal` is set as soon as it cannot succeed; what lands afterwards is dropped. `abort` may follow at any time
    and is harmless after `commit`.
    """

    __slots__ = ("_check", "_names", "_reservation_id", "_shard", "_view", "landed_nbytes", "refusal")

    def __init__(self, shard: Shard, names: tuple[bytes, bytes, int], reservation_id: int, view: memoryview) -> None:
        self._shard, self._names, self._reservation_id, self._view = shard, names, reservation_id, view
        self._check = FrameCheck(view)
        self.landed_nbytes = 0
        self.refusal: Refusal | None = None

    @property
    def left_nbytes(self) -> int:
        """Bytes still to come."""
        return len(self._view) - self.landed_nbytes

    def land(self, limit_nbytes: int, fill: Callable[[memoryview], int], scratch: memoryview) -> int:
        """Let `fill` put up to `limit_nbytes` bytes in place (it must not wait); returns how many it did.

        Once refused, `fill` is given `scratch` instead, so that the stream goes on in step.
        """
        limit = min(limit_nbytes, self.left_nbytes)
        shard = self._shard
        if self.refusal is None:
            with shard.lock:
                if not shard.index.begin_write(self._reservation_id, shard.now()):
                    self.refusal = Refusal.LOST
        if self.refusal is not None:
            count = fill(scratch[:limit])
            self.landed_nbytes += count
            return count
        try:
            count = fill(self._view[self.landed_nbytes : self.landed_nbytes + limit])
            self.landed_nbytes += count
            self._check.advance(self.landed_nbytes)
        except FrameError:
            self.refusal = Refusal.BAD_FRAME
        finally:
            with shard.lock:
                shard.index.end_write(self._reservation_id)
        return count

    def commit(self) -> Refusal | None:
        """Make the frame visible. None on success; otherwise nothing is stored."""
        header = self._check.header
        if self.refusal is None and (header is None or not self._check.done or not self._is_expected(header.meta)):
            self.refusal = Refusal.BAD_FRAME
        if self.refusal is not None or header is None:
            self.abort()
            return self.refusal
        shard = self._shard
        expires_at = shard.expiry(header.meta.expires_ms)
        if expires_at <= shard.now():
            self.refusal = Refusal.EXPIRED
            self.abort()
            return self.refusal
        with shard.lock:
            if shard.index.commit(
                self._reservation_id,
                header_nbytes=header.header_nbytes,
                header_sum=header.checksum,
                expires_at=expires_at,
                now=shard.now(),
            ):
                shard.counters["stored"] += 1
                shard.counters["bytes_written"] += self.landed_nbytes
            else:
                self.refusal = Refusal.LOST
        return self.refusal

    def _is_expected(self, meta: FrameMeta) -> bool:
        return (meta.key, meta.parent, meta.kind) == self._names

    def abort(self) -> None:
        """Give the room back, unless the frame was committed."""
        with self._shard.lock:
            self._shard.index.abort(self._reservation_id)
