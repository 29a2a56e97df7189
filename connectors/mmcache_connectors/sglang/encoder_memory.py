"""The host memory of SGLang's encoder that embeddings lie in: from addresses to rows of tensors. Knows torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Pools:
    """Contiguous pools `[tokens, width]` on the host; they outlive this."""

    def __init__(self) -> None:
        self._pools: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> None:
        """Know one more. Raises ValueError for a tensor that is no such pool, or of another dtype than those before."""
        if tensor.ndim != 2 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(f"a pool of shape {tuple(tensor.shape)} on {tensor.device} is no host memory of rows")
        if any(tensor.dtype is not pool.dtype for pool in self._pools):
            raise ValueError(f"a pool of {tensor.dtype} beside one of {self._pools[0].dtype}")
        self._pools.append(tensor)

    def rows(self, pointers: Sequence[int], sizes: Sequence[int]) -> list[torch.Tensor]:
        """For each address the rows of a pool that lie in `sizes` bytes from there; [] if not all are rows of one."""
        for pool in self._pools:
            found = [_rows(pool, *memory) for memory in zip(pointers, sizes, strict=True)]
            rows = [held for held in found if held is not None]
            if len(rows) == len(found):
                return rows
        return []


def _rows(pool: torch.Tensor, pointer: int, nbytes: int) -> torch.Tensor | None:
    row_nbytes = pool.shape[1] * pool.element_size()
    start, before = divmod(pointer - pool.data_ptr(), row_nbytes)
    count, rest = divmod(nbytes, row_nbytes)
    if before or rest or count < 1 or not 0 <= start <= len(pool) - count:
        return None
    return pool[start : start + count]
