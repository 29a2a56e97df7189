"""`mmcache size`: how many bytes a model's KV and embeddings take, and what fits in a cache of some size."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mmcache.cli_common import Json, size_text
from mmcache.config import GiB, ServerConfig, parse_nbytes
from mmcache.errors import ConfigError, UsageError
from mmcache.size.fields import Fields
from mmcache.size.kv import KV, NotCached, dtype_name, kv_of, model_dtype
from mmcache.size.media import Item, Picture, items_of, latent_of
from mmcache.size.sheet import Room, Split, StoredItem, room_of, split_of, stored_item
from mmcache.store.policies import POLICIES

MAX_CONFIG_NBYTES: Final = 4 << 20
DEFAULT_MEMORY: Final = (16 * GiB, 64 * GiB, 256 * GiB)
TP_SHOWN: Final = (1, 2, 4, 8)
SERVER: Final = ServerConfig()


@dataclass(frozen=True)
class Sheet:
    """Everything that is printed."""

    model_type: str
    block_tokens: int
    prompt_tokens: int
    kv: KV | None
    splits: list[Split]
    items: list[StoredItem]
    rooms: list[Room]
    notes: list[str]


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(
        epilog="Examples: **mmcache size Qwen2.5-VL-7B-Instruct/** · **mmcache size config.json --memory 128GiB "
        "--tp 4** · **mmcache size config.json --kv-cache-dtype fp8 --image 1920x1080 --json**"
    )(size)


def size(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_CONFIG", help="A model's config.json, or the folder that holds it.")
    ],
    memory: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Of the cache; may be given again. Default: 16, 64, 256GiB."),
    ] = None,
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="The engine's --block-size.")] = 16,
    tp: Annotated[int, typer.Option(metavar="N", help="The engine's --tensor-parallel-size.")] = 1,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="The engine's --dtype.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(metavar="DTYPE", help="The engine's --kv-cache-dtype.")] = "auto",
    prompt: Annotated[int, typer.Option(metavar="TOKENS", min=1, help="How long a prompt is.")] = 4096,
    image: Annotated[str, typer.Option(metavar="WxH", help="How large an image is, in pixels.")] = "1024x1024",
    alignment: Annotated[int, typer.Option(metavar="BYTES", help="The server's --alignment.")] = SERVER.alignment,
    as_json: Json = False,
) -> None:
    """Say how many bytes a model's KV and embeddings take, and what fits: from its config alone."""
    sizes = [parse_nbytes(text) for text in memory] if memory else list(DEFAULT_MEMORY)
    picture = _picture(image)
    for text in {dtype, kv_cache_dtype} - {"auto"}:
        dtype_name(text)
    config, processor, vae = _read(model)
    if config is None:
        assert vae is not None
        computed, kv = "bfloat16" if dtype == "auto" else dtype_name(dtype), None
        items, notes = [latent_of(vae, picture)], [f"latents counted as {computed}; an engine may keep float32"]
    else:
        computed = model_dtype(config, dtype)[0]
        kv, items, notes = _model(config, processor, picture, dtype, kv_cache_dtype)
    splits = [] if kv is None else _splits(kv, block_size, tp, alignment)
    stored = [stored_item(item, computed, alignment) for item in items]
    chosen = next((split for split in splits if split.tp == tp), None)
    rooms = [
        room_of(
            nbytes,
            chosen,
            stored,
            block_tokens=block_size,
            prompt_tokens=prompt,
            entries_of=lambda nbytes: ServerConfig(memory_nbytes=nbytes).entries,
            policy=POLICIES[SERVER.policy],
        )
        for nbytes in sizes
    ]
    kind = (config or vae or Fields({})).text("model_type", "_class_name")
    sheet = Sheet(kind, block_size, prompt, kv, splits, stored, rooms, notes)
    if as_json:
        print(json.dumps(_as_json(sheet)))
    else:
        _print(sheet, tp)


def _model(
    config: Fields, processor: Fields | None, picture: Picture, dtype: str, kv_cache_dtype: str
) -> tuple[KV | None, list[Item], list[str]]:
    """The KV, the items and what is to be said of both. A model without KV that can be cached may still have items."""
    items, notes = items_of(config, processor, picture)
    try:
        kv = kv_of(config, dtype, kv_cache_dtype)
    except NotCached as error:
        if not items:
            raise
        return None, items, [*notes, f"KV: {error}"]
    return kv, items, [*kv.notes, *notes]


def _splits(kv: KV, block_tokens: int, tp: int, alignment: int) -> list[Split]:
    """One row for each usual number of ranks that fits the model, and the one asked for."""
    found = []
    for count in sorted({*TP_SHOWN, tp}):
        try:
            found.append(split_of(kv, block_tokens, count, alignment))
        except ConfigError:
            if count == tp:
                raise
    return found


