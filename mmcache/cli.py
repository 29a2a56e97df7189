"""The command line: serve, bench, stat, inspect, version. Every command has examples in its --help, and --json."""

from __future__ import annotations

import json
import logging
import platform
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmcache._version import __version__
from mmcache.config import parse_nbytes, server_config
from mmcache.connect import connect
from mmcache.errors import ConfigError, FrameError, MMCacheError, UsageError
from mmcache.frame import parse_header
from mmcache.server.serve import Server

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="One content-addressed, verified cache for KV blocks, media embeddings and latents.",
)
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Measure with real data.")
app.add_typer(bench_app, name="bench")

DEFAULT_URL = "mmcache://127.0.0.1:7600"
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
Url = Annotated[str, typer.Option("--connect", "-c", metavar="URL", help="The server to ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _fail(error: Exception) -> NoReturn:
    print(f"mmcache: {error}", file=sys.stderr)
    raise typer.Exit(2 if isinstance(error, UsageError) else 1)


@app.command(
    epilog="Example: **mmcache serve --memory 8GiB --prefault** · then **mmcache stat** or connect to mmcache://127.0.0.1:7600"
)
def serve(
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT to listen on; port 0 picks one.", metavar="HOST:PORT")
    ] = None,
    unix: Annotated[str | None, typer.Option(help="Unix socket path; 'auto' or '' for none.", metavar="PATH")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for stored values.", metavar="SIZE")] = None,
    max_entries: Annotated[int | None, typer.Option(help="Entries in the index; 0: one per 16 KiB.")] = None,
    alignment: Annotated[int | None, typer.Option(help="Of tensors in memory, bytes; 4096 for RDMA.")] = None,
    prefault: Annotated[
        bool | None, typer.Option("--prefault", help="Take all the memory now, not on first use.")
    ] = None,
    lease_s: Annotated[float | None, typer.Option(help="How long a reader may hold an entry.")] = None,
    max_connections: Annotated[int | None, typer.Option(help="Connections at once.")] = None,
    insecure_network: Annotated[
        bool | None,
        typer.Option("--insecure-network", help="Allow an address other hosts can reach, with no access control."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every dropped connection.")] = False,
    as_json: Json = False,
) -> None:
    """Run a shard: keep values in memory and serve them until SIGTERM or Ctrl-C, then drain and exit 0.

    Settings not given are read from MMCACHE_MEMORY, MMCACHE_LISTEN and so on. Prints one ready line once it accepts.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before any thread starts: all inherit it, one waits
    try:
        config = server_config(
            listen=listen,
            unix_path=unix,
            memory_nbytes=None if memory is None else parse_nbytes(memory),
            max_entries=max_entries,
            alignment=alignment,
            prefault=prefault,
            lease_s=lease_s,
            max_connections=max_connections,
            insecure_network=insecure_network,
        )
        if not config.listen and not config.unix_path:
            raise ConfigError("there is nothing to listen on; give --listen HOST:PORT or --unix PATH")
        server = Server(config)
        server.start()
    except MMCacheError as error:
        _fail(error)
    _run_until_signal(server, as_json=as_json)


def _run_until_signal(server: Server, *, as_json: bool) -> None:
    host, port = server.address or ("", 0)
    url = f"mmcache://{f'[{host}]' if ':' in host else host}:{port}" if host else f"mmcache+unix://{server.unix_path}"
    config = server.config
    if as_json:
        ready = {"ready": True, "url": url, "unix_path": server.unix_path, "memory_nbytes": config.memory_nbytes}
        print(json.dumps(ready), flush=True)
    else:
        size = f"{config.memory_nbytes / 2**20:.0f} MiB, {config.entries} entries"
        print(f"mmcache {__version__} ready: {url} ({size}; unix socket {server.unix_path or 'off'})", flush=True)
    signal.sigwait(STOP_SIGNALS)
    server.stop()


@app.command(epilog="Example: **mmcache stat --json | jq .counters.hits**")
def stat(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show a server's counters: what it holds, hits and misses, leases, evictions."""
    try:
        with connect(url) as client:
            report = client.stat()
    except MMCacheError as error:
        _fail(error)
    if as_json:
        print(json.dumps(report))
        return
    table = Table(title=f"{report['server']} · up {report['uptime_s']:.0f} s · reached by {report['transport']}")
    table.add_column("counter")
    table.add_column("value", justify="right")
    for name, value in report["counters"].items():
        table.add_row(name, f"{value:,}")
    Console().print(table)


@app.command(epilog="Example: **mmcache inspect 5f0c…(64 hex digits)**")
def inspect(
    key: Annotated[str, typer.Argument(help="A stored key, 64 hexadecimal digits (Key.hex()).")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show one entry: its tensors, times and the facts of its namespace. Exit 1 if it is not stored."""
    try:
        digest = bytes.fromhex(key)
        if len(digest) != 32:
            raise ValueError
    except ValueError:
        _fail(UsageError(f"{key!r} is not a key; a key has 64 hexadecimal digits, as Key.hex() prints"))
    try:
        with connect(url) as client:
            reply = client.inspect(digest)
        if not reply.found:
            _fail(MMCacheError(f"{key} is not stored at {url}"))
        description = _describe(reply.header, reply.kind, dict(reply.facts))
    except MMCacheError as error:
        _fail(error)
    if as_json:
        print(json.dumps(description))
        return
    for name, value in description.items():
        if name in ("tensors", "namespace_facts"):
            print(f"{name}:")
            rows = value if name == "tensors" else [f"{fact} = {text}" for fact, text in value.items()]
            for row in rows:
                print(
                    f"  {row['name']}: {row['dtype']}{row['shape']} {row['nbytes']:,} bytes"
                    if isinstance(row, dict)
                    else f"  {row}"
                )
        else:
            print(f"{name}: {value}")


def _describe(header_bytes: bytes, kind: str, facts: dict[str, str]) -> dict[str, Any]:
    try:
        header = parse_header(header_bytes, limit_nbytes=1 << 40)
    except FrameError as error:
        raise FrameError(f"the stored header is damaged: {error}") from None
    meta = header.meta
    return {
        "key": meta.key.hex(),
        "kind": kind or meta.kind.name.lower(),
        "frame_nbytes": header.frame_nbytes,
        "index": meta.chain_index,
        "parent": meta.parent.hex() if any(meta.parent) else None,
        "home": meta.home.hex(),
        "namespace": meta.namespace.hex(),
        "created_ms": meta.created_ms,
        "expires_ms": meta.expires_ms or None,
        "writer": meta.writer,
        "tensors": [
            {"name": t.spec.name, "dtype": t.spec.dtype, "shape": list(t.spec.shape), "nbytes": t.nbytes,
             "xxh3_128": t.checksum.hex()}
            for t in header.tensors
        ],
        "namespace_facts": facts,
    }  # fmt: skip


@bench_app.command(
    "media",
    epilog="Examples: **mmcache bench media** · **mmcache bench media --memory 10%** · "
    "**mmcache bench media --inject corrupt** (must be caught) · **--inject wrong --no-verify** (must show as wrong)",
)
def bench_media(
    url: Annotated[
        str | None, typer.Option("--connect", "-c", metavar="URL", help="A running server; default: its own.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Of its own server: a size, a share of the working set, or auto.")
    ] = "auto",
    scale: Annotated[str, typer.Option(help="full or quick.")] = "full",
    questions: Annotated[int | None, typer.Option(help="Questions about each photo and video.")] = None,
    inject: Annotated[str | None, typer.Option(help="Damage stored entries: wrong or corrupt.", metavar="KIND")] = None,
    verify: Annotated[bool, typer.Option(help="Verify what is read.")] = True,
    seed: Annotated[int, typer.Option(help="Of the encoder, the order of requests and the damage.")] = 0,
    json_to: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE, or - for stdout.")
    ] = None,
) -> None:
    """Ask several questions about real videos and photos, and compare every hit bit for bit with a recomputation.

    Reports the hit rate of each kind beside that of an endless cache and of an exact LRU, bytes and latencies.
    Exits 1 if anything wrong was read, or if damage that was planted did not show.
    """
    from mmcache.bench.media import MediaOptions, run

    console = Console(stderr=json_to == "-")
    try:
        options = MediaOptions(
            connect=url,
            memory=memory,
            scale=scale,
            questions=questions,
            inject=inject,  # type: ignore[arg-type]  # MediaOptions checks it
            verify=verify,
            seed=seed,
        )
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task("requests")
            report = run(options, lambda done, total: bar.update(task, completed=done, total=total))
    except MMCacheError as error:
        _fail(error)
    report.print(console)
    if json_to is not None:
        text = json.dumps(report.to_dict())
        if json_to == "-":
            print(text)
        else:
            Path(json_to).write_text(text + "\n")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version of mmcache and of what it runs on."""
    import blake3
    import google.protobuf
    import numpy
    import xxhash

    parts = {
        "mmcache": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": numpy.__version__,
        "protobuf": google.protobuf.__version__,
        "blake3": blake3.__version__,
        "xxhash": xxhash.VERSION,
    }
    print(json.dumps(parts) if as_json else "\n".join(f"{name} {value}" for name, value in parts.items()))


def main() -> None:
    """Entry point."""
    app()
