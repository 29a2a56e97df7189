"""`mmcache top`: what a server did between two looks at its counters, and the table that shows it. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from mmcache.cli_common import printable, size_text

KINDS: Final = ("kv", "embedding", "prompt", "latent")
_RATES: Final = (
    "hits", "misses", "lookups", "stored", "bytes_read", "bytes_written", "evictions", "expired_entries",
    "put_full", "put_quota", "put_stopped", "corrupt_dropped", "refused_pins", "expired_leases",
)  # fmt: skip


class Rates:
    """Rates since the last look."""

    def __init__(self, first: Mapping[str, Any], now_s: float) -> None:
        self._last, self._last_s = _servers(first), now_s

    def look(self, stat: Mapping[str, Any], now_s: float) -> dict[str, Any]:
        """What changed: rates per second, the hit rate of what was asked since then (None: nothing was), gauges.

        `stat` is from `Client.stat`, `now_s` monotonic seconds. A server that was restarted counts from its start; a
        cluster's shard that did not answer before counts from the next look on.
        """
        after, servers = stat["counters"], _servers(stat)
        passed_s = max(1e-9, now_s - self._last_s)
        pairs = [(self._last[name], one) for name, one in servers.items() if name in self._last]
        grown = {name: sum(_grown(name, before, now) for before, now in pairs) for name in _RATES}
        asked = grown["hits"] + grown["misses"]
        self._last, self._last_s = servers, now_s
        return {
            "interval_s": round(passed_s, 3),
            "hit_rate": grown["hits"] / asked if asked else None,
            "per_s": {name: round(count / passed_s, 1) for name, count in grown.items()},
            "bytes_by_kind": {kind: after.get(f"bytes_{kind}", 0) for kind in KINDS},
            "gauges": {
                name: after.get(name, 0)
                for name in ("entries", "bytes_used", "bytes_capacity", "held_bytes", "leases", "connections")
            },
            "uptime_s": stat["uptime_s"],
            "silent": {name: one for name, one in stat.get("shards", {}).items() if isinstance(one, str)},
        }


def _servers(stat: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The statistics of each server that answered."""
    shards = stat.get("shards", {"": stat})
    return {name: one for name, one in shards.items() if not isinstance(one, str)}


def _grown(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    same = before["server_id"] == now["server_id"]
    return int(now["counters"].get(name, 0)) - (int(before["counters"].get(name, 0)) if same else 0)


def top_table(look: Mapping[str, Any], url: str) -> Table:
    """One look for people."""
    rate, gauges = look["per_s"], look["gauges"]
    table = Table(title=escape(f"{url}, up {look['uptime_s']:,.0f} s"), box=None, show_header=False, padding=(0, 2))
    hit_rate = look["hit_rate"]
    table.add_row("hit rate", "nothing was asked" if hit_rate is None else f"{hit_rate:.1%}")
    table.add_row("asked", f"{rate['hits'] + rate['misses']:,.0f} keys/s, {rate['lookups']:,.0f} more looked up")
    table.add_row("read", f"{size_text(int(rate['bytes_read']))}/s")
    table.add_row("stored", f"{rate['stored']:,.0f} values/s, {size_text(int(rate['bytes_written']))}/s")
    table.add_row("left", f"{rate['evictions']:,.0f} evicted/s, {rate['expired_entries']:,.0f} expired/s")
    refused = rate["put_full"] + rate["put_quota"] + rate["put_stopped"]
    table.add_row("refused", f"{refused:,.0f} puts/s (quota {rate['put_quota']:,.0f}, mode {rate['put_stopped']:,.0f})")
    share = gauges["bytes_used"] / max(1, gauges["bytes_capacity"])
    table.add_row("memory", f"{size_text(gauges['bytes_used'])} of {size_text(gauges['bytes_capacity'])} ({share:.0%})")
    kinds = ", ".join(f"{kind} {size_text(nbytes)}" for kind, nbytes in look["bytes_by_kind"].items() if nbytes)
    table.add_row("holds", f"{gauges['entries']:,} values{': ' if kinds else ''}{kinds}")
    table.add_row("claims", f"{gauges['leases']:,} leases, {size_text(gauges['held_bytes'])} held")
    table.add_row("clients", f"{gauges['connections']:,} connections")
    for name, why in look["silent"].items():
        table.add_row("[bold red]no answer[/]", escape(f"{printable(name)}: {printable(why)}"))
    if rate["corrupt_dropped"]:
        table.add_row("[bold red]bad bytes[/]", f"{rate['corrupt_dropped']:,.1f} entries/s dropped: test this memory")
    return table
