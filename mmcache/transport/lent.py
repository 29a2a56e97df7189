"""Memory that a client lends to servers on its host, which take what is stored straight from where it lies.

Only the server may write the arena, so what is put into shared memory is copied twice: into a ring, and out of it. What
lies in memory from `shared_buffer` is copied once, by the server, while the client hashes it.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
import threading
import weakref
from typing import Final

import numpy as np

from mmcache.errors import TransportError, UsageError
from mmcache.tensors import Bytes
from mmcache.transport.shm import check_sealed

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Lendable:
    """One `shared_buffer`: where it lies in this process, and the descriptor that goes to servers."""

    def __init__(self, fd: int, address: int, nbytes: int) -> None:
        self.fd, self.address, self.nbytes = fd, address, nbytes
        self.gone = False

    def let_go(self) -> None:
        """Its memory is freed. Called by the garbage collector, anywhere: takes no lock."""
        self.gone = True
        os.close(self.fd)


class _Buffers:
    """Those of this process, by address."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, Lendable]] = []
        self.renew_lock()

    def renew_lock(self) -> None:
        """Also in a forked child, where another thread may have held the old one."""
        self._lock = threading.Lock()

    def add(self, one: Lendable) -> None:
        """Know it, until it is gone."""
        with self._lock:
            known = [pair for pair in self._sorted if not pair[1].gone]
            self._sorted = sorted([*known, (one.address, one)], key=lambda pair: pair[0])

    def holding(self, address: int, nbytes: int) -> Lendable | None:
        """The one that all these bytes lie in."""
        known = self._sorted
        place = bisect.bisect_right(known, address, key=lambda pair: pair[0]) - 1
        while place >= 0 and known[place][1].gone:
            place -= 1
        if place < 0:
            return None
        one = known[place][1]
        return one if address + nbytes <= one.address + one.nbytes else None

    def __bool__(self) -> bool:
        return bool(self._sorted)


BUFFERS: Final = _Buffers()
os.register_at_fork(after_in_child=BUFFERS.renew_lock)


def shared_buffer(nbytes: int) -> Bytes:
    """Zeroed memory, a writable uint8 array, whose contents a server on this host takes without a copy by the client.
    All its pages exist when this returns.

    Cut tensors of it (views, `torch.from_numpy`) and put them: any client of this process knows them by where they lie.
    What is being put must not change before the call ends; if it does, it is not stored. The memory lives as long as
    the array and its views, and, where it has been put from, until those clients are closed: make few, and keep them.

    Raises UsageError for a size below 1, TransportError where the system has no such memory.
    """
    if nbytes < 1:
        raise UsageError(f"a buffer of {nbytes} bytes holds nothing; ask for 1 or more")
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        fd = os.memfd_create("mmcache-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise TransportError(f"no memory to share: {error}") from error
    try:
        os.ftruncate(fd, whole)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        memory = mmap.mmap(fd, whole, flags=mmap.MAP_SHARED)
        os.posix_fallocate(fd, 0, whole)
    except OSError as error:
        os.close(fd)
        raise TransportError(f"no memory to share: {error}") from error
    data: Bytes = np.frombuffer(memory, np.uint8)
    data[:: mmap.PAGESIZE] = 0  # maps them here, too
    one = Lendable(fd, data.ctypes.data, whole)
    BUFFERS.add(one)
    weakref.finalize(memory, one.let_go).atexit = False
    return data[:nbytes]


class LentView:
    """A server's read-only map of memory that a client lent."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.data = memoryview(self._map)


MAX_VIEWS: Final = 64  # each takes a descriptor
_VIEWS: weakref.WeakValueDictionary[tuple[int, int], LentView] = weakref.WeakValueDictionary()
_VIEWING: Final = threading.Lock()


def view_lent(fd: int, nbytes: int) -> LentView:
    """Map lent memory: once, however many connections it is lent over. Takes the descriptor over.

    Raises TransportError unless it is a memfd of this size that cannot shrink, of ordinary pages which all exist, so
    that no access can fail, and takes no memory of this process's; or if MAX_VIEWS are mapped.
    """
    try:
        check_sealed(fd, nbytes, "memory lent")
        known = os.fstat(fd)
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            raise TransportError("the memory lent is of huge pages, which may not be there; it was not mapped")
        if os.lseek(fd, 0, os.SEEK_HOLE) < nbytes:
            raise TransportError("the memory lent has holes, which would be filled here; it was not mapped")
        with _VIEWING:
            view = _VIEWS.get((known.st_dev, known.st_ino))
            if view is None and len(_VIEWS) >= MAX_VIEWS:
                raise TransportError(f"{MAX_VIEWS} pieces of memory are lent to this server already; lend fewer")
            if view is None:
                view = _VIEWS[known.st_dev, known.st_ino] = LentView(fd, nbytes)
            return view
    except TransportError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        raise TransportError(f"the memory lent could not be mapped: {error}") from error
    finally:
        os.close(fd)
