"""What one engine computed, a restarted one does not compute again, and answers the same, token for token.

The second engine is another process with another PYTHONHASHSEED and another hash algorithm for its own prefix cache.
Every case runs with asynchronous and with synchronous loads.
"""

from __future__ import annotations

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.harness import (
    BLOCK,
    VISION,
    WRITTEN,
    Ask,
    Engine,
    Expected,
    FirstRun,
    ask,
    words,
    written,
)
from tests.engines.vllm.models import IMAGE, VIDEO

pytestmark = pytest.mark.usefixtures("unchanged")

CLIP = {"kind": "frames", "seed": 1}
WHOLE = {
    "text": written(ask(words(1, 400))),
    "text of whole blocks only": written(ask(words(2, 640))),
    "text in several chunks": written(ask(words(3, 900))),
    "less than two blocks": written(ask(words(4, 40))),
    "image and text": written(ask(words(5, 100) + IMAGE + words(6, 150), 1)),
    "image first": written(ask(words(7, 300), 2)),
    "image last": written(ask(words(8, 310) + IMAGE, 3)),
    "three images": written(ask(words(9, 70) + IMAGE + words(10, 40) + IMAGE + IMAGE + words(11, 60), 1, 2, 3)),
    "one image twice": written(ask(words(12, 70) + IMAGE + words(13, 70) + IMAGE + words(14, 60), 4, 4)),
    "video frames": written(ask(words(15, 90) + VIDEO + words(16, 100), videos=[CLIP])),
    "image and video": written(ask(words(17, 50) + IMAGE + VIDEO + words(18, 100), 5, videos=[CLIP])),
    "uuid": written(ask(words(19, 100) + IMAGE + words(20, 80), 6, uuids={"image": ["a name"]})),
    "salt": written(ask(words(21, 300), salt="a tenant")),
    "adapter": written(ask(words(22, 300), lora=["one", 1, "adapter"])),
    "adapter and image": written(ask(words(23, 100) + IMAGE + words(24, 100), 7, lora=["one", 1, "adapter"])),
}
BEGINNING = words(30, 320)
written(ask(BEGINNING + words(31, 100)))
PARTIAL = ask(BEGINNING + words(32, 600))  # more than one chunk remains
MEDIA_BEGINNING = words(33, 100) + IMAGE + words(34, 85)
written(ask(MEDIA_BEGINNING + words(35, 50), 8))
MEDIA_PARTIAL = ask(MEDIA_BEGINNING + words(36, 600), 8)

SPOKEN = 60  # tokens of the first answer of a chat
written(ask(words(40, 200), max_tokens=SPOKEN))
CHAT = ask(words(40, 200), max_tokens=SPOKEN, then=[words(41, 40)])
written(ask(words(42, 100) + IMAGE + words(43, 30), 9, max_tokens=SPOKEN))
MEDIA_CHAT = ask(words(42, 100) + IMAGE + words(43, 30), 9, max_tokens=SPOKEN, then=[words(44, 40)])

SHARED = words(50, 256)
SHARED_MEDIA = words(51, 60) + IMAGE + words(52, 170)
written(ask(SHARED + words(53, 64)))
written(ask(SHARED_MEDIA + words(54, 64), 10))
CROWD = [ask(SHARED + words(60 + i, 40 + 7 * i)) for i in range(16)]
CROWD += [ask(SHARED_MEDIA + words(80 + i, 40 + 7 * i), 10) for i in range(16)]

EXPECTED = Expected.plan(VISION, *WHOLE.values(), PARTIAL, MEDIA_PARTIAL, CHAT, MEDIA_CHAT, *CROWD)


def test_storing_changes_no_answer_and_drops_nothing(first_run: FirstRun) -> None:
    """The first engine met its own stored prefixes, too."""
    for wanted, answer, truth in zip(WRITTEN, first_run.answers, EXPECTED.of(*WRITTEN), strict=True):
        assert answer.same(truth), (wanted, answer, truth)
    assert first_run.counters["blocks_saved"] > 0
    assert not any(first_run.counters.get(name, 0) for name in ("saves_dropped", "saves_refused", "load_failures"))


