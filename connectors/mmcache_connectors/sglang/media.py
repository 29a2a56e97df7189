"""What a media item IS: 32 bytes over everything of it that reaches the model.

SGLang's own item hash is 64 bits of SHA-256 over the feature bytes: shape, dtype and grid are not in it, so a row and
a column of the same tiles are one item to it, and so are a 30 x 150 and a 150 x 30 picture of one colour (sglang#25462;
seen on 0.5.23). Its `set_identity` takes a digest of 32 bytes instead, whose four 62-bit words it puts, in turn, in
place of the item's tokens; pages are hashed over these. Imports torch and numpy only if their values arrive.
"""

from __future__ import annotations

import array
import enum
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from blake3 import blake3

from mmcache.encoding import canonical, digest, framed

DOMAIN: Final = "mmcache.sglang.item.2"
# Handles of memory that only the model opens, by the type SGLang 0.5.23 gives them.
_REMEDIES: Final = dict.fromkeys(
    ("CudaIpcTensorTransportProxy", "CudaVmmPackedTensorTransportProxy", "CudaVmmTensorTransportProxy"),
    ": start SGLang with --mm-feature-transport cpu",
)
# What an item's data says of how it was brought here, not of itself. Source: multimodal/transport/cuda_ipc.py.
_TRANSPORT: Final = frozenset(
    {
        "_sglang_borrow_cuda_ipc_feature",
        "_sglang_cuda_ipc_feature_copy_event",
        "_sglang_defer_cuda_ipc_feature_reconstruction",
        "_sglang_retained_cuda_ipc_feature_proxy",
    }
)


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
        "specific": {name: held for name, held in item.model_specific_data.items() if name not in _TRANSPORT},
        "positions": [_relative(positions, span) for span in item.offsets or ()] if positions is not None else None,
    }
    return value_digest(fields, "item")


def value_digest(value: Any, path: str) -> bytes:
    """32 bytes over plain values, tensors and arrays, in mappings and lists. `path`: what an error calls it.

    Raises Unidentified if any of it has no canonical form.
    """
    try:
        return digest(DOMAIN, canonical(_plain(value, path), path))
    except ValueError as error:
        raise Unidentified(str(error)) from None


def _relative(positions: Any, span: tuple[int, int]) -> Any:
    held = positions[..., span[0] : span[1] + 1]
    return held - held.reshape(-1)[0] if held.shape[-1] else held


def _plain(value: Any, path: str) -> Any:
    """The same value in a form `canonical` takes, short whatever its size: what is large becomes a digest."""
    if isinstance(value, enum.Enum):
        return ["enum", type(value).__name__, value.name]
    if isinstance(value, Mapping):
        return {_name(name, path): _plain(held, f"{path}.{name}") for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return _listed(value, path)
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        host = value.detach().cpu().contiguous()
        data = host.reshape(-1).view(torch.uint8).numpy() if host.numel() else b""
        return ["tensor", str(value.dtype), list(value.shape), digest(DOMAIN, memoryview(data))]
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        held = numpy.ascontiguousarray(value)
        if held.dtype.hasobject:
            raise Unidentified(f"{path}: an array of Python objects")
        data = held.reshape(-1).view(numpy.uint8) if held.size else b""
        return ["array", held.dtype.str, list(numpy.shape(value)), digest(DOMAIN, memoryview(data))]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", struct.pack("<d", value)]  # by its bits, as NaN is a number here
    if isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        return ["str" if isinstance(value, str) else "bytes", digest(DOMAIN, data)]
    raise Unidentified(f"{path}: an object of type {type(value).__name__}{_REMEDIES.get(type(value).__name__, '')}")


def _listed(value: Sequence[Any], path: str) -> list[Any]:
    if value and set(map(type, value)) == {float}:
        return ["floats", len(value), digest(DOMAIN, array.array("d", value).tobytes())]
    hasher = blake3()
    for place, held in enumerate(value):
        hasher.update(framed(canonical(_plain(held, f"{path}[{place}]"), path)))
    return ["list", len(value), hasher.digest()]


def _name(name: object, path: str) -> str:
    if not isinstance(name, str):
        raise Unidentified(f"{path}: a key of type {type(name).__name__}")
    return name
