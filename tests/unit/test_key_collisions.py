"""Collisions by name: each is a bug that some system shipped or would ship, shown not to happen through public calls.

A test here builds two things that a careless key would confuse, and shows first what they have in common (the same
bytes, the same tokens, the same path), then that their keys differ. Where they should share a key, it shows that.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mmcache.chain import PlaceholderSpan
from mmcache.identity import directory_digest, file_digest
from mmcache.keys import Namespace, embedding_key, item_digest, opaque_key
from mmcache.keyset import NO_PARENT, Key, Part
from mmcache.media import media_digest, samples_digest
from mmcache.store.answers import Found, Reserved
from mmcache.store.index import Index

Array = npt.NDArray[np.uint8]
PAD = 151655  # the one token id that stands for every image, whatever the image
FACTS: dict[str, Any] = {"model": "org/model", "revision": "cc59489", "dtype": "bfloat16", "layout": "LBHNC"}
KV = Namespace(kind="kv", block_size=16, **FACTS)
VISION = Namespace(kind="embedding", **FACTS)


def picture(seed: int, height: int = 28, width: int = 28) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(samples: Array, **facts: Any) -> bytes:
    return item_digest(samples_digest(samples, "image", "RGB"), **facts)


def blocks(*content: int | tuple[bytes, int]) -> list[bytes]:
    """Stored keys of a prompt's blocks: an int is that many text tokens, a pair an image of so many placeholders."""
    tokens: list[int] = []
    spans = []
    for piece in content:
        if isinstance(piece, int):
            tokens += range(1000, 1000 + piece)
        else:
            spans.append(PlaceholderSpan(len(tokens), piece[1], piece[0]))
            tokens += [PAD] * piece[1]
    return KV.block_keys(tokens, spans).digests


def assert_different_everywhere(one: bytes, two: bytes) -> None:
    """Two items share no key: not their own, not their embedding's, not that of any block they are in."""
    assert one != two
    assert embedding_key(VISION, one).digest != embedding_key(VISION, two).digest
    assert not set(blocks((one, 48))) & set(blocks((two, 48)))


# -------------------------------------------------------------------------------------------------- media content
def test_horizontal_and_vertical_strip_of_the_same_tiles() -> None:
    tiles = [picture(seed) for seed in range(3)]
    horizontal, vertical = np.concatenate(tiles, axis=1), np.concatenate(tiles, axis=0)
    assert_different_everywhere(item(horizontal), item(vertical))
    # What a processor hands on is the same list of patches for both: the bytes agree, and only the grid tells.
    patches = samples_digest(np.concatenate([tile.reshape(4, -1) for tile in tiles]), "image", "patches")
    assert_different_everywhere(item_digest(patches, grid=(1, 2, 6)), item_digest(patches, grid=(1, 6, 2)))


def test_30x150_and_150x30() -> None:
    wide = picture(0, 30, 150)
    tall = wide.reshape(150, 30, 3)
    assert wide.tobytes() == tall.tobytes()
    assert_different_everywhere(item(wide), item(tall))


def test_shapes_whose_digits_run_together() -> None:
    one, other = np.zeros((1, 11, 3), np.uint8), np.zeros((11, 1, 3), np.uint8)
    assert_different_everywhere(item(one), item(other))
    content = samples_digest(one, "image", "RGB")
    assert_different_everywhere(item_digest(content, grid=(1, 1, 1)), item_digest(content, grid=(1, 11)))


def test_same_bytes_as_rgb_and_bgr() -> None:
    samples = picture(1)
    rgb, bgr = (samples_digest(samples, "image", mode) for mode in ("RGB", "BGR"))
    assert_different_everywhere(item_digest(rgb), item_digest(bgr))


def test_audio_at_another_sample_rate() -> None:
    samples = np.sin(np.arange(1600, dtype=np.float32))
    slow, fast = (item_digest(samples_digest(samples, "audio", "mono", rate)) for rate in (16_000, 44_100))
    assert_different_everywhere(slow, fast)


