"""Audits of stored KV: how far a recomputation is from what is stored, and a planted wrong value that is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mmcache
from mmcache_connectors.audit import Likeness, bound, compare
from tests.engines.cache import Cache, stored_keys
from tests.engines.vllm import models
from tests.engines.vllm.harness import BLOCK, Engine, Expected, Settings, ask, words

LAYERS, TOKENS, CHUNK = 16, 640, 160
DTYPES = ["float32", "bfloat16"]
TEXT = {dtype: Settings("text", {"dtype": dtype, "max_num_batched_tokens": 512}) for dtype in DTYPES}
CHUNKED = {dtype: Settings("text", {"dtype": dtype, "max_num_batched_tokens": 96}) for dtype in DTYPES}
SURE = {"float32": 0.0, "bfloat16": 0.07}  # logprobs so far apart do not change places in other chunks
ASKS = [ask(words(700 + i, 300 + 40 * i)) for i in range(4)]
EXPECTED = {dtype: Expected.plan(TEXT[dtype], *ASKS) for dtype in DTYPES}
BLOCKS = sum((300 + 40 * i + 8 - 1) // BLOCK for i in range(4))  # with the generated tokens that were computed


# ------------------------------------------------------------------------------------------------- what rounding does
@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model with many layers, in which a rounding grows."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("deep")
    config = Qwen2Config(**models.SIZES | {"num_hidden_layers": LAYERS}, tie_word_embeddings=True)
    models._weights(folder, Qwen2ForCausalLM, config, 3)
    return folder


def blocks(folder: Path, dtype: torch.dtype, attention: str, chunk: int) -> torch.Tensor:
    """A prompt's KV, `[blocks, layers, heads, tokens, keys and values]`, by other kernels than vLLM's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    prompt = torch.randint(0, 250, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    past: Any = None
    for start in range(0, TOKENS, chunk):
        with torch.no_grad():
            past = model(prompt[:, start : start + chunk], past_key_values=past, use_cache=True).past_key_values
    layers = [torch.cat([layer.keys[0], layer.values[0]], -1) for layer in past.layers]
    return torch.stack(layers).unflatten(2, (-1, BLOCK)).permute(2, 0, 1, 3, 4).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_blocks_are_close_and_others_are_not(deep: Path, dtype: torch.dtype) -> None:
    """Run with -s for the numbers that `audit.bound` quotes."""
    stored = blocks(deep, dtype, "sdpa", TOKENS)
    errors = {}
    for name, attention, chunk in (("in other chunks", "sdpa", CHUNK), ("by another kernel", "eager", TOKENS)):
        found = [
            compare(*pair, halves=True) for pair in zip(stored, blocks(deep, dtype, attention, chunk), strict=True)
        ]
        assert {one.likeness for one in found} <= {Likeness.EQUAL, Likeness.CLOSE}
        errors[name] = max(one.error for one in found)
    others = [compare(*pair, halves=True) for pair in zip(stored, stored.roll(1, 0), strict=True)]
    assert {one.likeness for one in others} == {Likeness.DIFFERENT}
    errors["of another block, at least"] = min(one.error for one in others)
    print(dtype, f"bound {bound(dtype):.2g}", {name: f"{error:.2g}" for name, error in errors.items()})
    assert errors["in other chunks"] < bound(dtype) / 3


# ------------------------------------------------------------------------------------------------------ a real engine
@pytest.fixture(scope="module", params=DTYPES)
def filled(request: pytest.FixtureRequest) -> Iterator[tuple[str, Cache]]:
    """A cache that one engine filled."""
    EXPECTED[request.param].prepare()
    with Cache() as cache:
        with Engine(TEXT[request.param], {"url": cache.url}) as writer:
            writer.generate(*ASKS)
            cache.settle()
        yield request.param, cache


def plant(cache: Cache, digest: bytes) -> None:
    """Another value of the same form under a stored key, by a client: header and checksums are right."""
    with mmcache.connect(cache.url) as client:
        keys = stored_keys(client, [digest])
        with client.acquire(keys) as lease:
            (frame,) = lease.frames
            assert frame is not None
            (tensor,) = frame.header.tensors
            value = torch.frombuffer(bytearray(frame.payload(tensor)), dtype=getattr(torch, tensor.spec.dtype))
            wrong = value.view(tensor.spec.shape).flip(2)  # its tokens in another order
        assert client.delete(keys) == [True]
        assert client.put(keys, [wrong])[0]


def test_a_planted_value_is_found_and_stored_anew(filled: tuple[str, Cache]) -> None:
    """By an engine that computes in other chunks and batches; what was right stays."""
    dtype, cache = filled
    with mmcache.connect(cache.url) as client:
        before = {digest: payload(client, digest) for digest in cache.digests()}
    planted = cache.digests()[7]
    plant(cache, planted)
    with Engine(CHUNKED[dtype], {"url": cache.url, "audit_share": 1.0}) as engine:
        answers = engine.generate(*ASKS, together=True)
        cache.settle()
        counters = engine.counters()
        log = engine.log()
    for answer, truth in zip(answers, EXPECTED[dtype].of(*ASKS), strict=True):
        sure = truth.sure(SURE[dtype])
        assert answer.tokens[:sure] == truth.tokens[:sure]
        assert answer.cached == 0
    assert counters["scheduler"]["audit_requests"] == len(ASKS)
    assert counters["worker"]["audit_differences"] == 1
    assert counters["worker"]["audit_blocks"] >= sum(answer.reusable for answer in answers) // BLOCK
    assert counters["worker"]["blocks_saved"] == 1
    assert log.count(f"audit: what is stored under {planted.hex()} is not what this engine computes") == 1
    with mmcache.connect(cache.url) as client:
        assert payload(client, planted) == before[planted]
        assert {digest: payload(client, digest) for digest in cache.digests()} == before


def payload(client: mmcache.Client, digest: bytes) -> bytes:
    with client.acquire(stored_keys(client, [digest])) as lease:
        (frame,) = lease.frames
        assert frame is not None
        return bytes(frame.payload(frame.header.tensors[0]))
