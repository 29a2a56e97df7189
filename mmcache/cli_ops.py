"""`mmcache mode, rm, ls, top, audit`: what operators do while engines run."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.live import Live

from mmcache.cli_common import (
    ADMINS_ONLY,
    DEFAULT_URL,
    Json,
    Url,
    all_answered,
    printable,
    progress_bar,
    silence,
    size_text,
)
from mmcache.client.operations import MODALITIES, MODES, Operations
from mmcache.connect import connect
from mmcache.errors import MMCacheError, UsageError
from mmcache.pb import cache_pb2 as pb
from mmcache.top import Rates, top_table

Namespaces = Annotated[
    list[str] | None,
    typer.Option(
        "--namespace",
        "-n",
        metavar="NAME=VALUE|ID",
        help="Of namespaces with this fact, or this id (its first digits).",
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="Short for --namespace model=NAME; also its last part.")
]
Kind = Annotated[str | None, typer.Option(metavar="KIND", help="kv, embedding, prompt or latent.")]
Tenant = Annotated[str | None, typer.Option(metavar="NAME", help="Of one tenant.")]
OlderThan = Annotated[str | None, typer.Option(metavar="AGE", help="Stored longer ago: 90s, 15m, 12h, 7d.")]
_AGE_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(
        epilog="Examples: **mmcache mode** · **mmcache mode off** · **mmcache mode read -n model=Qwen2.5-VL-7B**"
    )(mode)
    app.command(
        epilog="Examples: **mmcache rm --model Qwen2.5-VL-7B** · **mmcache rm --older-than 12h --kind embedding** · "
        "**mmcache rm --all**"
    )(rm)
    app.command(epilog="Examples: **mmcache ls** · **mmcache ls --entries --kind kv --json | jq -r .key**")(ls)
    app.command(epilog="Examples: **mmcache top** · **mmcache top --interval 5** · **mmcache top --count 1 --json**")(
        top
    )
    app.command(epilog="Examples: **mmcache audit** · **mmcache audit --share 10%** · **mmcache audit --json**")(audit)


def _selection(
    namespaces: list[str] | None = None,
    model: str | None = None,
    kind: str | None = None,
    tenant: str | None = None,
    older_than: str | None = None,
) -> pb.Selection:
    """Raises UsageError for what selects nothing that can be."""
    selection = pb.Selection(kind=kind or "", tenant=tenant or "")
    if kind not in (None, "kv", "embedding", "prompt", "latent"):
        raise UsageError(f"--kind {kind!r} is unknown; give kv, embedding, prompt or latent")
    if tenant == "":  # an unset variable of a script must not widen what is selected
        raise UsageError("--tenant is empty; give a tenant's name, or leave it out")
    for text in [*(namespaces or []), *([] if model is None else [f"model={model}"])]:
        name, equals, value = text.partition("=")
        if equals and name and value:
            selection.facts[name] = value
            continue
        try:
            selection.namespace = bytes.fromhex(text)
        except ValueError:
            selection.namespace = b""
        if not selection.namespace or len(selection.namespace) > 32:
            raise UsageError(
                f"--namespace {text!r} is neither NAME=VALUE nor the first digits, an even number, of an id; `mmcache "
                "ls` shows both"
            )
    if older_than is not None:
        found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd])", older_than.strip())
        if not found or not float(found[1]) > 0:
            raise UsageError(f"--older-than {older_than!r} is no age; give such as 90s, 15m, 12h or 7d")
        selection.older_than_s = float(found[1]) * _AGE_S[found[2]]
    return selection


def mode(
    wanted: Annotated[str | None, typer.Argument(metavar="[off|read|write|both]", help="What to allow.")] = None,
    namespaces: Namespaces = None,
    model: Model = None,
    kind: Kind = None,
    tenant: Tenant = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show, or change, what engines may do: both, only read, only write, or nothing (off). Takes effect at once.

    Stopped reads are misses and stopped writes are skipped saves: engines go on without the cache. Nothing stored is
    lost. With --namespace and the like: for what those select, also namespaces to come. A restart forgets it; see
    serve --mode.
    """
    selection = _selection(namespaces, model, kind, tenant)
    if wanted is None and selection.ByteSize():
        raise UsageError("say what to allow for these namespaces: off, read, write or both")
    if wanted not in (None, *MODES):
        raise UsageError(f"{wanted!r} is no mode; give off, read, write or both")
    with connect(url) as client:
        operations = Operations(client)
        reply = operations.mode() if wanted is None else operations.set_mode(wanted, selection)
    if as_json:
        rules = [{"of": MessageToDict(rule.of), "mode": MODES[rule.mode]} for rule in reply.rules]
        print(json.dumps({"mode": MODES[reply.mode], "rules": rules}))
        return
    print(f"mode {MODES[reply.mode]}")
    for rule in reply.rules:
        print(f"  {MODES[rule.mode]} for {_selection_text(rule.of)}")


def _selection_text(of: pb.Selection) -> str:
    parts = [f"{printable(name)}={printable(value)}" for name, value in sorted(of.facts.items())]
    parts += [f"id {of.namespace.hex()}"] if of.namespace else []
    parts += [f"kind {of.kind}"] if of.kind else []
    parts += [f"tenant {of.tenant}"] if of.tenant else []
    return ", ".join(parts) or "everything"


