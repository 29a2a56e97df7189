"""Prompts of growing conversations and pictures' embeddings, and the only right bytes of each key."""

from __future__ import annotations

from typing import Final

import numpy as np

from mmcache.keys import Namespace, opaque_key
from mmcache.keyset import Keys
from mmcache.testing.values import Bytes

BLOCK_SIZE: Final = 64  # tokens
BLOCK_NBYTES: Final = 16 << 10
PICTURE_NBYTES: Final = 512 << 10
SYSTEM_TOKENS: Final = 640  # that all conversations begin with: a hot run, and a fork behind it
TURN_TOKENS: Final = 400
TURNS: Final = 12

_HEAD_NBYTES: Final = 32
_POOL: Final = np.random.default_rng(20).integers(0, 256, 2 * PICTURE_NBYTES, np.uint8)


class Values:
    """Keys of one population of clients. Nobody else stores under them."""

    def __init__(self, population: str) -> None:
        model = f"faults/{population}"
        self._kv = Namespace(kind="kv", model=model, dtype="uint8", layout="LBHNC", block_size=BLOCK_SIZE)
        self._pictures = Namespace(kind="embedding", model=model, dtype="uint8", layout="flat")
        self._system = np.random.default_rng(1).integers(0, 50_000, SYSTEM_TOKENS).tolist()

    def prompt(self, chat: int, generation: int, turn: int) -> Keys:
        """The blocks of a conversation's first `turn` turns; the next turn's begin with them."""
        own = np.random.default_rng([chat, generation]).integers(0, 50_000, turn * TURN_TOKENS).tolist()
        return self._kv.block_keys([*self._system, *own])

    def picture(self, number: int) -> Keys:
        """One embedding."""
        return Keys.of([opaque_key(self._pictures, f"picture/{number}".encode())])


def value_of(digest: bytes, nbytes: int) -> Bytes:
    """The only right value of a key: the key itself, then what lies in a random pool at a place that it names."""
    start = int.from_bytes(digest[:4], "little") % PICTURE_NBYTES
    value = _POOL[start : start + nbytes].copy()
    value[:_HEAD_NBYTES] = np.frombuffer(digest, np.uint8)
    return value


def is_right(digest: bytes, found: Bytes) -> bool:
    """Whether every byte is the key's."""
    start = int.from_bytes(digest[:4], "little") % PICTURE_NBYTES
    rest = _POOL[start + _HEAD_NBYTES : start + len(found)]
    return found[:_HEAD_NBYTES].tobytes() == digest and bool(np.array_equal(found[_HEAD_NBYTES:], rest))
