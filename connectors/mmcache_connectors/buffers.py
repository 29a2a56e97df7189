"""A bounded pool of equal host buffers: what a worker stages blocks in, allocated when first needed and then reused."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BufferPool:
    """At most `count` flat uint8 buffers of `nbytes` each, in page-locked memory with `pinned`. Thread-safe."""

    def __init__(self, nbytes: int, count: int, pinned: bool) -> None:
        self.nbytes = nbytes
        self._count, self._pinned = count, pinned
        self._free: queue.LifoQueue[torch.Tensor | None] = queue.LifoQueue()  # None: one that is not allocated yet
        for _ in range(count):
            self._free.put(None)

    def take(self) -> torch.Tensor | None:
        """A buffer, or None if all are in use, or the host has no memory for another."""
        try:
            buffer = self._free.get(block=False)
        except queue.Empty:
            return None
        if buffer is None:
            try:
                buffer = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
            except (RuntimeError, MemoryError):  # the host has no such memory left
                self._free.put(None)
                return None
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """The buffer may be used again."""
        self._free.put(buffer)

    def free_share(self) -> float:
        """The share of buffers that nobody uses, about now."""
        return self._free.qsize() / self._count

    @contextmanager
    def borrow(self) -> Iterator[torch.Tensor | None]:
        """`take`, and `give_back` at the end."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            if buffer is not None:
                self.give_back(buffer)
