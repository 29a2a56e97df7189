"""The extent allocator: exact fits, coalescing on both sides, limits, refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmcache.errors import StoreError
from mmcache.store.extents import CLASS_BITS, Extents, size_class


def test_offsets_are_aligned_and_sizes_rounded_up() -> None:
    extents = Extents(1 << 20, 4096, 16)
    offsets = [extents.alloc(nbytes) for nbytes in (1, 4096, 4097)]
    assert [place and place[1] for place in offsets] == [0, 4096, 8192]
    assert extents.free_bytes == (1 << 20) - 4 * 4096


def test_capacity_is_rounded_down_to_the_alignment() -> None:
    extents = Extents(1000, 64, 16)
    assert extents.capacity_bytes == 960
    assert extents.alloc(961) is None
    assert extents.alloc(960) == (0, 0)


def test_a_full_arena_of_equal_sizes_is_refilled_exactly() -> None:
    # Good-fit allocators that only look in larger classes cannot reuse a hole of the very size they need.
    nbytes = 100 * 64 + 1
    extents = Extents(101 * 64 * 50, 64, 50)
    nodes = [place[0] for _ in range(50) if (place := extents.alloc(nbytes))]
    assert len(nodes) == 50
    assert extents.free_bytes == 0
    for node in nodes[::2]:
        extents.free(node)
    again = [extents.alloc(nbytes) for _ in range(25)]
    assert None not in again
    assert extents.free_bytes == 0
    extents.check_integrity()


def test_a_hole_of_the_same_class_that_is_too_small_is_not_given() -> None:
    small, large = 64 * 64, 65 * 64  # one class
    assert size_class(64) == size_class(65)
    extents = Extents(small + 64 + 2 * large, 64, 8)
    hole, _wall = extents.alloc(small), extents.alloc(64)
    assert hole is not None
    extents.free(hole[0])
    for offset in (small + 64, small + 64 + large):
        place = extents.alloc(large)
        assert place is not None
        assert place[1] == offset
        extents.check_integrity()
    assert extents.alloc(large) is None
    assert extents.alloc(small) is not None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)])
def test_neighbours_coalesce_in_any_order_of_frees(order: tuple[int, int, int]) -> None:
    extents = Extents(192, 64, 3)
    nodes = [place[0] for _ in range(3) if (place := extents.alloc(64))]
    for position in order:
        extents.free(nodes[position])
        extents.check_integrity()
    assert extents.largest_free_bytes() == 192
    assert extents.alloc(192) is not None


def test_no_more_than_max_extents_are_allocated_and_nodes_never_run_out() -> None:
    extents = Extents(64 * 1000, 64, 4)
    for _ in range(50):
        nodes = [place[0] for _ in range(4) if (place := extents.alloc(64))]
        assert extents.alloc(64) is None
        for node in nodes[::2] + nodes[1::2]:
            extents.free(node)
    extents.check_integrity()
    assert extents.free_bytes == 64000


def test_freeing_twice_is_caught() -> None:
    extents = Extents(128, 64, 2)
    place = extents.alloc(64)
    assert place is not None
    extents.free(place[0])
    with pytest.raises(AssertionError, match="not allocated"):
        extents.free(place[0])


def test_size_classes_grow_with_size_and_stay_within_three_percent() -> None:
    classes = [size_class(units) for units in range(1, 5000)]
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(classes))
    for cls in range(1, classes[-1]):
        first, last = classes.index(cls) + 1, len(classes) - classes[::-1].index(cls)
        assert last - first < max(first / (1 << CLASS_BITS), 1)


@pytest.mark.parametrize(
    ("capacity_bytes", "alignment", "max_extents"), [(1 << 20, 48, 4), (1 << 20, 0, 4), (63, 64, 4), (1 << 20, 64, 0)]
)
def test_impossible_sizes_are_refused(capacity_bytes: int, alignment: int, max_extents: int) -> None:
    with pytest.raises(StoreError, match="give"):
        Extents(capacity_bytes, alignment, max_extents)


@pytest.mark.parametrize("column", ["offset_bytes", "size_bytes", "_left", "_right", "_before"])
def test_check_integrity_notices_damage(column: str) -> None:
    extents = Extents(1 << 16, 64, 16)
    nodes = [place[0] for _ in range(6) if (place := extents.alloc(640))]
    for node in nodes[::2]:
        extents.free(node)
    extents.check_integrity()
    getattr(extents, column)[nodes[2]] += 64
    with pytest.raises((AssertionError, IndexError)):
        extents.check_integrity()
