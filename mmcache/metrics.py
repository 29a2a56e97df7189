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
KINDS: Final = ("kv", "embedding", "prompt", "latent")
MODALITIES: Final = ("text", "image", "video", "audio")


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
    "longest_step_bytes": Meaning("longest_step_bytes", False, "Most bytes copied or hashed without a break so far."),
    "lookups": Meaning("lookups", True, "Keys that match_prefix found."),
    "hits": Meaning("hits", True, "Keys asked for that were there."),
    "misses": Meaning("misses", True, "Keys asked for that were not there."),
    "bytes_read": Meaning("read_bytes", True, "Frame bytes given out."),
    "stored": Meaning("stored", True, "Frames stored."),
    "bytes_written": Meaning("written_bytes", True, "Bytes of frames stored."),
    "bytes_lent": Meaning("lent_bytes", True, "Bytes of tensors stored from memory that clients lend."),
    "put_present": Meaning("put_present", True, "Puts of what was stored already."),
    "put_busy": Meaning("put_busy", True, "Puts of what another client was writing."),
    "put_full": Meaning("put_full", True, "Puts refused for want of memory."),
    "put_too_large": Meaning("put_too_large", True, "Puts refused as larger than may be."),
    "put_no_entries": Meaning("put_no_entries", True, "Puts refused as the index was full."),
    "put_quota": Meaning("put_quota", True, "Puts refused as the tenant's or namespace's quota was used up."),
    "put_stopped": Meaning("put_stopped", True, "Puts refused as an operator had stopped writes."),
    "put_bad_frame": Meaning("put_bad_frame", True, "Puts whose bytes were not the frame that was announced."),
    "put_lost": Meaning("put_lost", True, "Puts whose reservation ended before all bytes were there."),
    "put_expired": Meaning("put_expired", True, "Puts whose time to live was over before they were stored."),
    "evictions": Meaning("evictions", True, "Entries that left for others."),
    "expired_entries": Meaning("expired_entries", True, "Entries whose time to live was over."),
    "expired_leases": Meaning("expired_leases", True, "Leases nobody gave back in time: killed or stopped readers."),
    "expired_reservations": Meaning("expired_reservations", True, "Reservations nobody ended in time."),
    "refused_pins": Meaning("refused_pins", True, "Keys not pinned because too much was leased at once."),
    "corrupt_dropped": Meaning("corrupt_dropped", True, "Entries dropped as their bytes had changed."),
    "restored_entries": Meaning("restored_entries", False, "Values that a server before this one stored."),
    "restored_dropped": Meaning("restored_dropped", False, "Values of a server before this one that were not whole."),
    "namespaces_forgotten": Meaning("namespaces_forgotten", True, "Namespaces whose facts are no longer known."),
}


class Labelled(NamedTuple):
    """A family of numbers with one label: STAT's name of one is `prefix`, the label's value, `suffix`."""

    name: str
    grows: bool
    help: str
    label: str
    values: tuple[str, ...]
    prefix: str
    suffix: str = ""
    scale: float = 1.0


LABELLED: Final = (
    Labelled("stored_bytes", False, "Bytes stored now, headers included.", "kind", KINDS, "bytes_"),
    Labelled("kind_hits", True, "Values found, by kind.", "kind", KINDS, "hits_"),
    Labelled("kind_stored", True, "Values stored since the start, by kind.", "kind", KINDS, "stored_"),
    Labelled("media_hits", True, "Values found whose writer said what they are of.", "modality", MODALITIES, "hits_"),
    Labelled("media_stored", True, "Values stored whose writer said what of.", "modality", MODALITIES, "stored_"),
    Labelled("hit_pixels", True, "Pixels that were not encoded again.", "modality", ("image",), "hits_", "_pixels"),
    Labelled("hit_frames", True, "Frames that were not encoded again.", "modality", ("video",), "hits_", "_frames"),
    Labelled("hit_audio_seconds", True, "Sound not encoded again.", "modality", ("audio",), "hits_", "_ms", 1e-3),
    Labelled("stored_pixels", True, "Pixels behind values stored.", "modality", ("image",), "stored_", "_pixels"),
    Labelled("stored_frames", True, "Frames behind values stored.", "modality", ("video",), "stored_", "_frames"),
    Labelled("stored_audio_seconds", True, "Sound behind them.", "modality", ("audio",), "stored_", "_ms", 1e-3),
)


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
        for one in LABELLED:
            family = CounterMetricFamily if one.grows else GaugeMetricFamily
            labelled = family(PREFIX + one.name, one.help, labels=[one.label])
            for value in one.values:
                labelled.add_metric([value], one.scale * numbers.get(one.prefix + value + one.suffix, 0))
            yield labelled
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