def test_video_with_another_frame_sampling() -> None:
    video = media_digest(b"one encoded video", "video")
    sampled = [
        item_digest(video),
        item_digest(video, timestamps=(0.0, 0.5, 1.0)),
        item_digest(video, timestamps=(0.0, 1.0, 2.0)),
        item_digest(video, timestamps=(0.0, 0.5)),
        item_digest(video, processor_kwargs={"fps": 1.0}),
        item_digest(video, processor_kwargs={"fps": 2.0}),
        item_digest(video, processor_kwargs={"num_frames": 2}),
    ]
    for place, one in enumerate(sampled):
        for other in sampled[place + 1 :]:
            assert_different_everywhere(one, other)


def test_the_same_frames_under_another_fps() -> None:
    frames = samples_digest(np.stack([picture(seed) for seed in range(4)]), "video", "RGB")
    times = [[place / fps for place in range(4)] for fps in (1, 2)]
    assert_different_everywhere(*(item_digest(frames, timestamps=stamps) for stamps in times))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_pixels": 1003520}, {"max_pixels": 1003521}),
        ({"max_pixels": 1003520}, {"min_pixels": 1003520}),
        ({"max_pixels": 1003520}, None),
        ({"size": {"shortest_edge": 224}}, {"size": {"longest_edge": 224}}),
        ({"size": {"shortest_edge": 224}}, {"size": 224}),
        ({"size": {"shortest_edge": 224}, "crop": True}, {"size": {"shortest_edge": 224, "crop": True}}),
        ({"do_resize": True}, {"do_resize": 1}),
        ({"do_resize": True}, {"do_resize": "true"}),
        ({"image_mean": [0.5, 0.25]}, {"image_mean": [0.25, 0.5]}),
        ({"image_mean": [[0.5], 0.25]}, {"image_mean": [[0.5, 0.25]]}),
        ({"rescale": 1 / 255}, {"rescale": float(np.float32(1 / 255))}),
        ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}),
        ({"a": ["x\x05y", "z"]}, {"a": ["x", "y\x05z"]}),
        ({}, None),
    ],
)
def test_the_same_image_under_another_processor_config(one: Any, other: Any) -> None:
    content = samples_digest(picture(4), "image", "RGB")
    items = [item_digest(content, processor_kwargs=kwargs) for kwargs in (one, other)]
    assert_different_everywhere(*items)


def test_the_same_image_with_another_embedding_mask() -> None:
    content = samples_digest(picture(5), "image", "RGB")
    masks = ([True, True, False], [True, False, True], [True, True], None)
    assert len({item_digest(content, is_embed=mask) for mask in masks}) == len(masks)


# ------------------------------------------------------------------------------------------------- short digests
def test_truncation_to_31_bits() -> None:
    seen: dict[int, bytes] = {}
    for number in range(1 << 20):  # by the birthday bound a 31-bit id repeats after some 2^16 items
        digest = item_digest(media_digest(struct.pack("<I", number), "image"))
        other = seen.setdefault(int.from_bytes(digest[:4], "little") & 0x7FFFFFFF, digest)
        if other != digest:
            assert_different_everywhere(digest, other)
            return
    raise AssertionError("no two items with equal 31 bits were found")


@pytest.mark.parametrize("place", range(32))
def test_truncation_to_64_bits(place: int) -> None:
    one = item(picture(6))
    other = bytes(byte ^ (0x80 if at == place else 0) for at, byte in enumerate(one))
    assert_different_everywhere(one, other)
    assert opaque_key(KV, one).digest != opaque_key(KV, other).digest


@pytest.mark.parametrize("bit", range(64))
def test_token_ids_are_hashed_whole(bit: int) -> None:
    tokens = list(range(16))
    tokens[3] ^= 1 << bit  # pad values reach 2^62; a key of 31- or 32-bit tokens would lose the high bits
    assert KV.block_keys(tokens).digests != KV.block_keys(range(16)).digests


