"""What this connector sends through vLLM between its scheduler and its workers: jobs down, facts and drops up."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

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
