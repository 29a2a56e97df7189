"""The encoder cache: what one engine encoded, another does not encode again, and answers the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.encoder import ALONE, SIGHT, Encoding, flip, reshape, retype, revalue, sharing, value
from tests.engines.vllm.harness import Ask, Expected, Settings, ask, words
from tests.engines.vllm.models import IMAGE, SOUND, VIDEO

CLIP = {"kind": "frames", "seed": 1}
KNOWN = {
    "image": ask(words(600, 60) + IMAGE + words(601, 40), 1),
    "two images": ask(words(602, 60) + IMAGE + words(603, 30) + IMAGE, 2, 3),
    "one image twice": ask(IMAGE + words(604, 30) + IMAGE, 4, 4),
    "in several chunks": ask(IMAGE + words(612, 600) + IMAGE, 13, 14),
    "video": ask(words(605, 50) + VIDEO + words(606, 30), videos=[CLIP]),
    "image and video": ask(IMAGE + words(607, 30) + VIDEO, 5, videos=[{"kind": "frames", "seed": 2}]),
    "uuid": ask(words(608, 60) + IMAGE, 6, uuids={"image": ["a name"]}),
    "salt": ask(words(609, 60) + IMAGE, 7, salt="a tenant"),
}
ITEMS = 11  # different ones in KNOWN
PLAIN = KNOWN["image"]
HALF = ask(words(610, 40) + IMAGE + words(611, 40) + IMAGE, 1, 9)
CROWD = [ask(words(620 + i, 20 + i) + IMAGE + words(640 + i, 10), 1 + i % 3) for i in range(8)]
MISSES = {
    "another tenant": KNOWN["salt"] | {"salt": "another tenant"},
    "no tenant": {name: value for name, value in KNOWN["salt"].items() if name != "salt"},
    "another processor setting": PLAIN | {"kwargs": {"max_pixels": 28 * 28 * 6}},
    "another picture under its name": ask(words(608, 60) + IMAGE, 8, uuids={"image": ["a name"]}),
    "one pixel": ask(words(600, 60) + IMAGE, {"kind": "picture", "seed": 1, "changed": True}),
}
GIVEN = ask(words(613, 40) + IMAGE, image_embeds={"seed": 3, "grid": [1, 8, 12], "bare": False})
GIVEN["text"] = words(613, 40) + IMAGE
FORGED = {  # an embedding of a client's own, and somebody's clip under the same name; both are 48 rows
    "text": words(614, 40) + IMAGE + words(615, 20) + VIDEO,
    "image_embeds": {"seed": 3, "grid": [1, 8, 24], "bare": False},
    "videos": [{"kind": "frames", "seed": 15}],
    "uuids": {"image": ["one name"], "video": ["one name"]},
}
HONEST = ask(words(616, 50) + VIDEO, videos=FORGED["videos"])
BARE: Ask = GIVEN | {"image_embeds": GIVEN["image_embeds"] | {"bare": True}}

SMALL_PIXELS = {"mm_processor_kwargs": {"max_pixels": 28 * 28 * 6}}
OTHERS = {
    "processor settings of the engine": Settings("vision", SIGHT.llm | SMALL_PIXELS),
    "model": Settings("vision-retrained", SIGHT.llm),
}
for other in OTHERS.values():
    Expected.plan(other, PLAIN)
DAMAGED = {
    "a bit": (ask(words(660, 40) + IMAGE, 21), flip),
    "the shape": (ask(words(661, 40) + IMAGE, 22), reshape),
    "the dtype": (ask(words(662, 40) + IMAGE, 23), retype),
}
EXPECTED = Expected.plan(SIGHT, *KNOWN.values(), HALF, *CROWD, *MISSES.values(), GIVEN, HONEST)
Expected.plan(SIGHT, *[wanted for wanted, _ in DAMAGED.values()])
HEARING = Settings("audio", ALONE | {"limit_mm_per_prompt": {"audio": 2}})
HEARD = [
    ask(words(650, 40) + SOUND + words(651, 30), sounds=[{"seed": 1, "seconds": 1.3}]),
    ask(SOUND + words(652, 30) + SOUND, sounds=[{"seed": 2, "seconds": 0.5}, {"seed": 3, "seconds": 2.0}]),
]
Expected.plan(HEARING, *HEARD)
LEVELS = Settings("levels", ALONE | {"limit_mm_per_prompt": {"image": 2, "video": 0}})
SEEN = [ask(words(670, 40) + IMAGE + words(671, 30), 41), ask(IMAGE + words(672, 20), 42)]
Expected.plan(LEVELS, *SEEN)
full = pytest.mark.full


@pytest.fixture(scope="module")
def filled() -> Iterator[Cache]:
    """A cache with what an engine encoded of KNOWN."""
    EXPECTED.prepare()
    with Cache() as cache:
        with Encoding(SIGHT, sharing(SIGHT, cache.url), {"PYTHONHASHSEED": "1"}) as writer:
            assert writer.right(*KNOWN.values()) >= len(KNOWN)
            cache.settle()
            assert len(cache.digests()) == ITEMS
        yield cache


@pytest.fixture(scope="module")
def reader(filled: Cache) -> Iterator[Encoding]:
    """Another process with what must not matter, and with metrics."""
    more = {"max_num_seqs": 4, "max_model_len": 960, "mm_processor_cache_gb": 1, "disable_log_stats": False}
    with Encoding(SIGHT, sharing(SIGHT, filled.url, llm=more), {"PYTHONHASHSEED": "77"}) as reader:
        yield reader


@pytest.fixture
def unchanged(filled: Cache) -> Iterator[None]:
    """What a test stores is gone when it ends."""
    before = set(filled.digests())
    yield
    filled.settle()
    filled.forget([digest for digest in filled.digests() if digest not in before])


@pytest.mark.parametrize("name", KNOWN)
def test_a_second_engine_encodes_nothing_it_can_find(reader: Encoding, name: str) -> None:
    before = reader.counters().get("items_hit", 0)
    assert reader.right(KNOWN[name]) == 0
    assert reader.counters()["items_hit"] > before


@pytest.mark.usefixtures("unchanged")
def test_of_two_images_only_the_unknown_one_is_encoded(reader: Encoding) -> None:
    assert reader.right(HALF) == 1


def test_requests_at_once_share_what_is_there(reader: Encoding) -> None:
    before = reader.counters()["fetched_nbytes"]
    assert reader.right(*CROWD, together=True) == 0
    assert reader.counters()["fetched_nbytes"] == before, "what was fetched for others was fetched again"


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", ["another tenant", "no tenant", "another processor setting", "one pixel"])
def test_what_is_not_the_same_item_is_encoded(reader: Encoding, name: str) -> None:
    assert reader.right(MISSES[name]) == 1


@pytest.mark.usefixtures("unchanged")
def test_an_embedding_that_came_with_the_request_passes_by(reader: Encoding, filled: Cache) -> None:
    before = filled.digests()
    for _ in range(2):
        assert reader.right(GIVEN) == 0
    filled.settle()
    assert set(filled.digests()) == set(before)


@pytest.mark.usefixtures("unchanged")
def test_a_clients_own_embedding_is_not_stored_as_another_items(reader: Encoding, filled: Cache) -> None:
    before = filled.digests()
    (forged,), _ = reader.answers(FORGED)
    assert forged.finish == "length", "vLLM accepts it: a consumer takes embeddings"
    filled.settle()
    assert set(filled.digests()) == set(before)
    assert reader.right(HONEST) == 1


def test_an_embedding_that_nobody_has_fails_its_request_and_no_other(reader: Encoding) -> None:
    """vLLM lets clients of such an engine leave an embedding out, and ends if it is not there when it is needed."""
    (bare,), _ = reader.answers(BARE)
    assert (bare.tokens, bare.finish) == ([], "error")
    assert reader.right(PLAIN) == 0


def test_the_metrics_are_the_engines_own(reader: Encoding) -> None:
    counters = reader.counters()
    assert reader.engine.call("metric", name="vllm:mmcache_encoder_hits") == counters["items_hit"]
    assert reader.engine.call("metric", name="vllm:mmcache_encoder_loaded_bytes") == counters["fetched_nbytes"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_entry_is_refused_dropped_and_stored_again(reader: Encoding, filled: Cache, damage: str) -> None:
    wanted, do = DAMAGED[damage]
    before = set(filled.digests())
    assert reader.right(wanted) == 1
    filled.settle()
    do(filled, [digest for digest in filled.digests() if digest not in before])
    failures = reader.counters()["verify_failures"]
    assert reader.right(wanted) == 1
    assert reader.counters()["verify_failures"] == failures + 1
    filled.settle()
    assert reader.right(wanted) == 0


@full
@pytest.mark.usefixtures("unchanged")
def test_a_name_reaches_only_what_it_shows(filled: Cache) -> None:
    """The reader's front end would not look at another picture under a name it knows; this engine's does."""
    with Encoding(SIGHT, sharing(SIGHT, filled.url)) as engine:
        assert engine.right(KNOWN["uuid"]) == 0
        assert engine.right(MISSES["another picture under its name"]) == 1
        filled.settle()
        assert engine.right(KNOWN["uuid"]) == 0
        assert engine.right(MISSES["another picture under its name"]) == 0


@full
def test_an_audit_finds_a_wrong_value_and_mends_it() -> None:
    EXPECTED.prepare()
    with Cache() as cache, Encoding(SIGHT, sharing(SIGHT, cache.url, audit_share=1.0)) as engine:
        assert engine.right(PLAIN) == 1
        cache.settle()
        (digest,) = cache.digests()
        right = value(cache, digest)
        assert engine.right(PLAIN) == 1
        engine.right(GIVEN)  # counts of what is done between steps come with the next one
        assert (engine.counters()["audits"], engine.counters().get("audit_differences", 0)) == (1, 0)
        revalue(cache, [digest])
        assert value(cache, digest).tobytes() != right.tobytes()
        assert engine.right(PLAIN) == 1
        cache.settle()
        engine.right(GIVEN)
        assert (engine.counters()["audits"], engine.counters().get("audit_differences", 0)) == (2, 1)
        assert value(cache, digest).tobytes() == right.tobytes()


@full
@pytest.mark.parametrize("name", OTHERS)
def test_engines_of_another_kind_share_nothing(filled: Cache, name: str) -> None:
    other = OTHERS[name]
    Expected.plan(other).prepare()
    with Encoding(other, sharing(other, filled.url)) as engine:
        assert engine.right(PLAIN) == 1


def test_an_encoder_instance_fills_what_a_prefill_instance_reads() -> None:
    """And what no encoder instance has encoded, the prefill instance encodes itself and keeps to itself."""
    EXPECTED.prepare()
    asks = [PLAIN, KNOWN["image and video"]]
    with Cache() as cache, Encoding(SIGHT, sharing(SIGHT, cache.url, "ec_consumer")) as prefill:
        assert prefill.right(*asks) == 3
        cache.settle()
        assert cache.digests() == []
        with Encoding(SIGHT, sharing(SIGHT, cache.url, "ec_producer")) as encode:
            encode.answers(*asks)
            assert encode.passes() == 3
            cache.settle()
            assert len(cache.digests()) == 3
            _, again = encode.answers(*asks)
            assert again == 0, "what is stored was encoded again"
        assert prefill.right(*asks) == 0, prefill.counters()


@full
@pytest.mark.parametrize(
    ("settings", "asks", "items", "width"),
    [(HEARING, HEARD, 3, 128), (LEVELS, SEEN, 2, 256)],
    ids=["sounds", "images in levels"],
)
def test_other_encoders(settings: Settings, asks: list[Ask], items: int, width: int) -> None:
    """The last engine only reads: it has not measured how wide an embedding is."""
    Expected.plan(settings).prepare()
    with Cache() as cache:
        for role, passes in (("ec_both", len(asks)), ("ec_consumer", 0)):
            with Encoding(settings, sharing(settings, cache.url, role)) as engine:
                assert engine.right(*asks) == passes
                cache.settle()
        assert cache.counters()["stored"] == items
        assert {value(cache, digest).shape[1] for digest in cache.digests()} == {width}
