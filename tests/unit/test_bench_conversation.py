"""The conversations of `bench chat`: turns grow, photos come back, and keys and truths name the same contents."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmcache.bench.conversation import QUICK, ChatScale, requests
from mmcache.bench.encoder import EMBEDDING_NBYTES, QWEN2_VL_2B
from mmcache.bench.oracle import ExactLRU, replay
from mmcache.bench.workload import Request
from mmcache.keys import Namespace, embedding_key

KV = Namespace(kind="kv", block_size=QWEN2_VL_2B.block_size, model="m", dtype="bfloat16", layout="L2THD")
EMBEDDING = Namespace(kind="embedding", model="clip", dtype="float16")


@pytest.fixture(scope="module")
def quick() -> list[Request]:
    return requests(QUICK, seed=0)


def by_user(asked: list[Request]) -> dict[str, list[Request]]:
    found: dict[str, list[Request]] = {}
    for request in asked:
        found.setdefault(request.name.split(":")[0], []).append(request)
    return found


def test_the_seed_fixes_everything(quick: list[Request]) -> None:
    again = requests(QUICK, seed=0)
    assert [(r.name, r.token_ids, r.answer) for r in again] == [(r.name, r.token_ids, r.answer) for r in quick]
    assert [r.token_ids for r in requests(QUICK, seed=1)] != [r.token_ids for r in quick]


def test_a_turn_begins_with_all_that_was_said_before(quick: list[Request]) -> None:
    talks = by_user(quick)
    assert len(talks) == QUICK.users
    grown = 0
    for talk in talks.values():
        for before, after in pairwise(talk):
            said = [*before.token_ids, *before.answer]
            if after.token_ids[: len(said)] == said:
                assert after.media[: len(before.media)] == before.media
                grown += 1
            else:  # the same turn again, or edited
                assert after.name.endswith(("again", "edited"))
    assert grown >= QUICK.users


def test_users_come_back_after_all_others(quick: list[Request]) -> None:
    last = {talk[-1].name for talk in by_user(quick).values()}
    assert {request.name for request in quick[-QUICK.users :]} == last


def test_photos_come_back_within_and_across_conversations() -> None:
    within = 0
    users: dict[bytes, set[str]] = {}
    for user, talk in by_user(requests(ChatScale(users=12, photos=2, turns=(4, 5)), seed=0)).items():
        shown = [medium.truth for _, medium in talk[-1].media]
        within += len(shown) > len(set(shown))
        for truth in shown:
            users.setdefault(truth, set()).add(user)
    assert within > 2
    assert max(map(len, users.values())) > 2


def test_keys_and_truths_name_the_same_contents(quick: list[Request]) -> None:
    pairs = set()
    for request in quick:
        step = request.step(QWEN2_VL_2B, EMBEDDING_NBYTES)
        keys = KV.block_keys([*request.token_ids, *request.answer], request.spans())
        assert len(keys) == len(step.blocks) + len(step.generated)
        assert len(step.blocks) == len(request.token_ids) // 16
        entries = (*step.blocks, *step.generated)
        pairs |= {(key.digest, entry.content) for key, entry in zip(keys, entries, strict=True)}
        pairs |= {(embedding_key(EMBEDDING, p.item).digest, p.truth) for _, p in request.pictures(16)}
    assert len(pairs) > 150
    assert len({key for key, _ in pairs}) == len({content for _, content in pairs}) == len(pairs)


def test_most_blocks_can_hit_and_not_all(quick: list[Request]) -> None:
    ideal = replay([request.step(QWEN2_VL_2B, EMBEDDING_NBYTES) for request in quick], ExactLRU())
    assert 0.6 < ideal["kv"].hit_rate < 0.95
    assert 0.2 < ideal["embedding"].hit_rate < 0.95
