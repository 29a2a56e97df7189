"""Sizes from a model's config: published figures, the server's own arithmetic, and configs that make no sense."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache import Namespace
from mmcache.config import MiB, ServerConfig
from mmcache.errors import ConfigError, UsageError
from mmcache.size.fields import Fields
from mmcache.size.kv import dtype_name, kv_of
from mmcache.size.media import Picture, items_of, latent_of
from mmcache.size.sheet import Room, Split, index_nbytes, room_of, split_of, stored_item
from mmcache.store.index import Index
from mmcache.store.policies import POLICIES
from tests.unit.size_configs import CONFIGS, TOKEN_NBYTES

SQUARE = Picture(1024, 1024)
LLAMA = CONFIGS["meta-llama/Meta-Llama-3-8B"]
QWEN_VL = CONFIGS["Qwen/Qwen2.5-VL-7B-Instruct"]


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_a_token_are_the_published_ones(name: str) -> None:
    kv = kv_of(Fields(CONFIGS[name]))
    assert kv.token_nbytes == TOKEN_NBYTES[name]
    assert kv_of(Fields(CONFIGS[name]), kv_dtype="fp8").token_nbytes * 2 == kv.token_nbytes
    assert kv_of(Fields(CONFIGS[name]), dtype="float32").token_nbytes == kv.token_nbytes * 2


def test_what_the_config_leaves_open_is_noted() -> None:
    def notes(**changes: Any) -> str:
        return " ".join(kv_of(Fields(LLAMA | changes)).notes)

    assert notes() == ""
    assert "names no dtype" in notes(torch_dtype=None)
    assert "says float32" in notes(torch_dtype="float32")
    assert "indexer" in notes(index_topk=2048)
    assert "--kv-cache-dtype fp8" in notes(quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    assert notes(quantization_config={"quant_method": "fp8"}) == ""


def test_layers_that_slide_are_groups_of_their_own() -> None:
    def groups(name: str) -> list[tuple[str, int, int]]:
        return [(group.kind, group.reach_tokens, group.layers) for group in kv_of(Fields(CONFIGS[name])).groups]

    assert groups("meta-llama/Meta-Llama-3-8B") == [("full", 0, 32)]
    assert groups("mistralai/Mistral-7B-v0.1") == [("window", 4096, 32)]
    assert groups("mistralai/Mistral-7B-Instruct-v0.3") == [("full", 0, 32)]
    assert groups("openai/gpt-oss-20b") == [("window", 128, 12), ("full", 0, 12)]
    assert groups("google/gemma-2-2b") == [("window", 4096, 13), ("full", 0, 13)]
    assert groups("google/gemma-3-4b-it") == [("window", 1024, 5)] * 5 + [("window", 1024, 4), ("full", 0, 5)]
    slides = LLAMA | {"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 16}
    assert [group.kind for group in kv_of(Fields(slides)).groups] == ["full", "window"]
    chunks = LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 8192}
    assert [(group.kind, group.layers) for group in kv_of(Fields(chunks)).groups] == [("chunk", 8)] * 3 + [("full", 8)]
    shared = LLAMA | {"num_kv_shared_layers": 12}
    assert kv_of(Fields(shared)).groups[0].layers == 20


ITEMS = {
    "google/gemma-3-4b-it": [("image of any size", 256, 2560)],
    "llava-hf/llava-1.5-7b-hf": [("image of any size", 576, 4096)],
    "Qwen/Qwen2-VL-7B-Instruct": [
        ("image of 1024x1024", 37 * 37, 3584),
        ("2 video frames of 1024x1024", 37 * 37, 3584),
    ],
    "Qwen/Qwen2.5-VL-7B-Instruct": [
        ("image of 1024x1024", 37 * 37, 3584),
        ("2 video frames of 1024x1024", 37 * 37, 3584),
    ],
    "Qwen/Qwen3-VL-8B-Instruct": [
        ("image of 1024x1024", 32 * 32, 4 * 4096),
        ("2 video frames of 1024x1024", 32 * 32, 4 * 4096),
    ],
    "OpenGVLab/InternVL3-1B-hf": [("tile of 448x448", 256, 896)],
    "mistral-community/pixtral-12b": [("image of 1024x1024", 64 * 64, 5120)],
    "Qwen/Qwen2-Audio-7B": [("30 s of audio", 750, 4096)],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_are_as_large_as_the_towers_make_them(name: str) -> None:
    items, _ = items_of(Fields(CONFIGS[name]), None, SQUARE)
    assert [(item.what, item.tokens, item.width) for item in items] == ITEMS.get(name, [])


def test_a_picture_is_scaled_to_the_processors_limits() -> None:
    def tokens(processor: dict[str, Any], picture: Picture) -> int:
        return items_of(Fields(QWEN_VL), Fields(processor), picture)[0][0].tokens

    plain, edges = {"min_pixels": 4 * 784, "max_pixels": 64 * 784}, {"shortest_edge": 4 * 784, "longest_edge": 64 * 784}
    for processor in (plain, {"size": edges}, {"size": plain}):
        assert tokens(processor, Picture(168, 112)) == 6 * 4
        assert tokens(processor, Picture(2800, 2800)) == 8 * 8
        assert tokens(processor, Picture(28, 28)) == 2 * 2
    notes = [items_of(Fields(QWEN_VL), Fields(plain), Picture(side, side))[1] for side in (168, 2800)]
    assert [["unscaled" in note for note in one] for one in notes] == [[], [True]]
    wide = items_of(Fields(CONFIGS["mistral-community/pixtral-12b"]), None, Picture(4096, 1024))[0][0]
    assert wide.tokens == 64 * 16


def test_an_unknown_tower_is_said_to_be_unknown() -> None:
    items, notes = items_of(
        Fields(LLAMA | {"model_type": "new", "vision_config": {}, "audio_config": {}}), None, SQUARE
    )
    assert items == []
    assert [note for note in notes if "not known here" in note and "new" in note] == notes
    assert len(notes) == 2
    whisper = Fields({"model_type": "whisper", "d_model": 1280, "is_encoder_decoder": True})
    assert items_of(whisper, None, SQUARE)[0][0].tokens == 1500
    with pytest.raises(ConfigError, match="cross-attention"):
        kv_of(whisper)


def test_latents_of_an_autoencoder() -> None:
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
    item = latent_of(Fields(vae), SQUARE)
    assert stored_item(item, "bfloat16", 64).nbytes == 16 * 128 * 128 * 2
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        latent_of(Fields(vae | {"_class_name": "AutoencoderKLWan"}), SQUARE)


def test_tensor_parallel_ranks_store_their_heads_once() -> None:
    kv = kv_of(Fields(LLAMA))
    block = 131_072 * 16
    for tp, parts in ((1, 1), (2, 2), (8, 8), (16, 8)):
        split = split_of(kv, 16, tp, 64)
        assert (split.parts, split.worker_nbytes) == (parts, block // parts)
        assert split.stored_nbytes == block + parts * 448  # a header of 256 + 160 bytes, padded to 64
    latent = split_of(kv_of(Fields(CONFIGS["deepseek-ai/DeepSeek-V3"])), 64, 8, 64)
    assert (latent.parts, latent.worker_nbytes) == (1, 70_272 * 64)
    for tp in (0, 3, -1):
        with pytest.raises(ConfigError, match="ranks"):
            split_of(kv, 16, tp, 64)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_index_takes_what_an_index_takes(policy: str) -> None:
    for entries in (1024, 30_000, 600_000):
        taken = 0

        def memory(nbytes: int) -> memoryview:
            nonlocal taken
            taken += nbytes
            return memoryview(bytearray(nbytes))

        Index(capacity_bytes=1 << 30, max_entries=entries, seed=1, policy=POLICIES[policy], memory=memory, kept=memory)
        assert index_nbytes(entries, POLICIES[policy]) == pytest.approx(taken, rel=0.01)


def test_as_many_blocks_fit_as_a_cache_takes() -> None:
    """A real cache of the same memory holds as many frames as the sheet says, and not one more."""
    kv = kv_of(Fields(LLAMA | {"num_hidden_layers": 1}))
    config = ServerConfig(memory_nbytes=8 * MiB)
    split = split_of(kv, 16, 2, config.alignment)
    room = _room(config, split_of(kv, 16, 2, config.alignment), prompt_tokens=32)
    frames = room.tokens // 16 * split.parts
    keys = Namespace(kind="kv", model="m", dtype="d", layout="l", block_size=1).block_keys(range(frames + 1))
    value = np.zeros(split.worker_nbytes, np.uint8)
    with mmcache.connect("embedded://?memory=8MiB", deadline_s=10) as cache:
        for number in range(frames):
            cache.put(keys[number : number + 1], [value])
        counters = cache.stat()["counters"]
        assert (counters["entries"], counters["evictions"]) == (frames, 0)
        cache.put(keys[frames:], [value])
        assert cache.stat()["counters"]["entries"] == frames
    assert room.prompts == room.tokens // 32


def _room(config: ServerConfig, split: Split, prompt_tokens: int) -> Room:
    return room_of(
        config.memory_nbytes,
        split,
        [],
        block_tokens=16,
        prompt_tokens=prompt_tokens,
        entries_of=lambda nbytes: ServerConfig(memory_nbytes=nbytes).entries,
        policy=POLICIES[config.policy],
    )


def test_an_index_that_is_full_first_is_told() -> None:
    config = ServerConfig(memory_nbytes=64 * MiB)
    tiny = split_of(kv_of(Fields(LLAMA | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 8})), 16, 1, 64)
    room = _room(config, tiny, prompt_tokens=16)
    assert room.index_full
    assert room.tokens == config.entries * 16


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "no num_attention_heads"),
    "a string for a number": (LLAMA | {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
    "a truth for a number": (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers is True"),
    "a negative number": (LLAMA | {"num_key_value_heads": -8}, "num_key_value_heads is -8"),
    "half a head": (LLAMA | {"num_key_value_heads": 7.5}, "num_key_value_heads is 7.5"),
    "too many layers": (LLAMA | {"num_hidden_layers": 10**9}, "1 to 4096"),
    "a number for a section": (LLAMA | {"text_config": 4}, "text_config is 4; it must be an object"),
    "a long value": (LLAMA | {"num_hidden_layers": "x" * 1000}, "xxx..."),
    "a number for a dtype": (LLAMA | {"torch_dtype": 2}, "torch_dtype is 2"),
    "an unknown dtype": (LLAMA | {"torch_dtype": "int3"}, "'int3' is not one"),
    "fewer kinds than layers": (LLAMA | {"layer_types": ["full_attention"]}, "1 entries for 32 layers"),
    "an unknown kind": (LLAMA | {"layer_types": ["cubist"] * 32}, "'cubist'"),
    "kinds that are no list": (LLAMA | {"layer_types": "full"}, "must be a list"),
    "a window of no size": (LLAMA | {"layer_types": ["sliding_attention"] * 32}, "how far they reach"),
    "attention of another kind in some layers": (LLAMA | {"attn_type_list": [0] * 7 + [1]}, "keep state"),
    "recurrent blocks": (LLAMA | {"block_types": ["recurrent", "attention"]}, "keeps state"),
    "layers with heads of their own": (LLAMA | {"global_head_dim": 512}, "heads of several sizes"),
    "a list of layers": (LLAMA | {"block_configs": [{"attention": {"no_op": True}}]}, "heads of several sizes"),
    "narrow values": (LLAMA | {"head_dim": 192, "v_head_dim": 128}, "not as wide"),
    "linear attention": (LLAMA | {"layer_types": ["linear_attention"] * 32}, "keep state"),
    "Mamba": (LLAMA | {"mamba_d_state": 16}, "keeps state"),
    "an unknown latent": (LLAMA | {"kv_lora_rank": 512}, "not known to this release"),
    "an encoder and a decoder": (LLAMA | {"is_encoder_decoder": True}, "cross-attention"),
    "yes": (LLAMA | {"is_encoder_decoder": "yes"}, "must be true or false"),
    "heads of no size": (LLAMA | {"hidden_size": 8}, "less than a head"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_config_must_not_say_is_named(name: str) -> None:
    config, said = BAD[name]
    with pytest.raises(ConfigError) as refusal:
        kv_of(Fields(config))
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_pictures_and_dtypes_that_make_no_sense_are_refused() -> None:
    for width, height in ((0, 5), (5, 1 << 20)):
        with pytest.raises(ConfigError, match="pixels"):
            Picture(width, height)
    for text in ("int64", "bool", "fp4", ""):
        with pytest.raises(ConfigError, match="dtype"):
            dtype_name(text)
    assert dtype_name("torch.bfloat16") == "bfloat16"
    assert dtype_name("half") == "float16"


NAMES = sorted({name for config in CONFIGS.values() for name in config} | {"layer_types", "kv_lora_rank", "head_dim"})
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 1 << 26), st.floats(), st.text(max_size=8))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6)
)


@given(
    base=st.sampled_from(sorted(CONFIGS)),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    within=st.sampled_from(["", "text_config", "vision_config", "audio_config"]),
)
def test_any_config_gives_sizes_or_one_kind_of_error(base: str, changes: dict[str, Any], within: str) -> None:
    config = CONFIGS[base] | changes
    if within:
        section = CONFIGS[base].get(within, {})
        config = CONFIGS[base] | {within: section | changes}
    with contextlib.suppress(UsageError):
        items, _ = items_of(Fields(config), Fields(changes), SQUARE)
        for item in items:
            assert stored_item(item, "bfloat16", 64).stored_nbytes > 0
        kv = kv_of(Fields(config))
        assert split_of(kv, 16, 1, 64).stored_nbytes > kv.token_nbytes > 0
