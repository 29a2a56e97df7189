"""Compile every kernel for GPUs that are not here: `python -m tests.unit.compile_kernels`, without TRITON_INTERPRET.

Prints JSON: for each kernel and compute capability, the kinds of accesses to global memory in its PTX.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmcache_kernels import gather, planes, quantize

CAPABILITIES = (80, 90, 100)
WARP = 32
NUMBERS = {"num_blocks": "i32", "layer0": "i32"}  # the strides are i64; tables and ids are pointers to i64
PAGE: dict[str, Any] = {"SIZE1": 2, "SIZE2": 16, "RUN": 128, "ALIGNED": True}  # as of a layout that keeps heads apart
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gather": (gather._move, {**PAGE, "LAYER_WORDS": 4096, "PIECES": 2, "PIECE": 2048, "WORD": tl.int64}),
    "planes": (planes._move, {**PAGE, "LAYERS": 1, "COUNT": 4096, "PIECES": 2, "PIECE": 2048}),
}
for mode in quantize.MODES:
    KERNELS[mode] = (
        quantize._move,
        {
            **PAGE, "ROWS": 64, "N": 64, "PIECES": 2, "TILE_ROWS": 32, "TILE_N": 64, "DTYPE": tl.bfloat16,
            "MODE": quantize.MODES[mode], "LARGEST": 3.3895313892515355e38,
        },
    )  # fmt: skip


def accesses(kernel: Any, constants: dict[str, Any], capability: int) -> list[str]:
    """The kinds of loads and stores of one compiled kernel; its tables and strides are multiples of 16."""
    names = kernel.arg_names
    kinds = {name: NUMBERS.get(name, "i64" if "stride" in name else "*i64") for name in names if name not in constants}
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kinds if name not in NUMBERS},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, WARP)).asm["ptx"]
    return sorted(set(re.findall(r"(?:ld|st)\.global[.\w]*", ptx)))


def main() -> None:
    """Compile all and print."""
    found = {
        f"{name} {'to frames' if to_frames else 'from frames'} sm_{capability}": accesses(
            kernel, {**constants, "TO_FRAME": to_frames}, capability
        )
        for name, (kernel, constants) in KERNELS.items()
        for to_frames in (True, False)
        for capability in CAPABILITIES
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
