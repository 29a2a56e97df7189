"""The xxh3-128 of bytes that are copied, or looked at, a part at a time. Pure."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import xxhash

STEP_NBYTES: Final = 256 << 10  # copied before it is hashed, while still in the CPU's cache


class Hasher(Protocol):
    """The hash of one run of bytes after the other. One thread at a time."""

    def copy(self, source: memoryview, target: memoryview, stream: bool, /) -> None:
        """Copy all of the source to the target, of as many bytes, and hash what was written there. With `stream` past
        the CPU's caches, where that can be."""

    def update(self, data: memoryview, /) -> None:
        """Hash what lies there."""

    def take(self) -> bytes:
        """The xxh3-128 of all since the last take, 16 bytes; the next run begins."""


class PlainHasher:
    """A Hasher in Python: it goes over the target a second time, while it is in the cache. Outside the GIL."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def copy(self, source: memoryview, target: memoryview, stream: bool, /) -> None:
        into, out_of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
        for start in range(0, len(into), STEP_NBYTES):
            np.copyto(into[start : start + STEP_NBYTES], out_of[start : start + STEP_NBYTES])
            self._state.update(target[start : start + STEP_NBYTES])

    def update(self, data: memoryview, /) -> None:
        self._state.update(data)

    def take(self) -> bytes:
        digest = self._state.digest()
        self._state.reset()
        return digest
