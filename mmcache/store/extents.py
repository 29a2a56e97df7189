"""Which bytes of the arena are whose: an offset allocator in columns. It never touches the arena itself.

A two-level segregated fit: free extents hang in lists by size class (32 classes an octave, so a class spans 3%), a
bit a class says which lists are not empty, and boundary tags (the neighbours in address order) let a freed extent
coalesce at once. Every operation takes a bounded number of steps. The columns hold one node an extent, allocated or
free, and no two free extents are neighbours, so `2 * max_extents + 1` nodes always suffice.
After M. Masmano et al., "TLSF: a new dynamic memory allocator for real-time systems", ECRTS 2004.
PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmcache.errors import StoreError
from mmcache.store.columns import NIL, Memory, column32, column64, heap

USED = NIL - 1  # in the free-list links: the node is allocated
UNUSED = NIL - 2  # in the free-list links: the node describes nothing
CLASS_BITS = 5
SAME_CLASS_SCAN = 8


def size_class(units: int) -> int:
    """The class of an extent of `units` >= 1 alignment units; classes grow with size."""
    octave = max(units.bit_length() - CLASS_BITS - 1, 0)
    return (octave << CLASS_BITS) + (units >> octave)


class Extents:
    """Allocates aligned extents out of `capacity_bytes`, rounded down to `alignment` (a power of two).

    A node names an extent from `alloc` to `free`. `offset_bytes` and `size_bytes` are columns by node, for reading.
    Raises StoreError at construction for sizes that cannot work; afterwards nothing. Not thread-safe.
    """

    def __init__(self, capacity_bytes: int, alignment: int, max_extents: int, memory: Memory = heap) -> None:
        if alignment < 1 or alignment & (alignment - 1):
            raise StoreError(f"alignment is {alignment}; give a power of two")
        if capacity_bytes < alignment:
            raise StoreError(f"capacity of {capacity_bytes} bytes holds no extent of {alignment}; give more memory")
        if not 1 <= max_extents < 1 << 30:
            raise StoreError(f"max_extents is {max_extents}; give 1 to 2**30 - 1")
        self.alignment = alignment
        self.capacity_bytes = capacity_bytes & -alignment
        self.max_extents = max_extents
        self.allocated = 0
        self.free_bytes = 0
        self._shift = alignment.bit_length() - 1
        nodes = 2 * max_extents + 1
        self.offset_bytes = column64(memory, nodes)
        self.size_bytes = column64(memory, nodes)
        self._left = column32(memory, nodes)
        self._right = column32(memory, nodes)
        self._before = column32(memory, nodes)  # free list, towards its head; the head's is NIL
        self._after = column32(memory, nodes)  # free list, away from its head; also chains unused nodes
        self._heads = column32(memory, size_class(self.capacity_bytes >> self._shift) + 1)
        self._nonempty = 0
        self._unused = NIL
        self._fresh = 0  # nodes from here on were never used
        first = self._new_node(0, self.capacity_bytes, NIL, NIL)
        self._push(first)

    def rounded(self, nbytes: int) -> int:
        """The size of the extent that `alloc(nbytes)` gives."""
        return (nbytes + self.alignment - 1) & -self.alignment

    def alloc(self, nbytes: int) -> tuple[int, int] | None:
        """An extent of at least `nbytes` >= 1: (node, offset in bytes), or None when no free extent is large enough
        or `max_extents` are allocated; then nothing has changed."""
        size = self.rounded(nbytes)
        if size > self.free_bytes or self.allocated == self.max_extents:
            return None
        node = self._find(size)
        if node is None:
            return None
        self._pull(node)
        offset, rest = self.offset_bytes[node], self.size_bytes[node] - size
        if rest:
            right = self._right[node]
            remainder = self._new_node(offset + size, rest, node, right)
            if right != NIL:
                self._left[right] = remainder
            self._right[node] = remainder
            self.size_bytes[node] = size
            self._push(remainder)
        self._before[node] = USED
        self.allocated += 1
        return node, offset

    def free(self, node: int) -> None:
        """Gives an allocated node's extent back, joined with free neighbours; `node` may be used anew at once."""
        before, left, right, sizes = self._before, self._left[node], self._right[node], self.size_bytes
        assert before[node] == USED, f"extent node {node} is freed but not allocated"
        size = sizes[node]
        if right != NIL and before[right] != USED:
            self._pull(right)
            size += sizes[right]
            absorbed, right = right, self._right[right]
            self._retire(absorbed)
        if left != NIL and before[left] != USED:
            self._pull(left)
            size += sizes[left]
            absorbed, node = node, left
            self._retire(absorbed)
        sizes[node] = size
        self._right[node] = right
        if right != NIL:
            self._left[right] = node
        self._push(node)
        self.allocated -= 1

    def restore(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """In a new allocator: exactly these extents are allocated; their nodes. They are whole multiples of the
        alignment, at most `max_extents`, in the order of their offsets, and do not overlap."""
        starts = np.concatenate(([0], offsets + sizes))
        gaps = np.append(offsets, self.capacity_bytes) - starts
        is_gap = gaps > 0
        before = np.cumsum(is_gap)
        nodes = np.arange(len(offsets)) + before[:-1]
        free = (np.arange(len(gaps)) + before - 1)[is_gap]
        total = len(nodes) + len(free)
        for column, used, unused in (
            (self.offset_bytes, offsets, starts[is_gap]),
            (self.size_bytes, sizes, gaps[is_gap]),
        ):
            numbers = np.frombuffer(column, np.uint64)
            numbers[nodes], numbers[free] = used, unused
        left, right = np.frombuffer(self._left, np.uint32), np.frombuffer(self._right, np.uint32)
        left[:total], right[:total] = np.arange(-1, total - 1) & NIL, np.arange(1, total + 1)
        right[total - 1] = NIL
        np.frombuffer(self._before, np.uint32)[nodes] = USED
        self.allocated, self._fresh = len(nodes), total
        self.free_bytes = self._nonempty = 0
        for node in free.tolist():
            self._push(node)
        return nodes

    def largest_free_bytes(self) -> int:
        """A lower bound, within 3%, of the largest free extent; 0 when none is free."""
        if not self._nonempty:
            return 0
        return self.size_bytes[self._heads[self._nonempty.bit_length() - 1]]

    def _find(self, size: int) -> int | None:
        """A free node of at least `size` bytes. Its own class is looked at first, so that equal sizes fit exactly."""
        cls = size_class(size >> self._shift)
        nonempty = self._nonempty >> cls
        if nonempty & 1:
            node, sizes, after = self._heads[cls], self.size_bytes, self._after
            for _ in range(SAME_CLASS_SCAN):
                if sizes[node] >= size:
                    return node
                node = after[node]
                if node == NIL:
                    break
            nonempty &= -2
        if not nonempty:
            return None
        return self._heads[cls + (nonempty & -nonempty).bit_length() - 1]

    def _push(self, node: int) -> None:
        size = self.size_bytes[node]
        self.free_bytes += size
        cls = size_class(size >> self._shift)
        bit = 1 << cls
        head = NIL
        if self._nonempty & bit:
            head = self._heads[cls]
            self._before[head] = node
        self._before[node] = NIL
        self._after[node] = head
        self._heads[cls] = node
        self._nonempty |= bit

    def _pull(self, node: int) -> None:
        size = self.size_bytes[node]
        self.free_bytes -= size
        before, after = self._before[node], self._after[node]
        if after != NIL:
            self._before[after] = before
        if before != NIL:
            self._after[before] = after
        else:
            cls = size_class(size >> self._shift)
            self._heads[cls] = after
            if after == NIL:
                self._nonempty ^= 1 << cls

    def _new_node(self, offset: int, size: int, left: int, right: int) -> int:
        node = self._unused
        if node != NIL:
            self._unused = self._after[node]
        else:
            node = self._fresh
            self._fresh += 1
        self.offset_bytes[node] = offset
        self.size_bytes[node] = size
        self._left[node] = left
        self._right[node] = right
        return node

    def _retire(self, node: int) -> None:
        self._before[node] = UNUSED
        self._after[node] = self._unused
        self._unused = node

    def is_allocated(self, node: int) -> bool:
        """Whether `node` names an allocated extent."""
        return node < self._fresh and self._before[node] == USED

    def check_integrity(self) -> None:
        """Walks everything; raises AssertionError saying what is wrong. O(extents)."""
        offset, node, left, allocated, free = 0, 0, NIL, 0, set()
        previous_free = False
        seen = 0
        while node != NIL:
            assert self.offset_bytes[node] == offset, f"node {node} begins at {self.offset_bytes[node]}, not {offset}"
            size = self.size_bytes[node]
            assert size > 0, f"node {node} is empty"
            assert size % self.alignment == 0, f"node {node} has {size} bytes, not a multiple of {self.alignment}"
            assert self._left[node] == left, f"node {node} has left {self._left[node]}, not {left}"
            assert self._before[node] != UNUSED, f"node {node} is in use and retired"
            is_free = self._before[node] != USED
            assert not (is_free and previous_free), f"free nodes {left} and {node} are neighbours"
            if is_free:
                free.add(node)
            allocated += not is_free
            previous_free, left = is_free, node
            offset, node, seen = offset + size, self._right[node], seen + 1
        assert offset == self.capacity_bytes, f"extents cover {offset} of {self.capacity_bytes} bytes"
        assert allocated == self.allocated, f"{allocated} extents are allocated, {self.allocated} are counted"
        assert sum(self.size_bytes[n] for n in free) == self.free_bytes, "free bytes are miscounted"
        self._check_lists(free)
        unused, node = 0, self._unused
        while node != NIL:
            unused, node = unused + 1, self._after[node]
        assert unused + seen == self._fresh, f"{self._fresh - unused - seen} nodes are lost"

    def _check_lists(self, free: set[int]) -> None:
        for cls, head in enumerate(self._heads):
            if not self._nonempty >> cls & 1:
                continue
            node, before = head, NIL
            while node != NIL:
                assert node in free, f"node {node} is listed in class {cls} but not free, or listed twice"
                free.remove(node)
                assert self._before[node] == before, f"node {node}'s link towards the head is wrong"
                actual = size_class(self.size_bytes[node] >> self._shift)
                assert actual == cls, f"node {node} of class {actual} is listed in class {cls}"
                node, before = self._after[node], node
        assert not free, f"free nodes {sorted(free)} are in no list"
