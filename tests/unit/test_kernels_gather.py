"""The Triton kernels, run by Triton's interpreter, against the torch reference: every layout, dtype and odd size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("triton")

from mmcache_kernels import KernelInputError, TorchMover, describe, mover, mover_for, why_no_kernels  # noqa: E402
from mmcache_kernels.layout import check_frame  # noqa: E402
from mmcache_kernels.mover import TritonMover, try_kernels  # noqa: E402
from tests.unit.paged_bed import BLOCKS, DTYPES, ORDERS, POISON, SHAPES, as_bytes, paged  # noqa: E402

CPU = torch.device("cpu")
BOTH: list[Any] = [TritonMover, TorchMover]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def views_of(layers: list[Any], ratio: int) -> list[Any]:
    """Words `[blocks, heads, ratio, tokens, content]`, as connectors hand layers over."""
    words = WORDS[layers[0].element_size()]
    return [layer.view(words).unflatten(0, (-1, ratio)).permute(0, 2, 1, 3, 4) for layer in layers]


def frames_for(views: list[Any], count: int) -> Any:
    return torch.full((count, len(views), *views[0].shape[1:]), POISON, dtype=views[0].dtype)


def content_of(layers: list[Any]) -> list[Any]:
    return [as_bytes(layer) for layer in layers]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "CNHBL"])
def test_blocks_come_out_and_go_in_as_the_reference_moves_them(order: str, name: str, shape: Any) -> None:
    layers, truth = paged(order, getattr(torch, name), shape)
    views, ids = views_of(layers, shape[4]), torch.tensor([5, 1, 6, 2])
    frames = frames_for(views, 4)
    TritonMover(views).gather(ids, frames)
    assert np.array_equal(frames.view(torch.uint8).numpy().reshape(4, -1), truth[ids].reshape(4, -1))

    targets = [paged(order, getattr(torch, name), shape, seed=1)[0] for _ in range(2)]
    for layers, moves in zip(targets, BOTH, strict=True):
        moves(views_of(layers, shape[4])).scatter(ids, frames)
    assert all(map(np.array_equal, *map(content_of, targets)))


def test_pools_that_keep_keys_and_values_apart_as_sglang_does() -> None:
    page, heads, content = 4, 2, 8
    pools = [torch.randn(BLOCKS * page, heads, content).to(torch.bfloat16) for _ in range(2 * 2)]  # k, v of two layers
    pages = [pool.view(torch.int16).view(BLOCKS, page, heads, content).permute(0, 2, 1, 3) for pool in pools]
    frames, ids = frames_for(pages, 3), torch.tensor([6, 2, 3])
    TritonMover(pages).gather(ids, frames)
    for number, block in enumerate(ids):
        for layer, pool in enumerate(pools):
            tokens = pool.view(torch.int16)[block * page : (block + 1) * page]
            assert torch.equal(frames[number, layer].transpose(0, 1), tokens)


@pytest.mark.parametrize("layers", [range(0, 1), range(1, 3), range(2, 2), range(0, 3)])
def test_some_layers_of_a_block_are_scattered(layers: range) -> None:
    shape = SHAPES[0]
    views = views_of(paged("LBHNC", torch.bfloat16, shape)[0], 1)
    frames, ids = frames_for(views, 2), torch.tensor([4, 2])
    TorchMover(views).gather(ids, frames)
    targets = [paged("BLHNC", torch.bfloat16, shape, seed=1)[0] for _ in range(2)]
    for target, moves in zip(targets, BOTH, strict=True):
        moves(views_of(target, 1)).scatter(ids, frames, layers)
    assert all(map(np.array_equal, *map(content_of, targets)))


def test_blocks_larger_than_a_program_and_many_of_them() -> None:
    shape = (2, 4, 64, 96, 1)  # 48 KiB a layer: several programs, the last one in part
    views = views_of(paged("LBNHC", torch.bfloat16, shape)[0], 1)
    ids = torch.tensor([1, 2, 3, 4, 5, 6] * 3)
    frames = [frames_for(views, len(ids)) for _ in range(2)]
    for out, moves in zip(frames, BOTH, strict=True):
        moves(views).gather(ids, out)
    assert torch.equal(*frames)


def test_no_blocks_and_one() -> None:
    views = views_of(paged("LBHNC", torch.float16, SHAPES[0])[0], 1)
    moves, none = TritonMover(views), torch.empty(0, dtype=torch.int64)
    moves.gather(none, frames_for(views, 0))
    moves.scatter(none, frames_for(views, 0))
    one = frames_for(views, 1)
    moves.gather(torch.tensor([3]), one)
    assert torch.equal(one[0], torch.stack([view[3] for view in views]))


@pytest.mark.parametrize("bad", [0, -1, BLOCKS, 2**40])
def test_a_wrong_id_on_the_device_is_skipped_and_nothing_else(bad: int) -> None:
    layers, _ = paged("LBHNC", torch.bfloat16, SHAPES[0])
    views, ids = views_of(layers, 1), torch.tensor([2, bad, 3])
    frames = frames_for(views, 3)
    TritonMover(views).gather(ids, frames)
    assert torch.all(frames[1] == POISON)
    assert torch.equal(frames[2], torch.stack([view[3] for view in views]))
    before = content_of(layers)
    TritonMover(views).scatter(ids, frames)
    assert all(map(np.array_equal, before, content_of(layers)))


def test_frames_are_read_wherever_they_lie() -> None:
    shape = (2, 2, 16, 64, 1)
    layers, truth = paged("LBHNC", torch.bfloat16, shape)
    moves, nbytes = TritonMover(views_of(layers, 1)), truth[0].nbytes
    memory = torch.zeros(4 * nbytes, dtype=torch.uint8)
    places = [3 * nbytes, 64, nbytes + 128]
    for block, place in zip((1, 5, 6), places, strict=True):
        memory[place : place + nbytes] = torch.from_numpy(truth[block].reshape(-1).copy())
    target, _ = paged("LBNHC", torch.bfloat16, shape, seed=1)
    addresses = torch.tensor([memory.data_ptr() + place for place in places])
    TritonMover(views_of(target, 1)).scatter_from(torch.tensor([2, 3, 4]), addresses)
    found = np.stack([as_bytes(layer) for layer in target], 1).reshape(BLOCKS, -1)
    assert np.array_equal(found[2:5], truth[[1, 5, 6]].reshape(3, -1))
    assert moves.paged.aligned_nbytes == 16


def test_memory_that_cannot_be_walked_is_refused_with_the_remedy() -> None:
    plain = torch.zeros(7, 2, 8, 4)
    with pytest.raises(KernelInputError, match="no layers"):
        describe([])
    with pytest.raises(KernelInputError, match="unlike layer 0"):
        describe([plain, plain.half()])
    with pytest.raises(KernelInputError, match="unlike layer 0"):
        describe([plain, torch.zeros(7, 8, 2, 4).transpose(1, 2)])
    scrambled = torch.zeros(5, 7, 3, 4, 2).permute(1, 4, 2, 0, 3)[..., ::2]
    with pytest.raises(KernelInputError, match="another KV layout"):
        describe([scrambled])
    assert mover_for([scrambled]).name == "torch"


def test_frames_are_checked() -> None:
    views = views_of(paged("LBHNC", torch.bfloat16, SHAPES[0])[0], 1)
    moves, ids, frames = TritonMover(views), torch.tensor([1, 2]), frames_for(views, 2)
    with pytest.raises(KernelInputError, match="2 frames of 480 bytes are wanted"):
        moves.gather(ids, frames[:, :1].contiguous())
    with pytest.raises(KernelInputError, match="not contiguous"):
        moves.gather(ids[:1], frames.transpose(2, 4)[:1])
    with pytest.raises(KernelInputError, match="multiples of 16"):
        moves.gather(ids[:1], frames.view(-1)[1:241].view(1, 240))
    with pytest.raises(KernelInputError, match="a block needs 100"):
        check_frame(torch.zeros(99, dtype=torch.uint8), 100, CPU)
    with pytest.raises(KernelInputError, match="out of reach"):
        check_frame(torch.zeros(100, dtype=torch.uint8), 100, torch.device("meta"))


def test_which_mover_is_taken_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the kernels are for GPUs" in why_no_kernels(CPU)
    assert mover_for([torch.zeros(7, 2, 8, 4)]).name == "torch"
    assert try_kernels(CPU) == ""
    monkeypatch.setattr(mover, "why_no_kernels", lambda device: "")
    assert mover_for([torch.zeros(7, 2, 8, 4)]).name == "triton"
    monkeypatch.setattr(mover.TritonMover, "gather", lambda *given: None)
    assert "other bytes than the reference" in try_kernels(CPU)
    monkeypatch.setattr(mover.TritonMover, "_move", lambda *given, **how: 1 / 0)
    assert mover_for([torch.zeros(7, 2, 8, 4)]).name == "torch"
    monkeypatch.undo()
    monkeypatch.setattr(mover.TritonMover, "gather", lambda *given: 1 / 0)
    assert try_kernels(CPU) == "Triton ZeroDivisionError: division by zero"
