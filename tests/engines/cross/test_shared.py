"""One cache before both engines: what one encoded, the other does not encode, and has the right embedding of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from mmcache_connectors.audit import bound
from tests.engines.cache import Cache
from tests.engines.cross.conftest import Made
from tests.engines.cross.harness import SGLangEncoder, vllm_encode
from tests.engines.cross.kept import Kept
from tests.engines.vllm.encoder import ALONE, sharing
from tests.engines.vllm.harness import Engine, Settings, ask, words

DTYPE = "bfloat16"
DEADLINE_S = 4.0  # of the cache, on a busy machine
VLLM_FIRST = ("first", "row", "wide", "photo")  # vLLM encodes them, SGLang reads
SGLANG_FIRST = ("second", "column", "tall")  # the other way round; two are a strip and a bar of VLLM_FIRST, turned
ARCHITECTURES = ("qwen2.5-vl", "qwen3-vl")
full = pytest.mark.full


class Side(NamedTuple):
    """One of the engines."""

    engine: Any
    cache: Cache
    made: Made

    def encode(self, *names: str) -> tuple[dict[str, Kept], int]:
        """(what it has of the pictures, how often its encoder ran), once that is stored."""
        files = self.made.pictures(*names)
        is_vllm = isinstance(self.engine, Engine)
        found = vllm_encode(self.engine, files) if is_vllm else self.engine.encode(files)
        self.cache.settle()
        return found


@contextmanager
def vllm(made: Made, cache: Cache, model: str = "qwen2-vl", dtype: str = DTYPE, **extra: Any) -> Iterator[Side]:
    """A vLLM engine before the cache."""
    more = {"dtype": dtype, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    settings = sharing(Settings(str(made.model(model)), ALONE | more), cache.url, deadline_s=DEADLINE_S, **extra)
    with Engine(settings, None, worker="tests.engines.cross.vllm_driver") as engine:
        yield Side(engine, cache, made)


@contextmanager
def sglang(made: Made, cache: Cache, model: str = "qwen2-vl", dtype: str = DTYPE, **extra: str) -> Iterator[Side]:
    """An SGLang encoder before the cache."""
    variables = {"URL": cache.url, "DEADLINE_S": str(DEADLINE_S)} | extra
    environment = {f"MMCACHE_SGLANG_EMBEDDINGS_{name}": text for name, text in variables.items()}
    with SGLangEncoder(made.model(model), dtype, "--enable-mm-global-cache", environment=environment) as engine:
        yield Side(engine, cache, made)


class Pair(NamedTuple):
    """Both engines before one cache, sharing."""

    vllm: Side
    sglang: Side


@contextmanager
def both(made: Made, model: str) -> Iterator[Pair]:
    """Both engines with a model, before an empty cache."""
    with (
        Cache() as cache,
        vllm(made, cache, model, shared_embeddings=True) as one,
        sglang(made, cache, model, SHARED_EMBEDDINGS="true") as other,
    ):
        yield Pair(one, other)


@pytest.fixture(scope="module")
def pair(made: Made) -> Iterator[Pair]:
    """Both engines with a Qwen2-VL; the cache is filled as the tests here go on."""
    with both(made, "qwen2-vl") as pair:
        yield pair


def near(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether every token is the true one, but for rounding."""
    if found.shape != truth.shape:
        return False
    apart = (found.double() - truth.double()).norm(dim=1) / truth.double().norm(dim=1)
    return bool((apart < bound(found.dtype)).all())


def reads(writer: Side, reader: Side, names: tuple[str, ...], truth: dict[str, torch.Tensor]) -> None:
    """What one has encoded, the other has, bit for bit, without a pass of its encoder."""
    written, passes = writer.encode(*names)
    assert passes == len(names), writer.engine.log()[-3000:]
    read, passes = reader.encode(*names)
    assert passes == 0, reader.engine.log()[-3000:]
    for name in names:
        assert torch.equal(read[name].embedding, written[name].embedding), name
        assert near(read[name].embedding, truth[name]), name


