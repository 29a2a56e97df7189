"""SGLang's encoder server with its global cache in mmcache: what is known is not encoded, and nothing is ever mixed up.

A first server stores and is killed; a second one reads, into host memory of 160 tokens, so that it has to ask the cache
again and again and its free memory lies in pieces. Truth is what a server answers that has neither cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmcache
from mmcache.keys import Key, Namespace, embedding_key
from mmcache.testing.values import eventually
from mmcache.transport.base import Outcome
from mmcache_connectors.sglang.encoder_items import digest_of
from tests.engines.cache import SHARDS, most_said
from tests.engines.sglang.encoders import GLOBAL_CACHE, ROW_NBYTES, Encoded, Encoder, encoding
from tests.engines.sglang.harness import DEADLINE_S, Cache
from tests.engines.sglang.stored import flip, forget

SLACK_S = 3.5  # what a busy machine adds to a request
TILE = 28  # pixels that become one token, across and down
# Name: tokens down and across.
SIZES = {
    "p0": (8, 4),
    "p1": (4, 5),
    "p2": (6, 4),
    "p3": (5, 10),
    "p4": (2, 2),
    "p5": (12, 2),
    "p6": (6, 3),
    "p7": (4, 6),
}
POOL_TOKENS = 160
POOL_NBYTES = POOL_TOKENS * ROW_NBYTES * 10 // 8  # eight tenths are for pictures
FILLS_POOL = "big"
STORED = [*SIZES, "row", "wide"]
Truth = dict[str, bytes]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PNG files by name."""
    numbers = np.random.default_rng(8)

    def noise(down: int, across: int) -> np.ndarray:
        return numbers.integers(0, 256, (down * TILE, across * TILE, 3), np.uint8)

    tiles = [noise(1, 1) for _ in range(10)]
    pixels = {name: noise(*size) for name, size in SIZES.items()} | {FILLS_POOL: noise(10, 16)}
    pixels |= {"row": np.concatenate(tiles, axis=1), "column": np.concatenate(tiles, axis=0)}
    pixels |= {
        "wide": np.full((30, 150, 3), (200, 30, 90), np.uint8),
        "tall": np.full((150, 30, 3), (200, 30, 90), np.uint8),
    }
    folder = tmp_path_factory.mktemp("shown")
    for name, array in pixels.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in pixels}


@pytest.fixture(scope="module")
def plain(made: Path, shown: dict[str, Path]) -> tuple[Truth, list[str]]:
    """What a server that nobody told of mmcache makes of each picture; and what of mmcache it has imported."""
    with encoding(made / "vl", None) as encoder:
        return {name: encoder.encode([file]).data for name, file in shown.items()}, encoder.modules()


@pytest.fixture(scope="module")
def truth(plain: tuple[Truth, list[str]]) -> Truth:
    """The right embeddings."""
    return plain[0]


@pytest.fixture(scope="module")
def cache(made: Path, shown: dict[str, Path], truth: Truth) -> Iterator[Cache]:
    """What a first server stored before it was killed."""
    with Cache() as cache:
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE) as first:
            for name in STORED:
                answer = first.encode([shown[name]])
                assert (answer.data, answer.encoded) == (truth[name], 1)
            eventually(lambda: cache.counters()["stored"] >= len(STORED), "all are stored", 30)
            cache.settle()
        counters = cache.counters()
        assert counters["stored"] == counters["stored_image"] == len(STORED)
        yield cache


@pytest.fixture(scope="module")
def encoder(made: Path, cache: Cache) -> Iterator[Encoder]:
    """A second server before the filled cache."""
    with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE, pool_nbytes=POOL_NBYTES) as second:
        yield second


def key_of(encoder: Encoder, cache: Cache, name: str) -> Key:
    """The key of an item that is stored, by the name it was asked for."""
    (line,) = encoder.lines("embeddings go to")
    item = digest_of(name)
    assert item is not None
    bare = embedding_key(_Bare(bytes.fromhex(line.split()[-1])), item)  # type: ignore[arg-type]
    with mmcache.connect(cache.url) as client:
        facts: dict[str, Any] = dict(client.inspect(bare.digest).facts)
    key = embedding_key(Namespace(kind="embedding", **facts), item)
    assert key == bare
    return key


class _Bare:
    kind = "embedding"

    def __init__(self, namespace: bytes) -> None:
        self.id = namespace


def test_a_server_that_nobody_told_of_mmcache_imports_the_plugin_and_no_more(plain: tuple[Truth, list[str]]) -> None:
    assert plain[1] == ["mmcache_connectors", "mmcache_connectors.sglang", "mmcache_connectors.sglang.plugin"]


def test_what_is_known_is_not_encoded_after_a_restart(encoder: Encoder, shown: dict[str, Path], truth: Truth) -> None:
    for name in STORED:
        answer = encoder.encode([shown[name]])
        assert (answer.data, answer.encoded) == (truth[name], 0), name
    assert len(encoder.lines("Misses (GPU Work): 0")) == len(STORED)


@pytest.mark.parametrize(("known", "other"), [("row", "column"), ("wide", "tall")])
def test_the_same_bytes_in_another_grid_are_another_item(
    encoder: Encoder, shown: dict[str, Path], truth: Truth, known: str, other: str
) -> None:
    for name, encoded in ((known, 0), (other, 1), (known, 0), (other, 0)):
        answer = encoder.encode([shown[name]])
        assert (answer.data, answer.encoded) == (truth[name], encoded), name


