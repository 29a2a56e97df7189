"""Every metric, named once: what a shard counts, as Prometheus sees it.

The server's STAT reply, `mmcache stat` and the metrics page show the same numbers; this says which of them only grow
and what each means. PURE but for the listener: numbers are read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mmcache._version import __version__
from mmcache.errors import TransportError

Read = Callable[[], Mapping[str, int]]
PREFIX: Final = "mmcache_"
KIND_PREFIX: Final = "bytes_"
KINDS: Final = ("kv", "embedding", "prompt", "latent")


class Meaning(NamedTuple):
    """What one number of STAT is: its Prometheus name (counters get `_total`), whether it only grows, and its help."""

    name: str
    grows: bool
    help: str


METRICS: Final[Mapping[str, Meaning]] = {
    "entries": Meaning("entries", False, "Values stored."),
    "ghosts": Meaning("ghosts", False, "Parents that are only remembered because a child is stored."),
    "bytes_capacity": Meaning("capacity_bytes", False, "Memory for values."),
    "bytes_used": Meaning("used_bytes", False, "Memory taken by values, rounded up to the alignment."),
    "largest_free_bytes": Meaning("largest_free_bytes", False, "The largest free piece of memory."),
    "leases": Meaning("leases", False, "Readers' claims now."),
    "reservations": Meaning("reservations", False, "Writers' claims now."),
    "held_bytes": Meaning("held_bytes", False, "Bytes under claims, which cannot be evicted."),
    "connections": Meaning("connections", False, "Clients' connections now."),
    "inflight_bytes": Meaning("inflight_bytes", False, "Bytes being received now."),
    "lookups": Meaning("lookups", True, "Keys that match_prefix found."),
    "hits": Meaning("hits", True, "Keys asked for that were there."),
    "misses": Meaning("misses", True, "Keys asked for that were not there."),
    "bytes_read": Meaning("read_bytes", True, "Frame bytes given out."),
    "stored": Meaning("stored", True, "Frames stored."),
    "bytes_written": Meaning("written_bytes", True, "Bytes of frames stored."),
    "put_present": Meaning("put_present", True, "Puts of what was stored already."),
    "put_busy": Meaning("put_busy", True, "Puts of what another client was writing."),
    "put_full": Meaning("put_full", True, "Puts refused for want of memory."),
    "put_too_large": Meaning("put_too_large", True, "Puts refused as larger than may be."),
    "put_no_entries": Meaning("put_no_entries", True, "Puts refused as the index was full."),
    "evictions": Meaning("evictions", True, "Entries that left for others."),
    "expired_entries": Meaning("expired_entries", True, "Entries whose time to live was over."),
    "expired_leases": Meaning("expired_leases", True, "Leases nobody gave back in time: killed or stopped readers."),
    "expired_reservations": Meaning("expired_reservations", True, "Reservations nobody ended in time."),
    "refused_pins": Meaning("refused_pins", True, "Keys not pinned because too much was leased at once."),
    "corrupt_dropped": Meaning("corrupt_dropped", True, "Entries dropped as their bytes had changed."),
    "namespaces_forgotten": Meaning("namespaces_forgotten", True, "Namespaces whose facts are no longer known."),
}


class ShardCollector(Collector):
    """One shard's numbers, read anew for every scrape. A number that has no meaning here is left out."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        numbers = self._read()
        for name, meaning in METRICS.items():
            if name in numbers:
                family = CounterMetricFamily if meaning.grows else GaugeMetricFamily
                yield family(PREFIX + meaning.name, meaning.help, value=numbers[name])
        stored = GaugeMetricFamily(
            PREFIX + "stored_bytes", "Bytes stored of each kind, headers included.", labels=["kind"]
        )
        for kind in KINDS:
            stored.add_metric([kind], numbers.get(KIND_PREFIX + kind, 0))
        yield stored
        version = GaugeMetricFamily(PREFIX + "build_info", "Always 1; the version is the label.", labels=["version"])
        version.add_metric([__version__], 1)
        yield version


class MetricsPage:
    """`http://HOST:PORT/metrics` until `close`. Raises TransportError if the address cannot be had."""

    def __init__(self, host: str, port: int, read: Read) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(ShardCollector(read))
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise TransportError(
                f"metrics cannot be served on {host}:{port}: {error}; choose another --metrics"
            ) from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stop answering, and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
