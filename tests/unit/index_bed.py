"""An index on a bench: whole operations in one line, a clock moved by hand, integrity checked on the way."""

from __future__ import annotations

import math
from typing import Any

from mmcache.store.answers import Found, Refusal, Reserved, Unpinned
from mmcache.store.index import Index

UNIT = 64
SUM = bytes(range(16))
ROOT = bytes(32)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Bed:
    """An index with short ways to do whole operations; `now` and ids are kept here."""

    def __init__(self, units: int = 8, max_entries: int = 64, **settings: Any) -> None:
        self.index = Index(capacity_bytes=units * UNIT, max_entries=max_entries, seed=7, lease_s=10.0, **settings)
        self.now = 0.0
        self.last_id = 0

    def reserve(self, name: bytes, parent: bytes = ROOT, units: int = 1, tenant: int = 0) -> Reserved | Refusal:
        self.last_id += 1
        return self.index.reserve(tenant, name, parent, units * UNIT, reservation_id=self.last_id, now=self.now)

    def commit(self, reservation_id: int | None = None, expires_at: float = math.inf) -> bool:
        return self.index.commit(
            reservation_id or self.last_id, header_nbytes=40, header_sum=SUM, expires_at=expires_at, now=self.now
        )

    def put(
        self, name: bytes, parent: bytes = ROOT, units: int = 1, tenant: int = 0, expires_at: float = math.inf
    ) -> int:
        """Stores and returns the offset."""
        answer = self.reserve(name, parent, units, tenant)
        assert isinstance(answer, Reserved), answer
        assert self.commit(expires_at=expires_at)
        self.index.check_integrity()
        return answer.offset

    def acquire(self, *names: bytes, tenant: int = 0, prefix: bool = False) -> list[Found | Unpinned | None]:
        self.last_id += 1
        return self.index.acquire(tenant, names, lease_id=self.last_id, now=self.now, prefix=prefix)

    def release(self, lease_id: int, tenant: int = 0) -> bool:
        held = self.index.release(tenant, lease_id, self.now)
        self.index.check_integrity()
        return held

    def stored(self, *names: bytes, tenant: int = 0) -> list[bool]:
        return self.index.contains(tenant, names, self.now)
