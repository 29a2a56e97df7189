"""SGLang's host pools in memory that a cache on the same host maps: pages are stored from where they lie.

One function of SGLang is wrapped, the one that all its host pools have their memory from by default. Names as of SGLang
0.5.23.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any, Final

from mmcache.errors import TransportError
from mmcache.transport.lent import shared_buffer

log = logging.getLogger("mmcache.sglang")
ALLOCATES: Final = "sglang.srt.mem_cache.pool_host.common.alloc_mmap"
HUGE_PAGES: Final = "SGLANG_HUGEPAGE_SIZE"


def register() -> None:
    """Have the host pools that are made from now on lie in such memory."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ALLOCATES, allocate, HookType.AROUND)


def allocate(original: Callable[..., Any], dims: tuple[int, ...], dtype: Any) -> Any:
    """A tensor in shared memory whose pages all exist, as `alloc_mmap` gives one; of SGLang's own where huge pages are
    asked for, which cannot be lent, or the system has no such memory."""
    import torch

    if os.environ.get(HUGE_PAGES):
        log.warning(
            "host pools of huge pages cannot be lent to a cache; unset %s, or live with one more copy", HUGE_PAGES
        )
        return original(dims, dtype)
    count = math.prod(dims)
    try:
        memory = shared_buffer(count * dtype.itemsize)
    except TransportError as error:
        log.warning("the host pool cannot be lent to a cache: %s", error)
        return original(dims, dtype)
    return torch.from_numpy(memory).view(dtype).reshape(dims)
