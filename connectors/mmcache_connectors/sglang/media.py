"""What a media item IS: 32 bytes over everything of it that reaches the model.

SGLang's own item hash is 64 bits of SHA-256 over the feature bytes: shape, dtype and grid are not in it, so a row and
a column of the same tiles are one item to it, and so are a 30 x 150 and a 150 x 30 picture of one colour (sglang#25462;
seen on 0.5.23). Its `set_identity` takes a digest of 32 bytes instead, whose four 62-bit words it puts, in turn, in
place of the item's tokens; pages are hashed over these. Imports torch and numpy only if their values arrive.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from typing import Any, Final

from mmcache.encoding import canonical, digest

DOMAIN: Final = "mmcache.sglang.item.1"


class Unidentified(Exception):
    """Something of an item cannot be identified; the message names it."""


def item_identity(item: Any, positions: Any = None) -> bytes:
    """32 bytes over a MultimodalDataItem: modality, format, features, embeddings, grids, and its positions.

    `positions` are the request's rotary positions, [axes, tokens], or None: two films of the same frames differ in
    nothing else when they run at different speeds. Taken relative to each span's first token, so that the item is the
    same wherever it stands. Raises Unidentified if any of it has no canonical form.
    """
    fields = {
        "modality": item.modality,
        "format": item.format,
        "feature": item.feature,
        "embeddings": item.precomputed_embeddings,
        "specific": item.model_specific_data,
        "positions": [_relative(positions, span) for span in item.offsets or ()] if positions is not None else None,
    }
    try:
        return digest(DOMAIN, canonical(_plain(fields, "item"), "item"))
    except ValueError as error:
        raise Unidentified(str(error)) from None


def _relative(positions: Any, span: tuple[int, int]) -> Any:
    held = positions[..., span[0] : span[1] + 1]
    return held - held.reshape(-1)[0] if held.shape[-1] else held


def _plain(value: Any, path: str) -> Any:
    """The same value with tensors as their dtype, shape and digest of bytes; anything else is left for `canonical`."""
    if isinstance(value, enum.Enum):
        return ["enum", type(value).__name__, value.name]
    if isinstance(value, Mapping):
        return {_name(name, path): _plain(held, f"{path}.{name}") for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held, f"{path}[{place}]") for place, held in enumerate(value)]
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        host = value.detach().cpu().contiguous()
        data = host.reshape(-1).view(torch.uint8).numpy() if host.numel() else b""
        return ["tensor", str(value.dtype), list(value.shape), digest(DOMAIN, memoryview(data))]
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        array = numpy.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise Unidentified(f"{path}: an array of Python objects")
        data = array.reshape(-1).view(numpy.uint8) if array.size else b""
        return ["array", array.dtype.str, list(numpy.shape(value)), digest(DOMAIN, memoryview(data))]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise Unidentified(f"{path}: an object of type {type(value).__name__}")


def _name(name: object, path: str) -> str:
    if not isinstance(name, str):
        raise Unidentified(f"{path}: a key of type {type(name).__name__}")
    return name
