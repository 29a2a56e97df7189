"""Replaying traces: hand-worked cases, the optimum against every possible choice, and lines that are no trace."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.bench.replay import PolicyCache, endless, replay
from mmcache.bench.trace import LRU, MAX_LINE_CHARS, Cache, Optimal, Request, hit_blocks, parse
from mmcache.errors import UsageError
from mmcache.store.policies import POLICIES
from tests.integration.support import run_cli


def line(*blocks: int, tokens: int | None = None) -> str:
    return json.dumps(
        {"timestamp": 0, "hash_ids": list(blocks), **({} if tokens is None else {"input_length": tokens})}
    )


def chains(draws: Sequence[Sequence[int]]) -> list[Request]:
    """Prompts over a tree: a block's number says which path leads to it, as a hash of a prefix does."""
    names: dict[tuple[int, ...], int] = {}
    return [
        tuple(names.setdefault(tuple(draw[: depth + 1]), len(names)) for depth in range(len(draw))) for draw in draws
    ]


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=7).map(chains)


def best_possible(requests: list[Request], capacity: int) -> int:
    """The most leading blocks any choice of what to keep could find, by trying all of them."""

    @lru_cache(None)
    def most(turn: int, kept: frozenset[int]) -> int:
        if turn == len(requests):
            return 0
        request = requests[turn]
        hits = next((depth for depth, block in enumerate(request) if block not in kept), len(request))
        there = sorted(kept | set(request))
        choices = itertools.combinations(there, min(capacity, len(there)))
        return hits + max(most(turn + 1, frozenset(choice)) for choice in choices)

    return most(0, frozenset())


@given(prompts, st.integers(1, 4))
def test_the_optimum_is_what_the_best_choice_finds(requests: list[Request], capacity: int) -> None:
    assert hit_blocks(requests, Optimal(capacity, requests)) == best_possible(requests, capacity)


@given(prompts, st.integers(1, 6))
def test_no_policy_holds_more_than_its_capacity_or_beats_the_optimum(requests: list[Request], capacity: int) -> None:
    blocks = {block for request in requests for block in request}
    optimum = hit_blocks(requests, Optimal(capacity, requests))
    policies: list[Cache] = [LRU(capacity), *(PolicyCache(capacity, policy) for policy in POLICIES.values())]
    for cache in policies:
        assert hit_blocks(requests, cache) <= optimum
        assert sum(block in cache for block in blocks) <= capacity


def test_lru_keeps_a_prompts_beginning_longest() -> None:
    cache = LRU(3)
    assert hit_blocks([(1, 2, 3, 4)], cache) == 0
    assert [block in cache for block in (1, 2, 3, 4)] == [True, True, True, False]
    assert hit_blocks([(1, 2, 9)], cache) == 2
    assert [block in cache for block in (1, 2, 3, 9)] == [True, True, False, True]


def test_an_endless_cache_finds_every_repetition() -> None:
    trace = parse([line(1, 2, 3, tokens=48), line(1, 2, 4, tokens=40), "", line(1, 2, 4), line(5)])
    assert (trace.blocks, trace.unique_blocks, trace.block_tokens) == (10, 5, 16)
    assert endless(trace) == 5 / 10
    row = replay(trace, 16 * 5)
    assert (row.capacity_blocks, row.rates["lru"], row.optimal, row.gap_closed("value")) == (5, 0.5, 0.5, None)


@pytest.mark.parametrize(("blocks", "tokens", "size"), [(14, 6758, 512), (2, 1024, 512), (100, 1600, 16), (3, 33, 16)])
def test_the_size_of_a_block_follows_from_the_lengths(blocks: int, tokens: int, size: int) -> None:
    assert parse([line(*range(blocks), tokens=tokens)]).block_tokens == size
    assert parse([line(*range(blocks), tokens=tokens)], 7).block_tokens == 7


