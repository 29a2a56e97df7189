"""Block chains: token ids and spans, incremental hashing, runs and homes."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcache.chain import PlaceholderSpan, run_bounds
from mmcache.errors import KeyInputError
from mmcache.keys import Namespace
from mmcache.keyset import NO_PARENT, Keys

ITEM = bytes(range(32))
OTHER = ITEM[::-1]
FACTS: dict[str, Any] = {"model": "org/model", "dtype": "bfloat16", "layout": "LBHNC"}


def kv(block_size: int = 4, **facts: object) -> Namespace:
    return Namespace(kind="kv", block_size=block_size, **{**FACTS, **facts})


@pytest.mark.parametrize(
    "tokens",
    [
        (5, 6, 7, 8),
        range(5, 9),
        np.array([5, 6, 7, 8], np.int32),
        np.array([5, 6, 7, 8], ">u8"),
        np.arange(5, 13)[::2] // 2 + np.arange(5, 9) - np.arange(5, 13)[::2] // 2,
        array("i", [5, 6, 7, 8]),
        [np.int64(5), 6, np.uint8(7), 8],
    ],
)
def test_token_ids_may_come_in_any_integer_form(tokens: Any) -> None:
    assert kv().block_keys(tokens) == kv().block_keys([5, 6, 7, 8])


def test_a_cpu_tensor_gives_the_keys_of_the_list() -> None:
    torch = pytest.importorskip("torch")
    assert kv().block_keys(torch.tensor([5, 6, 7, 8])) == kv().block_keys([5, 6, 7, 8])


@pytest.mark.parametrize(
    "tokens",
    [
        [1.0, 2, 3, 4],
        [True, 2, 3, 4],
        [1, 0, False, 4],
        [np.bool_(True), 2, 3, 4],
        [-1, 2, 3, 4],
        [1 << 64, 2, 3, 4],
        ["1", 2, 3, 4],
        [None, 2, 3, 4],
        [[1, 2], [3, 4]],
        "1234",
        b"1234",
        bytearray(b"1234"),
        5,
        None,
        {1, 2, 3, 4},
        np.array([1.0, 2.0]),
        np.array([True, False]),
        np.array([-1, 2]),
        np.array([[1, 2], [3, 4]]),
        np.array([1, None]),
        array("d", [1.0, 2.0]),
    ],
)
def test_what_is_no_token_id_is_refused(tokens: Any) -> None:
    with pytest.raises(KeyInputError, match=r"token_ids: .*0 <= id < 2\^64"):
        kv().block_keys(tokens)


def test_a_mask_over_tokens_is_not_dropped() -> None:
    masked = np.ma.masked_array([5, 6, 7, 8], mask=[False, False, False, True])
    with pytest.raises(KeyInputError, match=r"mask would be lost; pass \.compressed"):
        kv().block_keys(masked)
    assert kv().block_keys(masked.filled(0)) == kv().block_keys([5, 6, 7, 0])


def test_only_full_blocks_have_keys() -> None:
    assert [len(kv().block_keys(range(count))) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert kv().block_keys(range(7)) == kv().block_keys(range(4))


def test_a_chain_shares_its_prefix_and_differs_from_the_first_difference_on() -> None:
    one, two = kv().block_keys(range(16)), kv().block_keys([*range(8), 99, *range(9, 16)])
    assert one[:2] == two[:2]
    assert not set(one.digests[2:]) & set(two.digests[2:])
    assert len(set(one.digests + two.digests)) == 6


def test_parents_and_indices_follow_the_chain() -> None:
    keys = kv().block_keys(range(12))
    assert keys.parents == [NO_PARENT, *keys.digests[:-1]]
    assert keys.parent_chains == [NO_PARENT, *keys.chains[:-1]]
    assert list(keys.indices) == [0, 1, 2]
    assert set(keys.namespaces) == {kv().id}


def test_run_bounds_are_the_schedule() -> None:
    starts = sorted({run_bounds(token)[0] for token in range(0, 16_400, 16)})
    assert starts == [0, 512, 1024, 2048, 4096, 8192, 12288, 16384]
    assert [run_bounds(token) for token in (0, 511, 512, 2047, 2048, 4095, 4096)] == [
        (0, 512),
        (0, 512),
        (512, 1024),
        (1024, 2048),
        (2048, 4096),
        (2048, 4096),
        (4096, 8192),
    ]


@pytest.mark.parametrize("size", [1, 16, 48, 300, 512, 1000, 5000])
def test_a_block_has_the_home_of_the_run_that_holds_its_first_token(size: int) -> None:
    keys = kv(size).block_keys(np.arange(20_000))
    first_of_run: dict[int, bytes] = {}
    for index, chain in enumerate(keys.chains):
        home = first_of_run.setdefault(run_bounds(index * size)[0], chain)
        assert keys.homes[index] == home


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[int], list[PlaceholderSpan]]:
    size = draw(st.integers(1, 9))
    tokens = draw(st.lists(st.integers(0, (1 << 64) - 1), max_size=60))
    spans, at = [], 0
    while at < len(tokens) and draw(st.booleans()):
        offset = draw(st.integers(at, len(tokens) - 1))
        length = draw(st.integers(1, len(tokens) - offset))
        spans.append(PlaceholderSpan(offset, length, draw(st.sampled_from([ITEM, OTHER]))))
        at = offset + length
    return size, tokens, draw(st.permutations(spans))


@given(prompts(), st.data())
@settings(deadline=None)
def test_incremental_keys_are_the_keys_however_the_tokens_are_cut(
    prompt: tuple[int, list[int], list[PlaceholderSpan]], data: st.DataObject
) -> None:
    size, tokens, spans = prompt
    whole = kv(size).block_keys(tokens, spans)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    hasher, waiting, keys = kv(size).hasher(), list(spans), Keys.of([])
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        # Each span is declared early or with its first token, as the draw says.
        now = [span for span in waiting if span.offset < stop or data.draw(st.booleans())]
        waiting = [span for span in waiting if span not in now]
        keys = keys + hasher.extend(tokens[start:stop], now)
    assert keys == whole
    hasher.require_complete_spans()


def test_incremental_homes_are_the_homes_over_many_runs() -> None:
    tokens = np.arange(13_000)
    hasher, keys = kv(16).hasher(), Keys.of([])
    for start in range(0, len(tokens), 700):
        keys = keys + hasher.extend(tokens[start : start + 700])
    assert keys == kv(16).block_keys(tokens)


def test_a_span_may_be_declared_while_its_first_token_waits_in_a_partial_block() -> None:
    hasher = kv().hasher()
    keys = hasher.extend([1, 2, 3])
    keys = keys + hasher.extend([4, 5, 6, 7, 8], [PlaceholderSpan(2, 4, ITEM)])
    assert keys == kv().block_keys(range(1, 9), [PlaceholderSpan(2, 4, ITEM)])


def test_a_span_declared_after_its_first_token_was_hashed_is_refused() -> None:
    hasher = kv().hasher()
    hasher.extend(range(5))
    with pytest.raises(KeyInputError, match="starts before token 4, which is hashed already"):
        hasher.extend([5], [PlaceholderSpan(3, 2, ITEM)])


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([PlaceholderSpan(0, 3, ITEM), PlaceholderSpan(2, 3, ITEM)], "overlap"),
        ([PlaceholderSpan(2, 3, ITEM), PlaceholderSpan(2, 3, ITEM)], "overlap"),
        ([PlaceholderSpan(6, 3, ITEM)], "reaches beyond the 8 tokens"),
        ([PlaceholderSpan(8, 1, ITEM)], "reaches beyond the 8 tokens"),
        ([(0, 3, ITEM)], "object of type tuple is no PlaceholderSpan"),
        (None, "object of type NoneType is no sequence of spans"),
        (PlaceholderSpan(0, 3, ITEM), "object of type PlaceholderSpan is no sequence of spans"),
    ],
)
def test_impossible_spans_are_refused(spans: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        kv().block_keys(range(8), spans)


@pytest.mark.parametrize(
    ("offset", "length", "item"),
    [(-1, 1, ITEM), (0, 0, ITEM), (0, 1, ITEM[:31]), (0, 1, ITEM[:8]), (0, 1, "x"), (0.0, 1, ITEM), (0, True, ITEM)],
)
def test_impossible_span_fields_are_refused(offset: Any, length: Any, item: Any) -> None:
    with pytest.raises(KeyInputError, match=r"PlaceholderSpan\.\w+: "):
        PlaceholderSpan(offset, length, item)


def test_an_extend_that_raises_changes_nothing() -> None:
    hasher, twin = kv().hasher(), kv().hasher()
    first = [PlaceholderSpan(2, 9, ITEM)]
    assert hasher.extend(range(6), first) == twin.extend(range(6), first)
    for tokens, spans in (
        ([1.5], []),
        ([6, 7, 8], [PlaceholderSpan(10, 4, OTHER)]),
        ([6], [PlaceholderSpan(0, 1, ITEM)]),
    ):
        with pytest.raises(KeyInputError):
            hasher.extend(tokens, spans)  # type: ignore[arg-type]
    more = [PlaceholderSpan(11, 2, OTHER)]
    assert hasher.extend(range(6, 20), more) == twin.extend(range(6, 20), more)
