"""An index from the rows that a killed process left: what is whole goes on, what is not is dropped.

A row that says LIVE was completed: it becomes so last, and ceases to be first (rows.py), and stores of a killed process
take effect in their order. So nothing is searched for in the arena: a payload may well hold what looks like a frame.
The hash table, the allocator, the counts of children and bytes are made anew from those rows, on whole columns at once;
the bytes themselves are checked by whoever reads them first. What a fault in the columns could make harmful is looked
for all the same: extents that leave the arena or overlap, names that are there twice, parents that are not there.
Claims are not restored: what was leased may leave, and what was being written is free. PURE: no clock, no randomness,
no I/O.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcache.store.columns import NIL
from mmcache.store.index import Index
from mmcache.store.rows import FORK_CHILDREN, FREE, GHOST, LIVE, RECORD, Rows
from mmcache.store.table import NAME
from mmcache.store.usage import UNKNOWN

RECORD_TYPE: Final = np.dtype([("offset", "=u8"), ("nbytes", "=u8"), ("header_nbytes", "=u4"), ("header_sum", "V16")])
assert RECORD_TYPE.itemsize == RECORD.size
Ints = NDArray[np.int64]


class Restored(NamedTuple):
    """How many entries go on, their bytes, and how many rows had to be dropped though they said LIVE."""

    entries: int
    nbytes: int
    dropped: int


def restore(index: Index, tenants: int, namespaces: Set[int]) -> Restored:
    """Fill a new index over the columns that another of the same sizes and policy left in the same `kept` memory.

    `tenants`: numbers from there on are nobody's, and their rows are dropped. `namespaces`: the numbers that are known;
    rows of others become UNKNOWN's. May itself be killed and begun again.
    """
    rows, extents = index.rows, index._extents
    state = np.frombuffer(rows.state, np.uint8)
    said_live = np.flatnonzero(state == LIVE)
    in_use = np.flatnonzero(state != FREE)
    hashes = np.zeros(len(state), np.uint64)
    hashes[in_use] = rows.table.hashes(in_use)
    twice = _twice(in_use, hashes)
    live, sizes = _placed(rows, said_live[~twice[said_live]], extents.capacity_bytes, extents.alignment, tenants)
    parents, ghosts = _family(rows, live, state, twice)

    state[:] = FREE
    state[ghosts], state[live] = GHOST, LIVE
    parent = np.frombuffer(rows.parent, np.uint32)
    parent[live], parent[ghosts] = parents & NIL, NIL
    used = np.concatenate((live, ghosts))
    rows.table.restore(used, hashes[used])
    rows.live, rows.ghosts = len(live), len(ghosts)
    children = np.bincount(parents[parents >= 0], minlength=len(state))
    np.frombuffer(rows.children, np.uint32)[:] = children
    part_ways = np.frombuffer(rows.parts_ways, np.uint8)[used] != 0  # also those whose tails lie elsewhere by now
    for row in used[part_ways | (children[used] >= FORK_CHILDREN)].tolist():
        rows.note_fork(row)
    offsets = _records(rows)["offset"][live].astype(np.int64)
    np.frombuffer(rows.node, np.uint32)[live] = extents.restore(offsets, sizes)

    numbers = np.frombuffer(rows.namespace, np.uint32)
    unknown = live[~np.isin(numbers[live], np.fromiter(namespaces, np.int64, len(namespaces)))]
    numbers[unknown] = UNKNOWN
    _restore_policy(rows, live, children)
    nbytes = _count(index, live)
    return Restored(len(live), nbytes, len(said_live) - len(live))


def _records(rows: Rows) -> NDArray[np.void]:
    return np.frombuffer(rows.records, RECORD_TYPE)


def _tenants(rows: Rows, which: Ints) -> Ints:
    names = np.frombuffer(rows.table.names, np.dtype([("tenant", "<u4"), ("key", "V32")]))
    assert names.itemsize == NAME.size
    return names["tenant"][which].astype(np.int64)


def _twice(in_use: Ints, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Per row whether another one in use has its name (or, once in 2**64, only its hash)."""
    _, inverse, counts = np.unique(hashes[in_use], return_inverse=True, return_counts=True)
    twice = np.zeros(len(hashes), np.bool_)
    twice[in_use] = counts[inverse] > 1
    return twice


