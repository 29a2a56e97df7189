"""Triton: paged bfloat16 KV memory <-> frames of two byte planes, lossless, in the same pass as the gather.

A frame here holds all exponents of a block, then all signs and mantissas, in the order of its values. It is as large as
the block; a byte-wise codec (zstd, nvCOMP) then finds the exponents' redundancy. reference.split_planes defines it.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from mmcache_kernels.layout import KernelInputError, PagedLayout

PIECE_VALUES: Final = 2048  # of one program


@triton.jit
def _move(
    layer_table, frame_table, block_ids, num_blocks, block_stride, stride0, stride1, stride2,
    LAYERS: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr, RUN: tl.constexpr, COUNT: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, ALIGNED: tl.constexpr, TO_FRAME: tl.constexpr,
):  # fmt: skip
    """As gather._move, in values of 16 bits; COUNT of them in one layer's share of a block."""
    item = tl.program_id(0) // PIECES
    value = tl.program_id(0) % PIECES * PIECE + tl.arange(0, PIECE)
    layer = tl.program_id(1)
    block = tl.load(block_ids + item)
    if (block > 0) & (block < num_blocks):
        page = tl.load(layer_table + layer).to(tl.pointer_type(tl.int16))
        exponents = tl.load(frame_table + item).to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            page = tl.multiple_of(page, 16)
            exponents = tl.multiple_of(exponents, 16)
        page += block * block_stride
        exponents += layer.to(tl.int64) * COUNT
        rest = exponents + LAYERS * COUNT
        run = value // RUN
        outer = run // SIZE2
        # In 64 bits: layouts with heads outermost have strides of the whole pool's size.
        place = (outer // SIZE1).to(tl.int64) * stride0 + (outer % SIZE1).to(tl.int64) * stride1
        place += (run % SIZE2).to(tl.int64) * stride2 + value % RUN
        here = value < COUNT
        if TO_FRAME:
            bits = tl.load(page + place, mask=here, other=0).to(tl.int32)
            tl.store(exponents + value, ((bits >> 7) & 0xFF).to(tl.uint8), mask=here)
            tl.store(rest + value, (((bits >> 8) & 0x80) | (bits & 0x7F)).to(tl.uint8), mask=here)
        else:
            low = tl.load(rest + value, mask=here, other=0).to(tl.int32)
            high = tl.load(exponents + value, mask=here, other=0).to(tl.int32)
            bits = ((low & 0x80) << 8) | (high << 7) | (low & 0x7F)
            tl.store(page + place, bits.to(tl.int16), mask=here)


def move(paged: PagedLayout, frames: torch.Tensor, block_ids: torch.Tensor, *, to_frames: bool) -> None:
    """Launch on the current stream; tables and ids as in `gather.move`. Raises KernelInputError for other dtypes."""
    if paged.views[0].dtype not in (torch.bfloat16, torch.int16):
        raise KernelInputError(f"{paged.views[0].dtype} has no planes here; only bfloat16 is split")
    if not len(block_ids):
        return
    count = paged.layer_nbytes // 2
    piece = min(PIECE_VALUES, triton.next_power_of_2(count))
    pieces = triton.cdiv(count, piece)
    stride0, stride1, stride2 = (stride // 2 for stride in paged.strides)
    _move[(len(block_ids) * pieces, len(paged.views))](
        paged.layer_table, frames, block_ids, paged.num_blocks, paged.block_stride // 2, stride0, stride1, stride2,
        LAYERS=len(paged.views), SIZE1=paged.sizes[1], SIZE2=paged.sizes[2], RUN=paged.run_nbytes // 2,
        COUNT=count, PIECES=pieces, PIECE=piece, ALIGNED=paged.aligned_nbytes == 16, TO_FRAME=to_frames,
    )  # fmt: skip