def test_hashes_of_a_request_are_not_believed(encoder: Encoder, shown: dict[str, Path], truth: Truth) -> None:
    named = encoder.encode([shown["p0"]]).names[0]
    for given in (7, named):
        for name in ("p1", "p2"):
            answer = encoder.encode([shown[name]], [given])
            assert (answer.data, answer.encoded) == (truth[name], 0)


def test_many_requests_in_memory_for_few(encoder: Encoder, shown: dict[str, Path], truth: Truth) -> None:
    """Pictures come and go in the host memory, until it is in pieces; each arrives whole, and few are encoded anew."""
    choose = random.Random(3)
    encoded = items = 0
    for _ in range(60):
        names = choose.choices(STORED, k=choose.randint(1, 3))
        answer = encoder.encode([shown[name] for name in names])
        assert answer.data == b"".join(truth[name] for name in names), names
        encoded, items = encoded + answer.encoded, items + len(names)
    assert encoded < items / 10
    assert encoder.lines("Evicted")


def _other(value: object) -> Callable[[Cache, Key], None]:
    def put(cache: Cache, key: Key) -> None:
        forget(cache, [key])
        with mmcache.connect(cache.url) as client:
            (result,) = client.put([key], [value])
        assert result.outcome is Outcome.STORED

    return put


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda cache, key: forget(cache, [key]), id="gone"),
        pytest.param(lambda cache, key: flip(cache, [key]), id="flipped"),
        pytest.param(_other(np.zeros((16, 128), np.float16)), id="shape"),
        pytest.param(_other(np.zeros((32, 64), np.float16)), id="dtype"),
        pytest.param(_other(np.zeros((31, 64), np.float16)), id="short"),
        pytest.param(_other(np.zeros(32 * ROW_NBYTES + 1, np.uint8)), id="long"),
    ],
)
def test_what_is_not_what_was_stored_is_encoded(
    encoder: Encoder, cache: Cache, shown: dict[str, Path], truth: Truth, damage: Callable[[Cache, Key], None]
) -> None:
    def encode(name: str) -> Encoded:
        before = encoder.lines("PUT Finished")
        answer = encoder.encode([shown[name]])
        if answer.encoded:  # until it is stored, it cannot leave the server's own memory
            eventually(lambda: encoder.lines("PUT Finished") != before, "it is stored")
        return answer

    def ask(encoded: int) -> str:
        encode(FILLS_POOL)  # so that the other lies in the server's own memory no more
        answer = encode("p0")
        assert (answer.data, answer.encoded) == (truth["p0"], encoded)
        return answer.names[0]

    key = key_of(encoder, cache, ask(0))
    damage(cache, key)
    ask(1)
    with mmcache.connect(cache.url) as client:
        eventually(lambda: client.contains([key]) == [True], "something is stored again")
        if client.get_into([key], [np.empty((32, 64), np.uint16)])[0].outcome is Outcome.MISMATCH:
            ask(1)
            forget(cache, [key])
            ask(1)
            eventually(lambda: client.contains([key]) == [True], "it is stored again")
    ask(0)


def test_nothing_changes_when_the_cache_stops_dies_and_comes_back_full(
    encoder: Encoder, cache: Cache, shown: dict[str, Path], truth: Truth
) -> None:
    """Last here: what was stored is gone. At most one request waits for each server that has stopped."""

    def ask_in_turn() -> list[float]:
        took_s = []
        for name in (FILLS_POOL, "p0", "p1", "p3", "p5", FILLS_POOL, "p6", "p7", "p2"):
            began = time.monotonic()
            assert encoder.encode([shown[name]]).data == truth[name]
            took_s.append(time.monotonic() - began)
        return took_s

    slowest_s = max(ask_in_turn())
    cache.suspend()
    stopped_s = ask_in_turn() + ask_in_turn()
    assert max(stopped_s) < DEADLINE_S + SLACK_S + slowest_s  # one that has two takes that and its own time
    assert sum(took_s > DEADLINE_S for took_s in stopped_s) <= SHARDS
    cache.kill()  # as it is: resumed first, it could still answer
    time.sleep(2.5)  # the longest pause before a server that failed is asked again
    assert max(ask_in_turn()) < DEADLINE_S + 2 * slowest_s
    assert most_said(encoder.log(), "does not answer") == 1
    with Cache(f"{64 * SHARDS}KiB", pinned_share=1.0, at=cache) as small:

        def found_again() -> bool:
            assert encoder.encode([shown[FILLS_POOL]]).data == truth[FILLS_POOL]
            answer = encoder.encode([shown["p4"]])
            assert answer.data == truth["p4"]
            return answer.encoded == 0

        eventually(found_again, "it is asked again")
        assert encoder.lines("mmcache", "answers again")
        with mmcache.connect(small.url) as client:
            other = Namespace(kind="embedding", model="other", dtype="uint8")
            keys = [embedding_key(other, bytes([number]) * 32) for number in range(64 * SHARDS)]
            client.put(keys, [np.zeros(900, np.uint8)] * len(keys))
            failed = len(encoder.lines("PUT failed for"))
            with client.acquire(keys):
                ask_in_turn()
            assert len(encoder.lines("PUT failed for")) > failed
    assert encoder.lines("failed inside") == []