# ----------------------------------------------------------------------------------------------------- namespaces
def keys_of(**facts: Any) -> set[bytes]:
    """Stored keys of one content under these facts: its blocks, its embedding, and an engine's own hash."""
    content = item(picture(7))
    kv = Namespace(**{"kind": "kv", "block_size": 16, **FACTS, **facts})
    vision = Namespace(**{"kind": "embedding", **FACTS, **{k: v for k, v in facts.items() if k != "block_size"}})
    spans = [PlaceholderSpan(3, 40, content)]
    opaque = opaque_key(kv, hashlib.sha256(b"page").digest())
    return {*kv.block_keys(range(64), spans).digests, embedding_key(vision, content).digest, opaque.digest}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"model": "org/model-a"}, {"model": "org/model-b"}, id="model"),
        pytest.param({"revision": "cc59489"}, {"revision": "cc59480"}, id="revision"),
        pytest.param({"dtype": "bfloat16"}, {"dtype": "float16"}, id="dtype"),
        pytest.param({"kv_dtype": "auto"}, {"kv_dtype": "fp8_e4m3"}, id="kv dtype"),
        pytest.param({"kv_dtype": "fp8_e4m3"}, {"kv_dtype": "fp8_e5m2"}, id="kv dtype of one width"),
        pytest.param({"kv_scale": "checkpoint"}, {"kv_scale": "dynamic"}, id="kv scale source"),
        pytest.param({"quantization": "awq"}, {"quantization": "gptq"}, id="quantisation"),
        pytest.param({"layout": "LBHNC"}, {"layout": "LBNHC"}, id="layout"),
        pytest.param({"attention_backend": "FLASH_ATTN"}, {"attention_backend": "FLASHINFER"}, id="backend"),
        pytest.param({"rope": {"type": "yarn", "factor": 4.0}}, {"rope": {"type": "yarn", "factor": 2.0}}, id="rope"),
        pytest.param({"rope": {"type": "yarn", "factor": 4.0}}, {"rope": None}, id="rope scaling or none"),
        pytest.param({"max_pixels": 2}, {"min_pixels": 2}, id="another name"),
        pytest.param({"sliding_window": 4096}, {"sliding_window": 1024}, id="sliding window"),
        pytest.param({"sliding_window": 4096}, {"sliding_window": None}, id="sliding window or none"),
        pytest.param({"hf_overrides": {"num_layers": 2}}, {"hf_overrides": {}}, id="hf overrides"),
        pytest.param({"processor": {"max_pixels": 1}}, {"processor": {"max_pixels": 2}}, id="engine-wide max_pixels"),
        pytest.param({"processor": {"fps": 1.0}}, {"processor": {"fps": 2.0}}, id="engine-wide fps"),
        pytest.param({"cache_salt": "a"}, {"cache_salt": "b"}, id="cache salt"),
        pytest.param({"weights_epoch": None}, {"weights_epoch": "9f2c"}, id="weights updated in place"),
        pytest.param({"draft": "eagle"}, {"draft": None}, id="draft model"),
        pytest.param({}, {"a_field_of_next_year": True}, id="unknown config field"),
        pytest.param({"unknown": {"a": [1]}}, {"unknown": {"a": [1.0]}}, id="unknown structured field"),
        pytest.param({"fact": ""}, {}, id="empty or not set"),
        pytest.param({"a": "x", "b": "y"}, {"a": "xb", "by": ""}, id="names and texts run together"),
        pytest.param({"a": "b", "c": "d"}, {"a": "d", "c": "b"}, id="swapped texts"),
    ],
)
def test_another_configuration(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not keys_of(**one) & keys_of(**other)
    assert keys_of(**one) == keys_of(**dict(reversed(one.items())))


def test_another_block_size() -> None:
    other = Namespace(kind="kv", block_size=32, **FACTS)
    assert not set(KV.block_keys(range(64)).digests) & set(other.block_keys(range(64)).digests)
    assert opaque_key(KV, b"page").digest != opaque_key(other, b"page").digest


def test_other_weights_under_one_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    seen = []
    for weights in (b"before", b"after!"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        seen.append(keys_of(model=directory_digest(tmp_path)))
    assert not seen[0] & seen[1]


def test_another_config_beside_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = []
    for config in ("{}", '{"rope_scaling": {"factor": 4.0}}'):
        (tmp_path / "config.json").write_text(config)
        seen.append(keys_of(model=directory_digest(tmp_path)))
    assert not seen[0] & seen[1]


def test_lora_retrained_under_one_name(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter_model.safetensors"
    seen = [keys_of()]
    for weights in (b"before", b"after!"):
        adapter.write_bytes(weights)
        seen.append(keys_of(adapter_name="my-lora", adapter=file_digest(adapter)))
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


# ---------------------------------------------------------------------------------------------------------- parts
def part_key(**ranges: Any) -> bytes:
    return KV.block_keys(range(32)).for_part(Part(**ranges)).digests[-1]


def test_another_kv_head_or_layer_range() -> None:
    parts = [
        part_key(),
        part_key(kv_heads=(0, 4, 8)),
        part_key(kv_heads=(4, 8, 8)),
        part_key(kv_heads=(0, 2, 8)),
        part_key(kv_heads=(0, 4, 16)),
        part_key(layers=(0, 4, 8)),
        part_key(layers=(4, 8, 8)),
        part_key(kv_heads=(0, 4, 8), layers=(0, 4, 8)),
        part_key(kv_group=(0, 2)),
        part_key(kv_group=(1, 2)),
        part_key(context=(0, 2)),
        part_key(context=(1, 2)),
    ]
    assert len(set(parts)) == len(parts)


def rank_part(rank: int, tp_size: int, kv_heads: int, pp_rank: int = 0, pp_size: int = 1, layers: int = 8) -> Part:
    """What a rank holds: with fewer heads than ranks, several ranks hold the same head."""
    first = rank * kv_heads // tp_size
    count = max(1, kv_heads // tp_size)
    return Part(
        kv_heads=(first, first + count, kv_heads),
        layers=(pp_rank * layers // pp_size, (pp_rank + 1) * layers // pp_size, layers),
    )


def test_the_same_range_under_another_tp_or_pp_size_is_the_same_key() -> None:
    keys = KV.block_keys(range(32))
    whole = keys.digests
    assert keys.for_part(rank_part(0, 1, 8)).digests == whole
    # One kv head on one, two or four ranks; latent attention has one for all: every rank names the same bytes.
    for tp_size in (1, 2, 4):
        for rank in range(tp_size):
            assert keys.for_part(rank_part(rank, tp_size, 1)).digests == whole
    # Two heads on four ranks: ranks 0 and 1 hold what rank 0 of two holds.
    assert rank_part(1, 4, 2) == rank_part(0, 4, 2) == rank_part(0, 2, 2)
    assert keys.for_part(rank_part(1, 4, 2)).digests == keys.for_part(rank_part(0, 2, 2)).digests != whole
    # The last of four pipeline stages under one or more tensor ranks.
    stage = rank_part(0, 1, 1, pp_rank=3, pp_size=4)
    assert keys.for_part(stage).digests == keys.for_part(rank_part(1, 2, 1, pp_rank=3, pp_size=4)).digests
    assert keys.for_part(Part(layers=(6, 8, 8))).digests == keys.for_part(stage).digests


# --------------------------------------------------------------------------------------------------------- tenants
def test_another_tenants_identical_key_is_a_miss() -> None:
    key = KV.block_keys(range(16))[0]
    index = Index(capacity_bytes=1 << 20, max_entries=64, seed=1)
    reserved = index.reserve(1, key.digest, NO_PARENT, 4096, reservation_id=1, now=0.0)
    assert isinstance(reserved, Reserved)
    assert index.begin_write(1, 0.0)
    index.end_write(1)
    assert index.commit(1, header_nbytes=64, header_sum=bytes(16), expires_at=float("inf"), now=0.0)
    assert index.contains(1, [key.digest], 0.0) == [True]
    assert index.contains(2, [key.digest], 0.0) == [False]
    assert index.acquire(2, [key.digest], lease_id=7, now=0.0) == [None]
    (found,) = index.acquire(1, [key.digest], lease_id=8, now=0.0)
    assert isinstance(found, Found)
    assert index.delete(2, [key.digest], 0.0) == [False]
    assert index.contains(1, [key.digest], 0.0) == [True]


# ---------------------------------------------------------------------------------------------------- placeholders
A, B = item(picture(10)), item(picture(11))


def test_other_images_behind_the_same_tokens() -> None:
    one, other = blocks(32, (A, 20), 30), blocks(32, (B, 20), 30)
    assert one[:2] == other[:2]  # the text before them is shared
    assert not set(one[2:]) & set(other[2:])  # nothing from the image on, the text behind it included
    assert not set(blocks((A, 32))) & set(blocks(32))


def test_an_image_and_its_placeholder_tokens_without_it() -> None:
    assert KV.block_keys([PAD] * 16).digests != blocks((A, 16))


def test_two_images_adjacent_with_no_text_between() -> None:
    pairs = [
        blocks((A, 8), (B, 8)),
        blocks((B, 8), (A, 8)),
        blocks((A, 4), (B, 12)),
        blocks((A, 12), (B, 4)),
        blocks((A, 8), (A, 8)),
        blocks((A, 16)),
        blocks((B, 16)),
    ]
    assert len({pair[0] for pair in pairs}) == len(pairs)


def test_the_same_image_twice_in_one_prompt() -> None:
    twice = blocks((A, 16), (A, 16), (A, 16))
    assert len(set(twice)) == 3
    assert twice != blocks((A, 32), (A, 16))
    assert twice != blocks((A, 48))
    assert twice[1] != blocks((A, 16), (B, 16))[1]


def test_a_span_across_a_block_border() -> None:
    plain = blocks(10, (A, 12), 26)
    assert plain[0] != blocks(10, (B, 12), 26)[0]
    for other in (blocks(9, (A, 12), 27), blocks(11, (A, 12), 25), blocks(10, (A, 11), 27), blocks(10, (A, 13), 25)):
        assert not set(plain) & set(other)
    # The same 16 placeholders in the second block are the image's second part in one prompt, its first in the other.
    second_part, first_part = blocks((A, 32))[1], blocks(16, (A, 16))[1]
    assert second_part != first_part


def test_only_the_place_inside_the_image_differs() -> None:
    """One block, no parent, the same tokens, the same image: which rows of its embedding they take is in the key."""
    tokens = [PAD] * 16
    starts = [KV.block_keys([*tokens, *tokens], [PlaceholderSpan(offset, 16, A)]).digests[0] for offset in (0, 1, 15)]
    places = [KV.block_keys(tokens, [PlaceholderSpan(offset, 4, A)]).digests[0] for offset in (2, 5)]
    lengths = [KV.block_keys(tokens * 3, [PlaceholderSpan(0, length, A)]).digests[0] for length in (16, 17, 48)]
    assert len({*starts, *places, *lengths}) == 7  # offset 0 and length 16 are one and the same


def test_swapped_images_behind_equal_text() -> None:
    one, other = blocks(16, (A, 16), 16, (B, 16), 16), blocks(16, (B, 16), 16, (A, 16), 16)
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])


def test_the_same_block_behind_another_parent() -> None:
    tokens = list(range(16))
    one, other = KV.block_keys([*tokens, *tokens]), KV.block_keys([*reversed(tokens), *tokens])
    assert len({one.digests[0], one.digests[1], other.digests[1]}) == 3


# --------------------------------------------------------------------------------------------------------- domains
def test_one_byte_string_in_every_role() -> None:
    """Whatever 32 bytes are used for, the keys made of them differ by the use."""
    data = A
    keys: list[Key] = [opaque_key(KV, data), opaque_key(VISION, data), embedding_key(VISION, data)]
    seen = [data, item_digest(data), media_digest(data, "image"), media_digest(data, "text")]
    seen += [digest for key in keys for digest in (key.digest, key.chain)]
    assert len(set(seen)) == len(seen)
