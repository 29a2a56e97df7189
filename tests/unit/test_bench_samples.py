"""The figures of `mmcache bench serve`: quartiles, ratios of pairs, shares, arrivals."""

from __future__ import annotations

import numpy as np
import pytest

from mmcache.bench.samples import Ratio, Sample, Spread, arrivals_s, cached_share, characters_per_token, same_answers


def test_a_spread_leaves_out_what_is_missing() -> None:
    assert Spread.of([]) is None
    assert Spread.of([None, None]) is None
    found = Spread.of([None, 3.0, 1.0, 2.0, None, 5.0, 4.0])
    assert found == Spread(5, 2.0, 3.0, 4.0, None, None, 5.0)
    assert found is not None
    assert found.few


@pytest.mark.parametrize(
    ("count", "few", "p90", "p99"),
    [(9, True, False, False), (10, True, True, False), (20, False, True, False), (100, False, True, True)],
)
def test_a_percentile_needs_samples_beyond_it(count: int, few: bool, p90: bool, p99: bool) -> None:
    found = Spread.of([float(value) for value in range(count)])
    assert found is not None
    assert (found.few, found.p90 is not None, found.p99 is not None) == (few, p90, p99)


def test_ratios_are_of_requests_that_both_answered() -> None:
    assert Ratio.of([1.0, None], [None, 2.0]) is None
    found = Ratio.of([2.0, 4.0, None, 8.0, 1.0], [1.0, 1.0, 9.0, 8.0, None])
    assert found == Ratio(3, 1.0 / 4.0, 0.375, 0.5, 0.75)


def test_the_cached_share_is_of_tokens_not_of_requests() -> None:
    samples = [Sample(prompt_tokens=900, cached_tokens=900), Sample(prompt_tokens=100, cached_tokens=0)]
    assert cached_share(samples) == 0.9
    assert cached_share([*samples, Sample(error="no")]) == 0.9
    assert cached_share([*samples, Sample(prompt_tokens=500)]) == 0.6  # some servers leave out what is 0
    assert cached_share([Sample(prompt_tokens=500)]) is None


def test_answers_are_compared_where_both_are_there() -> None:
    first = [Sample(answer="a"), Sample(answer="b"), Sample(error="no")]
    second = [Sample(answer="a"), Sample(answer="c"), Sample(answer="d")]
    assert same_answers(first, second) == (1, 2)


def test_arrivals_are_independent_and_follow_from_the_seed() -> None:
    found = np.array(arrivals_s(20_000, 4.0, 0))
    gaps = np.diff(found, prepend=0.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential distribution: equal to its mean
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    assert arrivals_s(9, 4.0, 0) == list(found[:9])
    assert arrivals_s(9, 4.0, 1) != list(found[:9])


def test_characters_per_token_are_of_the_difference() -> None:
    assert characters_per_token((200, 230), (400, 430)) == 1.0
    assert characters_per_token((200, 60), (400, 110)) == 4.0
    assert characters_per_token((200, 60), (400, 60)) == 4.0  # it counts nothing: as of English
    assert characters_per_token((200, 0), (400, 10_000)) == 0.25