def _picture(text: str) -> Picture:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not match:
        raise UsageError(f"--image {text!r} is not WIDTHxHEIGHT in pixels; for example 1024x768")
    return Picture(int(match[1]), int(match[2]))


def _read(path: Path) -> tuple[Fields | None, Fields | None, Fields | None]:
    """(a model's config, its processor's, a diffusion pipeline's autoencoder's); of the first and the last, one."""
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "vae" / "config.json").is_file():
            return None, None, _json(path / "vae" / "config.json")
        raise UsageError(f"{path} holds no config.json; give a model's folder, or its config.json itself")
    file = path / "config.json" if path.is_dir() else path
    beside = file.with_name("preprocessor_config.json")
    return _json(file), _json(beside) if beside.is_file() else None, None


def _json(path: Path) -> Fields:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_NBYTES + 1)
        if len(data) > MAX_CONFIG_NBYTES:
            raise UsageError(f"{path} is over {MAX_CONFIG_NBYTES >> 20} MiB; a model's config is a small JSON object")
        values = json.loads(data)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; give a model's folder or config.json that is on this machine: "
            "nothing is downloaded"
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not JSON ({str(error)[:80]}); give a model's config.json") from None
    if not isinstance(values, Mapping):
        raise UsageError(f"{path} is not a JSON object; give a model's config.json")
    return Fields(values)


def _as_json(sheet: Sheet) -> dict[str, Any]:
    kv = sheet.kv and {
        "dtype": sheet.kv.dtype,
        "token_nbytes": sheet.kv.token_nbytes,
        "block_nbytes": sheet.kv.token_nbytes * sheet.block_tokens,
        "groups": [asdict(group) for group in sheet.kv.groups],
    }
    return {
        "model_type": sheet.model_type,
        "block_tokens": sheet.block_tokens,
        "prompt_tokens": sheet.prompt_tokens,
        "kv": kv,
        "tensor_parallel": [asdict(split) for split in sheet.splits],
        "items": [asdict(item) for item in sheet.items],
        "memory": [asdict(room) for room in sheet.rooms],
        "notes": sheet.notes,
    }


def _print(sheet: Sheet, tp: int) -> None:
    kv = sheet.kv
    if kv is not None:
        block_nbytes = kv.token_nbytes * sheet.block_tokens
        print(f"{sheet.model_type}: KV in {kv.dtype}, blocks of {sheet.block_tokens} tokens")
        print(f"  a token: {kv.token_nbytes:,} B")
        print(f"  a block: {block_nbytes:,} B")
        for group, count in Counter(kv.groups).items():
            times = f"{count} KV groups" if count > 1 else "a KV group"
            reach = f", {group.reach_tokens:,} tokens" if group.reach_tokens else ""
            what = f"{group.layers} layers x {group.heads} heads x {group.content} elements"
            print(f"  {times}: {what}, {group.kind}{reach}")
    else:
        print(f"{sheet.model_type}: no KV")
    for item in sheet.items:
        shape = f"[{item.tokens:,}, {item.width:,}]"
        print(f"  {item.what}: {shape}, {item.nbytes:,} B, stored as {item.stored_nbytes:,} B")
    if kv is not None:
        print()
        _print_table(
            ["tensor parallel", "frames a block", "stored a block", "more than its KV", "in one worker"],
            [
                [f"{one.tp}", f"{one.parts}", f"{one.stored_nbytes:,} B", f"{one.stored_nbytes / block_nbytes - 1:.2%}",
                 f"{one.worker_nbytes:,} B"]
                for one in sheet.splits
            ],
        )  # fmt: skip
    columns = ["memory", "index beside it"]
    columns += [f"tokens (tp {tp})", f"prompts of {sheet.prompt_tokens:,}"] if kv is not None else []
    columns += [f"or: {item.what}" for item in sheet.items]
    print()
    _print_table(columns, [_cells(sheet, room) for room in sheet.rooms])
    notes = list(sheet.notes)
    if any(room.index_full for room in sheet.rooms):
        notes.append("the index is full before the memory is: raise --max-entries of the server")
    if notes:
        print()
    for note in notes:
        print(f"note: {note}")


def _cells(sheet: Sheet, room: Room) -> list[str]:
    cells = [size_text(room.memory_nbytes), size_text(room.index_nbytes)]
    cells += [f"{room.tokens:,}", f"{room.prompts:,}"] if sheet.kv is not None else []
    return cells + [f"{count:,}" for count in room.items]


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
