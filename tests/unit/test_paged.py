"""Paged KV memory and stored blocks: every physical order and dtype, exact bytes, untouched neighbours, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")

import mmcache  # noqa: E402
from mmcache.tensors import host_tensor  # noqa: E402
from mmcache.testing.process import ServerProcess  # noqa: E402
from mmcache_connectors import paged as paged_module  # noqa: E402
from mmcache_connectors.device import DeviceBlocks  # noqa: E402
from mmcache_connectors.paged import PagedGroup  # noqa: E402
from tests.unit.paged_bed import BLOCKS, DTYPES, ORDERS, POISON, SHAPES, as_bytes, paged  # noqa: E402


def group_of(layers: list[Any], shape: tuple[int, int, int, int, int]) -> PagedGroup:
    return PagedGroup(layers, num_blocks=BLOCKS, block_tokens=shape[2])


def as_device(group: PagedGroup) -> PagedGroup:
    """The same memory, copied in the way of a device, by the reference."""
    group._device = DeviceBlocks(group._views)
    return group


def staging(group: PagedGroup, count: int) -> Any:
    return torch.empty((count, *group.shape), dtype=group.dtype)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("64MiB") as process:
        yield process


def content_of(layers: list[Any]) -> list[Any]:
    return [as_bytes(layer) for layer in layers]


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_come_out_and_go_in_exactly(
    order: str, name: str, shape: tuple[int, int, int, int, int], on_host: bool
) -> None:
    dtype = getattr(torch, name)
    layers, truth = paged(order, dtype, shape)
    group = group_of(layers, shape)
    group = group if on_host else as_device(group)
    ids = [5, 1, 6, 2]
    staged = staging(group, len(ids))
    staged.view(torch.uint8).fill_(POISON)
    group.gather(ids, staged)
    assert np.array_equal(as_bytes(staged), truth[ids])

    other, before = paged(order, dtype, shape, seed=1)
    group = group_of(other, shape)
    group = group if on_host else as_device(group)
    group.scatter(ids, staged)
    expected = before.copy()
    expected[ids] = truth[ids]
    assert group.spec().nbytes == truth[0].nbytes
    again = staging(group, BLOCKS - 1)
    group.gather(np.arange(1, BLOCKS), again)
    assert np.array_equal(as_bytes(again), expected[1:])
    null = slice(other[0].shape[0] // BLOCKS)  # block 0, which gather does not show
    for layer, unwritten in zip(other, paged(order, dtype, shape, seed=1)[0], strict=True):
        assert np.array_equal(as_bytes(layer[null]), as_bytes(unwritten[null]))


def test_memory_between_padded_blocks_is_left_alone() -> None:
    memory = torch.full((BLOCKS, 3, 2, 8, 6), 7, dtype=torch.int16)
    layers = [memory[:, layer, :, :, :5] for layer in (0, 2)]  # another layer between, a gap after each row
    group = PagedGroup(layers, num_blocks=BLOCKS, block_tokens=8)
    staged = staging(group, 2).fill_(9)
    group.scatter([3, 4], staged)
    assert torch.all(memory[3:5, [0, 2], :, :, :5] == 9)
    memory[3:5, [0, 2], :, :, :5] = 7
    assert torch.all(memory == 7)


def test_blocks_of_one_order_are_read_by_an_engine_of_another() -> None:
    shape = (2, 2, 16, 8, 1)
    layers, truth = paged("BHLNC", torch.bfloat16, shape)
    staged = staging(group_of(layers, shape), 3)
    group_of(layers, shape).gather([1, 2, 3], staged)
    split = (2, 2, 16, 8, 2)  # the same blocks, kept as two kernel blocks each
    other, _ = paged("LBNHC", torch.bfloat16, split, seed=2)
    group_of(other, split).scatter([4, 5, 6], staged)
    back = staging(group_of(other, split), 3)
    group_of(other, split).gather([4, 5, 6], back)
    assert np.array_equal(as_bytes(back), truth[1:4])


@pytest.mark.parametrize("on_host", [True, False])
def test_layers_may_lie_in_memory_each_in_its_own_way(on_host: bool) -> None:
    shape = (1, 2, 16, 8, 1)
    made = [paged(order, torch.float16, shape, seed) for seed, order in enumerate(ORDERS)]
    group = group_of([layers[0] for layers, _ in made], shape)
    group = group if on_host else as_device(group)
    staged = staging(group, 2)
    group.gather([6, 2], staged)
    assert np.array_equal(as_bytes(staged), np.concatenate([truth[[6, 2]] for _, truth in made], axis=1))
    group.scatter([1, 6], staged)
    back = staging(group, 3)
    group.gather([1, 6, 2], back)
    assert np.array_equal(as_bytes(back[:2]), as_bytes(staged))
    assert np.array_equal(as_bytes(back[2]), as_bytes(staged[1]))


@pytest.mark.parametrize("order", ["LBHNC", "BLNHC"])
def test_many_blocks_are_gathered_in_pieces(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, truth = paged(order, torch.float16, SHAPES[0])
    group = group_of(layers, SHAPES[0])
    monkeypatch.setattr(paged_module, "_PIECE_NBYTES", 4 * truth[0, 0].nbytes)
    staged = staging(group, 10)
    ids = [6, 5, 4, 3, 2, 1, 3, 3, 5, 6]
    group.gather(ids, staged)
    assert np.array_equal(as_bytes(staged), truth[ids])


def test_no_blocks_and_a_block_twice() -> None:
    layers, truth = paged("LBHNC", torch.float16, SHAPES[0])
    group = group_of(layers, SHAPES[0])
    before = content_of(layers)
    group.gather([], staging(group, 0))
    group.scatter([], staging(group, 0))
    assert group.rows(staging(group, 0)) == []
    twice = staging(group, 2)
    group.gather([3, 3], twice)
    assert np.array_equal(as_bytes(twice), truth[[3, 3]])
    assert all(np.array_equal(a, b) for a, b in zip(before, content_of(layers), strict=True))


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("caches", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("buffers", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("caller", [torch.inference_mode, torch.enable_grad])
def test_tensors_of_inference_mode_are_copied_in_and_out_of_it(
    on_host: bool, caches: Any, buffers: Any, caller: Any
) -> None:
    with caches():
        layers = [torch.zeros(BLOCKS, 2, 8, 4, dtype=torch.bfloat16) for _ in range(2)]
    group = PagedGroup(layers, num_blocks=BLOCKS, block_tokens=8)
    group = group if on_host else as_device(group)
    with buffers():
        staged, back = staging(group, 1).fill_(3), staging(group, 1)
    with caller():
        group.scatter([2], staged)
        group.gather([2], back)
    assert torch.equal(back, staged)
    assert float(layers[1][2].float().min()) == 3


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([0], "null block"),
        ([1, 0], "null block"),
        ([-1], "block id -1 is none of 7"),
        ([7], "block id 7 is none of 7"),
        ([1, 2**63 - 1], "none of 7"),
        ([2**64 - 1], "none of 7"),
        ([1.0], "flat list of integers"),
        ([True], "flat list of integers"),
        ([[1], [2]], "flat list of integers"),
    ],
)
def test_bad_block_ids_touch_nothing(ids: list[Any], why: str) -> None:
    layers, _ = paged("LBHNC", torch.float16, SHAPES[0])
    group = group_of(layers, SHAPES[0])
    before = content_of(layers)
    staged = staging(group, len(ids))
    staged.view(torch.uint8).fill_(POISON)
    with pytest.raises(ValueError, match=why):
        group.gather(ids, staged)
    assert torch.all(staged.view(torch.uint8) == POISON)
    with pytest.raises(ValueError, match=why):
        group.scatter(ids, staged)
    assert all(np.array_equal(a, b) for a, b in zip(before, content_of(layers), strict=True))


def test_a_block_is_not_written_twice() -> None:
    layers, _ = paged("LBHNC", torch.float16, SHAPES[0])
    group = group_of(layers, SHAPES[0])
    before = content_of(layers)
    with pytest.raises(ValueError, match="comes twice"):
        group.scatter([2, 3, 2], staging(group, 3))
    assert all(np.array_equal(a, b) for a, b in zip(before, content_of(layers), strict=True))


def test_staged_memory_of_another_form_is_refused() -> None:
    layers, _ = paged("LBHNC", torch.float16, SHAPES[0])
    group = group_of(layers, SHAPES[0])
    good = staging(group, 2)
    for bad, why in [
        (staging(group, 3), "not torch.float16"),
        (good.to(torch.bfloat16), "not torch.bfloat16"),
        (good.view(2, -1), "allocate that"),
        (torch.empty_like(good, device="meta"), "on meta"),
        (good.transpose(3, 4).contiguous().transpose(3, 4), "not contiguous"),
    ]:
        with pytest.raises(ValueError, match=why):
            group.gather([1, 2], bad)
        with pytest.raises(ValueError, match=why):
            group.scatter([1, 2], bad)


def plain(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.zeros(shape, dtype=dtype)


SHARED = plain(7, 2, 8, 4)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([], "no layers"),
        ([(plain(7, 2, 8, 4), plain(7, 2, 8, 4))], r"layer 0 is a tuple.*Mamba"),
        ([[plain(7, 2, 8, 4)]], r"layer 0 is a list"),
        ([plain(7, 2, 8, 4), plain(7, 2, 8, 5)], "one PagedGroup for each form"),
        ([plain(7, 2, 8, 4), plain(7, 2, 8, 4, dtype=torch.bfloat16)], "one PagedGroup for each form"),
        ([plain(2, 7, 2, 8, 4)], "logical view"),
        ([plain(7, 8)], "logical view"),
        ([torch.empty(7, 2, 8, 4, device="meta")], "no plain memory"),
        ([torch.zeros(7, 2, 8, 4).to_sparse()], "no plain memory"),
        ([plain(1, 2, 8, 4).expand(7, 2, 8, 4)], "share memory"),
        ([plain(7 * 64).as_strided((7, 2, 8, 4), (32, 32, 4, 1))], "share memory"),
        ([SHARED, SHARED], "layers that share KV"),
        ([plain(8, 2, 8, 4)], "does not hold 7 blocks of 8 tokens"),
        ([plain(7, 2, 16, 4)], "does not hold 7 blocks of 8 tokens"),
        ([plain(7, 0, 8, 4)], "does not hold 7 blocks"),
        ([plain(7, 2, 8, 4, dtype=torch.complex128)], "16 bytes"),
    ],
)
def test_caches_without_blocks_are_refused(layers: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PagedGroup(layers, num_blocks=7, block_tokens=8)


@pytest.mark.parametrize("name", DTYPES)
def test_rows_travel_through_a_server(name: str) -> None:
    dtype = getattr(torch, name)
    layers, truth = paged("LBNHC", dtype, SHAPES[3])
    group = group_of(layers, SHAPES[3])
    staged, back = staging(group, 3), staging(group, 3)
    group.gather([1, 3, 5], staged)
    rows = group.rows(staged)
    assert [(host.dtype, host.shape, host.data.nbytes) for host in map(host_tensor, rows)] == [
        (group.spec().dtype, group.spec().shape, group.spec().nbytes)
    ] * 3
    assert group.spec().dtype == ("uint8" if name == "float8_e4m3fnuz" else name)
    keys = mmcache.Namespace(kind="kv", model="m", dtype=name, layout="x", block_size=6).block_keys(range(18))
    with ServerProcess("16MiB") as server, mmcache.connect(server.url, deadline_s=10) as cache:
        assert [result.outcome for result in cache.put(keys, rows)] == ["stored"] * 3
        assert all(cache.get_into(keys, group.rows(back)))
    assert np.array_equal(as_bytes(back), truth[[1, 3, 5]])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fnuz"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_read_to_where_they_lie(order: str, name: str, shape: Any, server: ServerProcess) -> None:
    dtype = getattr(torch, name)
    layers, truth = paged(order, dtype, shape)
    group = group_of(layers, shape)
    staged, ids = staging(group, 3), [6, 1, 4]
    group.gather(ids, staged)
    other, before = paged(order, dtype, shape, seed=1)
    target = group_of(other, shape)
    places = target.in_place(ids)
    if places is None:
        return  # `test_which_layouts_are_read_in_place` says which must not be
    facts = {"layout": f"{order}/{shape}", "dtype": name}
    keys = mmcache.Namespace(kind="kv", model="in place", block_size=6, **facts).block_keys(range(18))
    with mmcache.connect(server.url, deadline_s=10) as cache:
        assert all(cache.put(keys, group.rows(staged)))
        assert all(cache.get_into(keys, places))
    before[ids] = truth[ids]
    back = staging(target, BLOCKS - 1)
    target.gather(np.arange(1, BLOCKS), back)
    assert np.array_equal(as_bytes(back), before[1:])


def test_which_layouts_are_read_in_place() -> None:
    possible = {
        order for order in ORDERS if group_of(paged(order, torch.bfloat16, SHAPES[0])[0], SHAPES[0]).in_place([1])
    }
    assert possible == {"LBHNC", "BLHNC"}
    one_head = {
        order for order in ORDERS if group_of(paged(order, torch.bfloat16, SHAPES[2])[0], SHAPES[2]).in_place([1])
    }
    assert one_head == set(ORDERS) - {"CNHBL"}
    apart = [plain(7, 2, 8, 4) for _ in range(2)]
    assert PagedGroup(apart, num_blocks=7, block_tokens=8).in_place([1]) is None


@pytest.mark.parametrize(("ids", "why"), [([0], "null block"), ([7], "none of 7"), ([2, 2], "comes twice")])
def test_blocks_in_place_are_checked(ids: list[int], why: str) -> None:
    group = group_of(paged("LBHNC", torch.float16, SHAPES[0])[0], SHAPES[0])
    with pytest.raises(ValueError, match=why):
        group.in_place(ids)
