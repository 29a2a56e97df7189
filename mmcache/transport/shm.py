"""Shared memory between a client and a server on one host: the read-only arena and the ring for writes.

A reader maps the arena the server sealed and handed over. A writer cannot map it writable, so it fills slots of a
small ring of its own memfd; the server copies each slot into the arena. Both ends check the other's seals, so neither
can be hit by SIGBUS when a peer truncates its file.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np
import xxhash

from mmcache.errors import TransportError
from mmcache.tensors import Bytes, HostTensor
from mmcache.transport.base import HIT, MAX_RING_NBYTES, RING_SLOT_NBYTES, RING_SLOTS, SLICE_NBYTES, Outcome, Result
from mmcache.transport.beside import beside
from mmcache.transport.native import CopyHashed
from mmcache.transport.planned import Planned

PARALLEL_NBYTES: Final = 8 << 20
MOST_THREADS: Final = 16
PIECES_NBYTES: Final = 1 << 20  # of pieces, as SLICE_NBYTES: fewer calls are worth more than a nearer cache
STREAM_NBYTES: Final = 4 << 20  # more than a CPU's own caches hold: past them
_BAD_SUM: Final = Result(Outcome.CORRUPT, "a tensor's checksum does not match its bytes")
_BAD_GAP: Final = Result(Outcome.CORRUPT, "padding between tensors is not zero")
_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def check_sealed(fd: int, nbytes: int, what: str) -> None:
    """Raises TransportError, or OSError for what is no memfd, unless it has that size for ever."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SIZE_SEALS != _SIZE_SEALS or os.fstat(fd).st_size != nbytes:
        raise TransportError(f"the {what} is not a memfd of {nbytes} bytes sealed against resizing; it was not mapped")


def _file(fd: int) -> tuple[object, ...]:
    """What tells a file in memory from every other one: its name and number. The kernel's numbers come round again
    while a map keeps a file in use, so a server names its own at random."""
    found = os.fstat(fd)
    return os.readlink(f"/proc/self/fd/{fd}"), found.st_dev, found.st_ino, found.st_size


class ArenaMap:
    """A read-only map of a server's arena. Takes the descriptor over. `data` is a flat uint8 array.

    `populate` maps every page at once, so that first reads pay no page faults; only for an arena whose pages all exist
    already, or this process would be charged for the server's memory.
    """

    def __init__(self, fd: int, nbytes: int, *, populate: bool) -> None:
        self._file: tuple[object, ...] = ()
        try:
            check_sealed(fd, nbytes, "arena")
            with contextlib.suppress(OSError):
                self._file = _file(fd)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
            self._map = mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(f"the server's arena could not be mapped: {error}") from error
        finally:
            os.close(fd)
        self.prefaulted = populate
        self.view = memoryview(self._map)
        self.data: Bytes = np.frombuffer(self._map, np.uint8)

    def is_of(self, fd: int) -> bool:
        """Whether this maps the file of that descriptor."""
        with contextlib.suppress(OSError):  # no /proc: nobody knows
            return self._file == _file(fd)
        return False


