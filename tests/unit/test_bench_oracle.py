"""The replays the benchmark is judged by: hand-worked cases, and LRU's stack property against brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmcache.bench.oracle import Entry, ExactLRU, PrefixStep, Tallies, Tally, replay


def entry(name: str, parent: str = "", nbytes: int = 10) -> Entry:
    return Entry(name.encode(), parent.encode(), nbytes)


def chain(names: str) -> tuple[Entry, ...]:
    return tuple(entry(name, parent) for name, parent in zip(names, ["", *names[:-1]], strict=True))


def held(store: ExactLRU, names: str) -> str:
    return "".join(name for name in names if name.encode() in store)


def test_the_least_recently_used_entry_goes_first() -> None:
    store = ExactLRU(30)
    for name in "abc":
        store.put([entry(name)])
    assert store.read([entry("a"), entry("z")]) == [True, False]
    store.put([entry("d")])
    assert held(store, "abcd") == "acd"


def test_a_look_touches_nothing() -> None:
    store = ExactLRU(20)
    store.put([entry("a")])
    store.put([entry("b")])
    assert store.prefix([entry("a")]) == 1
    store.put([entry("c")])
    assert held(store, "abc") == "bc"


def test_a_prefix_ends_at_the_first_gap() -> None:
    store = ExactLRU()
    store.put([entry("a"), entry("c")])
    assert store.prefix(chain("abc")) == 1
    assert store.prefix([]) == 0


def test_a_block_goes_only_after_all_that_follow_it() -> None:
    store = ExactLRU(40)
    store.put(chain("abc"))
    store.read(chain("abc")[2:])
    store.put([entry("x"), entry("y"), entry("z")])
    assert held(store, "abcxyz") == "axyz"


def test_a_shared_prefix_outlives_one_of_its_two_tails() -> None:
    store = ExactLRU(30)
    store.put(chain("ab"))
    store.put([entry("c", "a")])
    store.put([entry("x")])
    assert held(store, "abcx") == "acx"


def test_a_read_leaves_parents_more_recent_than_children() -> None:
    store = ExactLRU(30)
    store.put(chain("abc"))
    store.read(chain("abc"))
    store.put([entry("x")])
    assert held(store, "abcx") == "abx"


def test_what_can_never_fit_is_left_out_and_evicts_only_what_it_may() -> None:
    store = ExactLRU(25)
    assert store.put([entry("a"), entry("b"), entry("c")]) == 20
    assert held(store, "abc") == "ab"
    assert store.used_nbytes == 20


def test_an_entry_costs_its_overhead_rounded_up() -> None:
    store = ExactLRU(128, overhead_nbytes=50, alignment=64)
    assert store.cost_nbytes(entry("a", nbytes=15)) == 128
    assert store.put([entry("a", nbytes=14)]) == 14
    assert store.used_nbytes == 64


def test_storing_again_writes_nothing_but_touches() -> None:
    store = ExactLRU(20)
    store.put([entry("a")])
    store.put([entry("b")])
    assert store.put([entry("a")]) == 0
    store.put([entry("c")])
    assert held(store, "abc") == "ac"


def test_replay_counts_as_an_engine_would() -> None:
    blocks = chain("abcd")
    step = PrefixStep(blocks, ((2, entry("p", nbytes=7)), (4, entry("q", nbytes=7)), (4, entry("q", nbytes=7))))
    longer = PrefixStep((*blocks, entry("e", "d")), step.embeddings)
    other = PrefixStep((*blocks[:2], entry("x", "b")), ((1, entry("p", nbytes=7)), (3, entry("q", nbytes=7))))
    got = replay([step, longer, other], ExactLRU())
    assert (got["kv"].lookups, got["kv"].hits) == (4 + 5 + 3, 0 + 4 + 2)
    assert (got["kv"].bytes_read, got["kv"].bytes_written) == (60, 60)
    # the first asks for p and q once each, the second for none, the third for q: p lies inside its two hits
    assert (got["embedding"].lookups, got["embedding"].hits) == (3, 1)
    assert (got["embedding"].bytes_read, got["embedding"].bytes_written) == (7, 14)
    assert got.hit_rate == 7 / 15
    assert got["kv"].hit_rate == 0.5


def test_what_an_answer_completes_is_stored_for_the_next_turn_and_not_looked_up() -> None:
    first = PrefixStep(chain("abcd")[:2], (), generated=chain("abcd")[2:])
    second = PrefixStep(chain("abcdef")[:5], (), generated=chain("abcdef")[5:])
    got = replay([first, second], ExactLRU())
    assert (got["kv"].lookups, got["kv"].hits) == (2 + 5, 0 + 4)
    assert got["kv"].bytes_written == 60
    assert [moment["kv"] for moment in got.history] == [(2, 0, 0, 40), (7, 4, 40, 60)]


def test_totals_are_of_all_kinds() -> None:
    got = Tallies({"a": Tally(4, 1, 10, 20), "b": Tally(6, 4, 1, 2)})
    assert got.total() == Tally(10, 5, 11, 22)
    assert got.hit_rate == 0.5
    other = Tallies({"a": Tally(4, 1, 10, 20), "b": Tally(6, 4, 1, 2)})
    assert got == other
    other.mark()
    assert got != other


def test_no_lookups_is_a_hit_rate_of_zero() -> None:
    assert replay([], ExactLRU()).hit_rate == 0.0


@given(st.lists(st.integers(0, 8), max_size=60), st.integers(1, 6))
def test_a_hit_is_an_entry_with_fewer_others_used_since_than_fit(accesses: list[int], capacity: int) -> None:
    steps = [PrefixStep((), ((1, entry(str(name), nbytes=1)),)) for name in accesses]
    expected = 0
    for at, name in enumerate(accesses):
        earlier = [i for i in range(at) if accesses[i] == name]
        expected += bool(earlier) and len(set(accesses[earlier[-1] + 1 : at])) < capacity
    assert replay(steps, ExactLRU(capacity))["embedding"].hits == expected


@given(st.lists(st.text("ab", min_size=1, max_size=6), max_size=40), st.integers(6, 14))
def test_the_capacity_holds_and_no_block_is_left_without_its_parent(paths: list[str], capacity: int) -> None:
    store = ExactLRU(capacity)
    for path in paths:
        names = [path[: i + 1] for i in range(len(path))]
        blocks = [entry(name, name[:-1], nbytes=1) for name in names]
        prefix = store.prefix(blocks)
        store.read(blocks[:prefix])
        store.put(blocks[prefix:])
        assert store.used_nbytes <= capacity
    everything = [format(i, f"0{n}b").replace("0", "a").replace("1", "b") for n in range(1, 7) for i in range(2**n)]
    alive = {name for name in everything if name.encode() in store}
    assert len(alive) == store.used_nbytes
    assert all(len(name) == 1 or name[:-1] in alive for name in alive)
