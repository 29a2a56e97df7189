"""Triton: paged KV memory <-> frames, all layers of many blocks in one launch, by tables of addresses.

A program moves a piece of one layer's share of one block. Block ids are looked at again on the device: block 0 and ids
beyond the memory are skipped, so a wrong table can leave a frame unfilled, never write another block. The moves are of
words, not numbers: any dtype goes through unchanged.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from mmcache_kernels.layout import PagedLayout

PIECE_WORDS: Final = 2048  # a program's share: 16 KiB of 8-byte words


@triton.jit(do_not_specialize=["layer0"])  # a kernel for all layers, not one for layer 1
def _move(
    layer_table, frame_table, block_ids, num_blocks, block_stride, stride0, stride1, stride2, layer0,
    SIZE1: tl.constexpr, SIZE2: tl.constexpr, RUN: tl.constexpr, LAYER_WORDS: tl.constexpr, PIECES: tl.constexpr,
    PIECE: tl.constexpr, WORD: tl.constexpr, ALIGNED: tl.constexpr, TO_FRAME: tl.constexpr,
):  # fmt: skip
    """Strides, RUN and LAYER_WORDS are in words; SIZE1 and SIZE2 are the inner walked dimensions."""
    row = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    layer = layer0 + tl.program_id(1)
    block = tl.load(block_ids + row)
    if (block > 0) & (block < num_blocks):
        page = tl.load(layer_table + layer).to(tl.pointer_type(WORD))
        frame = tl.load(frame_table + row).to(tl.pointer_type(WORD))
        if ALIGNED:
            page = tl.multiple_of(page, 16)
            frame = tl.multiple_of(frame, 16)
        word = piece * PIECE + tl.arange(0, PIECE)
        run = word // RUN
        inside = word % RUN
        outer = run // SIZE2
        # In 64 bits: layouts with heads outermost have strides of the whole pool's size.
        place = (outer // SIZE1).to(tl.int64) * stride0 + (outer % SIZE1).to(tl.int64) * stride1
        place += (run % SIZE2).to(tl.int64) * stride2 + inside
        page += block * block_stride
        frame += layer.to(tl.int64) * LAYER_WORDS
        here = word < LAYER_WORDS
        if TO_FRAME:
            tl.store(frame + word, tl.load(page + place, mask=here), mask=here)
        else:
            tl.store(page + place, tl.load(frame + word, mask=here), mask=here)


def move(
    paged: PagedLayout, frames: torch.Tensor, block_ids: torch.Tensor, *, to_frames: bool,
    layers: range | None = None,
) -> None:  # fmt: skip
    """Launch on the current stream: `block_ids[i]` of every layer to, or from, the frame at address `frames[i]`.

    `frames` and `block_ids`: int64 on the device, 16-byte aligned addresses; checked by the caller. `layers`: only
    these, for moves that keep step with the model. Nothing is waited for.
    """
    layers = range(len(paged.views)) if layers is None else layers
    if not len(block_ids) or not len(layers):
        return
    nbytes = min(8, paged.aligned_nbytes)
    layer_words = paged.layer_nbytes // nbytes
    piece = min(PIECE_WORDS, triton.next_power_of_2(layer_words))
    pieces = triton.cdiv(layer_words, piece)
    stride0, stride1, stride2 = (stride // nbytes for stride in paged.strides)
    _move[(len(block_ids) * pieces, len(layers))](
        paged.layer_table, frames, block_ids, paged.num_blocks, paged.block_stride // nbytes,
        stride0, stride1, stride2, layers.start,
        SIZE1=paged.sizes[1], SIZE2=paged.sizes[2], RUN=paged.run_nbytes // nbytes, LAYER_WORDS=layer_words,
        PIECES=pieces, PIECE=piece, WORD=_WORD[nbytes],
        ALIGNED=paged.aligned_nbytes == 16 and paged.layer_nbytes % 16 == 0, TO_FRAME=to_frames,
    )  # fmt: skip


_WORD: Final = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
