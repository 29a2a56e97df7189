"""The arena: one sealed shared-memory file that only this process can write, and how much memory it may take.

The file is a memfd sealed against shrinking and growing (a reader can never be hit by SIGBUS) and then against future
writable maps, so a client that gets the descriptor can read and nothing more, whatever its uid
(man 2 memfd_create, F_SEAL_FUTURE_WRITE; Linux 5.1 or newer).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from mmcache.errors import StoreError

F_SEAL_FUTURE_WRITE: Final = 0x0010  # linux/fcntl.h; not named by Python's fcntl
MEMORY_SHARE: Final = 0.9  # of what the cgroup or the machine has left; the rest is for the server itself
TOUCH_NBYTES: Final = 64 << 20
Progress = Callable[[int, int], None]
_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")


def memory_left_nbytes(cgroup_root: Path = _CGROUP_ROOT, proc: Path = Path("/proc")) -> tuple[int, str]:
    """The least of what the machine and each enclosing cgroup (v2 or v1) still allow, in bytes, and who says so."""
    left, source = _meminfo_available(proc), f"{proc}/meminfo"
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, used_name = cgroup_root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = cgroup_root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):
                limit = int((level / limit_name).read_text())
                used = int((level / used_name).read_text()) - _droppable_nbytes(level)
                if limit - used < left:
                    left, source = limit - used, str(level / limit_name)
            if level == base:
                break
    return max(0, left), source


def _droppable_nbytes(level: Path) -> int:
    """File pages the kernel would drop before it refuses memory: counted as used, but in nobody's way."""
    with contextlib.suppress(OSError, ValueError):
        for line in (level / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


def _meminfo_available(proc: Path) -> int:
    with contextlib.suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def check_room(nbytes: int) -> None:
    """Raise StoreError, with the remedy, if there is not so much memory left, and some more for the server itself."""
    left, source = memory_left_nbytes()
    if nbytes > left * MEMORY_SHARE:
        raise StoreError(
            f"memory {nbytes / 2**20:.0f} MiB is more than {MEMORY_SHARE:.0%} of the {left / 2**20:.0f} MiB that "
            f"{source} leaves; give it less (--memory, or ?memory= of embedded://), or raise that limit"
        )


def check_huge_pages(nbytes: int, proc: Path = Path("/proc")) -> None:
    """Raise StoreError, with the remedy, unless so many bytes are a whole number of huge pages that are free."""
    numbers = {"Hugepagesize": 0, "HugePages_Free": 0, "HugePages_Rsvd": 0}
    with contextlib.suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in numbers:
                numbers[name] = int(rest.split()[0])
    page_nbytes = numbers["Hugepagesize"] * 1024
    if not page_nbytes:
        raise StoreError("this kernel has no huge pages; leave --huge-pages out")
    if nbytes % page_nbytes:
        raise StoreError(f"memory of {nbytes} bytes is not whole huge pages; give a multiple of {page_nbytes >> 20}MiB")
    wanted, free = nbytes // page_nbytes, numbers["HugePages_Free"] - numbers["HugePages_Rsvd"]
    if wanted > free:
        raise StoreError(
            f"{wanted} huge pages are needed and {free} are free; set more aside (sysctl vm.nr_hugepages=N, best at "
            "boot), or leave --huge-pages out"
        )


def memory_file(*, huge_pages: bool) -> int:
    """The descriptor of an empty file in memory. Its name is nobody else's: clients tell by it that they have a map of
    it already. Raises OSError where there is none to be had."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge_pages else 0)
    return os.memfd_create(f"mmcache-arena-{secrets.token_hex(8)}", flags)


def size_for_good(fd: int, nbytes: int) -> None:
    """Give the file its size, which nobody can change afterwards. Raises OSError."""
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def can_be_held() -> bool:
    """Whether there is memory here that a holder can keep and seal (server/holder.py): memfd, of Linux 5.1 or newer."""
    try:
        fd = memory_file(huge_pages=False)
    except OSError:
        return False
    try:
        size_for_good(fd, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class Arena:
    """`nbytes` of shared memory, writable here and read-only for everybody else. Close it when no view is in use.

    `huge_pages`: of pages that the machine's operator has set aside (vm.nr_hugepages); `nbytes` must be whole ones.
    Where the kernel, or what confines this process, knows no memfd, the memory is this process's alone: `fd` is -1, and
    `why_not_shared` says why. Raises StoreError, with the remedy, where there is not so much memory.
    """

    def __init__(
        self, nbytes: int, *, prefault: bool = False, huge_pages: bool = False, progress: Progress | None = None
    ) -> None:
        if huge_pages:
            check_huge_pages(nbytes)
        else:
            check_room(nbytes)
        self.nbytes = nbytes
        self.why_not_shared = ""
        try:
            self.fd = memory_file(huge_pages=huge_pages)
        except OSError as error:
            self.fd, self.why_not_shared = -1, f"memfd_create: {error.strerror}"
        if self.fd >= 0:
            self._map = self._sealed_map()
        elif huge_pages:
            raise StoreError(f"no huge pages without {self.why_not_shared}; leave --huge-pages out")
        else:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        if prefault:
            self.prefault(progress)

    @classmethod
    def held(cls, fd: int, writable: mmap.mmap) -> Arena:
        """One that another process sized, mapped and sealed, and keeps: this process inherited the descriptor and the
        map. What lies in it stays as it is."""
        arena = cls.__new__(cls)
        arena.fd, arena.nbytes, arena.why_not_shared = fd, len(writable), ""
        arena._map, arena.view = writable, memoryview(writable)
        return arena

    def _sealed_map(self) -> mmap.mmap:
        """The one writable map there will be of the file."""
        nbytes = self.nbytes
        try:
            size_for_good(self.fd, nbytes)
            writable = mmap.mmap(self.fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
            return writable
        except OSError as error:
            os.close(self.fd)
            raise StoreError(
                f"no sealed shared memory of {nbytes} bytes: {error}; Linux 5.1 or newer is needed"
            ) from error

    def prefault(self, progress: Progress | None) -> None:
        """Have the kernel give every page now, of an arena in which nothing lies yet; `progress` hears (bytes done,
        bytes in all)."""
        pages = np.frombuffer(self._map, np.uint8)[:: mmap.PAGESIZE]
        step = TOUCH_NBYTES // mmap.PAGESIZE
        for start in range(0, len(pages), step):
            pages[start : start + step] = 0
            if progress is not None:
                progress(min((start + step) * mmap.PAGESIZE, self.nbytes), self.nbytes)

    def close(self) -> None:
        """Unmap and close. Views still held keep their memory until they are dropped."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
