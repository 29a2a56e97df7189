"""Uses that a policy is told of later: it ends where it would have been, and never with a use of what is gone."""

from __future__ import annotations

import random

import pytest

from mmcache.store.policies import POLICIES
from mmcache.store.uses import MOST_WAITING, Uses

ROWS = 24


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_a_policy_told_at_once(name: str, seed: int) -> None:
    at_once, later = (POLICIES[name](ROWS, lambda nbytes: memoryview(bytearray(nbytes)), 7) for _ in range(2))
    uses, choose = Uses(later), random.Random(seed)
    inside: set[int] = set()
    for _ in range(600):
        row = choose.randrange(ROWS)
        what = choose.choice(["use", "use", "use", "use many", "insert", "remove", "shelve", "unshelve", "evict"])
        if row not in inside:
            at_once.insert(row, b"%36d" % row, 1, 0xFFFFFFFF)
            uses.insert(row, b"%36d" % row, 1, 0xFFFFFFFF)
            inside.add(row)
        elif what == "use":
            at_once.touch(row)
            uses.note([row])
        elif what == "use many":
            rows = [other for other in range(row, ROWS) if other in inside]
            for other in rows:
                at_once.touch(other)
            uses.note(rows)
        elif what == "remove":
            at_once.remove(row)
            uses.remove(row)
            inside.discard(row)
        elif what == "evict":
            found = at_once.victim(lambda _: True, ROWS)
            assert uses.victim(lambda _: True, ROWS) == found
            if found is not None:
                at_once.evict(found, b"%36d" % found)
                uses.evict(found, b"%36d" % found)
                inside.discard(found)
        elif what != "insert":
            getattr(at_once, what)(row)
            getattr(uses, what)(row)
        if not choose.randrange(10):  # asking tells all that was noted
            assert uses.exhausted() == at_once.exhausted()
    assert uses.listed() == at_once.listed()


def test_uses_do_not_pile_up_where_nothing_else_happens() -> None:
    lru = POLICIES["lru"](2, lambda nbytes: memoryview(bytearray(nbytes)), 0)
    uses = Uses(lru)
    for row in range(2):
        uses.insert(row, b"", 1, 0xFFFFFFFF)
    for _ in range(3 * MOST_WAITING):
        uses.note([0])
    assert len(uses._waiting) <= MOST_WAITING
    assert lru.listed() == [1, 0]
