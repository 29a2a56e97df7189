"""What an engine's encoder was given and gave, from its process to another, in a file of plain arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Kept(NamedTuple):
    """Of one picture; tensors. The first two are None where the encoder did not run."""

    pixels: Any
    grid: Any
    embedding: Any


def keep(file: str, kept: Mapping[str, Kept]) -> None:
    """Write it. numpy knows no bfloat16, so tensors are written as bytes."""
    import torch

    arrays: dict[str, Any] = {}
    for name, one in kept.items():
        for part, tensor in zip(Kept._fields, one, strict=True):
            if tensor is not None:
                flat = tensor.detach().cpu().contiguous()
                form = json.dumps([str(flat.dtype).removeprefix("torch."), list(flat.shape)])
                arrays[json.dumps([name, part, form])] = flat.reshape(-1).view(torch.uint8).numpy()
    np.savez(file, **arrays)


def read(file: str) -> dict[str, Kept]:
    """Read it, as tensors."""
    import torch

    parts: dict[str, dict[str, Any]] = {}
    with np.load(file, allow_pickle=False) as arrays:
        for key in arrays.files:
            name, part, form = json.loads(key)
            dtype, shape = json.loads(form)
            data = torch.from_numpy(arrays[key].copy()).view(getattr(torch, dtype)).reshape(shape)
            parts.setdefault(name, dict.fromkeys(Kept._fields))[part] = data
    return {name: Kept(**found) for name, found in parts.items()}
