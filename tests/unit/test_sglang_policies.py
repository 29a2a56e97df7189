"""How far a prompt with pages of several kinds can be restored, against the rules written out page by page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache_connectors.sglang.policies import Kind, restorable

PRESENCE = st.lists(st.booleans(), min_size=12, max_size=12)


def kinds() -> st.SearchStrategy[Kind]:
    every = st.builds(Kind, st.just("all_pages"), PRESENCE)
    trailing = st.builds(Kind, st.just("trailing_pages"), PRESENCE, window=st.integers(0, 5))
    groups = st.builds(Kind, st.just("block_groups"), PRESENCE, block_pages=st.integers(2, 5), group_pages=st.just(2))
    return st.one_of(every, trailing, groups)


def fits(kind: Kind, length: int) -> bool:
    """Whether a kind allows the prompt to go on after `length` pages."""
    first = {"all_pages": 0, "trailing_pages": max(0, length - max(kind.window, 1)), "block_groups": length}
    return all(kind.present[first[kind.policy] : length])


@given(st.integers(0, 12), st.lists(kinds(), max_size=3))
def test_a_length_is_restorable_if_every_kind_allows_it(pages: int, kinds: list[Kind]) -> None:
    found = restorable(pages, kinds)
    assert found.lengths == [length for length in range(1, pages + 1) if all(fits(kind, length) for kind in kinds)]
    for kind, reach in zip(kinds, found.reach, strict=True):
        if kind.policy != "block_groups":
            assert reach == max((length for length in range(1, pages + 1) if fits(kind, length)), default=0)


def test_block_groups_say_how_far_they_reach_and_hold_nothing_back() -> None:
    """Blocks of four pages, each with a group of two from its first page on."""
    there = [True, True, False, False, True, True, False, False, True, False, True, True]
    found = restorable(12, [Kind("block_groups", there, block_pages=4, group_pages=2)])
    assert found == ([*range(1, 13)], [8])
    assert restorable(7, [Kind("block_groups", there, block_pages=4, group_pages=2)]).reach == [4]


def test_a_state_between_two_others_is_one_where_it_lies() -> None:
    there = [False, False, True, False, True, False]
    assert restorable(6, [Kind("trailing_pages", there)]) == ([3, 5], [5])


@pytest.mark.parametrize(
    "kind", [Kind("leading_pages", [True]), Kind("block_groups", [True]), Kind("block_groups", [True], 1, 2, 3)]
)
def test_what_is_not_known_is_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"does not know|holds nothing"):
        restorable(1, [kind])
