"""One frame on its way into the arena: the only place where bytes are written there.

Every write is one the index knows to be in flight, so an expired reservation is never reused under a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmcache.errors import FrameError
from mmcache.frame import FrameHeader, FrameMeta
from mmcache.frame_view import FrameCheck
from mmcache.store.answers import Refusal
from mmcache.transport.base import SLICE_NBYTES

if TYPE_CHECKING:
    from mmcache.store.shard import Shard


class Landing:
    """One frame on its way into its extent: bytes land front to back, are hashed as they land, then commit.

    With `sums_last` its header lacks the tensors' checksums, and `seal` comes before `commit`.
    `refusal` is set as soon as it cannot succeed; what lands afterwards is dropped. `abort` may follow at any time
    and is harmless after `commit`.
    """

    __slots__ = ("_check", "_names", "_reservation_id", "_sealed", "_shard", "_tenant", "_view", "landed_nbytes",
                 "refusal")  # fmt: skip

    def __init__(
        self,
        shard: Shard,
        tenant: int,
        names: tuple[bytes, bytes, int, bytes],
        reservation_id: int,
        view: memoryview,
        *,
        sums_last: bool = False,
    ) -> None:
        self._shard, self._tenant, self._names = shard, tenant, names
        self._reservation_id, self._view = reservation_id, view
        self._check = FrameCheck(view, shard.hasher(), sums_last=sums_last)
        self._sealed = b""  # the header to be written over the one that came
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
        before = self.landed_nbytes
        try:
            count = fill(self._view[self.landed_nbytes : self.landed_nbytes + limit])
            self.landed_nbytes += count
            self._check.advance(self.landed_nbytes)
        except FrameError:
            self.refusal = Refusal.BAD_FRAME
        finally:
            with shard.lock:
                shard.index.end_write(self._reservation_id)
                shard.longest_step_nbytes = max(shard.longest_step_nbytes, self.landed_nbytes - before)
        return count

    def land_from(self, source: memoryview) -> None:
        """Copy `source`, at most what is left, into place, and hash it on the way. Once refused, it is dropped."""
        shard = self._shard
        if self.refusal is None:
            with shard.lock:
                if not shard.index.begin_write(self._reservation_id, shard.now()):
                    self.refusal = Refusal.LOST
        self.landed_nbytes += len(source)
        if self.refusal is not None:
            return
        longest = min(len(source), SLICE_NBYTES)
        try:
            self._check.copy(source)
        except FrameError:
            self.refusal = Refusal.BAD_FRAME
        finally:
            with shard.lock:
                shard.index.end_write(self._reservation_id)
                shard.longest_step_nbytes = max(shard.longest_step_nbytes, longest)

    def seal(self, sum_of_all: bytes) -> None:
        """All bytes have landed, and this stands for the checksums that their writer found (frame.sum_of_sums)."""
        if self.refusal is None:
            try:
                self._sealed = self._check.seal(sum_of_all)
            except FrameError:
                self.refusal = Refusal.BAD_FRAME

    def commit(self) -> Refusal | None:
        """Make the frame visible. None on success; otherwise nothing is stored."""
        header = self._check.header
        if self.refusal is None and (header is None or not self._check.done or not self._is_expected(header.meta)):
            self.refusal = Refusal.BAD_FRAME
        shard = self._shard
        if self.refusal is None and header is not None:
            self.refusal = self._commit(header)
        if self.refusal is not None:
            with shard.lock:
                shard.index.abort(self._reservation_id)
                shard.refused(self._tenant, self._names[0], self.refusal)
        return self.refusal

    def _commit(self, header: FrameHeader) -> Refusal | None:
        shard, meta = self._shard, header.meta
        expires_at = shard.expiry(meta)
        with shard.lock:
            now = shard.now()
            number = shard.number(self._tenant, meta.namespace)
            if expires_at <= now:
                return Refusal.EXPIRED
            if shard.may_not_write(number):
                return Refusal.STOPPED
            if not self._names[3] and not shard.index.usage.fits_namespace(self._tenant, number, len(self._view)):
                return Refusal.QUOTA  # its writer did not say before which namespace it is of
            if self._sealed:
                if not shard.index.begin_write(self._reservation_id, now):
                    return Refusal.LOST
                self._view[: len(self._sealed)] = self._sealed
                shard.index.end_write(self._reservation_id)
            if not shard.index.commit(
                self._reservation_id,
                header_nbytes=header.header_nbytes,
                header_sum=header.checksum,
                expires_at=expires_at,
                now=now,
                namespace=number,
            ):
                return Refusal.LOST
            shard.counters["stored"] += 1
            shard.counters["bytes_written"] += self.landed_nbytes
        return None

    def _is_expected(self, meta: FrameMeta) -> bool:
        key, parent, kind, namespace = self._names
        return (meta.key, meta.parent, meta.kind) == (key, parent, kind) and namespace in (b"", meta.namespace)

    def abort(self) -> None:
        """Give the room back, unless the frame was committed."""
        with self._shard.lock:
            self._shard.index.abort(self._reservation_id)
