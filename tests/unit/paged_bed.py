"""Paged KV memory of every physical order and dtype, filled at random, with its plain truth: to test what moves it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

ORDERS = {  # of the five logical dimensions L, B, H, N, C in memory, as vLLM names them
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
    "CNHBL": (4, 3, 2, 1, 0),  # nobody's order: content is not innermost
}
DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "float8_e4m3fnuz", "bool"]
SHAPES = [  # layers, heads, tokens, content, ratio
    (3, 2, 8, 5, 1),
    (1, 1, 1, 1, 1),
    (2, 1, 16, 24, 1),  # MLA: one head
    (2, 3, 6, 7, 3),
    (2, 2, 32, 64, 2),
    (1, 1, 4, 3, 4),
]
BLOCKS = 7
POISON = 0x5A


def paged(order: str, dtype: Any, shape: tuple[int, int, int, int, int], seed: int = 0) -> tuple[list[Any], Any]:
    """Layers in one allocation of that order, filled at random, and the plain truth in bytes.

    The truth is uint8 `[blocks, layers, heads, block_tokens, content * itemsize]`, built without PagedGroup.
    """
    count, heads, tokens, content, ratio = shape
    sizes = (count, BLOCKS * ratio, heads, tokens // ratio, content)
    itemsize = dtype.itemsize
    generator = np.random.default_rng(seed)
    high = 2 if dtype is torch.bool else 256
    plain = generator.integers(0, high, (*sizes, itemsize), np.uint8)
    memory = np.ascontiguousarray(plain.transpose(*ORDERS[order], 5)).reshape(-1)
    flat = torch.from_numpy(memory).view(dtype).view([sizes[i] for i in ORDERS[order]])
    whole = flat.permute([ORDERS[order].index(i) for i in range(5)])
    split = plain.reshape(count, BLOCKS, ratio, heads, tokens // ratio, content * itemsize)
    truth = split.transpose(1, 0, 3, 2, 4, 5).reshape(BLOCKS, count, heads, tokens, content * itemsize)
    return list(whole.unbind(0)), truth


def as_bytes(tensor: Any) -> Any:
    """A copy of the tensor's bytes, uint8 `[..., content * itemsize]`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(torch.uint8).numpy()
