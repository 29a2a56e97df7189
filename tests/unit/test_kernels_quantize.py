"""Quantising and splitting kernels, run by Triton's interpreter: equal to the reference, within the stated bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("triton")

from mmcache_kernels import KernelInputError, describe, planes, quantize, reference  # noqa: E402

ORDERS = {"LBHNC": (0, 1, 2, 3), "LBNHC": (0, 2, 1, 3), "HBNC": (1, 0, 2, 3)}  # of blocks, heads, tokens, content
SHAPES = [(2, 2, 16, 64), (1, 1, 8, 40), (3, 3, 5, 6)]  # layers, heads, tokens, content
BLOCKS = 5
IDS = torch.tensor([4, 1, 3])
NUMBERS = ["bfloat16", "float16", "float32"]


def memory(order: str, dtype: Any, shape: Any, seed: int = 0) -> list[Any]:
    """Layers `[blocks, heads, tokens, 2, content / 2]`, normal values of very different sizes from row to row."""
    layers, heads, tokens, content = shape
    random = torch.Generator().manual_seed(seed)
    sizes = [(BLOCKS, heads, tokens, content)[i] for i in ORDERS[order]]
    found = []
    for _ in range(layers):
        values = torch.randn(BLOCKS, heads, tokens, content, generator=random)
        values *= 10 ** (6 * torch.rand(BLOCKS, heads, tokens, 1, generator=random) - 3)
        place = torch.empty(sizes, dtype=dtype).permute([ORDERS[order].index(i) for i in range(4)])
        found.append(place.copy_(values).unflatten(-1, (2, -1)))
    return found


def address(rows: Any) -> Any:
    return torch.tensor([row.data_ptr() for row in rows])


def quantized(views: list[Any], mode: str) -> tuple[Any, Any]:
    """What the kernel makes of IDS: (bytes, scales)."""
    shape = (len(IDS), len(views), *views[0].shape[1:])
    values, scales = torch.full(shape, 0x5A, dtype=torch.uint8), torch.full(shape[:-1], -1.0)
    quantize.move(
        describe(views), address(values), address(scales), IDS, values_per_scale=shape[-1], mode=mode, to_frames=True
    )
    return values, scales


def expected(views: list[Any], mode: str) -> tuple[Any, Any]:
    blocks = torch.stack([view[IDS] for view in views], 1)
    values, scales = (reference.quantize_fp8 if mode == "fp8" else reference.quantize_int8)(blocks)
    return values.view(torch.uint8), scales


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_blocks_are_quantised_and_restored_as_the_reference_does(mode: str, order: str, name: str, shape: Any) -> None:
    dtype = getattr(torch, name)
    views = memory(order, dtype, shape)
    values, scales = quantized(views, mode)
    wanted, wanted_scales = expected(views, mode)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(values, wanted)

    target, before = memory(order, dtype, shape, seed=1), memory(order, dtype, shape, seed=1)
    quantize.move(
        describe(target), address(values), address(scales), IDS,
        values_per_scale=shape[3] // 2, mode=mode, to_frames=False,
    )  # fmt: skip
    restore = reference.dequantize_fp8 if mode == "fp8" else reference.dequantize_int8
    restored = restore(values if mode == "fp8" else values.view(torch.int8), scales, dtype)
    for layer, (view, untouched) in enumerate(zip(target, before, strict=True)):
        assert torch.equal(view[IDS], restored[:, layer])
        assert torch.equal(view[[0, 2]], untouched[[0, 2]])


def test_what_comes_back_is_within_the_stated_bounds() -> None:
    values = memory("LBHNC", torch.float32, (1, 8, 64, 64))[0]
    back = reference.dequantize_fp8(*reference.quantize_fp8(values), torch.float32)
    scale = reference.quantize_fp8(values)[1][..., None]
    assert torch.all((values - back).abs() <= torch.maximum(2**-4 * values.abs(), 2**-10 * scale))
    assert (values - back).abs().max() > 0  # it does round
    back = reference.dequantize_int8(*reference.quantize_int8(values), torch.float32)
    scale = reference.quantize_int8(values)[1][..., None]
    assert torch.all((values - back).abs() <= 0.502 * scale)
    assert torch.all(back.abs().amax(-1) >= 0.999 * values.abs().amax(-1))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's word for a NaN that signals
@pytest.mark.parametrize("mode", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_value_that_is_not_finite_comes_back_as_nan(mode: str, bad: float) -> None:
    views = memory("LBHNC", torch.bfloat16, SHAPES[0])
    views[1][4, 1, 7, 0, 3] = bad
    values, scales = quantized(views, mode)
    assert torch.equal(values, expected(views, mode)[0])
    assert torch.isnan(scales).sum() == 1
    restore = reference.dequantize_fp8 if mode == "fp8" else reference.dequantize_int8
    back = restore(values if mode == "fp8" else values.view(torch.int8), scales, torch.bfloat16)
    assert torch.isnan(back).sum() == 32
    assert torch.isnan(back[0, 1, 1, 7, 0]).all()
    for form in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001):  # GPUs make the second of every NaN
        scales.view(torch.int32)[0, 1, 1, 7, 0] = form
        quantize.move(
            describe(views), address(values), address(scales), IDS, values_per_scale=32, mode=mode, to_frames=False
        )
        assert torch.isnan(views[1][4, 1, 7, 0]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # rounded up beyond float32, then cut to what it holds
@pytest.mark.parametrize("mode", ["fp8", "int8"])
@pytest.mark.parametrize("name", NUMBERS)
def test_extreme_values_stay_finite(mode: str, name: str) -> None:
    dtype = getattr(torch, name)
    limits = torch.finfo(dtype)
    views = memory("LBHNC", dtype, SHAPES[0])
    for row, value in enumerate((limits.max, -limits.max, limits.tiny, -limits.smallest_normal, 0.0)):
        views[0][4, 0, row] = value
    values, scales = quantized(views, mode)
    assert torch.equal(values, expected(views, mode)[0])
    quantize.move(
        describe(views), address(values), address(scales), IDS, values_per_scale=32, mode=mode, to_frames=False
    )
    assert all(torch.isfinite(view).all() for view in views)
    assert torch.all(views[0][4, 0, 4] == 0)
    assert float(views[0][4, 0, 0].float().min()) >= 0.93 * limits.max


def test_what_cannot_be_quantised_is_refused() -> None:
    whole = [torch.zeros(BLOCKS, 2, 4, 8, dtype=torch.int32)]
    none = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(KernelInputError, match="only bfloat16, float16 and float32"):
        quantize.move(describe(whole), none, none, IDS, values_per_scale=8, mode="fp8", to_frames=True)
    with pytest.raises(KernelInputError, match="3 values a scale do not divide"):
        quantize.move(describe([whole[0].half()]), none, none, IDS, values_per_scale=3, mode="fp8", to_frames=True)
    with pytest.raises(KernelInputError, match="only bfloat16 is split"):
        planes.move(describe(whole), none, IDS, to_frames=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_planes_lose_nothing(order: str, shape: Any) -> None:
    views = memory(order, torch.bfloat16, shape)
    views[0][1].view(torch.int16).copy_(torch.arange(views[0][1].numel()).view_as(views[0][1]) * 7919 - 32768)
    blocks = torch.stack([view[IDS] for view in views], 1)
    frames = torch.full((len(IDS), blocks[0].numel() * 2), 0x5A, dtype=torch.uint8)
    planes.move(describe(views), address(frames), IDS, to_frames=True)
    exponents, rest = reference.split_planes(blocks)
    assert torch.equal(frames.view(len(IDS), 2, -1), torch.stack([exponents.flatten(1), rest.flatten(1)], 1))
    assert torch.equal(reference.join_planes(exponents, rest).view(torch.int16), blocks.view(torch.int16))

    target, before = memory(order, torch.bfloat16, shape, seed=1), memory(order, torch.bfloat16, shape, seed=1)
    planes.move(describe(target), address(frames), IDS, to_frames=False)
    for layer, (view, untouched) in enumerate(zip(target, before, strict=True)):
        assert torch.equal(view[IDS].view(torch.int16), blocks[:, layer].view(torch.int16))
        assert torch.equal(view[[0, 2]], untouched[[0, 2]])


def test_every_bfloat16_survives_being_split() -> None:
    words = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    exponents, rest = reference.split_planes(words.view(torch.bfloat16))
    assert torch.equal(reference.join_planes(exponents, rest).view(torch.int16), words)
    assert len(torch.unique(exponents)) == 256
