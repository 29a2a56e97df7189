"""`mmcache bench`: measure with real data, or replay what was recorded."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmcache.bench.replay import Row
from mmcache.bench.trace import MAX_LINE_CHARS, Trace
from mmcache.cli_bench_serve import bench_serve_app
from mmcache.cli_common import progress_bar, write_text
from mmcache.cli_workloads import JsonTo, workloads_app
from mmcache.errors import ConfigError, UsageError

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure with real data. `media`, `chat`, `diffusion` and `serve` need the bench extra: "
    "pip install 'mmcache[bench]' (in a clone: make demo).",
    epilog="Examples: **mmcache bench media** · **mmcache bench chat --html chat.html** · "
    "**mmcache bench transfer --quick** · **mmcache bench serve --url http://127.0.0.1:8000/v1** · "
    "**mmcache bench trace FILE** · **mmcache bench media --help**",
)
bench_app.add_typer(workloads_app)
bench_app.add_typer(bench_serve_app)


@bench_app.command(
    "trace",
    epilog="Examples: **mmcache bench trace conversation_trace.jsonl.gz** · "
    "**mmcache bench trace FILE --capacity 500k,2M --json -** · **mmcache bench trace --generate 1**",
)
def bench_trace(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="JSON lines with hash_ids, plain or gzip; -: stdin.")
    ] = None,
    capacity: Annotated[
        str, typer.Option(metavar="TOKENS", help="How many tokens the caches hold, such as 500k or 1M,3M.")
    ] = "1M,3M,10M,20M",
    block_tokens: Annotated[
        int, typer.Option(help="Tokens in a block; 0: what the trace's input_length says.", min=0)
    ] = 0,
    generate: Annotated[
        int | None, typer.Option(metavar="SEED", help="Instead of FILE: a made-up trace that follows from SEED.")
    ] = None,
    json_to: JsonTo = None,
) -> None:
    """Replay a trace of prompts over caches of several sizes: what would hit, by eviction policy, and what could.

    Reads Mooncake's and Qwen-Bailian's format: `hash_ids`, a prompt's blocks in order; `input_length`. Identities are
    replayed through the policies a server has (`serve --policy`), without tensors; the optimum (Belady) knows the
    future.
    """
    from mmcache.bench import replay, tracegen
    from mmcache.bench import trace as traces

    sizes = [_tokens(text) for text in capacity.split(",")]
    if (file is None) == (generate is None):
        raise UsageError("give a trace FILE or --generate SEED, one of them")
    if generate is not None and block_tokens:
        raise UsageError("--block-tokens is of a trace FILE; a made-up trace has blocks of 16 tokens")
    if (
        file is not None
        and json_to not in (None, "-")
        and Path(json_to).exists()
        and file.exists()
        and Path(json_to).samefile(file)
    ):
        raise UsageError(f"--json {json_to} is the trace itself; name another file")
    if json_to not in (None, "-"):
        write_text(Path(json_to), "", "a")  # find out now, not after the run
    trace = tracegen.generate(generate or 0) if file is None else traces.parse(_lines(file), block_tokens)
    inferred = "" if block_tokens or file is None else " (by the requests' lengths; --block-tokens says otherwise)"
    rows = []
    for size in sizes:
        with progress_bar(f"{size:,} tokens, each policy") as show:
            rows.append(replay.replay(trace, size, show))
    ideal = replay.endless(trace)
    result = {
        "workload": "trace",
        "requests": len(trace.requests),
        "blocks": trace.blocks,
        "unique_blocks": trace.unique_blocks,
        "block_tokens": trace.block_tokens,
        "ideal_hit_rate": ideal,
        "capacities": [
            {"tokens": row.capacity_tokens, "blocks": row.capacity_blocks, "optimal": row.optimal,
             **{_json_name(name): rate for name, rate in row.rates.items()},
             **{f"{_json_name(name)}_gap_closed": row.gap_closed(name) for name in row.rates if name != "lru"}}
            for row in rows
        ],
    }  # fmt: skip
    if json_to != "-":
        name = f"made up from seed {generate}" if file is None else file.name
        _print_trace(name, trace, rows, ideal, inferred)
    if json_to is not None:
        text = json.dumps(result) + "\n"
        print(text, end="") if json_to == "-" else write_text(Path(json_to), text)


def _json_name(policy: str) -> str:
    return policy.replace("-", "_")


def _print_trace(source: str, trace: Trace, rows: list[Row], ideal: float, inferred: str) -> None:
    table = Table(box=None, padding=(0, 1))
    others = [name for name in rows[0].rates if name != "lru"]
    names = ("lru", *others)
    for title in ("capacity, tokens", "blocks", *names, "optimum", *(f"gap {name} closes" for name in others)):
        table.add_column(title, justify="right", min_width=min(9, len(title)))
    for row in rows:
        rates = [f"{rate:.2%}" for rate in (*(row.rates[name] for name in names), row.optimal)]
        shares = [row.gap_closed(name) for name in others]
        closed = ["none to close" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(f"{row.capacity_tokens:,}", f"{row.capacity_blocks:,}", *rates, *closed)
    console, blocks = Console(), f"{trace.blocks:,} blocks of {trace.block_tokens} tokens{inferred}"
    console.print(
        f"{source}: {len(trace.requests):,} requests, {blocks}, {trace.unique_blocks:,} different; "
        f"an endless cache hits {ideal:.2%}",
        soft_wrap=True,
    )
    console.print(table)
    console.print("of all blocks asked for, those found: a prompt's leading blocks that are there", style="dim")


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, a pipe or "-", plain or gzip; none is read further than a trace's line may be long."""
    try:
        with open(0 if str(file) == "-" else file, "rb", closefd=str(file) != "-") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            with io.TextIOWrapper(gzip.open(raw) if packed else raw, encoding="utf-8-sig") as text:
                while line := text.readline(MAX_LINE_CHARS + 1):
                    yield line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"cannot read {file}: {error}; give a trace in JSON lines, plain or gzip") from None


def _tokens(text: str) -> int:
    """A number of tokens such as 500k or 3M."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)([kmg]?)", text.strip(), re.IGNORECASE)
    tokens = int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()]) if found else 0
    if tokens < 1:
        raise UsageError(f"--capacity {text!r} is no number of tokens; give such as 500k or 1M,3M")
    return tokens
