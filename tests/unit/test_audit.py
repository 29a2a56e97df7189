"""The comparison of stored values with recomputed ones: rounding is told from other content, in every dtype."""

from __future__ import annotations

import pytest
import torch

from mmcache_connectors.audit import Likeness, bound, compare

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
SHAPE = (8, 2, 16, 64)  # layers, heads, tokens, content


def block(seed: int, mean: float = 0.0) -> torch.Tensor:
    """A block whose layers are of very different magnitudes."""
    scale = 10.0 ** torch.arange(-3, 5).view(-1, 1, 1, 1)
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean) * scale


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """fp8 as engines keep it."""
    return tensor.to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.parametrize("dtype", [*FLOATS, *NARROW])
def test_the_same_bytes_are_equal(dtype: torch.dtype) -> None:
    value = block(1).clamp(-400, 400).to(dtype)
    assert compare(value, value.clone()) == (Likeness.EQUAL, 0.0)
    nan = torch.full(SHAPE, float("nan")).to(dtype)
    assert compare(nan, nan.clone()).likeness is Likeness.EQUAL


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_few_roundings_are_close(dtype: torch.dtype) -> None:
    noise = 1 + 4 * torch.finfo(dtype).eps * (block(3) / block(3).abs())
    found = compare(block(1).to(dtype), (block(1) * noise).to(dtype))
    assert found.likeness is Likeness.CLOSE
    assert 0 < found.error < bound(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, *NARROW])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_another_block_is_different(dtype: torch.dtype, mean: float) -> None:
    """Also where both have much in common."""
    found = compare(block(1, mean).clamp(-400, 400).to(dtype), block(2, mean).clamp(-400, 400).to(dtype))
    assert found.likeness is Likeness.DIFFERENT
    assert found.error > 0.7


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layer", [0, 7])
def test_one_wrong_token_in_one_layer_is_different(dtype: torch.dtype, layer: int) -> None:
    """Though beside the largest layer the smallest is nothing."""
    value = block(1).clamp(-6e4, 6e4).to(dtype)
    wrong = value.clone()
    wrong[layer, :, 5] = value[layer, :, 6]
    assert compare(value, wrong).likeness is Likeness.DIFFERENT


@pytest.mark.parametrize("dtype", FLOATS)
def test_wrong_values_beside_large_keys_are_different(dtype: torch.dtype) -> None:
    """With `halves`: as a whole the row would be close, so large are the keys."""
    value = block(1).clamp(-6e4, 6e4)
    value[..., : SHAPE[-1] // 2] *= 20 / bound(dtype)
    value = value.div(value.abs().max() / 6e4).to(dtype)
    wrong = value.clone()
    wrong[2, :, :, SHAPE[-1] // 2 :] = value[2, :, :, SHAPE[-1] // 2 :].roll(1, 1)
    assert compare(value, wrong).likeness is Likeness.CLOSE
    found = compare(value, wrong, halves=True)
    assert found.likeness is Likeness.DIFFERENT
    assert found.error > 0.7
    assert compare(value, value.clone(), halves=True).likeness is Likeness.EQUAL
    noisy = (value * (1 + 4 * torch.finfo(dtype).eps * torch.randn(SHAPE, dtype=torch.float64).sign())).to(dtype)
    assert compare(value, noisy, halves=True).likeness is Likeness.CLOSE


def test_an_odd_width_has_no_halves() -> None:
    value = block(1)[..., :63].float()
    assert compare(value, value + 1e-9, halves=True).likeness in (Likeness.EQUAL, Likeness.CLOSE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_different(bad: float) -> None:
    value = block(1).float()
    wrong = value.clone()
    wrong[3, 1, 2, 3] = bad
    for pair in ((value, wrong), (wrong, value)):
        assert compare(*pair) == (Likeness.DIFFERENT, float("inf"))


def test_zeros() -> None:
    zeros, value = torch.zeros(SHAPE), block(1).float()
    assert compare(zeros, -zeros).likeness is Likeness.CLOSE
    assert compare(zeros, value) == compare(value, zeros) == (Likeness.DIFFERENT, 1.0)


def test_bytes_of_an_unknown_type() -> None:
    """As many may differ as rounding explains; of two different blocks nearly all do."""
    one = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    near = one + 0.016 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    other = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    close = compare(as_bytes(one), as_bytes(near))
    assert close.likeness is Likeness.CLOSE
    assert 0.2 < close.error < 0.4
    assert compare(as_bytes(one), as_bytes(other)).likeness is Likeness.DIFFERENT
    wrong = as_bytes(one)
    wrong[2] = as_bytes(other)[2]
    assert compare(as_bytes(one), wrong).likeness is Likeness.DIFFERENT


def test_views_are_compared_by_what_they_hold() -> None:
    value = block(1).float()
    turned = value.transpose(1, 2)
    assert compare(turned, turned.contiguous()).likeness is Likeness.EQUAL


@pytest.mark.parametrize("other", [torch.zeros(SHAPE, dtype=torch.bfloat16), torch.zeros(SHAPE[1:])])
def test_two_forms_cannot_be_compared(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one form"):
        compare(torch.zeros(SHAPE), other)
