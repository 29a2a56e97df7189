"""The extent allocator against a plain dict: nothing overlaps, nothing leaks, neighbours coalesce."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mmcache.store.extents import Extents


class ExtentsMachine(RuleBasedStateMachine):
    extents: Extents

    @initialize(
        alignment=st.sampled_from([1, 64, 4096]), units=st.integers(1, 300), max_extents=st.sampled_from([1, 5, 64])
    )
    def build(self, alignment: int, units: int, max_extents: int) -> None:
        self.units, self.alignment = units, alignment
        self.extents = Extents(units * alignment + alignment // 2, alignment, max_extents)
        self.held: dict[int, tuple[int, int]] = {}  # node: offset, rounded size

    def gaps(self) -> list[int]:
        sizes, end = [], 0
        for offset, size in sorted(self.held.values()):
            sizes.append(offset - end)
            end = offset + size
        return [*sizes, self.units * self.alignment - end]

    @rule(data=st.data())
    def alloc(self, data: st.DataObject) -> None:
        nbytes = data.draw(st.integers(1, self.units * self.alignment + 1))
        if data.draw(st.booleans()):
            nbytes = min(nbytes, 4 * self.alignment)
        size = -(-nbytes // self.alignment) * self.alignment
        assert self.extents.rounded(nbytes) == size
        largest = max(self.gaps())
        got = self.extents.alloc(nbytes)
        if got is None:
            # A class spans 1/32 of its size; a request may miss an extent of its own class, never a larger one.
            assert len(self.held) == self.extents.max_extents or largest < size * 33 / 32 + self.alignment
            if size < 64 * self.alignment:
                assert len(self.held) == self.extents.max_extents or largest < size
            return
        node, offset = got
        assert node not in self.held
        assert offset % self.alignment == 0
        assert offset + size <= self.units * self.alignment
        assert all(offset + size <= other or other + length <= offset for other, length in self.held.values())
        self.held[node] = (offset, size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[node]
        self.extents.free(node)

    @precondition(lambda self: self.held)
    @rule()
    def free_everything_and_take_it_all(self) -> None:
        for node in self.held:
            self.extents.free(node)
        self.held.clear()
        got = self.extents.alloc(self.units * self.alignment)
        assert got is not None, "freed neighbours did not coalesce"
        self.held[got[0]] = (got[1], self.units * self.alignment)

    @invariant()
    def agrees(self) -> None:
        self.extents.check_integrity()
        gaps = self.gaps()
        assert self.extents.free_bytes == sum(gaps)
        assert self.extents.largest_free_bytes() <= max(gaps)
        assert self.extents.largest_free_bytes() * 33 / 32 + self.alignment > max(gaps)
        for node, (offset, size) in self.held.items():
            assert (self.extents.offset_bytes[node], self.extents.size_bytes[node]) == (offset, size)


TestExtents = ExtentsMachine.TestCase
TestExtents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
