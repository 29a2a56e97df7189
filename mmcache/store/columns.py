"""Columns: flat arrays cut from memory that the caller gives. Nothing here knows what a column means.

The index keeps no Python object per entry (objects cost twice the memory, and their garbage collections pause the
server); it keeps columns of numbers. All their memory comes through one argument, so that a server can place it in
a file that outlives a restart. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable

Memory = Callable[[int], memoryview]
"""Given a size in bytes, returns that many writable zero bytes, used by nobody else."""

NIL = 0xFFFFFFFF
"""No row, no node: the end of a list. Row and node numbers are unsigned 32-bit and always below it."""


def heap(nbytes: int) -> memoryview:
    """The default `Memory`: zeroed bytes on the heap."""
    return memoryview(bytearray(nbytes))


def column8(memory: Memory, count: int) -> memoryview[int]:
    """`count` unsigned 8-bit numbers, all zero."""
    return memory(count).cast("B")


def column32(memory: Memory, count: int) -> memoryview[int]:
    """`count` unsigned 32-bit numbers, all zero."""
    return memory(4 * count).cast("I")


def column64(memory: Memory, count: int) -> memoryview[int]:
    """`count` unsigned 64-bit numbers, all zero."""
    return memory(8 * count).cast("Q")


def column_float(memory: Memory, count: int) -> memoryview[float]:
    """`count` doubles, all zero."""
    return memory(8 * count).cast("d")
