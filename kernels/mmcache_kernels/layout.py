"""Where blocks lie, in bytes, for code that moves them: paged KV memory on one side, frames on the other.

Paged memory is a list of layers, each a strided view `[blocks, ...]`; a frame's payload holds one block of all layers,
contiguous, the dimensions in the view's order. Both sides are tables of addresses, one a layer and one a frame, so that
one launch moves all layers of many blocks wherever their frames are: a buffer, a ring, an arena. No kernel is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

_OUTER_DIMS: Final = 3  # that a kernel walks besides blocks, layers and the bytes of a run


class KernelInputError(ValueError):
    """Memory, block ids or sizes that cannot be moved: the message says which, and what to pass instead."""


@dataclass(frozen=True)
class PagedLayout:
    """The layers of one KV group, all of one form. `views` keeps their memory alive.

    `sizes` and `strides` (bytes) walk the runs of one layer's share of a block, outermost first; a run is
    `run_nbytes` that lie together both here and in a frame.
    """

    views: tuple[torch.Tensor, ...]
    num_blocks: int
    block_stride: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    run_nbytes: int

    @property
    def device(self) -> torch.device:
        """Where the paged memory is."""
        return self.views[0].device

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer's share of a block."""
        return self.sizes[0] * self.sizes[1] * self.sizes[2] * self.run_nbytes

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block's payload in a frame."""
        return self.layer_nbytes * len(self.views)

    @cached_property
    def aligned_nbytes(self) -> int:
        """16, 8, 4, 2 or 1: what every run's address and size is a multiple of."""
        places = [view.data_ptr() for view in self.views]
        places += [self.block_stride, self.run_nbytes, *self.strides]
        return next(size for size in (16, 8, 4, 2, 1) if all(place % size == 0 for place in places))

    @cached_property
    def layer_table(self) -> torch.Tensor:
        """The layers' addresses: int64 `[layers]` on the device."""
        return torch.tensor([view.data_ptr() for view in self.views], dtype=torch.int64, device=self.device)


def describe(views: Sequence[torch.Tensor]) -> PagedLayout:
    """The layout of layers `[blocks, ...]`, which must have one shape, dtype, device and strides.

    Raises KernelInputError, with the remedy, for layers that differ, and for memory in more pieces than a kernel walks
    (no engine's): the reference moves those.
    """
    if not views:
        raise KernelInputError("no layers: pass the layers of one KV group")
    first = views[0]
    for place, view in enumerate(views):
        if _form(view) != _form(first):
            raise KernelInputError(
                f"layer {place} is {view.dtype}{list(view.shape)} with strides {list(view.stride())} on {view.device}, "
                "unlike layer 0; make a group of each form"
            )
    itemsize = first.element_size()
    steps = zip(first.shape[1:], first.stride()[1:], strict=True)
    dims = [(size, step * itemsize) for size, step in steps if size != 1]
    run_nbytes = itemsize
    while dims and dims[-1][1] == run_nbytes:
        run_nbytes *= dims.pop()[0]
    walked = _merged(dims)
    if len(walked) > _OUTER_DIMS:
        raise KernelInputError(
            f"strides {list(first.stride())} cut a block of {list(first.shape[1:])} into more than {_OUTER_DIMS} "
            "nested pieces; ask the engine for another KV layout (LBHNC)"
        )
    padded = [(1, 0)] * (_OUTER_DIMS - len(walked)) + walked
    sizes, strides = zip(*padded, strict=True)
    return PagedLayout(tuple(views), len(first), first.stride(0) * itemsize, sizes, strides, run_nbytes)


def _form(view: torch.Tensor) -> tuple[object, ...]:
    return view.shape, view.stride(), view.dtype, view.device


def _merged(dims: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring dimensions (size, stride) that are walked as one are one."""
    found: list[tuple[int, int]] = []
    for size, stride in dims:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


def check_frame(frame: torch.Tensor, nbytes: int, device: torch.device) -> None:
    """Raise KernelInputError for a frame that is too small, not contiguous, or in memory the device cannot reach (not
    its own, and not page-locked host memory)."""
    if not frame.is_contiguous() or frame.nbytes < nbytes:
        form = "not contiguous" if not frame.is_contiguous() else f"{frame.nbytes} bytes"
        raise KernelInputError(f"a frame is {form}; a block needs {nbytes} contiguous bytes")
    if frame.device != device and not (frame.device.type == "cpu" and frame.is_pinned()):
        raise KernelInputError(f"a frame is on {frame.device}, out of reach of {device}; pass pinned memory")
