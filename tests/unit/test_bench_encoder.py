"""The benchmark's stand-in models: the stated shapes, and values that depend on the whole content and only on it."""

from __future__ import annotations

import numpy as np
import pytest

from mmcache.bench.encoder import (
    EMBEDDING_NBYTES,
    EMBEDDING_SHAPE,
    QWEN2_VL_2B,
    SIDE,
    TOKENS_PER_PICTURE,
    KVShape,
    VisionEncoder,
    block_truths,
    kv_block,
    preprocess,
    truth,
)

RGB = np.random.default_rng(5).integers(0, 256, (300, 400, 3), dtype=np.uint8)
TINY = KVShape("tiny", layers=2, kv_heads=1, head_dim=8, block_size=4)


def test_shapes_are_those_of_the_named_models() -> None:
    assert EMBEDDING_SHAPE == (257, 1024)
    assert EMBEDDING_NBYTES == 526_336
    assert TOKENS_PER_PICTURE == 64
    assert QWEN2_VL_2B.nbytes // QWEN2_VL_2B.block_size == 28_672
    assert kv_block(QWEN2_VL_2B, truth(b"x")).nbytes == QWEN2_VL_2B.nbytes == 458_752


def test_an_embedding_is_recomputed_bit_for_bit() -> None:
    pixels = preprocess(RGB, 10**6)
    first = VisionEncoder(1).encode(pixels)
    assert first.shape == EMBEDDING_SHAPE
    assert first.dtype == np.float16
    assert np.isfinite(first).all()
    for _ in range(20):
        assert VisionEncoder(1).encode(pixels.copy()).tobytes() == first.tobytes()


def test_an_embedding_depends_on_every_patch_and_the_seed() -> None:
    pixels = preprocess(RGB, 10**6)
    encoder = VisionEncoder(1)
    first = encoder.encode(pixels)
    changed = pixels.copy()
    changed[SIDE - 1, SIDE - 1] ^= 255
    second = encoder.encode(changed)
    rows = np.flatnonzero((first != second).any(axis=1))
    assert rows.tolist() == [0, 256]
    assert not np.array_equal(VisionEncoder(2).encode(pixels), first)


def test_max_pixels_changes_what_the_encoder_sees() -> None:
    assert preprocess(RGB, 10**6).shape == (SIDE, SIDE, 3)
    assert not np.array_equal(preprocess(RGB, 10**6), preprocess(RGB, 30_000))
    assert np.array_equal(preprocess(RGB, 10**6), preprocess(RGB, 10**7))


def test_truth_frames_its_fields() -> None:
    assert truth(b"ab", b"c") != truth(b"a", b"bc")
    assert truth(b"ab") != truth(b"ab", b"")


def test_only_full_blocks_have_values_and_each_depends_on_all_before_it() -> None:
    tokens = list(range(100, 111))
    first = block_truths(TINY, tokens, [])
    assert len(first) == 2
    assert len(set(first)) == 2
    longer = block_truths(TINY, [*tokens, 1, 2, 3, 4, 5], [])
    assert longer[:2] == first
    changed = block_truths(TINY, [7, *tokens[1:]], [])
    assert not set(changed) & set(first)
    assert block_truths(TINY, tokens[:3], []) == []


MEDIUM, OTHER = truth(b"one"), truth(b"two")


@pytest.mark.parametrize(
    "media",
    [
        [],
        [(2, 4, OTHER)],
        [(1, 4, MEDIUM)],
        [(3, 4, MEDIUM)],
        [(2, 3, MEDIUM)],
        [(2, 2, MEDIUM), (4, 2, MEDIUM)],
        [(2, 2, MEDIUM), (4, 2, OTHER)],
    ],
)
def test_the_same_placeholders_over_other_media_are_other_values(media: list[tuple[int, int, bytes]]) -> None:
    tokens = [9] * 8
    assert block_truths(TINY, tokens, media)[1] != block_truths(TINY, tokens, [(2, 4, MEDIUM)])[1]


def test_another_model_shape_is_another_value() -> None:
    deeper = KVShape("tiny", layers=3, kv_heads=1, head_dim=8, block_size=4)
    assert block_truths(TINY, [1, 2, 3, 4], []) != block_truths(deeper, [1, 2, 3, 4], [])


def test_kv_bits_follow_from_the_content() -> None:
    assert np.array_equal(kv_block(TINY, MEDIUM), kv_block(TINY, MEDIUM))
    assert kv_block(TINY, MEDIUM).shape == (2, 2, 4, 1, 8)
    assert (kv_block(QWEN2_VL_2B, MEDIUM) == kv_block(QWEN2_VL_2B, OTHER)).mean() < 0.001
