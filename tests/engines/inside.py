"""A held server's memory from outside, as a debugger has it: where entries lie, and damage to them while it serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from mmcache.config import ServerConfig
from mmcache.server import holder
from mmcache.store.kept import JOURNAL_NBYTES, PAGE_NBYTES, Kept, kept_nbytes
from mmcache.store.rows import LIVE, RECORD, Rows
from mmcache.store.table import tenant_prefix
from tests.integration.held import Memory

COLUMNS_AT = PAGE_NBYTES + JOURNAL_NBYTES  # in what is kept


class Inside:
    """The memory that a holder keeps for a server of so many bytes. Use as a context manager."""

    def __init__(self, pid: int, memory_nbytes: int) -> None:
        self._entries = ServerConfig(memory_nbytes=memory_nbytes).entries
        self._arena, self._index = Memory(pid, "memfd:mmcache-arena"), Memory(pid, "memfd:mmcache-index")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._arena.__exit__(*exc)
        self._index.__exit__(*exc)

    def flip(self, digests: Sequence[bytes], bit: int) -> int:
        """Flip one bit in each of these frames; how many are here."""
        records = [record for _, record in self._records(digests)]
        for offset, nbytes, *_ in records:
            at = offset + bit // 8 % nbytes
            self._arena.write(at, bytes([self._arena.read(at, 1)[0] ^ 1 << bit % 8]))
        return len(records)

    def swap(self, digests: Sequence[bytes]) -> int:
        """Have each two of these keys, in a row, name each other's frame, if of one size; how many pairs."""
        found = list(self._records(digests))
        pairs = [(one, other) for one, other in zip(found[::2], found[1::2], strict=False) if one[1][1] == other[1][1]]
        for (here, record), (there, other) in pairs:
            self._index.write(here, RECORD.pack(*other))
            self._index.write(there, RECORD.pack(*record))
        return len(pairs)

    def _records(self, digests: Sequence[bytes]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Of each key that is stored here: where in the index it says so, and what."""
        copy = bytearray(kept_nbytes(self._entries))  # the journal is left out: to read it would take its memory
        columns_nbytes = len(copy) - COLUMNS_AT
        copy[COLUMNS_AT:] = self._index.read(holder.PAGE_NBYTES + COLUMNS_AT, columns_nbytes)
        rows = Rows(self._entries, 0, kept=Kept(memoryview(copy), self._entries, {}).memory)
        start = _address(rows.records) - _address(copy)
        live = {rows.table.name(row): row for row in range(self._entries) if rows.state[row] == LIVE}
        for digest in digests:
            row = live.get(tenant_prefix(0) + digest)
            if row is not None:
                at = row * RECORD.size
                yield holder.PAGE_NBYTES + start + at, RECORD.unpack_from(rows.records, at)


def _address(buffer: Any) -> int:
    address: int = np.frombuffer(buffer, np.uint8).ctypes.data
    return address
