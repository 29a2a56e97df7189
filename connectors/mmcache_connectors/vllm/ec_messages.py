"""What the encoder-cache connector sends through vLLM: items down to the workers, counters up, counters out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata, ECConnectorWorkerMetadata
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from mmcache_connectors.vllm.ec_items import Load, Save
from mmcache_connectors.vllm.metrics import CacheStats

METRICS: Final = {  # counter of either side -> (name in vLLM's metrics, what it counts)
    "items_hit": ("hits", "Media items whose embedding came from the cache."),
    "items_missed": ("misses", "Media items that were asked for and encoded."),
    "lookup_timeouts": ("lookup_timeouts", "Requests whose items were encoded because finding out took too long."),
    "no_room": ("no_room", "Media items that were encoded because load_buffer_mib was full."),
    "fetched_nbytes": ("loaded_bytes", "Bytes of embeddings fetched."),
    "fetch_us": ("load_seconds", "Seconds in which embeddings were being fetched."),
    "items_saved": ("saves", "Embeddings stored."),
    "saved_nbytes": ("saved_bytes", "Bytes of embeddings stored."),
    "save_us": ("save_seconds", "Seconds in which embeddings were being stored."),
    "saves_dropped": ("dropped_saves", "Embeddings dropped: save_buffer_mib was full, or the cache away."),
    "verify_failures": ("verify_failures", "Stored embeddings that failed their checks."),
    "audits": ("audits", "Known items that were encoded all the same and compared."),
    "audit_differences": ("audit_differences", "Audited items whose stored embedding was another one."),
}


@dataclass
class StepItems(ECConnectorMetadata):  # type: ignore[misc]
    """One step's loads and saves; saves by identifier."""

    step: int = 0
    loads: list[Load] = field(default_factory=list)
    saves: dict[str, Save] = field(default_factory=dict)


@dataclass
class WorkerReport(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """The step that has run, and what the workers have counted since their last report."""

    step: int
    counts: dict[str, int]

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """With another worker's of the same step."""
        for name, amount in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + amount
        return self


class EncoderStats(CacheStats, ECConnectorStats):  # type: ignore[misc]
    """Counts since the last report, summed over workers; vLLM logs them as "EC Transfer metrics"."""


class EncoderMetrics(ECConnectorPromMetrics):  # type: ignore[misc]
    """The counts of METRICS as vllm:mmcache_encoder_..._total, every series from the start."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)
        self._counters: dict[tuple[int, str], Any] = {}
        for count, (name, what) in METRICS.items():
            made = self._counter_cls(name=f"vllm:mmcache_encoder_{name}", documentation=what, labelnames=labelnames)
            for engine, values in self.per_engine_labelvalues.items():
                self._counters[engine, count] = made.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one report of one engine."""
        for count, added in transfer_stats_data.items():
            if (counter := self._counters.get((engine_idx, count))) is not None:
                counter.inc(added / 1e6 if count.endswith("_us") else added)