def _placed(rows: Rows, live: Ints, capacity: int, alignment: int, tenants: int) -> tuple[Ints, Ints]:
    """Those of the rows whose extents can be, in the order of their offsets, and the sizes of the extents."""
    records = _records(rows)[live]
    offsets, nbytes, header = records["offset"], records["nbytes"], records["header_nbytes"]
    sane = (offsets < capacity) & (offsets % alignment == 0) & (nbytes > 0) & (nbytes <= capacity)
    sane &= (header > 0) & (header <= nbytes) & (_tenants(rows, live) < tenants)
    live, starts = live[sane], offsets[sane].astype(np.int64)
    sizes = nbytes[sane].astype(np.int64) + alignment - 1 & -alignment
    order = np.argsort(starts, kind="stable")
    live, starts, sizes = live[order], starts[order], sizes[order]
    ends = starts + sizes
    good = ends <= capacity
    overlaps = np.maximum.accumulate(ends)[:-1] > starts[1:]  # nobody knows which of them is right
    good[1:] &= ~overlaps
    good[:-1] &= ~overlaps
    return live[good], sizes[good]


def _family(rows: Rows, live: Ints, state: NDArray[np.uint8], twice: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """The parents of the live rows, -1: none, and the rows that are ghosts: parents that are not live."""
    parents = np.frombuffer(rows.parent, np.uint32)[live].astype(np.int64)
    parents[(parents >= len(state)) | (parents == live)] = -1
    above = np.maximum(parents, 0)
    parents[(state[above] == FREE) | twice[above] | (_tenants(rows, above) != _tenants(rows, live))] = -1
    is_live = np.zeros(len(state), np.bool_)
    is_live[live] = True
    ancestor = np.full(len(state), -1)
    ancestor[live] = parents
    steps = 1
    while steps <= len(state):  # twice as far up each time: whoever never gets to the top goes in a circle
        ancestor = np.where(ancestor >= 0, ancestor[np.maximum(ancestor, 0)], -1)
        steps *= 2
        if (ancestor < 0).all():
            break
    parents[ancestor[live] >= 0] = -1
    above = np.unique(parents[parents >= 0])
    return parents, above[~is_live[above]]


def _restore_policy(rows: Rows, live: Ints, children: Ints) -> None:
    stored_at_s = np.frombuffer(rows.stored_at_s, np.uint32)
    order = live[np.lexsort((live, stored_at_s[live]))]
    rows.policy.restore(order.tolist(), np.frombuffer(rows.kind, np.uint8)[order].tolist())
    for row in order[children[order] > 0].tolist():
        rows.policy.shelve(row)


def _count(index: Index, live: Ints) -> int:
    rows, usage = index.rows, index.usage
    nbytes = _records(rows)["nbytes"][live].astype(np.int64)
    for counter, names in (
        (usage.by_kind, np.frombuffer(rows.kind, np.uint8)[live]),
        (usage.by_tenant, _tenants(rows, live)),
        (usage.by_namespace, np.frombuffer(rows.namespace, np.uint32)[live]),
    ):
        found, inverse = np.unique(names, return_inverse=True)
        totals = np.zeros(len(found), np.int64)
        np.add.at(totals, inverse, nbytes)
        counter.update(dict(zip(found.tolist(), totals.tolist(), strict=True)))
    found, counts = np.unique(np.frombuffer(rows.namespace, np.uint32)[live], return_counts=True)
    usage.entries_by_namespace.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    return int(nbytes.sum())
