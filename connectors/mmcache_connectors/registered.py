"""Host memory that a GPU may read where it is: a server's memory, registered with the driver once a process.

Registering pins every page, which takes seconds for tens of GiB, so it happens in the background: until it is done,
and wherever the driver refuses, the answer is no. Registered memory is kept mapped: the GPU goes on reading the pages
it was given, so an address that another server's memory came to lie at would show it the old one's bytes. It is given
up once no client uses it any more.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger("mmcache.kernels")
_MAPPED_READ_ONLY: Final = 0x01 | 0x02 | 0x08  # cudaHostRegister: for every context, in its address space, to read
_ALREADY: Final = 712


class MappedMemory(Protocol):
    """A server's memory as a client maps it (`mmcache.transport.shm.ArenaMap`): flat bytes, mapped while it lives."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """All of it."""


def _cuda_register(place: int, nbytes: int, device: torch.device) -> str:
    """Why the driver refused, or ""."""
    torch.cuda.set_device(device)
    error = int(torch.cuda.cudart().cudaHostRegister(place, nbytes, _MAPPED_READ_ONLY))
    return "" if error in (0, _ALREADY) else f"cudaHostRegister: error {error}"


def _cuda_unregister(place: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(place)


@dataclass(slots=True)
class _Entry:
    """One server's memory: who maps it, the map itself, and whether a device may read it (None: not known yet)."""

    owner: weakref.ref[MappedMemory]
    data: Any
    allowed: bool | None = None
    readers: int = 0


class Registry:
    """Thread-safe. `register` and `unregister` are the driver's, by default."""

    def __init__(
        self, register: Callable[[int, int, torch.device], str] = _cuda_register,
        unregister: Callable[[int], None] = _cuda_unregister,
    ) -> None:  # fmt: skip
        self._register, self._unregister = register, unregister
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []

    @contextmanager
    def reading(self, arena: MappedMemory, device: torch.device) -> Iterator[bool]:
        """Whether `device` may read this memory inside the `with`. The first question starts to find out."""
        entry = self._find(arena, device)
        try:
            yield entry is not None
        finally:
            if entry is not None:
                with self._lock:
                    entry.readers -= 1

    def _find(self, arena: MappedMemory, device: torch.device) -> _Entry | None:
        with self._lock:
            entry = next((entry for entry in self._entries if entry.owner() is arena), None)
            if entry is None:
                entry = _Entry(weakref.ref(arena), arena.data)
                self._entries.append(entry)
                work = threading.Thread(target=self._settle, args=(entry, device), name="mmcache-register", daemon=True)
                work.start()
            if not entry.allowed:
                return None
            entry.readers += 1
            return entry

    def _settle(self, entry: _Entry, device: torch.device) -> None:
        """Give up what no client maps any more, and ask the driver for this one."""
        with self._lock:
            gone = [one for one in self._entries if one.owner() is None and not one.readers and one.allowed is not None]
            self._entries = [one for one in self._entries if one not in gone]
        try:
            for one in gone:
                if one.allowed:
                    self._unregister(int(one.data.ctypes.data))
            refused = self._register(int(entry.data.ctypes.data), entry.data.nbytes, device)
        except Exception as error:  # a driver that fails in whichever way
            refused = f"{type(error).__name__}: {error}"
        if refused:
            log.warning(
                "mmcache: the driver does not let the GPU read the cache's memory (%s); blocks are loaded through "
                "page-locked buffers",
                refused,
            )
        with self._lock:
            entry.allowed = not refused


REGISTRY: Final = Registry()
