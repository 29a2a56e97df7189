"""Moves blocks between an engine's paged KV memory and frames: Triton kernels on a GPU, plain torch elsewhere.

Knows torch, and Triton where it is installed; nothing of mmcache or of any engine. `mover_for` picks what works.
"""

from mmcache_kernels.layout import KernelInputError, PagedLayout, describe
from mmcache_kernels.mover import Mover, TorchMover, TritonMover, mover_for, why_no_kernels

__all__ = [
    "KernelInputError",
    "Mover",
    "PagedLayout",
    "TorchMover",
    "TritonMover",
    "describe",
    "mover_for",
    "why_no_kernels",
]