class Ring:
    """A client's write ring: `slots` slots of `slot_nbytes` in a sealed memfd; the server maps it read-only. It takes
    memory when it is first written to: most links of most clients only read."""

    def __init__(self, slots: int = RING_SLOTS, slot_nbytes: int = RING_SLOT_NBYTES) -> None:
        self.slots, self.slot_nbytes = slots, slot_nbytes
        try:
            self.fd = os.memfd_create("mmcache-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise TransportError(f"no memory for a write ring: {error}") from error
        try:
            os.ftruncate(self.fd, slots * slot_nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, slots * slot_nbytes, flags=mmap.MAP_SHARED)
        except OSError as error:
            os.close(self.fd)
            raise TransportError(f"no memory for a write ring: {error}") from error
        self.data: Bytes = np.frombuffer(self._map, np.uint8)

    def slot(self, number: int) -> Bytes:
        """The bytes of slot `number` modulo the number of slots."""
        start = number % self.slots * self.slot_nbytes
        return self.data[start : start + self.slot_nbytes]

    def close_fd(self) -> None:
        """Close the descriptor once the server has its own; the map stays."""
        os.close(self.fd)


class RingView(Ring):
    """The server's read-only view of a client's ring. Takes the descriptor over. Raises TransportError if unsound."""

    def __init__(self, fd: int, slots: int, slot_nbytes: int) -> None:
        self.slots, self.slot_nbytes, self.fd = slots, slot_nbytes, fd
        try:
            if not 1 < slots <= 64 or slot_nbytes < 4096 or slots * slot_nbytes > MAX_RING_NBYTES:
                raise TransportError(f"a ring of {slots} x {slot_nbytes} bytes is outside the limits")
            check_sealed(fd, slots * slot_nbytes, "ring")
            self._map = mmap.mmap(fd, slots * slot_nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(f"the client's ring could not be mapped: {error}") from error
        finally:
            os.close(fd)
        self.data = np.frombuffer(self._map, np.uint8)


def copy_hashed(source: Bytes, target: Bytes) -> bytes:
    """Copy all of `source` and return the xxh3-128 of what arrived in `target` (not of what was read).

    Works in slices of SLICE_NBYTES, each hashed while it is still in the CPU cache; both steps run outside the GIL.
    The rows of a two-dimensional `target` are the exception: see `Copier.by_lease`.
    """
    if target.ndim == 2:
        return _copy_pieces(source, target)
    nbytes = source.nbytes
    if nbytes <= SLICE_NBYTES:
        np.copyto(target, source)
        return xxhash.xxh3_128_digest(target.data)
    state = xxhash.xxh3_128()
    for start in range(0, nbytes, SLICE_NBYTES):
        piece = target[start : start + SLICE_NBYTES]
        np.copyto(piece, source[start : start + SLICE_NBYTES])
        state.update(piece.data)
    return state.digest()


def _copy_pieces(source: Bytes, target: Bytes) -> bytes:
    """As `copy_hashed`, to the rows of `target`, but the hash is of what was read, many rows in one call: threads that
    hash row by row spend more time waiting for each other's GIL than on the bytes (docs/adr/0012).

    Bytes, not elements as large as a row: numpy keeps the GIL while it moves those.
    """
    state = xxhash.xxh3_128()
    count, nbytes = target.shape
    packed = source.reshape(target.shape)
    step = max(1, PIECES_NBYTES // max(1, nbytes))
    for start in range(0, count, step):
        rows = packed[start : start + step]
        state.update(rows.data)
        np.copyto(target[start : start + step], rows)
    return state.digest()


def copy_frame(planned: Planned, verify: bool) -> Result:
    """Copy a planned frame's tensors to their destinations, verified as they are copied.

    The header's checksums begin the chain, so bytes that change meanwhile (an expired lease) fail it; for
    pieces see `Copier.by_lease`. The destinations are undefined unless the outcome is HIT.
    """
    for source, target, checksum in planned.moves:
        if not verify:
            np.copyto(target, source.reshape(target.shape))
        elif copy_hashed(source, target) != checksum:
            return _BAD_SUM
    if verify and any(gap.any() for gap in planned.gaps):
        return _BAD_GAP
    return HIT


def _copy_fused(plans: Sequence[Planned | Result], fused: CopyHashed, threads: int) -> list[Result]:
    """As `copy_frame` for each, verified, in one call."""
    moves = [move for plan in plans if not isinstance(plan, Result) for move in plan.moves]
    stream = sum([move.source.nbytes for move in moves]) >= STREAM_NBYTES
    sums = fused([move.source for move in moves], [move.target for move in moves], stream, threads)
    results, start = [], 0
    for plan in plans:
        if isinstance(plan, Result):
            results.append(plan)
            continue
        wanted = b"".join([move.checksum for move in plan.moves])
        arrived, start = sums[start : start + len(wanted)], start + len(wanted)
        if arrived != wanted:
            results.append(_BAD_SUM)
        else:
            results.append(_BAD_GAP if any(gap.any() for gap in plan.gaps) else HIT)
    return results


class Copier:
    """Copies planned frames, large batches on several threads: one CPU alone cannot use the memory's bandwidth.

    The copies run outside the GIL, with `fused` all in one call. The threads last as long as the call, which ends only
    after them, whatever ends it: no destination is written afterwards.
    """

    def __init__(self, threads: int, fused: CopyHashed | None = None) -> None:
        self._threads = min(threads, os.cpu_count() or 1, MOST_THREADS)
        self._fused = fused

    def by_lease(self, buffers: Iterable[Mapping[str, HostTensor]]) -> bool:
        """Whether what is read into some of these is only right if the lease was held until it had arrived: pieces,
        whose bytes are checked where they lie and copied from there. With `fused` they are checked as delivered."""
        return self._fused is None and any(tensor.data.ndim == 2 for one in buffers for tensor in one.values())

    def copy(self, plans: Sequence[Planned | Result], verify: bool) -> list[Result]:
        """One Result per plan; a plan that already is one stays as it is."""
        nbytes = [0 if isinstance(plan, Result) else sum([move.source.nbytes for move in plan.moves]) for plan in plans]
        threads = self._threads if sum(nbytes) >= PARALLEL_NBYTES else 1
        if self._fused is not None and verify:
            return _copy_fused(plans, self._fused, threads)
        if threads == 1:
            return _copy_frames(plans, verify)
        share, taken, cuts = sum(nbytes) / self._threads, 0.0, [0]
        for position, size in enumerate(nbytes):
            if taken >= share * len(cuts):
                cuts.append(position)
            taken += size
        parts = [plans[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(plans)], strict=True)]
        copies = [partial(_copy_frames, part, verify) for part in parts]
        return [result for results in beside(copies, "mmcache-copy") for result in results]


def _copy_frames(plans: Sequence[Planned | Result], verify: bool) -> list[Result]:
    return [plan if isinstance(plan, Result) else copy_frame(plan, verify) for plan in plans]
