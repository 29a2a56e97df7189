"""Tensors in and out of frames: numpy arrays, torch tensors, anything with the buffer protocol.

The only module of mmcache that knows torch, and it never imports it first: a torch tensor can only arrive when its
caller has imported torch. numpy has no bfloat16 or float8: `as_dtype` labels an array of raw words with one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcache.errors import TensorError
from mmcache.frame import DTYPES, FrameHeader, StoredTensor, TensorSpec

Bytes = NDArray[np.uint8]
_NUMPY_NAMES: Final = frozenset(DTYPES) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
_WORDS: Final[dict[str, np.dtype[Any]]] = {
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
}
_NAME_OF: Final = {np.dtype(name): name for name in _NUMPY_NAMES}  # dtype.name is slow; other byte orders are not in it


@dataclass(frozen=True, slots=True)
class Labelled:
    """An array of raw words and the dtype they really are; made by `as_dtype`."""

    array: NDArray[Any]
    dtype: str


def as_dtype(array: NDArray[Any], dtype: str) -> Labelled:
    """Say that `array`'s words (uint16 for bfloat16, uint8 for float8) are of `dtype`. Raises TensorError."""
    if not isinstance(array, np.ndarray):
        raise TensorError(f"{type(array).__name__} is no ndarray of words; convert it with numpy.asarray")
    words = array.dtype
    if dtype not in DTYPES or DTYPES[dtype][1] != words.itemsize or words.hasobject or not words.isnative:
        raise TensorError(f"{words} words cannot be {dtype!r}; use native words of the same size and a known dtype")
    return Labelled(array, dtype)


@dataclass(frozen=True, slots=True)
class Pieces:
    """A destination that lies in memory in equal pieces: uint8 `[pieces, nbytes of one]`, each piece contiguous.

    Together, in order, they take the bytes of one contiguous tensor of `dtype` and `shape`: an engine's block of KV,
    for example, which is spread over its layers.
    """

    data: Bytes
    dtype: str
    shape: tuple[int, ...]


