"""Shared memory between a client and a server on one host: the read-only arena and the ring for writes.

A reader maps the arena the server sealed and handed over. A writer cannot map it writable, so it fills slots of a
small ring of its own memfd; the server copies each slot into the arena. Both ends check the other's seals, so neither
can be hit by SIGBUS when a peer truncates its file.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping
from typing import Final

import numpy as np
import xxhash

from mmcache.errors import FrameError, TransportError
from mmcache.frame import FrameHeader, align_up, check_expected, parse_header
from mmcache.tensors import Bytes, HostTensor, destinations
from mmcache.transport.base import HIT, MAX_RING_NBYTES, RING_SLOTS, SLICE_NBYTES, Found, Outcome, Result

_SIZE_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _check_sealed(fd: int, nbytes: int, what: str) -> None:
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SIZE_SEALS != _SIZE_SEALS or os.fstat(fd).st_size != nbytes:
        raise TransportError(f"the {what} is not a memfd of {nbytes} bytes sealed against resizing; it was not mapped")


class ArenaMap:
    """A read-only map of a server's arena. Takes the descriptor over. `data` is a flat uint8 array.

    `populate` maps every page at once, so that first reads pay no page faults; only for an arena whose pages all exist
    already, or this process would be charged for the server's memory.
    """

    def __init__(self, fd: int, nbytes: int, *, populate: bool) -> None:
        try:
            _check_sealed(fd, nbytes, "arena")
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
            self._map = mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(f"the server's arena could not be mapped: {error}") from error
        finally:
            os.close(fd)
        self.view = memoryview(self._map)
        self.data: Bytes = np.frombuffer(self._map, np.uint8)


class Ring:
    """A client's write ring: `slots` slots of `slot_nbytes` in a sealed memfd; the server maps it read-only."""

    def __init__(self, slots: int = RING_SLOTS, slot_nbytes: int = SLICE_NBYTES) -> None:
        self.slots, self.slot_nbytes = slots, slot_nbytes
        self.fd = os.memfd_create("mmcache-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, slots * slot_nbytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
        self._map = mmap.mmap(self.fd, slots * slot_nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
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
            _check_sealed(fd, slots * slot_nbytes, "ring")
            self._map = mmap.mmap(fd, slots * slot_nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(f"the client's ring could not be mapped: {error}") from error
        finally:
            os.close(fd)
        self.data = np.frombuffer(self._map, np.uint8)


def copy_hashed(source: Bytes, target: Bytes) -> bytes:
    """Copy all of `source` and return the xxh3-128 of what arrived in `target` (not of what was read).

    Works in 256 KiB slices, so that each is hashed while still in the CPU cache; both steps run outside the GIL.
    """
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


def read_frame(arena: ArenaMap, found: Found, key: bytes, buffers: Mapping[str, HostTensor], verify: bool) -> Result:
    """Copy one frame out of the mapped arena into its destinations, verified as it is copied.

    The header is copied first and its checksum begins the chain, so bytes that change meanwhile (an expired lease)
    fail it. The destinations are undefined unless the outcome is HIT.
    """
    try:
        header = _read_header(arena, found, verify)
        check_expected(header, found.nbytes, found.header_nbytes, key if verify else None)
    except FrameError as error:
        return Result(Outcome.CORRUPT, str(error))
    targets = destinations(header, buffers)
    if isinstance(targets, str):
        return Result(Outcome.MISMATCH, targets)
    if _read_tensors(arena, found.offset, header, targets, verify):
        return HIT
    return Result(Outcome.CORRUPT, "a tensor's checksum or padding does not match")


def _read_header(arena: ArenaMap, found: Found, verify: bool) -> FrameHeader:
    if found.offset + found.nbytes > arena.data.nbytes:
        raise FrameError(f"a frame of {found.nbytes} bytes at {found.offset} is outside the arena")
    header = bytes(arena.view[found.offset : found.offset + found.header_nbytes])
    return parse_header(header, limit_nbytes=found.nbytes, checksum=found.header_sum if verify else None, verify=verify)


def _read_tensors(arena: ArenaMap, offset: int, header: FrameHeader, targets: list[Bytes], verify: bool) -> bool:
    data = arena.data
    end = header.header_nbytes
    for stored, target in zip(header.tensors, targets, strict=True):
        start = offset + stored.offset
        if verify:
            if stored.offset != end and data[offset + end : offset + align_up(end, header.alignment)].any():
                return False
            if copy_hashed(data[start : start + stored.nbytes], target) != stored.checksum:
                return False
        else:
            np.copyto(target, data[start : start + stored.nbytes])
        end = stored.offset + stored.nbytes
    return True
