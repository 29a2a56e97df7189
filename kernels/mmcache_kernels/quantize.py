"""Triton: paged KV memory <-> quantised frames, in the same pass as the gather. reference.py defines the results.

A frame here is two tables of rows: the values, a byte each, and one float32 scale for each row of `values_per_scale`
values (a head's keys, or values, of one token). Never a default: what comes back is not what went in.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from mmcache_kernels.layout import KernelInputError, PagedLayout
from mmcache_kernels.reference import FP8_MAX, INT8_MAX, TINY

FP8: Final = 0
INT8: Final = 1
MODES: Final = {"fp8": FP8, "int8": INT8}
DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TILE_VALUES: Final = 2048  # of one program
_FP8_MAX = tl.constexpr(FP8_MAX)
_INT8_MAX = tl.constexpr(INT8_MAX)
_TINY = tl.constexpr(TINY)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _power_of_two(at_least):
    bits = at_least.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_e4m3(values):
    """float32 within +-448 to the bits of float8_e4m3fn, to nearest, ties to even; in integers, for GPUs before it."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 a step is 2**-9, which is also float32's step at 2**14: adding that rounds.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.int8)


@triton.jit
def _from_e4m3(quantized):
    """The bits of float8_e4m3fn as float32."""
    bits = quantized.to(tl.int32)
    size = bits & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    plain = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    plain = tl.where(size == 0x7F, float("nan"), plain)
    return tl.where((bits & 0x80) != 0, -plain, plain)


@triton.jit
def _to_bfloat16(values):
    """To nearest, ties to even; in integers, as Triton's interpreter cuts off instead. NaN has many forms: one here."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _quantize(rows, MODE: tl.constexpr):
    """(bytes as int8, scales) of float32 rows [R, N]. Divisions are IEEE's, as torch's are."""
    finite = tl.min((tl.abs(rows) <= _LARGEST).to(tl.int32), 1) == 1
    rows = tl.where(finite[:, None], rows, 0.0)
    largest = tl.max(tl.abs(rows), 1)
    if MODE == 0:
        scale = _power_of_two(tl.div_rn(largest, tl.full(largest.shape, _FP8_MAX, tl.float32)))
        inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        scaled = tl.minimum(tl.maximum(rows * inverse[:, None], -_FP8_MAX), _FP8_MAX)
        quantized = _to_e4m3(scaled)
    else:
        scale = tl.div_rn(largest, tl.full(largest.shape, _INT8_MAX, tl.float32))
        divisor = tl.broadcast_to(tl.where(largest > _TINY, scale, 1.0)[:, None], rows.shape)
        scaled = tl.floor(tl.div_rn(rows, divisor) + 0.5)  # no product, which a compiler could fuse with the sum
        quantized = tl.minimum(tl.maximum(scaled, -_INT8_MAX), _INT8_MAX).to(tl.int8)
    return quantized, tl.where(finite, scale, float("nan"))


@triton.jit
def _dequantize(quantized, scales, MODE: tl.constexpr, LARGEST: tl.constexpr):
    """float32 rows of what `_quantize` made, within what the engine's dtype holds."""
    if MODE == 0:
        rows = _from_e4m3(quantized) * scales[:, None]
    else:
        rows = quantized.to(tl.float32) * scales[:, None]
    clamped = tl.minimum(tl.maximum(rows, -LARGEST), LARGEST)
    return tl.where(rows == rows, clamped, rows)


