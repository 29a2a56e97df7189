"""Keys whose values follow from them, destinations that hold nobody's value, and waiting with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mmcache.keys import Namespace, opaque_key
from mmcache.keyset import Keys

Bytes = NDArray[np.uint8]
NAMESPACE: Final = Namespace(kind="kv", model="test/model", dtype="uint8", layout="LBHNC", block_size=16)
PATIENCE_S: Final = 20.0  # how long a busy machine may take over what should be immediate


def keys_of(count: int, label: str) -> Keys:
    """`count` keys without parents; other labels give other keys."""
    return Keys.of([opaque_key(NAMESPACE, f"{label}/{i}".encode()) for i in range(count)])


def value_of(digest: bytes, nbytes: int) -> Bytes:
    """The only right value of a key, recomputed from it."""
    return np.frombuffer(blake3(digest).digest(nbytes), np.uint8)


def values_of(keys: Keys, nbytes: int) -> list[Bytes]:
    """The only right values of `keys`."""
    return [value_of(digest, nbytes) for digest in keys.digests]


def blanks(count: int, nbytes: int) -> list[Bytes]:
    """Destinations that hold nobody's value."""
    return [np.full(nbytes, 0xA5, np.uint8) for _ in range(count)]


def eventually(holds: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait until `holds()` is true and return it. Raises AssertionError, naming `what`, if it never is: if it was asked
    once more when the time was over, as a machine may stand still meanwhile."""
    deadline = time.monotonic() + patience_s
    while True:
        last = time.monotonic() >= deadline
        if answer := holds():
            return answer
        assert not last, f"never happened: {what}"
        time.sleep(0.02)
