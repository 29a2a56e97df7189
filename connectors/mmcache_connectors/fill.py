"""Stored blocks to where an engine keeps them, by the shortest way there is.

Blocks in host memory are read in place where each is a few even pieces. A GPU takes them straight from the server's
memory where the driver maps that for it: checked where they lie, and right if the lease was held until they had
arrived. Everything else goes through a page-locked buffer. Shared by the connectors: it knows no engine.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mmcache.client.blocking import Client
from mmcache.errors import FrameError
from mmcache.frame_view import Frame
from mmcache.keyset import Keys
from mmcache.transport.base import HIT, Outcome, Result
from mmcache_connectors.buffers import BufferPool
from mmcache_connectors.device import Copy
from mmcache_connectors.paged import BlockSpec, PagedGroup

log = logging.getLogger("mmcache.kernels")
BUFFER_WAIT_S: Final = 0.5
COPIED_NBYTES: Final = 64 << 20
MAPPED_PARTS: Final = 32
_LOST: Final = Result(Outcome.MISS, "the lease expired while the blocks were being read")


class LayerGate:
    """Copies of one engine step that arrive layer by layer, while the engine already computes with the first.

    `pass_layer` has the engine's stream wait for one layer; buffers are given back once what they hold has arrived.
    """

    def __init__(self, buffers: BufferPool) -> None:
        self._buffers = buffers
        self._lock = threading.Lock()
        self._copies: list[list[Copy]] = []
        self._held: deque[tuple[Copy, torch.Tensor]] = deque()

    def add(self, copies: list[Copy], buffer: torch.Tensor) -> None:
        """One buffer's blocks are on their way, a copy a layer."""
        with self._lock:
            self._copies.append(copies)
            self._held.append((copies[-1], buffer))

    def pass_layer(self, layer: int) -> None:
        """On the engine's thread: what it starts from now on finds this layer's blocks filled."""
        with self._lock:
            copies = [copies[layer] for copies in self._copies]
        _pass(copies)

    def pass_all(self) -> None:
        """As `pass_layer`, for every layer."""
        with self._lock:
            copies = [copies[-1] for copies in self._copies]
        _pass(copies)

    def give_back_one(self) -> bool:
        """Wait for the oldest buffer's blocks and give it back; False if there is none."""
        with self._lock:
            if not self._held:
                return False
            copy, buffer = self._held.popleft()
        copy.synchronize()
        self._buffers.give_back(buffer)
        return True

    def give_back_all(self) -> None:
        """Wait for every buffer's blocks and give them back; off the engine's thread."""
        while self.give_back_one():
            pass


def _pass(copies: Sequence[Copy]) -> None:
    for copy in copies:
        if isinstance(copy, torch.cuda.Event):
            torch.cuda.current_stream().wait_event(copy)


class Filler:
    """Fills blocks from one cache. Thread-safe; a load's blocks belong to it until `fill` returns, or its gate says."""

    def __init__(self, client: Client, buffers: BufferPool) -> None:
        self._client, self._buffers = client, buffers
        self._said = False

    def copied_nbytes(self, paged: PagedGroup) -> int:
        """How much to ask for at once where blocks are only copied, within this host's memory, which the client does on
        threads of its own: a small share of the server's memory, as it is pinned meanwhile. 0: they are not."""
        return min(COPIED_NBYTES, self._client.mapped_nbytes // MAPPED_PARTS) if paged.lies_in_place else 0

    def fill(
        self, paged: PagedGroup, keys: Keys, block_ids: Sequence[int], after: Any = None, gate: LayerGate | None = None
    ) -> list[Result]:
        """One Result a block, in order; what is no hit, and all behind it, holds nothing valid. No results at all:
        there is no memory for a buffer. On a GPU nothing is written before the engine has reached `after`."""
        if places := paged.in_place(block_ids):
            return self._client.get_into(keys, places)
        results = self._from_arena(paged, keys, block_ids, after) if paged.on_device else []
        done = len(results)
        if done < len(keys) and all(results):
            results += self._staged(paged, keys[done:], block_ids[done:], after, gate)
        return results

    def _from_arena(self, paged: PagedGroup, keys: Keys, block_ids: Sequence[int], after: Any) -> list[Result]:
        """Straight from the server's memory, as many leading blocks as are there as they should be: the other way says
        what is wrong with the next, and is taken where this one fails."""
        arena = self._client.shared_memory
        if arena is None:
            return []
        try:
            with paged.reading(arena) as readable:
                return self._from_leased(arena.data, paged, keys, block_ids, after) if readable else []
        except Exception:
            if not self._said:
                self._said = True
                log.exception("mmcache: blocks could not be taken from the cache's memory; they go through a buffer")
            return []

    def _from_leased(
        self, memory: NDArray[np.uint8], paged: PagedGroup, keys: Keys, block_ids: Sequence[int], after: Any
    ) -> list[Result]:
        lease = self._client.acquire(keys)
        held = False
        try:
            addresses = list(_addresses(lease.frames, memory, paged.spec()))
            if addresses:
                paged.scatter_from(block_ids[: len(addresses)], addresses, after)
        finally:
            held = lease.release()
        return [HIT if held else _LOST] * len(addresses)

    def _staged(
        self, paged: PagedGroup, keys: Keys, block_ids: Sequence[int], after: Any, gate: LayerGate | None
    ) -> list[Result]:
        buffer = self._buffers.take()
        while buffer is None and gate is not None and gate.give_back_one():
            buffer = self._buffers.take()
        if buffer is None:
            buffer = self._buffers.take(BUFFER_WAIT_S)  # of the step before, whose blocks may still be on their way
        if buffer is None:
            return []
        kept = False
        try:
            staged = as_blocks(buffer, len(block_ids), paged)
            results = self._client.get_into(keys, paged.rows(staged))
            good = leading(results)
            if good and gate is not None:
                gate.add(paged.scatter_by_layer(block_ids[:good], staged[:good], after), buffer)
                kept = True
            elif good:
                paged.scatter(block_ids[:good], staged[:good], after)
            return results
        finally:
            if not kept:
                self._buffers.give_back(buffer)


def _addresses(frames: Sequence[Frame | None], memory: NDArray[np.uint8], spec: BlockSpec) -> Iterator[int]:
    """Where in `memory` the leading blocks lie that have this form and the bytes that were stored."""
    begin = int(memory.ctypes.data)
    for frame in frames:
        if frame is None or len(frame.header.tensors) != 1:
            return
        (tensor,) = frame.header.tensors
        if tensor.spec[1:] != (spec.dtype, spec.shape):
            return
        try:
            frame.verify()
        except FrameError:
            return
        address = int(np.frombuffer(frame.payload(tensor), np.uint8).ctypes.data)
        if not begin <= address <= begin + memory.nbytes - tensor.nbytes:  # of a server that came after
            return
        yield address


def leading(results: Sequence[Result]) -> int:
    """How many results are good before the first that is not."""
    return next((row for row, result in enumerate(results) if not result), len(results))


def as_blocks(buffer: torch.Tensor, count: int, paged: PagedGroup) -> torch.Tensor:
    """The first bytes of a buffer as `count` blocks."""
    return buffer[: count * paged.spec().nbytes].view(paged.dtype).view(count, *paged.shape)
