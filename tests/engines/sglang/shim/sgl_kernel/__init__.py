"""A stand-in for SGLang's kernels where there is no GPU: what a tiny model needs, in torch; the rest can be imported.

A kernel that is missing raises when it is called, so that nothing passes by accident. `convert_weight_packed` must not
exist: SGLang takes its presence for a CPU with AMX.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from . import hicache

NOT_KERNELS = ("scalar_types", "ScalarType")  # SGLang catches the ImportError and goes on without
# Operators that models look up when they are imported.
OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)

hicache.install()
_library = torch.library.Library("sgl_kernel", "DEF")
for _name in OPERATORS:
    _library.define(f"{_name}(Tensor a) -> Tensor")


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in NOT_KERNELS:
        raise ImportError(name)

    def kernel(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in here")

    return kernel


class _Submodules(MetaPathFinder, Loader):
    """Any sgl_kernel.x.y can be imported; what is taken from it raises when called."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _missing


sys.meta_path.append(_Submodules())
__getattr__ = _missing


def assign_req_to_token_pool_cpu(requests: Any, table: Any, starts: Any, ends: Any, places: Any, stride: int) -> None:
    """Write each request's places, which lie one after the other in `places`, to its row of `table`."""
    done = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = places[done : done + end - start].to(table.dtype)
        done += end - start