@triton.jit
def _move(
    layer_table, value_table, scale_table, block_ids, num_blocks, block_stride, stride0, stride1, stride2,
    SIZE1: tl.constexpr, SIZE2: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    PIECES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_N: tl.constexpr, DTYPE: tl.constexpr, MODE: tl.constexpr,
    LARGEST: tl.constexpr, ALIGNED: tl.constexpr, TO_FRAME: tl.constexpr,
):  # fmt: skip
    """As gather._move, but in values of DTYPE, TILE_ROWS rows of N values at once."""
    item = tl.program_id(0) // PIECES
    row = tl.program_id(0) % PIECES * TILE_ROWS + tl.arange(0, TILE_ROWS)
    layer = tl.program_id(1)
    block = tl.load(block_ids + item)
    if (block > 0) & (block < num_blocks):
        page = tl.load(layer_table + layer).to(tl.pointer_type(DTYPE))
        values = tl.load(value_table + item).to(tl.pointer_type(tl.int8))
        scales = tl.load(scale_table + item).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            page = tl.multiple_of(page, 16)
            values = tl.multiple_of(values, 16)
            scales = tl.multiple_of(scales, 16)
        page += block * block_stride
        values += layer.to(tl.int64) * (ROWS * N)
        scales += layer.to(tl.int64) * ROWS
        column = tl.arange(0, TILE_N)
        value = row[:, None] * N + column[None, :]
        here = (row < ROWS)[:, None] & (column < N)[None, :]
        run = value // RUN
        outer = run // SIZE2
        # In 64 bits: layouts with heads outermost have strides of the whole pool's size.
        place = (outer // SIZE1).to(tl.int64) * stride0 + (outer % SIZE1).to(tl.int64) * stride1
        place += (run % SIZE2).to(tl.int64) * stride2 + value % RUN
        if TO_FRAME:
            rows = tl.load(page + place, mask=here, other=0.0).to(tl.float32)
            quantized, scale = _quantize(rows, MODE)
            tl.store(values + value, quantized, mask=here)
            tl.store(scales + row, scale, mask=row < ROWS)
        else:
            quantized = tl.load(values + value, mask=here, other=0)
            scale = tl.load(scales + row, mask=row < ROWS, other=0.0)
            rows = _dequantize(quantized, scale, MODE, LARGEST)
            if tl.bfloat16 == DTYPE:
                tl.store(page + place, _to_bfloat16(rows), mask=here)
            else:
                tl.store(page + place, rows.to(DTYPE), mask=here)


def move(
    paged: PagedLayout, values: torch.Tensor, scales: torch.Tensor, block_ids: torch.Tensor, *,
    values_per_scale: int, mode: str, to_frames: bool,
) -> None:  # fmt: skip
    """Launch on the current stream; tables and ids as in `gather.move`: addresses are multiples of 16 where the paged
    memory's are. Nothing is waited for.

    Raises KernelInputError for a dtype that cannot be quantised, and rows that do not divide a block.
    """
    dtype = paged.views[0].dtype
    if dtype not in DTYPES:
        raise KernelInputError(f"{dtype} values cannot be quantised; only bfloat16, float16 and float32 can")
    count = paged.layer_nbytes // dtype.itemsize
    if values_per_scale < 1 or count % values_per_scale:
        raise KernelInputError(f"{values_per_scale} values a scale do not divide a layer's {count} of a block")
    if not len(block_ids):
        return
    tile_n = triton.next_power_of_2(values_per_scale)
    tile_rows = max(1, min(_TILE_VALUES // tile_n, triton.next_power_of_2(count // values_per_scale)))
    pieces = triton.cdiv(count // values_per_scale, tile_rows)
    stride0, stride1, stride2 = (stride // dtype.itemsize for stride in paged.strides)
    _move[(len(block_ids) * pieces, len(paged.views))](
        paged.layer_table, values, scales, block_ids, paged.num_blocks, paged.block_stride // dtype.itemsize,
        stride0, stride1, stride2,
        SIZE1=paged.sizes[1], SIZE2=paged.sizes[2], RUN=paged.run_nbytes // dtype.itemsize,
        ROWS=count // values_per_scale, N=values_per_scale, PIECES=pieces, TILE_ROWS=tile_rows, TILE_N=tile_n,
        DTYPE=DTYPES[dtype], MODE=MODES[mode], LARGEST=torch.finfo(dtype).max,
        ALIGNED=paged.aligned_nbytes == 16, TO_FRAME=to_frames,
    )  # fmt: skip
