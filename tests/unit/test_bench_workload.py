"""The benchmark's requests: stable, truly media-bound, and named the same way by mmcache's keys and by the truths."""

from __future__ import annotations

import pytest

from mmcache.bench.encoder import EMBEDDING_NBYTES, QWEN2_VL_2B
from mmcache.bench.oracle import ExactLRU, replay
from mmcache.bench.workload import QUICK, Medium, Picture, Request, prompt, requests, tokenize
from mmcache.keys import Namespace, embedding_key

KV = Namespace(kind="kv", block_size=QWEN2_VL_2B.block_size, model="m", dtype="bfloat16", layout="L2THD")
EMBEDDING = Namespace(kind="embedding", model="clip", dtype="float16")


@pytest.fixture(scope="module")
def quick() -> list[Request]:
    return requests(QUICK, seed=0)


def test_the_seed_fixes_the_order_and_nothing_else(quick: list[Request]) -> None:
    again = requests(QUICK, seed=0)
    assert [(r.name, r.token_ids) for r in again] == [(r.name, r.token_ids) for r in quick]
    other = requests(QUICK, seed=1)
    assert [r.name for r in other] != [r.name for r in quick]
    assert sorted(r.name for r in other) == sorted(r.name for r in quick)


def test_keys_and_truths_name_the_same_contents(quick: list[Request]) -> None:
    pairs = set()
    for request in quick:
        step = request.step(QWEN2_VL_2B, EMBEDDING_NBYTES)
        keys = KV.block_keys(request.token_ids, request.spans())
        pairs |= {(key.digest, entry.content) for key, entry in zip(keys, step.blocks, strict=True)}
        pairs |= {(embedding_key(EMBEDDING, p.item).digest, p.truth) for _, p in request.pictures(16)}
    assert len(pairs) > 100
    assert len({key for key, _ in pairs}) == len({content for _, content in pairs}) == len(pairs)


def test_equal_tokens_over_other_media_are_in_the_workload(quick: list[Request]) -> None:
    contents: dict[tuple[int, ...], set[bytes]] = {}
    for request in quick:
        step = request.step(QWEN2_VL_2B, EMBEDDING_NBYTES)
        contents.setdefault(tuple(request.token_ids), set()).add(step.blocks[-1].content)
    assert max(map(len, contents.values())) >= 4


def test_some_reuse_is_possible_and_some_is_not(quick: list[Request]) -> None:
    steps = [request.step(QWEN2_VL_2B, EMBEDDING_NBYTES) for request in quick]
    ideal = replay(steps, ExactLRU())
    assert 0.3 < ideal["kv"].hit_rate < 0.9
    assert 0.3 < ideal["embedding"].hit_rate < 0.9


def picture(name: str) -> Picture:
    return Picture(None, name.encode() * 32, name.encode())  # type: ignore[arg-type]


def test_placeholders_lie_where_the_prompt_says() -> None:
    photo = Medium("p", 777, (picture("a"),), b"1" * 32, b"p")
    film = Medium("v", 888, (picture("b"), picture("c")), b"2" * 32, b"v")
    request = prompt("x", ["Look at these:", photo, film, "Which is it?"])
    (first, _), (second, _) = request.media
    assert request.token_ids[first : first + 64] == [777] * 64
    assert request.token_ids[second : second + 128] == [888] * 128
    assert request.token_ids.count(777) == 64
    assert request.token_ids.count(888) == 128
    assert [(span.offset, span.length, span.item) for span in request.spans()] == [
        (first, 64, b"1" * 32),
        (second, 128, b"2" * 32),
    ]
    # a picture is covered once the block with its last token is there
    assert [blocks for blocks, _ in request.pictures(16)] == [
        (first + 63) // 16 + 1,
        (second + 63) // 16 + 1,
        (second + 127) // 16 + 1,
    ]


def test_words_keep_their_ids() -> None:
    assert tokenize("Is it? It is.")[1:3] == tokenize("it ?")
    assert len(tokenize("A cat, asleep.")) == 5
    assert all(0 <= token < 151644 for token in tokenize("Is it? It is."))
