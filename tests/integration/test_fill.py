"""From a real server to where blocks lie: in place, straight from its memory, or through a buffer, and never wrong.

The device is this processor's memory: its blocks are copied by Triton's interpreter, in the way of a GPU's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("triton")

import mmcache  # noqa: E402
from mmcache.client.blocking import Client  # noqa: E402
from mmcache.config import ServerConfig  # noqa: E402
from mmcache.keyset import Keys  # noqa: E402
from mmcache.server.serve import Server  # noqa: E402
from mmcache.testing import faults  # noqa: E402
from mmcache_connectors.buffers import BufferPool  # noqa: E402
from mmcache_connectors.device import SAVE_SLOTS, DeviceBlocks, Ended  # noqa: E402
from mmcache_connectors.fill import Filler, LayerGate  # noqa: E402
from mmcache_connectors.paged import PagedGroup  # noqa: E402
from mmcache_kernels import TorchMover, TritonMover  # noqa: E402

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 12, 2, 16, 64
SHORT_S = 0.5  # of a lease that is to be lost; others last as long as a machine may stand still
IDS, TARGETS = [5, 1, 9, 2], [3, 8, 1, 11]
MOVERS: dict[str, Any] = {"kernels": TritonMover, "torch": TorchMover}


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20, prefault=True))
    running.start()
    yield running
    running.stop()


def url(server: Server) -> str:
    assert server.address is not None
    return "mmcache://{}:{}".format(*server.address)


def group(seed: int, mover: str = "", order: str = "LBHNC") -> PagedGroup:
    """Paged memory full of random bytes; with a mover, it is a device's."""
    random = torch.Generator().manual_seed(seed)
    memory = torch.randint(-32768, 32768, (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT), dtype=torch.int16, generator=random)
    if order == "LBNHC":
        memory = memory.transpose(2, 3).contiguous().transpose(2, 3)
    paged = PagedGroup(list(memory.unbind(0)), num_blocks=BLOCKS, block_tokens=TOKENS)
    if mover:
        paged._grid = None
        paged._device = DeviceBlocks(paged._views, MOVERS[mover](paged._views))
    return paged


def blocks(paged: PagedGroup, ids: list[int]) -> Any:
    staged = torch.empty((len(ids), *paged.shape), dtype=paged.dtype)
    copy = paged.gather(ids, staged)
    assert copy is not None
    copy.synchronize()
    return staged


@dataclass
class Bed:
    """A client, what it stored, and the buffers of a filler."""

    client: Client
    keys: Keys
    stored: Any
    buffers: BufferPool

    def fill(self, paged: PagedGroup, gate: LayerGate | None = None) -> list[str]:
        results = Filler(self.client, self.buffers).fill(paged, self.keys, TARGETS, gate=gate)
        return [str(result.outcome) for result in results]


@pytest.fixture(params=["shm", "tcp"])
def bed(request: pytest.FixtureRequest, server: Server) -> Iterator[Bed]:
    source = group(0)
    keys = mmcache.Namespace(kind="kv", model="m", dtype="int16", layout="x", block_size=TOKENS).block_keys(range(64))
    stored = blocks(source, IDS)
    with mmcache.connect(url(server), deadline_s=20) as patient:
        assert all(patient.put(keys, source.rows(stored)))
    with mmcache.connect(f"{url(server)}?transport={request.param}", deadline_s=10) as client:
        yield Bed(client, keys, stored, BufferPool(4 * source.spec().nbytes, 1, pinned="no"))


KINDS = [("", "LBHNC"), ("", "LBNHC"), ("kernels", "LBHNC"), ("kernels", "LBNHC"), ("torch", "LBNHC")]


@pytest.mark.parametrize(("mover", "order"), KINDS)
def test_blocks_arrive_and_no_other_changes(bed: Bed, mover: str, order: str) -> None:
    paged, before = group(1, mover, order), group(1, order=order)
    assert bed.fill(paged) == ["hit"] * 4
    assert torch.equal(blocks(paged, TARGETS), bed.stored)
    others = [block for block in range(1, BLOCKS) if block not in TARGETS]
    assert torch.equal(blocks(paged, others), blocks(before, others))
    # Straight from the server's memory, or in place, no buffer was needed.
    straight = bed.client.stat()["transport"] == "shm" and mover == "kernels"
    in_place = not mover and order == "LBHNC"
    assert (bed.buffers._free.queue[-1] is None) == (straight or in_place)


