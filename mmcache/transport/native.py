"""The optional C extension, mmcache-native: tensors copied and hashed in one pass, many in one call or one in parts.

Chosen where it is installed and of this release's ABI; everything works without it (kernels/native/).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from mmcache.hashing import Hasher, PlainHasher

ABI: Final = 2


class CopyHashed(Protocol):
    """`mmcache_native.copy_hashed`."""

    def __call__(self, sources: Sequence[Any], targets: Sequence[Any], stream: bool, threads: int, /) -> bytes:
        """Copy each source to its target; the xxh3-128 of each as written, 16 bytes. `stream`: past the caches. On
        `threads` threads at most, 1 to 16, which have ended when this returns."""


class Native(NamedTuple):
    """What is used of the extension; where there is none, `hasher` is Python's."""

    copy_hashed: CopyHashed | None
    hasher: Callable[[], Hasher]


PYTHON: Final = Native(None, PlainHasher)


def load(name: str = "mmcache_native") -> tuple[Native, str]:
    """(the extension's functions, its instruction set), or PYTHON and why it cannot be used."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return PYTHON, "mmcache-native is not installed"
    except ImportError as error:
        return PYTHON, f"mmcache-native cannot be loaded ({error}); install one built for this Python"
    found = getattr(module, "ABI", None)
    if found != ABI:
        return PYTHON, f"mmcache-native speaks ABI {found}, this release {ABI}: install the two in step"
    return Native(module.copy_hashed, module.Hasher), str(module.INSTRUCTIONS)


NATIVE, STATE = load()