class HostTensor(NamedTuple):
    """One tensor's bytes in this process: flat uint8 view, and its dtype name and shape ('' and () when untyped).

    For a destination in pieces the view is two-dimensional: see `Pieces`.
    """

    data: Bytes
    dtype: str
    shape: tuple[int, ...]


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _flat(array: NDArray[Any]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def _from_numpy(array: NDArray[Any], dtype: str | None, *, writable: bool) -> HostTensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TensorError("a masked array's mask would be lost; pass array.filled(value)")
    name = dtype or _NAME_OF.get(array.dtype, "")
    if not name and writable and array.dtype == _WORDS["bfloat16"]:
        name = array.dtype.name  # numpy has no bfloat16: raw words take it
    if not name:
        raise TensorError(
            f"numpy dtype {array.dtype} cannot be stored; use native-order {', '.join(sorted(_NUMPY_NAMES))}, "
            "or label raw words with mmcache.tensors.as_dtype"
        )
    if writable:
        if not (array.flags.c_contiguous and array.flags.writeable):
            raise TensorError("a destination must be C-contiguous and writable; pass a contiguous buffer and copy out")
    else:
        array = np.ascontiguousarray(array) if array.ndim else array
    return HostTensor(_flat(array), name, array.shape)


def _from_torch(tensor: Any, *, writable: bool) -> HostTensor:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TensorError(f"torch dtype {name} cannot be stored; use one of {', '.join(sorted(DTYPES))}")
    if tensor.device.type != "cpu":
        raise TensorError(
            f"the tensor is on {tensor.device}; copy it to host memory first (.cpu()), or use a connector"
        )
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TensorError("a sparse or nested tensor cannot be stored; pass a dense one")
    if not tensor.is_contiguous() or tensor.is_neg():
        if writable:
            raise TensorError("a destination tensor must be contiguous; pass a contiguous one and copy out")
        tensor = tensor.resolve_neg().contiguous()
    shape = tuple(tensor.shape)
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # a size of 1 may have any stride; reshape would keep it
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return HostTensor(data, name, shape)


def _from_pieces(value: Pieces, *, writable: bool) -> HostTensor:
    if not writable:
        raise TensorError("pieces are a destination only; pass a value as one contiguous tensor")
    data = value.data
    if data.dtype != np.uint8 or data.ndim != 2 or (data.shape[1] > 1 and data.strides[1] != 1):
        raise TensorError(f"pieces of {data.dtype}{list(data.shape)}: expected uint8 [pieces, nbytes], each contiguous")
    if not data.flags.writeable:
        raise TensorError("pieces must be writable as a destination")
    return HostTensor(data, value.dtype, value.shape)


def host_tensor(value: Any, *, writable: bool = False) -> HostTensor:
    """A flat byte view of an ndarray, a torch CPU tensor, a Labelled array or a buffer; copies only to make contiguous.

    With `writable` (a destination) nothing is ever copied. A bare buffer (bytes, memoryview, ...) is uint8 of one
    dimension, and as a destination fits any tensor of its size. An array of raw words (uint16, uint8) is a destination
    for bfloat16 or float8 of its shape. Raises TensorError with the remedy.
    """
    if isinstance(value, np.ndarray):
        return _from_numpy(value, None, writable=writable)
    if isinstance(value, Labelled):
        return _from_numpy(value.array, value.dtype, writable=writable)
    if isinstance(value, Pieces):
        return _from_pieces(value, writable=writable)
    if _is_torch(value):
        return _from_torch(value, writable=writable)
    try:
        view = memoryview(value)
        data = np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.empty(0, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        wanted = "pass an ndarray, torch tensor or contiguous buffer"
        raise TensorError(f"{type(value).__name__} is not a tensor ({error}); {wanted}") from None
    if writable and view.readonly:
        raise TensorError("a buffer must be writable as a destination; pass a bytearray or an ndarray")
    return HostTensor(data, "" if writable else "uint8", data.shape)


def named_tensors(value: Any, *, writable: bool = False) -> dict[str, HostTensor]:
    """One key's tensors by name: a mapping keeps its names, a list is named '0', '1', ..., a single tensor '0'.

    Raises TensorError for what is no tensor, and for two names that are the same text (1 and '1').
    """
    if isinstance(value, Mapping):
        named = {str(name): host_tensor(item, writable=writable) for name, item in value.items()}
        if len(named) != len(value):
            raise TensorError("two tensors of one key share a name; name them apart")
        return named
    if isinstance(value, (list, tuple)):
        return {str(i): host_tensor(item, writable=writable) for i, item in enumerate(value)}
    return {"0": host_tensor(value, writable=writable)}


def specs_of(tensors: Mapping[str, HostTensor]) -> list[TensorSpec]:
    """The frame specs of these tensors, in order."""
    return [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def destinations(header: FrameHeader, buffers: Mapping[str, HostTensor]) -> list[Bytes] | str:
    """Where each stored tensor goes, in stored order, or, as a string, why these buffers do not fit the frame."""
    if len(header.tensors) != len(buffers):
        return f"the entry holds {len(header.tensors)} tensors, {len(buffers)} destinations were given"
    found = []
    for stored in header.tensors:
        spec = stored.spec
        buffer = buffers.get(spec.name)
        if buffer is None:
            return f"the entry holds tensor {spec.name!r}, which has no destination"
        if not _fits(stored, buffer):
            return f"stored {spec.dtype}{list(spec.shape)}, destination {buffer.dtype or 'bytes'}{list(buffer.shape)}"
        found.append(buffer.data)
    return found


def _fits(stored: StoredTensor, buffer: HostTensor) -> bool:
    if buffer.data.nbytes != stored.nbytes:
        return False
    if not buffer.dtype or (buffer.dtype == "uint8" and len(buffer.shape) == 1):
        return True
    if buffer.shape != stored.spec.shape:
        return False
    words = _WORDS.get(stored.spec.dtype)
    return buffer.dtype == stored.spec.dtype or (words is not None and buffer.dtype == words.name)


def as_numpy(spec: TensorSpec, payload: memoryview) -> NDArray[Any]:
    """A zero-copy ndarray over a stored tensor's bytes (raw words for bfloat16 and float8), read-only if they are."""
    dtype = _WORDS.get(spec.dtype) or np.dtype(spec.dtype)
    array: NDArray[Any] = np.frombuffer(payload, dtype)
    return array.reshape(spec.shape)


def as_torch(spec: TensorSpec, payload: memoryview) -> Any:
    """A torch tensor over a stored tensor's bytes. Zero-copy; torch warns if the bytes are read-only: do not write."""
    import torch  # type: ignore[import-not-found,unused-ignore]

    dtype = getattr(torch, spec.dtype)
    if not len(payload):
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype).reshape(spec.shape)


def check_count(keys: Sequence[Any], values: Sequence[Any], what: str) -> None:
    """Raise TensorError unless there is one value per key."""
    try:
        count = len(values)
    except TypeError:
        raise TensorError(f"the {what} are a {type(values).__name__}; pass a list, one per key") from None
    if len(keys) != count:
        raise TensorError(
            f"{len(keys)} keys but {count} {what}; pass a list with one per key, [tensor] for a single key"
        )
