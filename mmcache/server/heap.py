"""glibc's heap, told to keep what gRPC messages were in for the next ones.

By default a large block is mapped when it is taken and unmapped when it is freed, or the end of the heap goes back to
the system: so every message of some MiB has its pages faulted in anew, several times on its way through gRPC, which
takes longer than all the copies (malloc.h, man 3 mallopt).
"""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_NBYTES: Final = 32 << 20  # of a block that is kept: glibc allows no more
KEPT_NBYTES: Final = 64 << 20  # free at the end of a heap, of which threads have one each


def keep_freed_memory() -> bool:
    """Of this process, for good. False where the C library knows no such thing: messages are slower then."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_NBYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_NBYTES))
