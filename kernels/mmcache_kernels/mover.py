"""Which code moves blocks: the kernels where they run and have shown so, the reference elsewhere, with the reason.

Both movers take blocks of one KV group to and from frames, on the device's current stream, and wait for nothing. Block
ids are checked by the caller: they come from the host, and a check must not wait for a device.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from mmcache_kernels import reference
from mmcache_kernels.layout import KernelInputError, PagedLayout, check_frame, describe

log = logging.getLogger("mmcache.kernels")
_LAUNCH: Final = threading.Lock()  # Triton compiles at the first launch, and its interpreter runs one at a time


class Mover(Protocol):
    """Moves blocks of one KV group; `name` is "triton" or "torch".

    `frames` hold one block each: rows of a contiguous tensor `[blocks, layers, ...]` of the paged memory's dtype, in
    its device's memory, or, for kernels alone (`reaches_host`), in page-locked host memory.
    """

    name: str
    reaches_host: bool

    def gather(self, block_ids: torch.Tensor, frames: torch.Tensor) -> None:
        """Fill `frames[i]` with block `block_ids[i]`."""

    def scatter(self, block_ids: torch.Tensor, frames: torch.Tensor, layers: range | None = None) -> None:
        """Fill block `block_ids[i]` (of these layers) with `frames[i]`; no other block changes."""


class TorchMover:
    """The reference as a mover."""

    name = "torch"
    reaches_host = False

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        self._views = tuple(views)

    def gather(self, block_ids: torch.Tensor, frames: torch.Tensor) -> None:
        """See Mover."""
        reference.gather(self._views, block_ids, frames)

    def scatter(self, block_ids: torch.Tensor, frames: torch.Tensor, layers: range | None = None) -> None:
        """See Mover."""
        some = slice(None) if layers is None else slice(layers.start, layers.stop)
        reference.scatter(self._views[some], block_ids, frames[:, some])


class TritonMover:
    """The kernels as a mover. Raises KernelInputError for memory they cannot walk."""

    name = "triton"
    reaches_host = True

    def __init__(self, views: Sequence[torch.Tensor]) -> None:
        self.paged: PagedLayout = describe(views)
        self._kernels: Any = importlib.import_module("mmcache_kernels.gather")
        # Compiled now, not in the engine's first step: block 0 is skipped, so nothing moves.
        null = torch.zeros(1, dtype=torch.int64, device=self.paged.device)
        for to_frames in (True, False):
            self._move(null, null, to_frames=to_frames)

    def gather(self, block_ids: torch.Tensor, frames: torch.Tensor) -> None:
        """See Mover."""
        self._move(self._table(frames), block_ids, to_frames=True)

    def scatter(self, block_ids: torch.Tensor, frames: torch.Tensor, layers: range | None = None) -> None:
        """See Mover."""
        self._move(self._table(frames), block_ids, to_frames=False, layers=layers)

    def scatter_from(self, block_ids: torch.Tensor, addresses: torch.Tensor) -> None:
        """As `scatter`, from frames at these addresses (int64 `[blocks]` on the device, multiples of 16), which the
        device must be able to read: an arena that was registered with it."""
        self._move(addresses, block_ids, to_frames=False)

    def _move(self, addresses: torch.Tensor, block_ids: torch.Tensor, **how: Any) -> None:
        with _LAUNCH:
            self._kernels.move(self.paged, addresses, block_ids, **how)

    def _table(self, frames: torch.Tensor) -> torch.Tensor:
        """The frames' addresses, made on the device: a table copied from the host would have to be waited for."""
        block_nbytes, paged = self.paged.block_nbytes, self.paged
        if frames.nbytes != len(frames) * block_nbytes:
            wanted = f"{len(frames)} frames of {block_nbytes} bytes"
            raise KernelInputError(f"{wanted} are wanted, not {frames.nbytes} bytes; allocate that")
        check_frame(frames, frames.nbytes, paged.device)
        if frames.data_ptr() % 16:
            raise KernelInputError("frames must begin at multiples of 16 bytes; pass an allocation of their own")
        return torch.arange(len(frames), device=paged.device) * block_nbytes + frames.data_ptr()


def mover_for(views: Sequence[torch.Tensor]) -> Mover:
    """The fastest mover that works for this memory; what falls back says why in the log, once."""
    reason = why_no_kernels(views[0].device) if views else ""
    if not reason:
        try:
            return TritonMover(views)
        except KernelInputError as error:
            reason = str(error)
        except Exception as error:  # a compiler or a driver that fails, in whichever way
            reason = f"{type(error).__name__}: {error}"
    if views and views[0].device.type != "cpu":
        log.warning("mmcache: blocks are moved by torch, not by kernels: %s", reason)
    return TorchMover(views)


@functools.cache
def why_no_kernels(device: torch.device) -> str:
    """Why the kernels are not used on this device, in words; "" if they are. Tries them on a few blocks first."""
    if device.type != "cuda":
        return f"{device.type} memory is copied by the processor; the kernels are for GPUs"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return try_kernels(device)


def try_kernels(device: torch.device) -> str:
    """Move a few blocks there and back with the kernels and with the reference: what went wrong, in words, or ""."""
    try:
        source = [torch.arange(4 * 2 * 16 * 64, device=device).view(4, 2, 16, 64).to(torch.int16) + i for i in range(3)]
        ids = torch.tensor([3, 1], device=device)
        frames = [torch.zeros(2, 3, 2, 16, 64, dtype=torch.int16, device=device) for _ in range(2)]
        pages = [[torch.zeros_like(layer) for layer in source] for _ in range(2)]
        both: tuple[type[TritonMover | TorchMover], ...] = (TritonMover, TorchMover)
        for moves, out, into in zip(both, frames, pages, strict=True):
            moves(source).gather(ids, out)
            moves(into).scatter(ids, out)
        same = torch.equal(*frames) and all(torch.equal(*pair) for pair in zip(*pages, strict=True))
    except Exception as error:  # a compiler or a driver that fails, in whichever way
        return f"Triton {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else 'no reason'}"
    return "" if same else "the kernels gave other bytes than the reference on this device"
