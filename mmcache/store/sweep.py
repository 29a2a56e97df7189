"""Walks over all rows, a bounded piece at a time: removing, listing and sampling entries for operators. PURE.

A walk is not a snapshot: what is stored or moved between two pieces may be missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from mmcache.store.index import Index
from mmcache.store.rows import LIVE, RECORD
from mmcache.store.table import tenant_of
from mmcache.why import Why

ROWS_PER_PIECE = 4096


class Entry(NamedTuple):
    """One stored value. Times are monotonic seconds; `media` as in answers.pack_media."""

    tenant: int
    key: bytes
    namespace: int
    nbytes: int
    stored_at_s: int
    expires_at: float
    children: int
    kind: int
    media: int


def chosen(index: Index, numbers: Set[int], stored_before_s: float = math.inf) -> Callable[[int], bool]:
    """Whether a live row is of one of these namespaces and was stored by then."""
    namespace, stored_at_s = index.rows.namespace, index.rows.stored_at_s
    return lambda row: namespace[row] in numbers and stored_at_s[row] <= stored_before_s


def piece(index: Index, start: int) -> tuple[range, int]:
    """The rows to look at from `start` on, and where the next piece starts; 0: this was the last."""
    bound = index.rows.table.bound
    stop = min(bound, start + ROWS_PER_PIECE)
    return range(min(start, bound), stop), stop if stop < bound else 0


def live(index: Index, rows: range, select: Callable[[int], bool]) -> Iterator[int]:
    """Those of the rows that are live and selected."""
    state = index.rows.state
    return (row for row in rows if state[row] == LIVE and select(row))


def remove(index: Index, start: int, select: Callable[[int], bool], now: float) -> tuple[int, int, int]:
    """Remove what is selected from one piece: entries, their bytes, and where the next piece starts. What is leased
    is a miss at once, and its memory free with the last lease."""
    rows, following = piece(index, start)
    entries = nbytes = 0
    for row in live(index, rows, select):
        nbytes += nbytes_of(index, row)
        entries += 1
        index.drop(row, Why.REMOVED, now)
    return entries, nbytes, following


def listed(index: Index, start: int, select: Callable[[int], bool]) -> tuple[list[Entry], int]:
    """The selected entries of one piece, and where the next starts."""
    rows, following = piece(index, start)
    table = index.rows
    entries = []
    for row in live(index, rows, select):
        name = table.table.name(row)
        entries.append(
            Entry(
                tenant_of(name),
                name[4:],
                table.namespace[row],
                nbytes_of(index, row),
                table.stored_at_s[row],
                table.expires_at[row],
                table.children[row],
                table.kind[row],
                table.media[row],
            )
        )
    return entries, following


def sampled(
    index: Index, start: int, share: float, seed: int, most_nbytes: int
) -> tuple[list[tuple[int, bytes, int]], int]:
    """(tenant, key, bytes) of a share of one piece's entries, the same for the same seed; where the next starts.

    A piece ends early once its entries are more than `most_nbytes`.
    """
    rows, following = piece(index, start)
    limit = int(share * 2**64)
    found = []
    for row in live(index, rows, lambda row: True):
        name = index.rows.table.name(row)
        if xxh3_64_intdigest(name, seed) < limit:
            found.append((tenant_of(name), name[4:], nbytes_of(index, row)))
            most_nbytes -= found[-1][2]
            if most_nbytes <= 0:
                return found, row + 1 if row + 1 < index.rows.table.bound else 0
    return found, following


def nbytes_of(index: Index, row: int) -> int:
    """The bytes of a live row's frame."""
    nbytes: int = RECORD.unpack_from(index.rows.records, row * RECORD.size)[1]
    return nbytes
