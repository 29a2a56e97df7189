"""Audit of stored blocks: an engine computed them although they are stored, so what is stored can be compared."""

from __future__ import annotations

import logging
from collections import Counter

import torch

from mmcache.client.blocking import Client
from mmcache.errors import MMCacheError
from mmcache.keyset import Keys
from mmcache.transport.base import Outcome
from mmcache_connectors.audit import Likeness, compare
from mmcache_connectors.paged import PagedGroup

log = logging.getLogger("mmcache.vllm")


class Auditor:
    """Compares, and drops what differs. For one thread, which is not the engine's."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._said = False

    def check(self, paged: PagedGroup, keys: Keys, computed: torch.Tensor) -> Counter[str]:
        """Compare what is stored under `keys` with staged blocks `[len(keys), *paged.shape]`, and drop what is of
        another content or form, so that it can be stored anew. What is not stored, or fails its checks, is not
        compared.

        Counts audit_blocks (compared), audit_differences (dropped) and verify_failures.
        """
        stored = torch.empty_like(computed)
        results = self._client.get_into(keys, paged.rows(stored))
        counts: Counter[str] = Counter()
        for row, result in enumerate(results):
            error = float("inf")
            if result:
                likeness, error = compare(stored[row], computed[row], halves=True)
            elif result.outcome is Outcome.MISMATCH:
                likeness = Likeness.DIFFERENT
            else:
                counts["verify_failures"] += result.outcome is Outcome.CORRUPT
                continue
            counts["audit_blocks"] += 1
            if likeness is Likeness.DIFFERENT:
                counts["audit_differences"] += 1
                self._drop(keys[row : row + 1], error)
        return counts

    def _drop(self, key: Keys, error: float) -> None:
        try:
            self._client.delete(key)
        except MMCacheError:
            log.exception("mmcache: an entry that differs from what was computed could not be dropped")
        if not self._said:
            self._said = True
            log.warning(
                "mmcache: audit: what is stored under %s is not what this engine computes (relative error %.2g); it is "
                "dropped and stored anew. Further ones are only counted (mmcache_audit_differences): either a stored "
                "value is wrong, or engines that compute different values share a namespace",
                key.digests[0].hex(), error,
            )  # fmt: skip
