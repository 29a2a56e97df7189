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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger("mmcache.kernels")
_MAPPED_READ_ONLY: Final = 0x01 | 0x02 | 0x08  # cudaHostRegister: for every context, in its address space, to read


class MappedMemory(Protocol):
    """A server's memory as a client maps it (`mmcache.transport.shm.ArenaMap`): flat bytes, mapped while it lives."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """All of it."""


def _cuda_register(place: int, nbytes: int, device: torch.device) -> str:
    """Why the driver refused, or "". Memory that somebody registered before may be other pages: refused too."""
    torch.cuda.set_device(device)
    error = int(torch.cuda.cudart().cudaHostRegister(place, nbytes, _MAPPED_READ_ONLY))
    return f"cudaHostRegister: error {error}" if error else ""


def _cuda_unregister(place: int, device: torch.device) -> str:
    """Why the driver refused, or ""."""
    torch.cuda.set_device(device)
    error = int(torch.cuda.cudart().cudaHostUnregister(place))
    return f"cudaHostUnregister: error {error}" if error else ""


@dataclass(slots=True)
class _Entry:
    """One server's memory: who maps it, the map itself (which keeps its address taken), and whether the device may read
    it (None: not known yet). `leaving`: it is being given up."""

    owner: weakref.ref[MappedMemory]
    data: Any
    device: torch.device
    allowed: bool | None = None
    readers: int = 0
    leaving: bool = False


class Registry:
    """Thread-safe. `register` and `unregister` are the driver's, by default; both say why they refused."""

    def __init__(
        self, register: Callable[[int, int, torch.device], str] = _cuda_register,
        unregister: Callable[[int, torch.device], str] = _cuda_unregister,
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
                if entry.owner() is None:
                    self._soon(self._sweep)

    def _find(self, arena: MappedMemory, device: torch.device) -> _Entry | None:
        with self._lock:
            entry = next((entry for entry in self._entries if entry.owner() is arena), None)
            if entry is not None:
                if not entry.allowed:
                    return None
                entry.readers += 1
                return entry
            entry = _Entry(weakref.ref(arena), arena.data, device)
            self._entries.append(entry)
        weakref.finalize(arena, self._soon, self._sweep).atexit = False
        if not self._soon(lambda: self._settle(entry)):
            self._answer(entry, "no thread can be started")
        return None

    def _soon(self, work: Callable[[], None]) -> bool:
        """Whether `work` was begun on a thread of its own."""
        with suppress(RuntimeError):  # no more threads, or the interpreter is ending
            threading.Thread(target=work, name="mmcache-register", daemon=True).start()
            return True
        return False

    def _settle(self, entry: _Entry) -> None:
        """Ask the driver for this memory."""
        try:
            refused = self._register(int(entry.data.ctypes.data), entry.data.nbytes, entry.device)
        except Exception as error:  # a driver that fails in whichever way
            refused = f"{type(error).__name__}: {error}"
        self._answer(entry, refused)
        if entry.owner() is None:
            self._sweep()

    def _answer(self, entry: _Entry, refused: str) -> None:
        if refused:
            log.warning(
                "mmcache: the GPU cannot read the cache's memory where it is (%s); blocks are loaded through "
                "page-locked buffers",
                refused,
            )
        with self._lock:
            entry.allowed = not refused
            if refused:
                entry.data = None

    def _sweep(self) -> None:
        """Give up what no client maps any more and nobody reads. What the driver does not let go stays mapped."""
        with self._lock:
            known = [entry for entry in self._entries if entry.allowed is not None and not entry.leaving]
            gone = [entry for entry in known if entry.owner() is None and not entry.readers]
            for entry in gone:
                entry.leaving = True
        for entry in gone:
            refused = ""
            if entry.allowed:
                try:
                    refused = self._unregister(int(entry.data.ctypes.data), entry.device)
                except Exception as error:
                    refused = f"{type(error).__name__}: {error}"
            if refused:
                log.warning(
                    "mmcache: %d MiB of a server that is gone stay pinned (%s)", entry.data.nbytes >> 20, refused
                )
                continue
            with self._lock:
                self._entries.remove(entry)


REGISTRY: Final = Registry()
