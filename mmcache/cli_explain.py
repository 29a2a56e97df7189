"""`mmcache explain`: why keys, or a request's blocks, are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmcache.cli_common import DEFAULT_URL, Json, Url, all_answered, key_digest
from mmcache.client.operations import Operations, Reason, reason_of
from mmcache.connect import connect
from mmcache.errors import UsageError
from mmcache.explain import explain as explain_request
from mmcache.explain import parse
from mmcache.pb import cache_pb2 as pb
from mmcache.why import Why


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(
        epilog="Examples: **mmcache explain KEY KEY** · **mmcache explain --request request.json** · "
        "**mmcache explain --recent 20**"
    )(explain)


def explain(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys, 64 hexadecimal digits each.")
    ] = None,
    request: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A recorded request (docs/explain.md): finds what differs.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --request: another one, which was to share its blocks.")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The last N lookups that missed something.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Say why keys, or a request's blocks, are not there: never stored, evicted (when), expired, refused, ..."""
    if sum(map(bool, (keys, request, recent))) != 1 or (against and not request):
        raise UsageError("give KEYs, or --request FILE (and --against FILE), or --recent N")
    digests = [key_digest(text) for text in keys or []]
    recorded = [parse(_text(path)) for path in (request, against) if path is not None]
    with connect(url) as client:
        operations = Operations(client)
        if recent:
            _print_recent(operations.recent(recent), as_json)
        elif recorded:
            _print_explanation(operations, recorded, as_json)
        else:
            for digest, reason in zip(digests, operations.explain(digests), strict=True):
                row = {"key": digest.hex(), **_reason_row(reason)}
                print(json.dumps(row) if as_json else f"{row['key']}  {_reason_text(reason)}")
    all_answered(operations.silent)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _reason_row(reason: Reason) -> dict[str, Any]:
    return {"why": reason.why.name.lower(), "ago_s": reason.ago_s, "text": reason.text}


def _reason_text(reason: Reason) -> str:
    ago = "" if reason.ago_s is None or reason.why is Why.BEING_WRITTEN else f", {reason.ago_s:,.1f} s ago"
    return f"{reason.text}{ago}"


def _print_explanation(operations: Operations, recorded: list[Any], as_json: bool) -> None:
    found = explain_request(operations, *recorded)
    if as_json:
        first = {"blocks": found.blocks, "first_missing": found.first_missing, **_reason_row(found.reason)}
        print(json.dumps({**first, "findings": list(found.findings)}))
        return
    if not found.blocks:
        print("the request is shorter than a block: there is nothing to be stored")
    elif found.first_missing is None:
        print(f"all {found.blocks} blocks are stored")
    else:
        print(f"block {found.first_missing} of {found.blocks} is missing: {_reason_text(found.reason)}")
    for finding in found.findings:
        print(f"  {finding}")


def _print_recent(misses: list[pb.Miss], as_json: bool) -> None:
    for miss in misses:
        reason = reason_of(miss.why, miss.why_ago_s, miss.put_status)
        if as_json:
            row = {"ago_s": miss.ago_s, "tenant": miss.tenant, "keys": miss.keys, "found": miss.found,
                   "prefix": miss.prefix, "key": miss.key.hex(), **_reason_row(reason)}  # fmt: skip
            print(json.dumps({**row, "ago_s": miss.ago_s, "why_ago_s": reason.ago_s}))
            continue
        since = "" if reason.ago_s is None else f", {reason.ago_s:,.1f} s before"
        print(
            f"{miss.ago_s:8.1f} s ago  found {miss.found} of {miss.keys}; {miss.key.hex()[:16]}: {reason.text}{since}"
        )
    if not misses and not as_json:
        print("no lookup has missed anything")
