"""Blocks in a GPU's memory, to and from host memory: kernels and copy engines, on streams of their own.

The engine's stream is never waited for by the host, and waits itself only for a gather inside the GPU, so that a block
may be reused once its step has ended. What is copied to the host is complete when the returned copy is `synchronize`d,
by a thread that is not the engine's. On devices that have no CUDA streams everything is done on return.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mmcache_connectors.registered import REGISTRY, MappedMemory
from mmcache_kernels import Mover, TritonMover, mover_for

SAVE_SLOTS: Final = 8  # gathered chunks on their way to the host; with none free, a save is put off


class Copy(Protocol):
    """A copy under way."""

    def synchronize(self) -> None:
        """Wait until it has ended."""


class Ended:
    """A copy that has ended."""

    def synchronize(self) -> None:
        """Returns at once."""

    def query(self) -> bool:
        """True."""
        return True


@dataclass(slots=True)
class _Slot:
    """Device memory for one gathered chunk, and the copy out of it."""

    buffer: torch.Tensor | None = None
    copy: Any = field(default_factory=Ended)


class DeviceBlocks:
    """The blocks of one KV group on a device: views `[blocks, ...]` of words, a view a layer.

    Block ids and sizes are checked by the caller. `gather` is for one thread, the engine's; `scatter` for any.
    """

    def __init__(self, views: Sequence[torch.Tensor], mover: Mover | None = None) -> None:
        self._views = tuple(views)
        self.device = views[0].device
        self.mover = mover or mover_for(views)
        self._cuda = self.device.type == "cuda"
        self._slots = [_Slot() for _ in range(SAVE_SLOTS)]
        self._own = threading.local()
        if self._cuda:
            self._gathers, self._copies = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def mark(self) -> Any:
        """A point on the engine's stream: what the engine has started until now. None without streams."""
        return torch.cuda.current_stream(self.device).record_event() if self._cuda else None

    def gather(self, block_ids: NDArray[np.int64], out: torch.Tensor) -> Copy | None:
        """Begin to copy blocks to `out`, page-locked host memory `[blocks, layers, ...]`; `out` is theirs until the
        copy is synchronized. None, and nothing is done, while too many gathered blocks wait for the link to the host.
        """
        slot = next((slot for slot in self._slots if slot.copy.query()), None)
        if slot is None:
            return None
        held = self._hold(slot, out)
        if not self._cuda:
            self.mover.gather(self._on_device(block_ids), held)
            out.copy_(held)
            return Ended()
        engine = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._gathers):
            self._gathers.wait_stream(engine)
            self.mover.gather(self._on_device(block_ids), held)
            gathered = self._gathers.record_event()
        engine.wait_event(gathered)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(gathered)
            out.copy_(held, non_blocking=True)
            slot.copy = self._copies.record_event()
        return slot.copy  # type: ignore[no-any-return]

    def _hold(self, slot: _Slot, like: torch.Tensor) -> torch.Tensor:
        """The slot's memory in the form of `like`; it grows to the largest that was asked for."""
        if slot.buffer is None or slot.buffer.nbytes < like.nbytes:
            slot.buffer = torch.empty(like.nbytes, dtype=torch.uint8, device=self.device)
        return slot.buffer[: like.nbytes].view(like.dtype).view(like.shape)

    def scatter(self, block_ids: NDArray[np.int64], staged: torch.Tensor, after: Any = None) -> Copy:
        """Begin to copy page-locked host memory `[blocks, layers, ...]` into blocks, once what `mark` gave is reached;
        `staged` must stay as it is until the copy is synchronized."""
        return self._loading(after, lambda: self.mover.scatter(self._on_device(block_ids), self._brought(staged)))

    def scatter_by_layer(self, block_ids: NDArray[np.int64], staged: torch.Tensor, after: Any = None) -> list[Copy]:
        """As `scatter`, layer after layer, a copy each, so that the engine may begin with the first; one copy where the
        device cannot read host memory by itself. If it raises, nothing reads `staged` any more."""
        if not (self.mover.reaches_host and self._cuda and staged.is_pinned()):
            return [self.scatter(block_ids, staged, after)] * len(self._views)
        copies: list[Copy] = []

        def move() -> None:
            index = self._on_device(block_ids)
            for layer in range(len(self._views)):
                self.mover.scatter(index, staged, range(layer, layer + 1))
                copies.append(torch.cuda.current_stream(self.device).record_event())

        self._loading(after, move)
        return copies

    def reading(self, arena: MappedMemory) -> AbstractContextManager[bool]:
        """Whether, inside the `with`, kernels can read this server's memory where it is."""
        if not isinstance(self.mover, TritonMover):
            return nullcontext(False)
        return REGISTRY.reading(arena, self.device) if self._cuda else nullcontext(True)

    def scatter_from(self, block_ids: NDArray[np.int64], addresses: Sequence[int], after: Any = None) -> Copy:
        """As `scatter`, straight from frames' payloads at these addresses in memory that is being read."""
        assert isinstance(self.mover, TritonMover)
        mover, places = self.mover, np.array(addresses, np.int64)
        return self._loading(after, lambda: mover.scatter_from(self._on_device(block_ids), self._on_device(places)))

    def _loading(self, after: Any, move: Any) -> Copy:
        """Run `move` on this thread's own stream."""
        if not self._cuda:
            move()
            return Ended()
        stream = getattr(self._own, "stream", None)
        if stream is None:
            torch.cuda.set_device(self.device)  # or torch would come back to device 0 after each `with`
            stream = self._own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            try:
                move()
                return stream.record_event()  # type: ignore[no-any-return]
            except Exception:
                stream.synchronize()  # what was started may still read the caller's buffer
                raise

    def _brought(self, staged: torch.Tensor) -> torch.Tensor:
        return staged.to(self.device, non_blocking=True) if self._cuda else staged

    def _on_device(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """The numbers as a tensor on the device, without waiting for it."""
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._cuda else tensor.to(self.device)