def test_bailians_files_have_blocks_of_16_tokens_whatever_their_lengths_say() -> None:
    record = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.1, "type": "image", "turn": 1, "hash_ids": [7, 8]}
    trace = parse([json.dumps(record), json.dumps({**record, "chat_id": 2, "parent_chat_id": 1, "input_length": 3000})])
    assert (trace.block_tokens, trace.blocks, trace.unique_blocks) == (16, 4, 2)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no request"),
        (["", "\n"], "no request"),
        ([line(1, 2, tokens=32), "{"], "line 2: not JSON"),
        (["[" * 100_000], "line 1: not JSON"),
        (["[1]"], "line 1: a list"),
        (['{"hash_ids": null}'], "line 1: hash_ids is missing"),
        (['{"other": 1}'], "line 1: hash_ids is missing"),
        (['{"hash_ids": [1, "2"]}'], "line 1: hash_ids is .*integers"),
        (['{"hash_ids": [1, true]}'], "line 1: hash_ids"),
        ([line(1, 2, tokens=32), '{"hash_ids": [1, 2], "input_length": "9"}'], "line 2: input_length is '9'"),
        (['{"hash_ids": [1, 2], "input_length": -9}'], "line 1: input_length is -9"),
        ([line(1, 2)], "--block-tokens"),
        ([" " * (MAX_LINE_CHARS + 1)], "line 1: longer than"),
    ],
)
def test_what_is_no_trace_is_told_by_line_and_field(lines: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse(lines)


def test_a_capacity_below_one_block_is_refused() -> None:
    with pytest.raises(UsageError, match="holds no block of 16"):
        replay(parse([line(1, 2, tokens=32)]), 15)


@pytest.mark.parametrize("packed", [True, False])
def test_the_command_prints_a_table_and_json(tmp_path: Path, packed: bool) -> None:
    text = "\n".join(line(*range(number % 7, number % 7 + 4), tokens=64) for number in range(70))
    file = tmp_path / "trace"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    shown = run_cli("bench", "trace", str(file), "--capacity", "80,0.16k")
    assert shown.returncode == 0, shown.stderr
    assert (
        "70 requests, 280 blocks of 16 tokens (by the requests' lengths; --block-tokens says otherwise), 10 diff"
        in shown.stdout
    )
    result = json.loads(run_cli("bench", "trace", str(file), "--capacity", "80,0.16k", "--json", "-").stdout)
    assert [row["blocks"] for row in result["capacities"]] == [5, 10]
    rates = {"lru", "s3_fifo", "value", "optimal", "s3_fifo_gap_closed", "value_gap_closed"}
    assert result["capacities"][0].keys() == {"tokens", "blocks"} | rates
    assert result["capacities"][1]["lru"] == result["ideal_hit_rate"]
    assert result["capacities"][0]["lru"] < result["capacities"][0]["optimal"] <= result["ideal_hit_rate"]


def test_a_pipe_is_read_and_an_endless_line_is_not(tmp_path: Path) -> None:
    text = gzip.compress(f"\ufeff{line(1, 2, tokens=32)}\n".encode())
    command = [sys.executable, "-m", "mmcache", "bench", "trace", "-", "--capacity", "32", "--json", "-"]
    ended = subprocess.run(command, input=text, capture_output=True)
    assert json.loads(ended.stdout)["blocks"] == 2, ended.stderr
    damaged = tmp_path / "damaged.gz"
    damaged.write_bytes(text[:12] + b"\xff\xff" + text[14:])
    assert "cannot read" in run_cli("bench", "trace", str(damaged)).stderr
    assert "longer than" in run_cli("bench", "trace", "/dev/zero").stderr
    whole = tmp_path / "whole"
    whole.write_text(line(1, 2, tokens=32))
    assert "name another file" in run_cli("bench", "trace", str(whole), "--json", str(whole)).stderr
    assert whole.read_text() == line(1, 2, tokens=32)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "give a trace FILE or --generate SEED"),
        (["{file}", "--generate", "1"], "one of them"),
        (["--generate", "1", "--block-tokens", "32"], "is of a trace FILE"),
        (["no-such-file"], "cannot read no-such-file"),
        (["{file}", "--capacity", "many"], "no number of tokens"),
        (["{file}", "--capacity", "1M,"], "no number of tokens"),
        (["{file}", "--json", "no/such/folder"], "cannot write"),
    ],
)
def test_bad_arguments_say_what_to_do(tmp_path: Path, words: list[str], why: str) -> None:
    file = tmp_path / "trace"
    file.write_text(line(1, 2, tokens=32))
    ended = run_cli("bench", "trace", *(word.format(file=file) for word in words))
    assert ended.returncode == 2
    assert why in ended.stderr
