"""Placement: all who hold a view compute the same owners, a change moves little, and weights are shares."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.cluster.placement import Member, View
from mmcache.errors import ConfigError

_random = random.Random(7)
HOMES = [_random.randbytes(32) for _ in range(4000)]


def view_of(*ids: str, **weights: float) -> View:
    return View(tuple(Member(name, f"mmcache://{name}:7600", weights.get(name, 1.0)) for name in ids))


def owner(view: View, home: bytes) -> str:
    return view.members[view.owners(home)[0]].id


# ------------------------------------------------------------------------------------------ the view
def test_a_view_is_its_members_in_any_order() -> None:
    assert view_of("a", "b", "c") == view_of("c", "a", "b")
    assert view_of("a", "b", "c").version == view_of("c", "a", "b").version
    assert [member.id for member in view_of("b", "a").members] == ["a", "b"]


def test_the_version_changes_with_every_fact() -> None:
    views = [
        view_of("a", "b"),
        view_of("a"),
        view_of("a", "c"),
        view_of("a", "b", b=2.0),
        View((Member("a", "mmcache://a:7600"), Member("b", "mmcache://b:7601"))),
    ]
    assert len({view.version for view in views}) == len(views)


def test_the_version_is_a_constant_of_the_format() -> None:
    assert view_of("a", "b").version == "ed21f033acd618b11ea66a3653c879ff"


@pytest.mark.parametrize("members", [(), (Member("a", "x"), Member("a", "y"))])
def test_a_view_needs_members_with_ids_of_their_own(members: tuple[Member, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one member"):
        View(members)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ConfigError, match="greater than 0"):
        view_of("a", "b", b=weight)


# ------------------------------------------------------------------------------------------ owners
def test_owners_are_constants_of_keys_v1() -> None:
    view = view_of("a", "b", "c", b=2.0)
    assert "".join(owner(view, bytes([i]) * 32) for i in range(12)) == "abbabbbabbbb"


@given(
    st.sets(st.text("abcXYZ-._0\u00e9 ", min_size=1, max_size=8), min_size=1, max_size=8),
    st.binary(min_size=32, max_size=32),
)
def test_owners_are_distinct_and_more_of_them_only_add(ids: set[str], home: bytes) -> None:
    view = View(tuple(Member(name, "x") for name in ids))
    every = view.owners(home, len(ids) + 3)
    assert sorted(every) == list(range(len(ids)))
    for count in range(1, len(ids) + 1):
        assert view.owners(home, count) == every[:count]


def test_a_member_that_leaves_moves_only_what_it_owned() -> None:
    before, after = view_of("a", "b", "c", "d"), view_of("a", "b", "d")
    for home in HOMES:
        if owner(before, home) != "c":
            assert owner(after, home) == owner(before, home)
        else:
            second = before.members[before.owners(home, 2)[1]].id
            assert owner(after, home) == second


def test_a_member_that_joins_takes_only_what_it_owns() -> None:
    before, after = view_of("a", "b", "c"), view_of("a", "b", "c", "d")
    moved = [home for home in HOMES if owner(before, home) != owner(after, home)]
    assert {owner(after, home) for home in moved} == {"d"}
    assert 0.2 < len(moved) / len(HOMES) < 0.3


def test_a_weight_that_grows_only_takes() -> None:
    before, after = view_of("a", "b", "c"), view_of("a", "b", "c", b=3.0)
    moved = {owner(after, home) for home in HOMES if owner(before, home) != owner(after, home)}
    assert moved == {"b"}


def test_shares_follow_weights() -> None:
    counts = Counter(owner(view_of("a", "b", "c", a=1, b=2, c=5), home) for home in HOMES)
    for name, share in {"a": 1 / 8, "b": 2 / 8, "c": 5 / 8}.items():
        assert abs(counts[name] / len(HOMES) - share) < 0.03


def test_only_ratios_of_weights_matter() -> None:
    small, large = view_of("a", "b", a=1, b=3), view_of("a", "b", a=100, b=300)
    assert [owner(small, home) for home in HOMES[:500]] == [owner(large, home) for home in HOMES[:500]]


def test_an_address_may_change_without_moving_anything() -> None:
    before = view_of("a", "b", "c")
    after = View(tuple(Member(member.id, "elsewhere", member.weight) for member in before.members))
    assert [before.owners(home, 3) for home in HOMES[:500]] == [after.owners(home, 3) for home in HOMES[:500]]


# ------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("ids", ["a", "abc"])
def test_homes_are_grouped_by_owner_in_order(ids: str) -> None:
    view = view_of(*ids)
    homes = [HOMES[i % 7] for i in range(50)]
    groups = view.group(iter(homes))
    assert sorted(position for group in groups.values() for position in group) == list(range(50))
    for member, positions in groups.items():
        assert list(positions) == sorted(positions)
        assert {view.owners(homes[position])[0] for position in positions} == {member}
    assert list(view.group([]).get(0, [])) == []


@pytest.mark.parametrize(
    "member", [Member("a\tb", "x"), Member("a", "x\ny"), Member("a", "x", float("inf")), Member("a", "x", float("nan"))]
)
def test_a_member_whose_text_or_weight_would_be_ambiguous_is_refused(member: Member) -> None:
    with pytest.raises(ConfigError):
        View((member,))


def test_weights_written_as_whole_numbers_are_the_same_view() -> None:
    assert View((Member("a", "x", 2),)).version == View((Member("a", "x", 2.0),)).version
