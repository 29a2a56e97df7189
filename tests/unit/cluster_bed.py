"""Views, and keys whose prompts share a beginning, for the tests of placement and of searches."""

from __future__ import annotations

from collections.abc import Sequence

from mmcache.cluster.placement import Member, View
from mmcache.keyset import Keys
from mmcache.testing.values import NAMESPACE


def view_of(count: int, *, first: int = 0, **weights: float) -> View:
    """`count` members m0, m1, ..."""
    names = [f"m{number}" for number in range(first, first + count)]
    return View(tuple(Member(name, f"mmcache://{name}:7600", weights.get(name, 1.0)) for name in names))


def prompt(shared: int, own: int, label: int) -> Keys:
    """The blocks of a prompt of `shared` tokens that all have, and `own` that only those of this label have."""
    tokens: Sequence[int] = [*range(shared), *([1_000_000 + label] * own)]
    return NAMESPACE.block_keys(tokens)
