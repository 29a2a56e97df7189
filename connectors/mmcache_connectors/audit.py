"""What is stored against what an engine computed anew: the same bytes, the same up to rounding, or something else.

An engine that computes a value again rounds it differently in other batches and chunks, so stored bytes may differ and
be right. How far that goes, and how far apart values are that have nothing in common, is far enough apart to tell.
Shared by the connectors; no clock, no chance: which hits are audited is drawn by the caller.
"""

from __future__ import annotations

import enum
import math
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

OPAQUE_BOUND: Final = 0.75  # of the bytes of a type whose numbers are unknown here, how many rounding may change
_WORDS: Final[dict[int, Any]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Likeness(enum.Enum):
    """What a comparison came to."""

    EQUAL = "equal"  # bit for bit
    CLOSE = "close"  # but for rounding
    DIFFERENT = "different"  # of something else, or damaged


class Comparison(NamedTuple):
    """`error` is the largest of the rows', see `compare`; infinite where something is no number."""

    likeness: Likeness
    error: float


def compare(stored: torch.Tensor, computed: torch.Tensor, *, halves: bool = False) -> Comparison:
    """Compare host tensors of one dtype and shape, row by row of their first dimension: a block's layers, say, each on
    its own, as their magnitudes differ. What belongs together as a whole is passed as one row, `[1, ...]`.

    With `halves` a row is two, by the halves of the last dimension, if that is even: keys and values. Some models' keys
    are hundreds of times their values (Qwen2's have large biases): beside them wrong values would pass for rounding.
    A row's error is the relative L2 error, |a - b| / max(|a|, |b|), and it is close up to `bound`. Of a dtype that is
    no floating point type (fp8 kept as bytes, say) it is the share of bytes that differ, up to OPAQUE_BOUND.
    Raises ValueError for tensors of two forms.
    """
    if (stored.dtype, stored.shape) != (computed.dtype, computed.shape):
        raise ValueError(
            f"{stored.dtype}{list(stored.shape)} cannot be compared with {computed.dtype}{list(computed.shape)}; pass "
            "tensors of one form"
        )
    mine, other = _rows(stored), _rows(computed)
    if np.array_equal(mine, other):
        return Comparison(Likeness.EQUAL, 0.0)
    if halves and stored.shape[-1] % 2 == 0:
        mine, other = _halves(mine, stored.shape[-1]), _halves(other, stored.shape[-1])
    if stored.dtype.is_floating_point:
        limit, error = bound(stored.dtype), _relative_l2(_numbers(mine, stored.dtype), _numbers(other, stored.dtype))
    else:
        limit, error = OPAQUE_BOUND, _share(mine, other)
    return Comparison(Likeness.CLOSE if error <= limit else Likeness.DIFFERENT, error)


def bound(dtype: torch.dtype) -> float:
    """The largest relative L2 error that rounding explains: the square root of the type's epsilon.

    That is halfway, in orders of magnitude, between a single rounding (epsilon) and a tensor that has nothing in common
    with the other one (about 1): 3.5e-4 for float32, 0.031 for float16, 0.088 for bfloat16. Measured on a model of
    16 random layers, in which errors grow faster than in a trained one: computed in other chunks, a layer's keys or
    values were off by up to 2.3e-6 in float32 and 0.017 in bfloat16; by another attention kernel, which the namespace
    tells apart, by 3.5e-6 and 0.072; two different blocks, in one layer at least, by 1.4
    (tests/engines/vllm/test_audit.py).
    """
    return math.sqrt(torch.finfo(dtype).eps)


def _rows(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's words `[rows, ...]`."""
    words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()]).numpy()
    rows: NDArray[Any] = words.reshape(len(words), -1)
    return rows


def _halves(rows: NDArray[Any], width: int) -> NDArray[Any]:
    """Two rows for each: the first halves of every `width` words, and the second ones."""
    pairs: NDArray[Any] = rows.reshape(len(rows), -1, 2, width // 2).swapaxes(1, 2)
    return pairs.reshape(2 * len(rows), -1)


def _numbers(words: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """What the words stand for. By numpy: torch would wait for threads on cores that an engine keeps busy."""
    if dtype == torch.bfloat16:
        wide: NDArray[Any] = words.view(np.uint16).astype(np.uint32) << 16
        floats: NDArray[Any] = wide.view(np.float32)
        return floats
    if dtype.itemsize == 1:
        narrow: NDArray[Any] = _table(dtype)[words.view(np.uint8)]
        return narrow
    name = str(dtype).removeprefix("torch.")
    numbers: NDArray[Any] = words.view(name).astype(np.promote_types(name, np.float32), copy=False)
    return numbers


@cache
def _table(dtype: torch.dtype) -> NDArray[np.float32]:
    """The 256 values of a floating point type of one byte."""
    table: NDArray[np.float32] = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return table


def _relative_l2(mine: NDArray[Any], other: NDArray[Any]) -> float:
    with np.errstate(all="ignore"):
        apart = _squares(mine - other)
        worst = np.divide(apart, np.maximum(_squares(mine), _squares(other)), out=apart.copy(), where=apart > 0).max()
    return math.sqrt(worst) if np.isfinite(worst) else math.inf


def _squares(rows: NDArray[Any]) -> NDArray[np.float64]:
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)  # type: ignore[no-any-return]


def _share(mine: NDArray[Any], other: NDArray[Any]) -> float:
    return float((mine.view(np.uint8) != other.view(np.uint8)).mean(axis=1).max())
