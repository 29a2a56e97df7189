"""What the kernels must give, in plain torch: the definition, and what runs where there is no GPU or no Triton.

Frames here are rows of one contiguous tensor `[blocks, layers, ...]` of the paged memory's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

FP8_MAX: Final = 448.0  # the largest float8_e4m3fn
INT8_MAX: Final = 127.0


def gather(views: Sequence[torch.Tensor], block_ids: torch.Tensor, out: torch.Tensor) -> None:
    """`out[i, l] = views[l][block_ids[i]]`. `block_ids`: int64 on the views' device, checked by the caller."""
    for layer, view in enumerate(views):
        out[:, layer] = view.index_select(0, block_ids)


def scatter(views: Sequence[torch.Tensor], block_ids: torch.Tensor, frames: torch.Tensor) -> None:
    """`views[l][block_ids[i]] = frames[i, l]`; no other block changes. Ids come once."""
    for layer, view in enumerate(views):
        view.index_copy_(0, block_ids, frames[:, layer])


def quantize_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn as bytes `[..., n]`, scales float32 `[...]`) of floating values `[..., n]`.

    A scale is the least power of two that brings its row within the range, so scaling itself rounds nothing:
    |value - restored| <= 2**-4 * |value|, or scale * 2**-10 where that is more. A row that holds infinities or NaN
    comes back as NaN throughout, never as a plausible number.
    """
    rows, largest, finite = _finite_rows(values)
    scale = power_of_two(largest / torch.full_like(largest, FP8_MAX))
    scaled = (rows / scale[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), torch.where(finite, scale, torch.nan)


def dequantize_fp8(quantized: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_fp8` made, back in `dtype`."""
    return _within(quantized.view(torch.float8_e4m3fn).float() * scales[..., None], dtype)


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 `[..., n]`, scales float32 `[...]`) of floating values `[..., n]`.

    A scale is the row's largest magnitude / 127: |value - restored| <= 0.502 * scale (half a step, and float32's own
    rounding), or 2**-119 where that is more. Rows with infinities or NaN come back as NaN throughout.
    """
    rows, largest, finite = _finite_rows(values)
    # Not by a plain number: on GPUs torch multiplies with its rounded inverse then.
    scale = largest / torch.full_like(largest, INT8_MAX)
    divisor = torch.where(largest > TINY, scale, 1.0)
    scaled = torch.floor(rows / divisor[..., None] + 0.5).clamp(-INT8_MAX, INT8_MAX)
    return scaled.to(torch.int8), torch.where(finite, scale, torch.nan)


def dequantize_int8(quantized: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_int8` made, back in `dtype`."""
    return _within(quantized.float() * scales[..., None], dtype)


def _finite_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows as float32, with zeros where one is not finite throughout; their largest magnitudes; which are finite)."""
    rows = values.float()
    finite = torch.isfinite(rows).all(-1)
    rows = torch.where(finite[..., None], rows, 0.0)
    return rows, rows.abs().amax(-1), finite


def _within(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, where rounding must not have made a finite value infinite."""
    largest = torch.finfo(dtype).max
    return rows.clamp(-largest, largest).to(dtype)


def split_planes(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(exponents, signs and mantissas): the two bytes of each bfloat16, apart: uint8 of the words' shape each.

    Exponents of one tensor are few and alike, so a byte-wise codec shrinks their plane; mantissas are noise. Lossless.
    """
    bits = words.view(torch.int16).to(torch.int32)
    exponents = (bits >> 7) & 0xFF
    rest = ((bits >> 8) & 0x80) | (bits & 0x7F)
    return exponents.to(torch.uint8), rest.to(torch.uint8)


def join_planes(exponents: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The bfloat16 values whose planes these are."""
    low = rest.to(torch.int32)
    bits = ((low & 0x80) << 8) | (exponents.to(torch.int32) << 7) | (low & 0x7F)
    return bits.to(torch.int16).view(torch.bfloat16)


TINY: Final = 2.0**-119  # rows of less are zero in int8: their scale would leave float32's normal range


def power_of_two(at_least: torch.Tensor) -> torch.Tensor:
    """The least power of two, from 2**-126 on, that is no less than these float32 values >= 0."""
    bits = at_least.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)
