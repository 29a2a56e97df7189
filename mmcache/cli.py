"""The command line: serve, stat, inspect, doctor, version; the others are in cli_*.py.

Every command has examples in its --help, and --json.

Whatever is raised ends in `main`: one line on stderr, exit 2 for what can never work, else 1.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmcache import cli_cluster, cli_explain, cli_ops, cli_size
from mmcache._version import __version__
from mmcache.cli_bench import bench_app
from mmcache.cli_common import ADMINS_ONLY, DEFAULT_URL, Json, Url, Verbose, key_digest, printable, size_text
from mmcache.cli_serve import run
from mmcache.cli_token import token_app
from mmcache.config import ServerConfig, parse_nbytes, server_config
from mmcache.connect import connect
from mmcache.errors import FrameError, MMCacheError, UsageError
from mmcache.frame import parse_header

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Examples: **mmcache serve --memory 8GiB** · **mmcache stat** · **mmcache bench media** · "
    "**mmcache serve --help** for the settings",
)
app.add_typer(bench_app, name="bench")
cli_ops.register(app)
cli_explain.register(app)
cli_size.register(app)
cli_cluster.register(app)
app.add_typer(token_app, name="token")

DEFAULTS = ServerConfig()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmcache {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """One content-addressed, verified cache for KV blocks, media embeddings and latents."""


def _setting(name: str, text: str, *flags: str, metavar: str | None = None) -> Any:
    """An option of `serve` for a field of ServerConfig: its help ends with the default and the environment variable."""
    value = getattr(DEFAULTS, name)
    shown = size_text(value) if name.endswith("_nbytes") else "off" if value is False else str(value) or "none"
    variable = f"MMCACHE_{name.removesuffix('_nbytes').upper()}"
    return typer.Option(*flags, metavar=metavar, help=f"{text} (default: {shown}; {variable})")


Listen = Annotated[
    str | None, _setting("listen", "Listen here; port 0 picks one, '' listens on no port.", metavar="HOST:PORT")
]
UnixPath = Annotated[
    str | None,
    _setting(
        "unix_path",
        "Unix socket. 'auto': shard.sock in a private temporary directory, which the ready line and clients on "
        "this host are told; '': none, and so no shared memory.",
        "--unix",
        metavar="PATH",
    ),
]
Shards = Annotated[
    int | None,
    _setting("shards", "Processes, each with a share of the memory; ports, and --unix PATH, count up.", metavar="N"),
]
Metrics = Annotated[
    str | None,
    _setting("metrics", "Serve a page for Prometheus here; port 0 picks one, '' serves none.", metavar="HOST:PORT"),
]
PolicyName = Annotated[
    str | None, _setting("policy", "Which entries leave first: value, lru or s3-fifo.", metavar="NAME")
]
Mode = Annotated[str | None, _setting("mode", "Allow both, read, write or off; see `mmcache mode`.", metavar="MODE")]
LogForm = Annotated[str | None, _setting("log", "How to log: text or json, one object a line.", metavar="FORM")]
Grpc = Annotated[
    str | None,
    _setting(
        "grpc", "Serve gRPC here, for clients in any language; port 0 picks one, '' serves none.", metavar="HOST:PORT"
    ),
]
AccessFile = Annotated[
    str | None,
    _setting("access_file", "Who may come in, as whom: see `mmcache token --help`.", "--access", metavar="FILE"),
]
TlsCert = Annotated[str | None, _setting("tls_cert", "Speak TLS with this certificate chain, PEM.", metavar="FILE")]
TlsKey = Annotated[str | None, _setting("tls_key", "Its private key, mode 0600.", metavar="FILE")]
TlsClientCa = Annotated[
    str | None,
    _setting(
        "tls_client_ca", "Ask for client certificates signed by these CAs; needed without --access.", metavar="FILE"
    ),
]
InsecureNetwork = Annotated[
    bool | None,
    _setting(
        "insecure_network",
        "Allow an address other hosts can reach without TLS and access control.",
        "--insecure-network",
    ),
]
Hold = Annotated[
    bool | None,
    _setting(
        "hold",
        "Have a small process hold the memory, and start the server again with what it stored when it dies, or on "
        "SIGHUP (docs/warm-restart.md).",
        "--hold",
    ),
]
HugePages = Annotated[bool | None, _setting("huge_pages", "Use huge pages (vm.nr_hugepages).", "--huge-pages")]
Nixl = Annotated[
    str | None,
    _setting(
        "nixl",
        "Let clients read the memory by NIXL (RDMA) over these devices, as UCX names them: lo, mlx5_0:1. UCX asks "
        "nobody who they are: only on a network you trust, and for one tenant. Needs the extra nixl.",
        metavar="DEVICES",
    ),
]

Join = Annotated[
    str | None,
    _setting(
        "join",
        "Tell this cluster's Redis that this server is there, and at the end that it leaves: see `mmcache cluster`.",
        metavar="URL",
    ),
]
Advertise = Annotated[
    str | None,
    _setting(
        "advertise",
        "Where the cluster's clients find this server: mmcache://HOST:PORT, if not where it listens.",
        metavar="URL",
    ),
]


@app.command(
    epilog="Examples: **mmcache serve --memory 8GiB --prefault**, then **mmcache stat** or connect to "
    "mmcache://127.0.0.1:7600 · **MMCACHE_MEMORY=8GiB mmcache serve --listen 127.0.0.1:7700**"
)
def serve(
    listen: Listen = None,
    unix_path: UnixPath = None,
    memory: Annotated[
        str | None, _setting("memory_nbytes", "Memory for stored values, such as 8GiB.", metavar="SIZE")
    ] = None,
    shards: Shards = None,
    max_entries: Annotated[int | None, _setting("max_entries", "Entries in the index; 0: one per 16 KiB.")] = None,
    alignment: Annotated[
        int | None, _setting("alignment", "Of tensors in memory, bytes, a power of two; 4096 for RDMA.")
    ] = None,
    prefault: Annotated[
        bool | None, _setting("prefault", "Take all the memory now, not on first use.", "--prefault")
    ] = None,
    huge_pages: HugePages = None,
    hold: Hold = None,
    lease_s: Annotated[float | None, _setting("lease_s", "Seconds a reader may hold an entry.")] = None,
    policy: PolicyName = None,
    max_connections: Annotated[int | None, _setting("max_connections", "Connections at once.")] = None,
    insecure_network: InsecureNetwork = None,
    metrics: Metrics = None,
    mode: Mode = None,
    log: LogForm = None,
    grpc: Grpc = None,
    access_file: AccessFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    nixl: Nixl = None,
    join: Join = None,
    advertise: Advertise = None,
    weight: Annotated[
        float | None, _setting("weight", "In a cluster, its share of the keys; 0: its memory in GiB.")
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run a shard: keep values in memory and serve them until SIGTERM or Ctrl-C, then drain and exit 0.

    An option not given is read from its environment variable. Prints one ready line once it accepts. With --shards,
    that line names all addresses, and what dies is started again.
    """
    settings = {name: value for name, value in locals().items() if name not in ("memory", "verbose", "as_json")}
    config = server_config(memory_nbytes=None if memory is None else parse_nbytes(memory), **settings)
    run(config, verbose=verbose, as_json=as_json)


