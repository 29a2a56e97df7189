"""The optional C extension, mmcache-native: many tensors copied and hashed in one pass and one call.

Chosen where it is installed and of this release's ABI; everything works without it (kernels/native/).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final, Protocol

ABI: Final = 1


class CopyHashed(Protocol):
    """`mmcache_native.copy_hashed`."""

    def __call__(self, sources: Sequence[Any], targets: Sequence[Any], stream: bool, /) -> bytes:
        """Copy each source to its target; the xxh3-128 of each as written, 16 bytes. `stream`: past the caches."""


def load(name: str = "mmcache_native") -> tuple[CopyHashed | None, str]:
    """(the extension's function, its instruction set), or None and why it cannot be used."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, "mmcache-native is not installed"
    except ImportError as error:
        return None, f"mmcache-native cannot be loaded ({error}); install one built for this Python"
    found = getattr(module, "ABI", None)
    if found != ABI:
        return None, f"mmcache-native speaks ABI {found}, this release {ABI}: install the two in step"
    return module.copy_hashed, str(module.INSTRUCTIONS)


COPY_HASHED, STATE = load()