def rm(
    namespaces: Namespaces = None,
    model: Model = None,
    kind: Kind = None,
    tenant: Tenant = None,
    older_than: OlderThan = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Remove what agrees with all options given. Engines see misses at once; what is being read stays until it is."""
    selection = _selection(namespaces, model, kind, tenant, older_than)
    if bool(selection.ByteSize()) == everything:
        raise UsageError("say what to remove: --namespace, --model, --kind, --tenant, --older-than, or --all alone")
    with connect(url) as client, progress_bar("entries") as show:
        operations = Operations(client)
        done = operations.remove(selection, show)
    if as_json:
        print(json.dumps(done._asdict() | {"silent": operations.silent}))
    else:
        print(f"removed {done.entries:,} entries, {size_text(done.nbytes)}")
    all_answered(operations.silent)


def ls(
    entries: Annotated[bool, typer.Option("--entries", help="Every entry, not the namespaces.")] = False,
    namespaces: Namespaces = None,
    model: Model = None,
    kind: Kind = None,
    tenant: Tenant = None,
    older_than: OlderThan = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List namespaces with what they hold, or with --entries what is stored, one a line (--json: one object a line)."""
    selection = _selection(namespaces, model, kind, tenant, older_than)
    if older_than and not entries:
        raise UsageError("--older-than selects entries: give --entries too")
    with connect(url) as client:
        operations = Operations(client)
        if entries:
            for entry in operations.entries(selection):
                row = _entry_row(entry)
                print(json.dumps(row) if as_json else _entry_text(row))
        else:
            rows = [_namespace_row(row) for row in operations.namespaces(selection)]
            for row in rows:
                print(json.dumps(row) if as_json else _namespace_text(row))
            if not rows and not as_json:
                print("no namespace is known yet; engines declare theirs when they first store")
    all_answered(operations.silent)


def _namespace_row(row: pb.NamespaceRow) -> dict[str, Any]:
    return {
        "namespace": row.namespace.hex(),
        "kind": row.kind,
        "entries": row.entries,
        "nbytes": row.nbytes,
        "mode": MODES[row.mode],
        "tenant": row.tenant,
        "facts": dict(sorted(row.facts.items())),
    }


def _entry_row(entry: pb.EntryRow) -> dict[str, Any]:
    return {
        "key": entry.key.hex(),
        "kind": KINDS.get(entry.kind, str(entry.kind)),
        "namespace": entry.namespace.hex(),
        "tenant": entry.tenant,
        "nbytes": entry.nbytes,
        "age_s": round(entry.age_s, 1),
        "expires_in_s": round(entry.expires_in_s, 1) if entry.expires_in_s >= 0 else None,
        "children": entry.children,
        "modality": MODALITIES[entry.modality] or None,
        "units": entry.units or None,
    }


def _namespace_text(row: Mapping[str, Any]) -> str:
    tenant = f", tenant {row['tenant']}" if row["tenant"] else ""
    mode = f", mode {row['mode']}" if row["mode"] != "both" else ""
    holds = f"{row['entries']:,} entries, {size_text(row['nbytes'])}{tenant}{mode}"
    lines = [f"{row['namespace'][:16]}  {row['kind'] or 'kind unknown'}: {holds}"]
    return "\n".join(lines + [f"    {printable(name)} = {printable(text)}" for name, text in row["facts"].items()])


KINDS: Final[Mapping[int, str]] = {1: "kv", 2: "embedding", 3: "prompt", 4: "latent"}


def _entry_text(row: Mapping[str, Any]) -> str:
    expires = "" if row["expires_in_s"] is None else f", expires in {row['expires_in_s']:.0f} s"
    return f"{row['key']}  {row['kind']:<9}  {size_text(row['nbytes']):>10}  {row['age_s']:.0f} s old{expires}"


def top(
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many looks; default: at Ctrl-C.")] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Watch a server live: hit rate, traffic, memory by kind, and what holds it up. --json: one object a look."""
    with connect(url) as client, contextlib.ExitStack() as stack:
        first = client.stat()
        if "bytes_capacity" not in first["counters"]:
            raise MMCacheError(ADMINS_ONLY)
        rates, looks = Rates(first, time.monotonic()), 0
        console = Console()
        watched = console.is_terminal and not as_json
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if watched else None
        while count is None or looks < count:
            time.sleep(interval_s)
            now = rates.look(client.stat(), time.monotonic())
            looks += 1
            if as_json:
                print(json.dumps(now), flush=True)
            elif live is not None:
                live.update(top_table(now, url), refresh=True)
            else:  # a file or a pipe: one table after the other
                console.print(top_table(now, url))


def audit(
    share: Annotated[str, typer.Option(metavar="SHARE", help="Of the entries: 100%, 5%, 0.1.")] = "100%",
    seed: Annotated[int | None, typer.Option(help="Which ones; default: others each time.", min=0)] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Check stored bytes against their checksums, where they lie. What is bad is dropped. Exits 1 if anything was."""
    try:
        part = float(share[:-1]) / 100 if share.endswith("%") else float(share)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise UsageError(f"--share {share!r} is no share; give such as 5% or 0.05, above 0 and at most 100%")
    with connect(url) as client, progress_bar("entries") as show:
        operations = Operations(client)
        done = operations.audit(part, time.time_ns() if seed is None else seed, show)
    keys = [key.hex() for key in done.bad]
    if as_json:
        print(json.dumps(asdict(done) | {"bad": keys, "silent": operations.silent}))
    else:
        print(f"checked {done.entries:,} entries, {size_text(done.nbytes)}: {len(keys)} bad")
        for key, name in zip(keys, done.bad_on, strict=True):
            print(f"  dropped {key}" + (f" on {printable(name)}" if name else ""))
    if keys:
        hosts = ", ".join(printable(name) for name in sorted(set(done.bad_on)) if name)
        whose = f"the memory of {hosts}" if hosts else "this host's memory"
        more = f"; {silence(operations.silent)}" if operations.silent else ""
        raise MMCacheError(f"{len(keys)} entries' bytes had changed in memory; test {whose}{more}")
    all_answered(operations.silent)
