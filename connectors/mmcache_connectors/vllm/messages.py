"""What this connector sends through vLLM between its scheduler and its workers: jobs down, facts and counters up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from mmcache_connectors.vllm.plan import Job


@dataclass
class StepJobs(KVConnectorMetadata):  # type: ignore[misc]
    """One step's loads and saves."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What only a worker knows of how its blocks are computed, as namespace facts."""

    facts: dict[str, str]


@dataclass
class Dropped(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """By request, the first block that found no room on its way out."""

    first: dict[str, int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Dropped:
        """With another worker's: a block is stored when all its parts are."""
        for request_id, first in other.first.items():
            self.first[request_id] = min(first, self.first.get(request_id, first))
        return self


class CacheStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last report, summed over workers; vLLM logs them as "KV Transfer metrics"."""

    def reset(self) -> None:
        """Start again from nothing."""
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> CacheStats:
        """Add another report to this one."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, Any]:
        """What is logged."""
        return {f"mmcache_{name}": amount for name, amount in sorted(self.data.items()) if amount}

    def is_empty(self) -> bool:
        """True if nothing happened."""
        return not any(self.data.values())


class StatsReporter:
    """Turns counters since the start into reports of what was added."""

    def __init__(self) -> None:
        self._reported: dict[str, int] = {}

    def report(self, counters: dict[str, int]) -> CacheStats | None:
        """What was added since the last report; None for nothing."""
        added = {name: count - self._reported.get(name, 0) for name, count in counters.items()}
        self._reported = dict(counters)
        stats = CacheStats(data={name: amount for name, amount in added.items() if amount})
        return None if stats.is_empty() else stats