@app.command(epilog="Examples: **mmcache stat** · **mmcache stat --json | jq .counters.hits**")
def stat(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show a server's counters: what it holds, hits and misses, leases, evictions. docs/python.md explains each."""
    with connect(url) as client:
        report = client.stat()
    if as_json:
        print(json.dumps(report))
        return
    table = Table(title=escape(f"{report['server']}, up {report['uptime_s']:.0f} s"))
    table.add_column("counter", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, value in report["counters"].items():
        table.add_row(name, size_text(value) if "bytes" in name.split("_") else f"{value:,}")
    Console().print(table)
    print(f"read by {report['transport']}: {report['transport_why']}")
    if "bytes_capacity" not in report["counters"]:
        print(f"mmcache: {ADMINS_ONLY}", file=sys.stderr)


@app.command(
    epilog="Examples: **mmcache inspect 5f0c…(64 hex digits)** · **mmcache inspect KEY --json | jq .namespace_facts**"
)
def inspect(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A stored key, 64 hexadecimal digits (Key.hex()).")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show one entry: its tensors, times and the facts of its namespace. Exit 1 if it is not stored."""
    digest = key_digest(key)
    with connect(url) as client:
        reply = client.inspect(digest)
    if not reply.found:
        raise MMCacheError(
            f"{key} is not stored at {url}; it may have expired, been evicted or belong to another namespace: make the "
            "key again from the same namespace and content, and ask the server it was stored in"
        )
    description = _describe(reply.header, reply.kind, dict(sorted(reply.facts.items())))
    if as_json:
        print(json.dumps(description))
        return
    for name, value in description.items():
        if name == "tensors":
            print("tensors:")
            for row in value:
                print(f"  {printable(row['name'])}: {row['dtype']}{row['shape']} {row['nbytes']:,} bytes")
        elif name == "namespace_facts":
            print("namespace_facts:" if value else "namespace_facts: none are known here")
            for fact, text in value.items():
                print(f"  {printable(fact)} = {printable(text)}")
        else:
            print(f"{name}: {printable(str(value))}" + (f" ({_iso(value)})" if name.endswith("_ms") and value else ""))


def _iso(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError):
        return "beyond the calendar"


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


@app.command(
    epilog="Examples: **mmcache doctor** · **mmcache doctor --connect mmcache://127.0.0.1:7700** · "
    "**mmcache doctor --json**"
)
def doctor(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Say what this machine can do for mmcache, by trying it, and why the rest cannot. Run it where the engine runs."""
    from mmcache.doctor import examine

    found = examine(url)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found]))
        return
    table = Table(box=None, show_header=False, padding=(0, 2))
    for finding in found:
        table.add_row(*map(escape, finding))
    Console().print(table)


@app.command(
    epilog="Examples: **mmcache version** · **mmcache version --json** · **mmcache --version** for the number alone"
)
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
    try:
        app()
    except MMCacheError as error:
        print(f"mmcache: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