@pytest.mark.parametrize(("mover", "order"), KINDS)
@pytest.mark.parametrize("bit", [3, 8 * 100, 8 * 600, -1])
def test_a_damaged_block_ends_the_hits(bed: Bed, server: Server, mover: str, order: str, bit: int) -> None:
    faults.flip_bit(server.shard, bed.keys.digests[2], bit)
    paged = group(1, mover, order)
    found = bed.fill(paged)
    assert found[:3] == ["hit", "hit", "corrupt"]
    assert torch.equal(blocks(paged, TARGETS[:2]), bed.stored[:2])
    assert bed.client.counters["verify_failures"] == 1
    assert bed.fill(paged)[:3] == ["hit", "hit", "miss"]  # the server dropped it


@pytest.mark.parametrize(("mover", "order"), KINDS)
def test_what_is_absent_or_of_another_form_is_told(bed: Bed, mover: str, order: str) -> None:
    paged = group(1, mover, order)
    assert bed.client.delete(bed.keys[1]) == [True]
    assert bed.fill(paged)[:2] == ["hit", "miss"]
    assert all(bed.client.put(bed.keys[1], [np.zeros(7, np.int16)]))
    assert bed.fill(paged)[:2] == ["hit", "mismatch"]
    assert torch.equal(blocks(paged, TARGETS[:1]), bed.stored[:1])


def test_entries_that_change_places_are_not_taken_for_each_other(bed: Bed, server: Server) -> None:
    faults.swap_entries(server.shard, bed.keys.digests[0], bed.keys.digests[1])
    assert bed.fill(group(1, "kernels"))[0] == "corrupt"


def test_a_lease_that_was_lost_makes_every_block_a_miss(
    bed: Bed, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bed.client.stat()["transport"] != "shm":
        pytest.skip("what is received needs no lease")
    paged = group(1, "kernels")
    scatter = PagedGroup.scatter_from

    def late(self: PagedGroup, *given: Any) -> None:
        scatter(self, *given)
        time.sleep(1.5 * SHORT_S)

    monkeypatch.setattr(server.shard.index, "_lease_s", SHORT_S)
    monkeypatch.setattr(PagedGroup, "scatter_from", late)
    assert bed.fill(paged) == ["miss"] * 4
    monkeypatch.undo()
    assert bed.fill(paged) == ["hit"] * 4


def test_what_cannot_be_taken_from_memory_is_asked_for_once(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    acquire = Client.acquire

    def noted(self: Client, keys: Any) -> Any:
        asked.append("acquire")
        return acquire(self, keys)

    monkeypatch.setattr(Client, "acquire", noted)
    assert bed.fill(group(1, "torch")) == ["hit"] * 4
    assert asked == []
    assert bed.fill(group(1, "kernels")) == ["hit"] * 4
    assert asked == (["acquire"] if bed.client.stat()["transport"] == "shm" else [])


def test_a_way_that_fails_is_another_ones_turn(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paged = group(1, "kernels")
    monkeypatch.setattr(TritonMover, "scatter_from", lambda *given: 1 / 0)
    assert bed.fill(paged) == ["hit"] * 4
    assert torch.equal(blocks(paged, TARGETS), bed.stored)
    assert ("ZeroDivisionError" in caplog.text) == (bed.client.stat()["transport"] == "shm")


def test_without_a_free_buffer_nothing_is_filled_or_a_gate_gives_one(bed: Bed) -> None:
    paged = group(1, "torch")
    gate = LayerGate(bed.buffers)
    assert bed.fill(paged, gate) == ["hit"] * 4
    assert bed.fill(paged) == []  # the gate holds the only one
    assert bed.fill(paged, gate) == ["hit"] * 4  # which gives it back when what it holds has arrived
    gate.pass_layer(LAYERS - 1)
    gate.give_back_all()
    assert bed.fill(paged) == ["hit"] * 4
    assert torch.equal(blocks(paged, TARGETS), bed.stored)


def test_a_save_is_put_off_while_the_link_to_the_host_is_behind() -> None:
    class Behind(Ended):
        def query(self) -> bool:
            return False

    paged = group(1, "torch")
    assert paged._device is not None
    staged = torch.empty((len(IDS), *paged.shape), dtype=paged.dtype)
    for slot in paged._device._slots:
        assert paged.gather(IDS, staged) is not None
        slot.copy = Behind()
    assert len(paged._device._slots) == SAVE_SLOTS
    assert paged.gather(IDS, staged) is None
    paged._device._slots[3].copy = Ended()
    assert paged.gather(IDS, staged) is not None
