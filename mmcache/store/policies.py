"""The eviction policies by name. docs/policies.md says which to take. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mmcache.store.policy import LRU, Factory
from mmcache.store.s3fifo import S3FIFO
from mmcache.store.value import Value

POLICIES: Final[Mapping[str, Factory]] = MappingProxyType({"value": Value, "lru": LRU, "s3-fifo": S3FIFO})
