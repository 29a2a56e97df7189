"""`python -m mmcache.testing.simulator fleet`: what a fleet's shards, networks and Redis bear, by arithmetic.

Each number follows from what is given: how many GPUs, how often each is asked, how long prompts are, how much of them
is found. How unevenly load lies, and how many shards a query asks, are what the scale curve says, and are given too.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from mmcache.cluster.beats import BEAT_S, Beat

POLL_S: Final = 5.0  # as a client of Redis looks at least, when nothing wakes it
GIB: Final = 1 << 30
GIVEN: Final = (
    ("gpus", 1000, "how many"),
    ("host-gpus", 8, "of one host, which has one shard"),
    ("clients", 2, "of one GPU: a scheduler and a worker"),
    ("rate", 0.5, "requests a second of each GPU"),
    ("tokens", 12_288, "of a request's prompt; the mean of Mooncake's conversation trace"),
    ("found", 0.37, "share of the prompt that is read; what an endless cache finds in that trace"),
    ("token-nbytes", 57_344, "of KV a token; Qwen2.5-VL-7B"),
    ("memory-gib", 512, "of each shard"),
    ("replicas", 1, "owners of a value"),
    ("asks", 5.8, "shards a query asks"),
    ("lookups-ratio", 2.0, "the busiest shard's lookups over the mean"),
    ("reads-ratio", 2.5, "the busiest shard's reads over the mean"),
    ("bytes-ratio", 1.2, "the fullest shard over the mean"),
)


def add_fleet(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser("fleet", help="what a fleet needs, by arithmetic", description="See docs/scale.md.")
    for name, default, text in GIVEN:
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} ({default:,})")


def needs(given: argparse.Namespace) -> list[tuple[str, str]]:
    """What there is, by name, as text."""
    hosts = given.gpus / given.host_gpus
    requests = given.gpus * given.rate
    prompt_nbytes = given.tokens * given.token_nbytes
    read = requests * prompt_nbytes * given.found
    written = requests * prompt_nbytes * (1 - given.found) * given.replicas
    memory = hosts * given.memory_gib * GIB
    usable = memory / given.bytes_ratio
    clients = given.gpus * given.clients
    beat = Beat(id="shard-123.mmcache", address="mmcache://10.0.12.34:7600", weight=1.0, registration="0" * 32,
                since_ms=10**12, version="1.0.0")  # fmt: skip
    looks = clients / POLL_S
    return [
        ("shards, one a host", f"{hosts:,.0f}"),
        ("memory of all", f"{memory / GIB / 1024:,.1f} TiB"),
        ("tokens held, once the fullest is full", f"{usable / given.replicas / given.token_nbytes / 1e9:,.2f} billion"),
        ("a value stays, at this rate", f"{usable / written:,.0f} s"),
        ("lookups a second: mean shard, busiest",
         f"{requests * given.asks / hosts:,.0f}, {requests * given.asks / hosts * given.lookups_ratio:,.0f}"),
        ("read a second: all, mean shard, busiest",
         f"{_gb(read)}, {_gb(read / hosts)}, {_gb(read / hosts * given.reads_ratio)}"),
        ("written a second: all, mean shard, fullest",
         f"{_gb(written)}, {_gb(written / hosts)}, {_gb(written / hosts * given.bytes_ratio)}"),
        ("network of the busiest shard, both ways",
         f"{(read * given.reads_ratio + written * given.bytes_ratio) / hosts * 8 / 1e9:,.0f} Gbit/s"),
        ("moves, as it is read, when one joins", f"{memory / (hosts + 1) / GIB:,.0f} GiB: 1/{hosts + 1:.0f}"),
        ("computed again when one dies for good", f"{given.memory_gib if given.replicas < 2 else 0:,.0f} GiB at most"),
        ("Redis: heartbeats a second", f"{hosts / BEAT_S:,.0f}"),
        ("Redis: looks of clients a second", f"{looks:,.0f}"),
        ("Redis: sent a second", f"{looks * hosts * len(beat.pack()) / 1e6:,.1f} MB"),
    ]  # fmt: skip


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB"


def fleet(given: argparse.Namespace) -> int:
    """Print what is given, and what follows; 0."""
    table = Table("given", "", "what follows", "")
    rows = [(text, f"{getattr(given, name.replace('-', '_')):,g}") for name, _, text in GIVEN]
    for left, right in zip(rows, needs(given) + [("", "")] * (len(rows) - len(needs(given))), strict=True):
        table.add_row(*left, *right)
    Console(width=max(150, Console().width)).print(table)
    return 0
