"""A journal in memory that outlives its process: records that are there whole, or not at all.

Two halves, one in force. A record is written behind the others, and counts once the half's length says so: that store
is the last. When a half is full, or before, its owner writes what still holds into the other one, all at once or bit by
bit, and that one is in force from the moment that a single store says so. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Final

from xxhash import xxh3_64_intdigest

from mmcache.errors import StoreError

HEAD: Final = Struct("=QQ")  # a record's size, and its xxh3-64
_START: Final = 8  # of a half: its length comes first


class Journal:
    """Over `memory`, whose size is a multiple of 16 beyond 16; zeros are an empty journal."""

    def __init__(self, memory: memoryview) -> None:
        half_nbytes = (len(memory) - 16) // 2
        self._in_force = memory[:8].cast("Q")
        self._halves = [memory[16 : 16 + half_nbytes], memory[16 + half_nbytes : 16 + 2 * half_nbytes]]
        self._lengths = [half[:_START].cast("Q") for half in self._halves]

    def append(self, record: bytes) -> bool:
        """Keep a record; False, and nothing changes, where the half is full."""
        return self._write(self._in_force[0] & 1, (record,))

    @property
    def share(self) -> float:
        """How full the half in force is, 0 to 1."""
        half, length = self._half(self._in_force[0] & 1)
        return (_START + length) / len(half)

    def rewrite(self, records: Iterable[bytes]) -> bool:
        """Keep these in place of all; False, and nothing changes, where they are too many."""
        self.begin_other()
        if not self._write(self._other, records):
            return False
        self.turn()
        return True

    def begin_other(self) -> None:
        """Empty the half that is not in force, for `append_other`."""
        self._lengths[self._other][0] = 0

    def append_other(self, record: bytes) -> bool:
        """Write a record to the half that is not in force; False where it is full."""
        return self._write(self._other, (record,))

    def turn(self) -> None:
        """From now on the other half is in force."""
        self._in_force[0] = self._other

    @property
    def _other(self) -> int:
        return 1 - (self._in_force[0] & 1)

    def clear(self) -> None:
        """Keep nothing."""
        self._lengths[0][0] = self._lengths[1][0] = 0

    def __iter__(self) -> Iterator[bytes]:
        """The records, oldest first. Raises StoreError where one is not what was written."""
        half, length = self._half(self._in_force[0] & 1)
        at = _START
        while at < _START + length:
            if at + HEAD.size > len(half):
                raise StoreError("the journal is damaged: it ends in a record")
            nbytes, checksum = HEAD.unpack_from(half, at)
            at += HEAD.size
            record = bytes(half[at : at + nbytes])
            if len(record) != nbytes or xxh3_64_intdigest(record) != checksum:
                raise StoreError("the journal is damaged: a record does not match its checksum")
            at += nbytes
            yield record

    def _half(self, which: int) -> tuple[memoryview, int]:
        return self._halves[which], self._lengths[which][0]

    def _write(self, which: int, records: Iterable[bytes]) -> bool:
        half, length = self._half(which)
        at = _START + length
        for record in records:
            end = at + HEAD.size + len(record)
            if end > len(half):
                return False
            HEAD.pack_into(half, at, len(record), xxh3_64_intdigest(record))
            half[at + HEAD.size : end] = record
            at = end
        self._lengths[which][0] = at - _START
        return True
