"""How many bytes each kind, tenant and namespace has, and may have. Numbers only: names are kept elsewhere.

Kinds count what is stored; tenants and namespaces also what is being written, so that writers at the same time cannot
exceed a quota together. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mmcache.frame import Kind
from mmcache.store.answers import MAX_UNITS, UNIT_BITS, Modality

UNITS = {Modality.TEXT: "", Modality.IMAGE: "pixels", Modality.VIDEO: "frames", Modality.AUDIO: "ms"}
UNKNOWN = 0  # the namespace of what was announced without one


class Quota(NamedTuple):
    """The most bytes of frames a tenant may have in all, and in each namespace; None: no limit."""

    nbytes: int | None = None
    namespace_nbytes: int | None = None


class Usage:
    """Bytes and entries by kind, by tenant and by namespace number."""

    def __init__(self) -> None:
        self.by_kind: Counter[int] = Counter()
        self.by_tenant: Counter[int] = Counter()
        self.by_namespace: Counter[int] = Counter()
        self.entries_by_namespace: Counter[int] = Counter()
        self.quotas: Mapping[int, Quota] = {}
        self.hits_by_kind: Counter[int] = Counter()
        self.stored_by_kind: Counter[int] = Counter()
        self.hits_by_modality: Counter[int] = Counter()
        self.stored_by_modality: Counter[int] = Counter()
        self.hit_units: Counter[int] = Counter()  # pixels, frames or milliseconds, by modality
        self.stored_units: Counter[int] = Counter()

    def hit(self, kinds: bytes, media: Iterable[int]) -> None:
        """Values of these kinds, one byte each, were found; `media`: what is known of them."""
        for kind in set(kinds):
            self.hits_by_kind[kind] += kinds.count(kind)
        if self.stored_by_modality:
            for one in media:
                if one:
                    self.hits_by_modality[one >> UNIT_BITS] += 1
                    self.hit_units[one >> UNIT_BITS] += one & MAX_UNITS

    def stored(self, kind: int, media: int) -> None:
        """A value was stored."""
        self.stored_by_kind[kind] += 1
        if media:
            self.stored_by_modality[media >> UNIT_BITS] += 1
            self.stored_units[media >> UNIT_BITS] += media & MAX_UNITS

    def fits(self, tenant: int, namespace: int, nbytes: int) -> bool:
        """Whether a value of this size stays within the quotas."""
        quota = self.quotas.get(tenant)
        if quota is None:
            return True
        if quota.nbytes is not None and self.by_tenant[tenant] + nbytes > quota.nbytes:
            return False
        return self.fits_namespace(tenant, namespace, nbytes)

    def fits_namespace(self, tenant: int, namespace: int, nbytes: int) -> bool:
        """The same of the namespace's quota only. What lies under UNKNOWN is of all tenants, and counts for none."""
        quota = self.quotas.get(tenant)
        if quota is None or quota.namespace_nbytes is None:
            return True
        held_nbytes = 0 if namespace == UNKNOWN else self.by_namespace[namespace]
        return held_nbytes + nbytes <= quota.namespace_nbytes

    def claim(self, tenant: int, namespace: int, nbytes: int) -> None:
        """A value is to be written."""
        self.by_tenant[tenant] += nbytes
        self.by_namespace[namespace] += nbytes
        self.entries_by_namespace[namespace] += 1

    def free(self, tenant: int, namespace: int, nbytes: int) -> None:
        """A value that was claimed is gone."""
        for count, name, amount in (
            (self.by_tenant, tenant, nbytes),
            (self.by_namespace, namespace, nbytes),
            (self.entries_by_namespace, namespace, 1),
        ):
            count[name] -= amount
            if not count[name]:
                del count[name]

    def numbers(self) -> dict[str, int]:
        """Bytes, hits and puts by kind and by modality, under the names that metrics.py explains."""
        numbers: dict[str, int] = {}
        for kind in Kind:
            name = kind.name.lower()
            numbers[f"bytes_{name}"] = self.by_kind[kind]
            numbers[f"hits_{name}"] = self.hits_by_kind[kind]
            numbers[f"stored_{name}"] = self.stored_by_kind[kind]
        for modality, unit in UNITS.items():
            name = modality.name.lower()
            numbers[f"hits_{name}"] = self.hits_by_modality[modality]
            numbers[f"stored_{name}"] = self.stored_by_modality[modality]
            if unit:
                numbers[f"hits_{name}_{unit}"] = self.hit_units[modality]
                numbers[f"stored_{name}_{unit}"] = self.stored_units[modality]
        return numbers
