"""Routes: who stores a key, who is asked for it and in which order, as views change and runs become hot."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcache.cluster.absent import MAX_ABSENT, Absent
from mmcache.cluster.heat import LEAST_CALLS, WINDOW_CALLS, Heat
from mmcache.cluster.routes import Replicas, Route, Router, by_member
from mmcache.errors import ConfigError
from mmcache.keys import Namespace, embedding_key
from mmcache.keyset import Keys
from mmcache.testing.values import NAMESPACE, keys_of
from tests.unit.cluster_bed import prompt, view_of

RAMP_S = 100.0
KEYS = keys_of(400, "routes")
EMBEDDING = Namespace(kind="embedding", model="test/model", dtype="uint8")


def router(members: int = 4, replicas: Replicas | None = None, draw: int = 1) -> Router:
    return Router(view_of(members), replicas or Replicas(), draw, 0.0, RAMP_S)


def routes(of: Router, keys: Keys = KEYS, now: float = RAMP_S) -> list[Route]:
    return of.routes(keys, now)


# ------------------------------------------------------------------------------------------ replicas
def test_replicas_are_said_for_all_for_a_kind_and_for_a_namespace() -> None:
    said = Replicas.parse(f"2,embedding:3,{NAMESPACE.id.hex()[:12]}:4")
    assert said.count(EMBEDDING.id) == 3
    assert said.count(NAMESPACE.id) == 4
    assert said.count(bytes(32)) == 2
    assert said.most == 4
    assert Replicas.parse("kv:2").default == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "give 1 to 16"),
        ("17", "give 1 to 16"),
        ("-1", "has no count"),
        ("two", "has no count"),
        ("1.5", "has no count"),
        ("", "has no count"),
        ("1,2", "twice"),
        ("kv:1,kv:2", "twice"),
        ("images:2", "no kind"),
        ("abc:2", "no kind"),
        ("embedding:0", "give 1 to 16"),
    ],
)
def test_replicas_of_nonsense_are_an_error_that_says_what_to_give(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Replicas.parse(text)


def test_more_replicas_than_shards_are_an_error_at_the_start_and_fewer_later() -> None:
    with pytest.raises(ConfigError, match="replicas=3 needs as many shards, and there are 2"):
        router(2, Replicas(3))
    shrunk = router(3, Replicas(3))
    shrunk.take(view_of(2), 1.0)
    assert {len(route.owners) for route in routes(shrunk)} == {2}


# ------------------------------------------------------------------------------------------ owners and reads
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.booleans(), st.integers(0, 1 << 70))
@settings(max_examples=60, deadline=None)
def test_every_route_names_members_once_and_reads_where_it_stores(
    members: int, replicas: int, joined: int, hot: bool, draw: int
) -> None:
    one = router(members + 4, Replicas(replicas), draw)
    one.take(view_of(members + 4, first=joined), 1.0)
    if hot:
        for _ in range(LEAST_CALLS):
            one.routes(KEYS[:3], 2.0, counts=True)
    for route in routes(one, KEYS[:40], now=3.0):
        asked = route.reads + route.spares
        assert len(route.owners) == len(set(route.owners)) == replicas
        assert len(asked) == len(set(asked))
        assert {*route.owners} <= {*asked} <= one.ids


def test_all_who_know_the_same_ask_the_same() -> None:
    assert routes(router(5, draw=1)) == routes(router(5, draw=2))
    assert router(5).owners(KEYS.homes[0], 1) == routes(router(5))[0].owners


def test_one_run_has_one_route_and_a_prompt_few_owners() -> None:
    keys = prompt(20_000, 0, 0)
    found = routes(router(64), keys)
    assert len({id(route) for route in found}) == len(set(keys.homes)) == 8
    for before, after, home, following in zip(found, found[1:], keys.homes, keys.homes[1:], strict=False):
        assert (before is after) == (home == following)


def test_a_replica_is_a_spare_and_is_read_from_while_the_first_may_lack_what_it_has() -> None:
    settled = routes(router(4, Replicas(2)))
    assert all(route.reads == route.owners[:1] and route.spares == route.owners[1:] for route in settled)
    fresh = routes(router(4, Replicas(2)), now=1.0)
    assert all(route.reads == route.owners and not route.spares for route in fresh)
    failed = router(4, Replicas(2))
    failed.failed("m1", RAMP_S)
    for route in routes(failed, now=RAMP_S + 1):
        assert route.reads == (route.owners if route.owners[0] == "m1" else route.owners[:1])
    assert routes(failed, now=2 * RAMP_S) == settled


# ------------------------------------------------------------------------------------------ views that change
def test_a_newcomer_is_asked_first_and_then_who_owned_it_before() -> None:
    one = router(4)
    before = routes(one)
    one.take(view_of(5), RAMP_S)
    during, after = routes(one, now=RAMP_S + 1), routes(one, now=2 * RAMP_S)
    moved = [row for row in range(len(KEYS)) if during[row].owners != before[row].owners]
    assert 40 < len(moved) < 130  # a fifth of 400
    for row, (old, now) in enumerate(zip(before, during, strict=True)):
        assert now.reads == (("m4", old.owners[0]) if row in moved else old.reads)
    assert all(route.reads == route.owners for route in after)


def test_a_newcomer_may_lack_what_its_replicas_have_however_often_the_view_changes() -> None:
    one = router(4, Replicas(2))
    for at, weight in enumerate((1.0, 1.1, 1.0)):
        one.take(view_of(5, m0=weight), RAMP_S + at)
    new = [route for route in routes(one, now=RAMP_S + 9) if route.owners[0] == "m4"]
    assert new
    assert all(route.reads[:2] == route.owners for route in new)


def test_behind_a_fork_the_run_s_own_home_is_asked_after_the_tail_s() -> None:
    one, plain, keys = router(16), router(16), prompt(5000, 3000, 1)
    fork = 5000 // 16 - 1
    one.forks.hear(keys, [keys.digests[fork]], 0.0)
    finer, before = routes(one, keys, 1.0)[fork + 1], routes(plain, keys, 1.0)[fork + 1]
    assert finer.owners == one.owners(keys.chains[fork + 1], 1) != before.owners
    assert finer.reads == finer.owners + before.owners
    one.forks.hear(keys, [keys.digests[fork]], RAMP_S - 1.0)
    assert routes(one, keys, RAMP_S)[fork + 1].reads == finer.owners, (
        "what was stored before has been moved, or is gone"
    )


def test_behind_a_fork_who_owned_the_run_before_the_view_changed_is_asked_too() -> None:
    moved = 0
    for shared in range(4200, 80_000, 4096):  # prompts that part ways in another run each
        keys, fork = prompt(shared, 500, 1), shared // 16 - 1
        former = router(4)
        run_s = routes(former, keys, 1.0)[fork + 1].owners[0]  # where a tail was stored, by who knew of no fork
        one = router(4)
        one.forks.hear(keys, [keys.digests[fork]], 0.0)
        one.take(view_of(5), 1.0)
        moved += one.owners(keys.homes[fork + 1], 1) == ("m4",)
        assert run_s in routes(one, keys, 2.0)[fork + 1].reads
    assert moved


def test_who_left_is_not_asked() -> None:
    one = router(5)
    one.take(view_of(4), 1.0)
    one.failed("m4", 1.0)
    assert all("m4" not in route.reads + route.spares + route.owners for route in routes(one, now=2.0))


def test_after_two_changes_the_view_before_the_last_is_still_asked() -> None:
    one = router(2)
    one.take(view_of(3), 1.0)
    one.take(view_of(4), 2.0)
    reads = {route.reads for route in routes(one, now=3.0)}
    assert any(len(chain) == 3 for chain in reads)
    assert all(route.reads == route.owners for route in routes(one, now=200.0))


# ------------------------------------------------------------------------------------------ hot runs
def test_a_run_in_all_calls_is_read_from_all_shards_and_each_client_from_one() -> None:
    hot, first = prompt(512, 0, 0), Counter[str]()
    for draw in range(200):
        one = router(4, draw=draw)
        for label in range(LEAST_CALLS):
            one.routes(prompt(512, 64, label), RAMP_S, counts=True)
        (route,) = set(routes(one, hot))
        assert route.owners == router(4).owners(hot.homes[0], 1)
        assert route.reads in ((route.reads[0], route.owners[0]), route.owners)
        first[route.reads[0]] += 1
    assert set(first) == {"m0", "m1", "m2", "m3"}
    assert max(first.values()) < 90


def test_a_run_that_cools_down_is_hot_no_more() -> None:
    heat = Heat()
    for _ in range(LEAST_CALLS):
        heat.note([b"hot"])
    assert heat.copies(b"hot", 8) == 8
    for number in range(4 * WINDOW_CALLS):
        heat.note([b"%d" % number])
    assert heat.copies(b"hot", 8) == 1
    assert len(heat._counts) <= WINDOW_CALLS


def test_a_run_in_half_of_the_calls_is_on_half_of_the_shards() -> None:
    heat = Heat()
    for number in range(WINDOW_CALLS):
        heat.note([b"hot"] if number % 2 else [b"%d" % number])
    assert heat.copies(b"hot", 8) in (3, 4)
    assert heat.copies(b"1", 8) == 1


# ------------------------------------------------------------------------------------------ what is known to be absent
def test_what_was_absent_a_moment_ago_is_so_until_its_time_or_until_it_is_stored() -> None:
    absent = Absent(0.05)
    absent.note("m0", b"k", 1.0)
    assert absent("m0", b"k", 1.04, last=False)
    assert not absent("m0", b"k", 1.05, last=False)
    assert not absent("m1", b"k", 1.04, last=False)
    absent.note("m0", b"k", 2.0)
    absent.stored("m0", b"k")
    assert not absent("m0", b"k", 2.0, last=False)
    absent.note("m0", b"k", 3.0)
    absent.keep(frozenset({"m1"}))
    assert not absent("m0", b"k", 3.0, last=False)
    nothing = Absent(0.0)
    nothing.note("m0", b"k", 1.0)
    assert not nothing("m0", b"k", 1.0, last=False)


def test_the_last_to_ask_is_passed_over_only_after_two_misses_in_a_row() -> None:
    absent = Absent(0.05)
    absent.note("m0", b"k", 1.0)
    assert not absent("m0", b"k", 1.01, last=True)
    absent.note("m0", b"k", 1.01)
    assert absent("m0", b"k", 1.05, last=True)
    assert not absent("m0", b"k", 1.06, last=True)
    absent.note("m0", b"k", 1.07)
    assert not absent("m0", b"k", 1.08, last=True)


def test_what_is_known_to_be_absent_is_bounded() -> None:
    absent = Absent(10.0)
    for number in range(3 * MAX_ABSENT):
        absent.note("m0", b"%d" % number, 1.0)
    assert len(absent) <= MAX_ABSENT
    assert absent("m0", b"%d" % (3 * MAX_ABSENT - 1), 1.0, last=False)


def test_rows_by_member() -> None:
    assert by_member([(0, "ab"), (1, "b"), (2, "")]) == {"a": [0], "b": [0, 1]}


def test_kinds_are_known_where_the_id_comes_from_a_namespace() -> None:
    item = random.Random(1).randbytes(32)
    keys = Keys.of([embedding_key(EMBEDDING, item)]) + prompt(16, 0, 0)
    pair, single = routes(router(4, Replicas.parse("1,embedding:2")), keys)
    assert (len(pair.owners), len(single.owners)) == (2, 1)


def test_what_is_past_its_time_takes_no_memory_however_many_shards_there_are() -> None:
    absent, now = Absent(0.05), 0.0
    for number in range(10_000):
        now = number / 100
        absent.note(f"m{number % 256}", b"%d" % number, now)
        assert len(absent) <= 12
    absent.note("m0", b"k", now + 10.0)
    assert len(absent) == 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["note", "stored", "ask"]), st.integers(0, 9)), max_size=60)
)
def test_it_says_what_a_list_of_all_that_was_said_would_say(events: list[tuple[int, str, int]]) -> None:
    absent, said, now = Absent(10.0), dict[int, tuple[float, bool]](), 0.0
    for key, what, later in events:
        now += later
        before = said.get(key, (0.0, False))
        if what == "note":
            absent.note("m0", b"%d" % key, now)
            said[key] = now + 10.0, before[0] > now
        elif what == "stored":
            absent.stored("m0", b"%d" % key)
            said.pop(key, None)
        for last in (False, True):
            until, twice = said.get(key, (0.0, False))
            assert absent("m0", b"%d" % key, now, last=last) == (until > now and (twice or not last))
