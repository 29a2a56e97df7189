"""What to ask of whom: batches within a server's limits, and when a shard is worth asking again."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.client.plan import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    SHARE_NBYTES,
    Breaker,
    batches,
    put_batches,
    runs_within,
    shares,
)


def covers(runs: list[range], count: int) -> bool:
    """Every position once, in order, in runs that are not empty."""
    return [position for run in runs for position in run] == list(range(count)) and all(map(len, runs))


@given(st.integers(0, 200), st.integers(1, 50))
def test_batches_cover_all_keys_in_order(count: int, max_keys: int) -> None:
    runs = list(batches(count, max_keys))
    assert covers(runs, count)
    assert all(len(run) == max_keys for run in runs[:-1])
    assert all(len(run) <= max_keys for run in runs)


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 10), st.integers(1, 150))
def test_put_batches_stay_within_both_limits_and_are_as_large_as_they_may(
    sizes: list[int], max_keys: int, max_nbytes: int
) -> None:
    runs = list(put_batches(sizes, max_keys, max_nbytes))
    assert covers(runs, len(sizes))
    for run in runs:
        assert len(run) <= max_keys
        assert len(run) == 1 or sum(sizes[position] for position in run) <= max_nbytes
    for run, following in pairwise(runs):
        total = sum(sizes[position] for position in run) + sizes[following.start]
        assert len(run) == max_keys or total > max_nbytes


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40), st.integers(1, 20), st.integers(1, 20))
def test_runs_stay_within_every_limit_and_are_as_long_as_they_may(
    costs: list[tuple[int, int]], first: int, second: int
) -> None:
    def fits(positions: range) -> bool:
        sums = [sum(costs[position][column] for position in positions) for column in (0, 1)]
        return sums[0] <= first and sums[1] <= second

    runs = list(runs_within(costs, (first, second)))
    assert covers(runs, len(costs))
    assert all(len(run) == 1 or fits(run) for run in runs)
    assert not any(fits(range(run.start, run.stop + 1)) for run in runs[:-1])


def test_a_frame_over_the_limit_goes_alone() -> None:
    assert list(put_batches([1, 99, 1, 1], 10, 10)) == [range(0, 1), range(1, 2), range(2, 4)]
    assert list(put_batches([], 10, 10)) == []


def test_a_breaker_doubles_its_pause_up_to_a_limit_and_forgets_on_success() -> None:
    breaker = Breaker()
    assert breaker.allows(0.0)
    now, pauses = 100.0, []
    for _ in range(8):
        breaker.failed(now)
        pauses.append(breaker.retry_at - now)
        assert not breaker.allows(now)
        assert not breaker.allows(breaker.retry_at - 1e-6)
        now = breaker.retry_at
        assert breaker.allows(now)
    doubled = [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**i) for i in range(8)]
    assert pauses == pytest.approx(doubled)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S)
    breaker.succeeded()
    assert breaker.allows(0.0)
    breaker.failed(200.0)
    assert breaker.retry_at == pytest.approx(200.0 + FIRST_PAUSE_S)


def test_a_pause_is_as_long_as_the_call_that_failed() -> None:
    breaker = Breaker()
    breaker.failed(100.0, took_s=0.7)
    assert breaker.retry_at == pytest.approx(100.7)
    breaker.failed(200.0, took_s=0.1)
    assert breaker.retry_at == pytest.approx(201.4)
    breaker.failed(300.0, took_s=30.0)
    assert breaker.retry_at == pytest.approx(300.0 + LONGEST_PAUSE_S)


def test_a_call_that_was_under_way_when_the_server_failed_does_not_say_that_it_is_back() -> None:
    breaker = Breaker()
    before = breaker.failures
    breaker.failed(10.0)
    assert not breaker.succeeded(before)
    assert not breaker.allows(10.0)
    assert breaker.succeeded(breaker.failures)
    assert breaker.allows(10.0)


@given(st.lists(st.integers(0, 3 * SHARE_NBYTES), max_size=40), st.integers(1, 8))
def test_shares_cover_all_values_and_none_is_small(sizes: list[int], count: int) -> None:
    runs = shares(sizes, count)
    assert [position for run in runs for position in run] == list(range(len(sizes)))
    assert 1 <= len(runs) <= count
    if len(runs) > 1:
        fair = sum(sizes) / len(runs)
        assert all(len(run) for run in runs)
        assert fair >= SHARE_NBYTES
        assert all(sum(sizes[run.start : run.stop]) < fair + max(sizes) for run in runs)


def test_equal_values_are_shared_out_evenly() -> None:
    assert shares([SHARE_NBYTES] * 6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert shares([SHARE_NBYTES] * 2, 8) == [range(0, 1), range(1, 2)]
    assert shares([1] * 100, 8) == [range(0, 100)]
    assert shares([], 8) == [range(0, 0)]
