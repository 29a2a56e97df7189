"""A bounded pool of equal host buffers: what a worker stages blocks in, allocated when first needed and then reused."""

from __future__ import annotations

import logging
import queue
from typing import Literal

import torch

log = logging.getLogger("mmcache.kernels")
Pinned = Literal["no", "wanted", "must"]


class BufferPool:
    """At most `count` flat uint8 buffers of `nbytes` each. Thread-safe.

    `pinned`: in page-locked memory, which a GPU copies to and from by itself. Where the host has none left, "wanted"
    takes ordinary memory (slower, and the copying thread waits), "must" has no buffer; the log says so once.
    """

    def __init__(self, nbytes: int, count: int, pinned: Pinned) -> None:
        self.nbytes = nbytes
        self._count, self._pinned = count, pinned
        self._said = False
        self._free: queue.LifoQueue[torch.Tensor | None] = queue.LifoQueue()  # None: one that is not allocated yet
        for _ in range(count):
            self._free.put(None)

    def take(self, wait_s: float = 0.0) -> torch.Tensor | None:
        """A buffer, or None if all are in use, for longer than `wait_s`, or the host has no memory for another."""
        try:
            buffer = self._free.get(block=wait_s > 0, timeout=wait_s or None)
        except queue.Empty:
            return None
        if buffer is None:
            buffer = self._allocate()
        if buffer is None:
            self._free.put(None)
        return buffer

    def _allocate(self) -> torch.Tensor | None:
        for pin in (True, False) if self._pinned == "wanted" else (self._pinned == "must",):
            try:
                return torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pin)
            except (RuntimeError, MemoryError) as error:
                if not self._said:
                    self._said = True
                    log.warning(
                        "mmcache: no buffer of %d MiB of %s memory (%s); %s",
                        self.nbytes >> 20,
                        "page-locked" if pin else "host",
                        str(error).splitlines()[0] if str(error) else type(error).__name__,
                        "ordinary memory is used" if self._pinned == "wanted" else "blocks are not stored without one",
                    )
        return None

    def give_back(self, buffer: torch.Tensor) -> None:
        """The buffer may be used again."""
        self._free.put(buffer)

    def free_share(self) -> float:
        """The share of buffers that nobody uses, about now."""
        return self._free.qsize() / self._count
