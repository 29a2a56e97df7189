"""What the connector counts, as vLLM's own metrics: the "KV Transfer metrics" line of its log, and Prometheus.

Both sides count since their start; each step sends what was added, vLLM adds up the workers' and the scheduler's, and
the process that serves /metrics turns the sums into the metrics below. Names and interface: vLLM 0.32,
distributed/kv_transfer/kv_connector/v1/metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

SECONDS_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its labels' names, and for each of its series the labels' values and the count it shows."""

    name: str
    help: str
    labels: Labels
    series: Mapping[Labels, str]


def _plain(name: str, text: str, count: str) -> Metric:
    return Metric(f"vllm:mmcache_{name}", text, (), {(): count})


_PATHS: Final = ("shared_memory", "network")
COUNTERS: Final = (
    _plain("lookups", "Questions to the cache how much of a prompt is stored.", "lookups"),
    _plain("lookup_timeouts", "Requests computed because finding out took too long.", "lookup_timeouts"),
    Metric(
        "vllm:mmcache_hit_tokens",
        "Prompt tokens loaded instead of computed, by how the scheduler reaches the cache.",
        ("transport",),
        {(path,): f"hit_tokens_{path}" for path in _PATHS},
    ),
    Metric(
        "vllm:mmcache_bytes",
        "Bytes moved between workers and the cache.",
        ("direction", "transport"),
        {(way, path): f"{way}_bytes_{path}" for way in ("load", "save") for path in _PATHS},
    ),
    Metric(
        "vllm:mmcache_saves",
        "Parts of blocks on their way to the cache, by what became of them. Dropped ones are tried again, and counted "
        "each time.",
        ("outcome",),
        {
            ("stored",): "blocks_saved",
            ("present",): "blocks_present",
            ("refused",): "saves_refused",
            ("dropped",): "saves_dropped",
        },
    ),
    _plain("load_failures", "Requests whose load failed: they are computed.", "loads_failed"),
    _plain("verify_failures", "Parts of blocks that failed their checks: they are not used.", "verify_failures"),
    _plain("uncacheable_requests", "Requests of unknown identity: they are not cached.", "requests_not_cacheable"),
    _plain("audit_requests", "Requests with a hit that were computed all the same, to compare.", "audit_requests"),
    _plain("audit_blocks", "Parts of blocks compared with what was computed.", "audit_blocks"),
    _plain("audit_differences", "Parts of blocks that were not what was computed: dropped.", "audit_differences"),
)
TIMES: Final = {
    "load_seconds": "Seconds from the start of a request's load in a worker to its end.",
    "save_seconds": "Seconds to store a batch of blocks once they are in host memory.",
}


class CacheStats(KVConnectorStats):  # type: ignore[misc]
    """What was added since the last report, summed over workers: counts, and lists of seconds."""

    def reset(self) -> None:
        """Start again from nothing."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> CacheStats:
        """Add another report to this one."""
        for name, added in other.data.items():
            self.data[name] = self.data[name] + added if name in self.data else added
        return self

    def reduce(self) -> dict[str, Any]:
        """What is logged: counts, and the mean of times."""
        told = {name: round(sum(x) / len(x), 6) if isinstance(x, list) else x for name, x in self.data.items() if x}
        return {f"mmcache_{name}": told[name] for name in sorted(told)}

    def is_empty(self) -> bool:
        """True if nothing happened."""
        return not any(self.data.values())


class StatsReporter:
    """Turns counters since the start into reports of what was added."""

    def __init__(self) -> None:
        self._reported: dict[str, int] = {}

    def report(self, counters: dict[str, int], times: dict[str, list[float]]) -> CacheStats | None:
        """What was added since the last report, with `times` taken since then; None for nothing, as in most steps."""
        if counters == self._reported and not any(times.values()):
            return None
        added: dict[str, Any] = {name: count - self._reported.get(name, 0) for name, count in counters.items()}
        self._reported = counters
        stats = CacheStats(data={name: one for name, one in (added | times).items() if one})
        return None if stats.is_empty() else stats


class CacheProm(KVConnectorPromMetrics):  # type: ignore[misc]
    """The Prometheus metrics, every series from the start."""

    def __init__(self, *args: Any) -> None:
        """As vLLM's `build_prom_metrics` is called."""
        super().__init__(*args)
        self._counters: dict[tuple[int, str], Any] = {}
        self._times: dict[tuple[int, str], Any] = {}
        for metric in COUNTERS:
            made = self._counter_cls(
                name=metric.name, documentation=metric.help, labelnames=[*self._labelnames, *metric.labels]
            )
            for engine, values in self.per_engine_labelvalues.items():
                for labels, count in metric.series.items():
                    self._counters[engine, count] = made.labels(*values, *labels)
        for name, text in TIMES.items():
            made = self._histogram_cls(
                name=f"vllm:mmcache_{name}", documentation=text, labelnames=self._labelnames,
                buckets=list(SECONDS_BUCKETS),
            )  # fmt: skip
            for engine, values in self.per_engine_labelvalues.items():
                self._times[engine, name] = made.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's report. What has no metric (counts of the client, say) is in the log only."""
        for name, added in transfer_stats_data.items():
            if (counter := self._counters.get((engine_idx, name))) is not None:
                counter.inc(added)
            elif (histogram := self._times.get((engine_idx, name))) is not None:
                for seconds in added:
                    histogram.observe(seconds)