def encodes(side: Side, *names: str) -> None:
    """Nothing that is stored is what it looks for."""
    before = set(side.cache.digests())
    _, passes = side.encode(*names)
    assert passes == len(names)
    side.cache.forget([digest for digest in side.cache.digests() if digest not in before])


def test_pictures_are_told_apart_here(made: Made) -> None:
    """Of `near`: two pictures of one shape, and turned ones, are far from each other."""
    truth = made.truth("qwen2-vl")
    for one, other in (("first", "second"), ("row", "column")):
        assert not near(truth[one].bfloat16(), truth[other])
    assert near(truth["first"].bfloat16(), truth["first"])


def test_what_vllm_encoded_sglang_reads(pair: Pair, made: Made) -> None:
    reads(pair.vllm, pair.sglang, VLLM_FIRST, made.truth("qwen2-vl"))


def test_what_sglang_encoded_vllm_reads(pair: Pair, made: Made) -> None:
    """Two of the pictures are to SGLang's own hash what vLLM has stored already."""
    reads(pair.sglang, pair.vllm, SGLANG_FIRST, made.truth("qwen2-vl"))


def test_a_picture_that_differs_in_one_pixel_is_encoded(pair: Pair) -> None:
    encodes(pair.vllm, "touched")
    encodes(pair.sglang, "touched")


@full
def test_other_weights_another_dtype_and_engines_that_do_not_share_find_nothing(pair: Pair, made: Made) -> None:
    cache, names = pair.vllm.cache, (*VLLM_FIRST, *SGLANG_FIRST)
    pair.vllm.encode(*names)
    assert len(cache.digests()) == len(names)
    refused = []
    for other in (
        vllm(made, cache, "qwen2-vl-retrained", shared_embeddings=True),
        vllm(made, cache, dtype="float32", shared_embeddings=True),
        vllm(made, cache),
        sglang(made, cache, "qwen2-vl-retrained", SHARED_EMBEDDINGS="true"),
        sglang(made, cache, dtype="float32", SHARED_EMBEDDINGS="true"),
        sglang(made, cache),
    ):
        with other as side:
            encodes(side, *names)
            refused.append("nothing is shared with other kinds" in side.engine.log())
    assert not any(refused)  # those that were told to share do: it is their names that are others


@full
def test_an_audit_finds_that_they_are_the_same(made: Made) -> None:
    """vLLM encodes what SGLang stored all the same, and takes the difference for rounding."""
    with Cache() as cache:
        with sglang(made, cache, SHARED_EMBEDDINGS="true") as writer:
            writer.encode(*SGLANG_FIRST)
        with vllm(made, cache, shared_embeddings=True, audit_share=1.0) as reader:
            assert reader.encode(*SGLANG_FIRST)[1] == len(SGLANG_FIRST)
            counters = reader.engine.counters()["encoder"]
            deadline = time.monotonic() + 20.0
            while counters.get("audits", 0) < len(SGLANG_FIRST) and time.monotonic() < deadline:
                reader.engine.generate(ask(words(1, 8)))  # counts of what is done between steps come with the next one
                counters = reader.engine.counters()["encoder"]
    assert (counters.get("audits", 0), counters.get("audit_differences", 0)) == (len(SGLANG_FIRST), 0)


@full
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_other_architectures(made: Made, model: str) -> None:
    with both(made, model) as pair:
        reads(pair.vllm, pair.sglang, VLLM_FIRST, made.truth(model))
        reads(pair.sglang, pair.vllm, SGLANG_FIRST, made.truth(model))


@full
def test_a_model_whose_pixels_vllm_does_not_normalise_is_not_shared(made: Made) -> None:
    """vLLM makes other embeddings of it; each engine still has its own back."""
    with both(made, "qwen2-vl-bare") as pair:
        assert "not normalised" in pair.vllm.engine.log()
        for side in pair:
            assert side.encode("first", "row")[1] == 2
            assert side.encode("first", "row")[1] == 0