def test_both_engines_give_their_blocks_the_same_facts(reader: Engine, store: Cache) -> None:
    reader.fresh(*WHOLE.values())
    assert store.varying_facts() == {"adapter", "cache_salt"}


@pytest.mark.parametrize("name", WHOLE)
def test_a_restarted_engine_computes_nothing_again(reader: Engine, name: str) -> None:
    (answer,), (truth,) = reader.fresh(WHOLE[name]), EXPECTED.of(WHOLE[name])
    assert answer.same(truth), (answer, truth)
    assert answer.hit, f"{answer.cached} of {answer.reusable} tokens"


@pytest.mark.parametrize(("wanted", "shared"), [(PARTIAL, 320), (MEDIA_PARTIAL, 211)], ids=["text", "image"])
def test_what_was_seen_is_reused_and_the_rest_computed_in_chunks(
    reader: Engine, store: Cache, wanted: Ask, shared: int
) -> None:
    (answer,), (truth,) = reader.fresh(wanted), EXPECTED.of(wanted)
    assert answer.same(truth), (answer, truth)
    assert answer.cached == shared // BLOCK * BLOCK
    store.settle()
    (again,) = reader.fresh(wanted)
    assert again.same(truth)
    assert again.hit, "what was computed after a partial hit was not stored"


@pytest.mark.parametrize(("chat", "said"), [(CHAT, 200), (MEDIA_CHAT, 156)], ids=["text", "image"])
def test_the_next_turn_finds_the_blocks_of_the_answer_before(reader: Engine, chat: Ask, said: int) -> None:
    (truth,) = EXPECTED.of(chat)
    pictures = {"images": chat["images"]} if "images" in chat else {}
    (answer,) = reader.fresh(ask(tokens=truth.prompt, max_tokens=SPOKEN, **pictures))
    assert answer.prompt == truth.prompt
    assert answer.tokens == truth.tokens[SPOKEN:]
    assert answer.cached == (said + SPOKEN - 1) // BLOCK * BLOCK > said, "only prompt blocks were there"


def test_32_requests_at_once_share_what_is_there(reader: Engine, store: Cache) -> None:
    answers, truths = reader.fresh(*CROWD, together=True), EXPECTED.of(*CROWD)
    assert [answer.tokens for answer in answers] == [truth.tokens for truth in truths]
    assert all(answer.cached >= 256 // BLOCK * BLOCK for answer in answers), [answer.cached for answer in answers]
    store.settle()
    again = reader.fresh(*CROWD, together=True)
    assert [answer.tokens for answer in again] == [truth.tokens for truth in truths]
    assert all(answer.hit for answer in again), [(answer.cached, answer.reusable) for answer in again]


def test_a_request_may_ask_not_to_read(reader: Engine) -> None:
    wanted = WHOLE["image and text"]
    (answer,), (truth,) = reader.fresh(wanted | {"skip_reading": True}), EXPECTED.of(wanted)
    assert answer.same(truth)
    assert answer.cached == 0


def test_an_abort_while_blocks_load_harms_nobody(reader: Engine) -> None:
    wanted = WHOLE["text in several chunks"]
    status = "WAITING_FOR_REMOTE_KVS" if reader.cache["load_mode"] == "async" else "RUNNING"
    assert reader.call("abort", ask=wanted, status=status, patience_s=10.0), "the abort met no load"
    answers, truths = reader.fresh(wanted, *CROWD[:2]), EXPECTED.of(wanted, *CROWD[:2])
    assert [answer.tokens for answer in answers] == [truth.tokens for truth in truths]
    assert answers[0].hit


def test_the_counters_tell_what_happened(reader: Engine) -> None:
    before = reader.counters()
    reader.fresh(WHOLE["text"])
    after = reader.counters()
    loaded = after["worker"]["blocks_loaded"] - before["worker"].get("blocks_loaded", 0)
    assert loaded == 400 // BLOCK
    assert after["worker"].get("verify_failures", 0) == 0
    assert after["worker"].get("load_failures", 0) == 0
