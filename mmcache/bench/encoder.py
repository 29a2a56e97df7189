"""The stand-ins for the models: tensors of the real shapes, computed from content and from nothing else.

A benchmark that checks every hit must be able to say what the right value is. So the vision encoder is a seeded patch
projection of the pixels, and a KV block is a seeded stream of bits whose seed is SHA-256 over everything a real block
depends on: the model, the token ids, and the pixels, settings and times of the media so far. That digest shares no
code with mmcache.keys: if two contents ever got one key, the bytes that come back would not be these. No cache here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mmcache.bench import extras
from mmcache.bench.corpus import Pixels

# OpenAI CLIP ViT-L/14 at 224 px: 16 x 16 patches of 14 x 14 x 3 and a class token, width 1024.
SIDE, PATCH, WIDTH = 224, 14, 1024
GRID = (1, SIDE // PATCH, SIDE // PATCH)
EMBEDDING_SHAPE = (1 + GRID[1] * GRID[2], WIDTH)
EMBEDDING_NBYTES = prod(EMBEDDING_SHAPE) * 2
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# Qwen2-VL merges 2 x 2 patches into one prompt token.
TOKENS_PER_PICTURE = GRID[1] * GRID[2] // 4


@dataclass(frozen=True)
class KVShape:
    """One KV block of a model: (layers, 2, block_size, kv_heads, head_dim) of bfloat16, as uint16 bits."""

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * 2


# Its config.json: 28 hidden layers, 2 key-value heads, head dimension 1536 / 12. 28,672 B a token, 458,752 B a block.
QWEN2_VL_2B = KVShape("Qwen/Qwen2-VL-2B-Instruct", layers=28, kv_heads=2, head_dim=128, block_size=16)


def preprocess(rgb: Pixels, max_pixels: int) -> Pixels:
    """What the encoder sees of a picture: first at most `max_pixels` large, then uint8 (224, 224, 3).

    Raises ConfigError if pillow is not installed.
    """
    image = extras.load("PIL.Image")
    height, width = rgb.shape[:2]
    picture = image.fromarray(rgb)
    shrink = (max_pixels / (width * height)) ** 0.5
    if shrink < 1:
        picture = picture.resize((int(width * shrink), int(height * shrink)), image.Resampling.BICUBIC)
    return np.asarray(picture.resize((SIDE, SIDE), image.Resampling.BICUBIC))


class VisionEncoder:
    """A seeded linear patch encoder of CLIP ViT-L/14's output shape. Same seed and pixels, same bits (one process)."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        features = PATCH * PATCH * 3
        self._projection = rng.standard_normal((features, WIDTH), dtype=np.float32) / np.float32(features**0.5)
        self._positions = rng.standard_normal((GRID[1] * GRID[2], WIDTH), dtype=np.float32) * np.float32(0.02)
        self._class_token = rng.standard_normal(WIDTH, dtype=np.float32)

    def encode(self, pixels: Pixels) -> npt.NDArray[np.float16]:
        """The read-only float16 (257, 1024) embedding of preprocessed pixels: class token, then one row a patch."""
        side = SIDE // PATCH
        normalised = (pixels.astype(np.float32) / 255 - _MEAN) / _STD
        patches = normalised.reshape(side, PATCH, side, PATCH, 3).swapaxes(1, 2).reshape(side * side, -1)
        rows = patches @ self._projection + self._positions
        embedding = np.empty(EMBEDDING_SHAPE, dtype=np.float16)
        embedding[0] = self._class_token + rows.mean(axis=0)
        embedding[1:] = rows
        embedding.setflags(write=False)
        return embedding


def truth(*fields: bytes) -> bytes:
    """SHA-256 over length-framed fields: the benchmark's own name for a content."""
    state = hashlib.sha256()
    for field in fields:
        state.update(len(field).to_bytes(8, "little"))
        state.update(field)
    return state.digest()


def block_truths(shape: KVShape, token_ids: Sequence[int], media: Iterable[tuple[int, int, bytes]]) -> list[bytes]:
    """One 32-byte content digest per full block of a prompt, each over everything up to and including that block.

    Args:
        media: (offset, length, truth) of each medium in the prompt, in tokens; truth covers its pixels and settings.
    """
    seen = [b""] * len(token_ids)
    for offset, length, content in media:
        for position in range(length):
            seen[offset + position] = content + position.to_bytes(4, "little")
    state = truth(b"kv", repr(shape).encode())
    digests = []
    for start in range(0, len(token_ids) - shape.block_size + 1, shape.block_size):
        block = range(start, start + shape.block_size)
        state = truth(state, *(part for at in block for part in (token_ids[at].to_bytes(8, "little"), seen[at])))
        digests.append(state)
    return digests


def kv_block(shape: KVShape, content: bytes) -> npt.NDArray[np.uint16]:
    """The KV block of a content digest: bfloat16 bits, uint16 of `shape.shape`; all bit patterns occur."""
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(content, "little")))
    words = rng.integers(0, 2**64, size=shape.nbytes // 8, dtype=np.uint64)
    return words.view(np.uint16).reshape(shape.shape)
