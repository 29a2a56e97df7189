"""The pictures and frames of the suite, from a few numbers: the same ones in every process."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def picture(seed: int, width: int = 168, height: int = 112, changed: bool = False) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: noise in squares of 14, so that no two tiles look alike; `changed`: in one pixel."""
    squares = np.random.default_rng(seed).integers(0, 256, (-(-height // 14), -(-width // 14), 3), np.uint8)
    pixels = np.kron(squares, np.ones((14, 14, 1), np.uint8))[:height, :width].copy()
    if changed:
        pixels[0, 0] ^= 255
    return pixels


def frames(seed: int, count: int = 8, every: int = 1, width: int = 112, height: int = 84) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3]: every `every`-th of a clip's `count` frames, as another frame rate samples them."""
    return np.stack([picture(1000 * seed + i, width, height) for i in range(0, count, every)])


def strip(seed: int, tiles: int, upright: bool) -> NDArray[np.uint8]:
    """The same `tiles` tiles of 28 x 28 beside each other or, `upright`, on top of each other.

    Both have the same patches in the same order, so their pixel values are the same bytes: only the grid differs.
    """
    blocks = np.random.default_rng(seed).integers(0, 256, (tiles, 28, 28, 3), np.uint8)
    return np.concatenate(list(blocks), axis=0 if upright else 1)


def sound(seed: int, seconds: float) -> NDArray[np.float32]:
    """float32 samples at 16 kHz: a few tones, and noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(int(16000 * seconds)) / 16000
    tones = np.sin(2 * np.pi * rng.uniform(100, 4000, (5, 1)) * times).sum(axis=0)
    samples: NDArray[np.float32] = (0.1 * tones + 0.05 * rng.standard_normal(len(times))).astype(np.float32)
    return samples


def media(spec: dict[str, Any]) -> NDArray[np.uint8]:
    """What a JSON object names: {"kind": "picture" | "frames" | "strip", and that function's arguments}."""
    arguments = {name: value for name, value in spec.items() if name != "kind"}
    makers: dict[str, Any] = {"picture": picture, "frames": frames, "strip": strip}
    pixels: NDArray[np.uint8] = makers[spec["kind"]](**arguments)
    return pixels
