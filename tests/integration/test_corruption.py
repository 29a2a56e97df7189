"""Damage in the arena itself: a verified read says so, the server drops what is really bad, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client import batch
from mmcache.client.blocking import Client
from mmcache.config import ClientConfig, ServerConfig
from mmcache.embedded import EmbeddedClient
from mmcache.errors import CorruptFrame
from mmcache.server.serve import Server
from mmcache.store.shard import Shard
from mmcache.tensors import Pieces
from mmcache.testing import faults
from mmcache.transport.base import SLICE_NBYTES, Outcome
from tests.integration.on_a_loop import OnALoop
from tests.integration.support import blanks, eventually, keys_of, value_of, values_of

NBYTES = 2 * SLICE_NBYTES + 100
HEADER_BITS = [0, 8 * 10 + 3, 8 * 32, 8 * 100, 8 * 180 + 7, 8 * 300, 8 * 400]  # prefix, checksum, key, entry, padding
PAYLOAD_BITS = [8 * 448, 8 * (448 + SLICE_NBYTES), 8 * (448 + NBYTES) - 1]


@pytest.fixture(params=["shm", "tcp", "asyncio shm", "asyncio tcp"])
def reached(request: pytest.FixtureRequest) -> Iterator[tuple[Client, Shard]]:
    """A client of a server in this process, so that faults can be planted in its shard."""
    if request.param == "shm":
        with faults.embedded(16 << 20) as (client, shard):
            yield client, shard
        return
    unix_path = "auto" if "shm" in request.param else ""
    server = Server(ServerConfig(listen="127.0.0.1:0", unix_path=unix_path, memory_nbytes=16 << 20))
    server.start()
    assert server.address is not None
    host, port = server.address
    config = ClientConfig(host=host, port=port)
    any_client: Any = OnALoop(mmcache.AsyncClient(config)) if "asyncio" in request.param else Client(config)
    with any_client as client:
        assert client.stat()["transport"] == request.param.split()[-1]
        yield client, server.shard
    server.stop()


@pytest.mark.parametrize("pieces", [3, 1000])
@pytest.mark.parametrize("place", [0, 1 << 19, 3_000 * 1000 - 1])
def test_a_flipped_bit_is_noticed_in_pieces_too(reached: tuple[Client, Shard], place: int, pieces: int) -> None:
    client, shard = reached
    keys, nbytes = keys_of(2, "pieces"), 3_000 * 1000
    assert all(client.put(keys, values_of(keys, nbytes)))
    faults.flip_bit(shard, keys.digests[0], 8 * (448 + place))
    memory = np.zeros((pieces, 2, nbytes // pieces), np.uint8)
    places = [Pieces(memory[:, at], "uint8", (nbytes,)) for at in (0, 1)]
    bad, good = client.get_into(keys, places)
    assert (bad.outcome, good.outcome) == (Outcome.CORRUPT, Outcome.HIT)
    assert np.array_equal(memory[:, 1].reshape(-1), value_of(keys.digests[1], nbytes))
    assert client.counters["verify_failures"] == 1


@pytest.mark.parametrize("is_asyncio", [False, True])
def test_pieces_count_if_the_lease_outlived_their_copying(monkeypatch: pytest.MonkeyPatch, is_asyncio: bool) -> None:
    copy, lease_s, nbytes = batch._copy, 0.2, 6_000

    def slowly(*arguments: Any) -> Any:
        results = copy(*arguments)
        time.sleep(2 * lease_s)
        return results

    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20, lease_s=lease_s))
    server.start()
    assert server.address is not None
    config = ClientConfig(host=server.address[0], port=server.address[1], native=False)
    any_client: Any = OnALoop(mmcache.AsyncClient(config)) if is_asyncio else Client(config)
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        client = stack.enter_context(any_client)
        keys = keys_of(2, "late")
        eventually(lambda: all(client.put(keys, values_of(keys, nbytes))), "they are stored before reservations end")
        memory = np.zeros((3, 2, nbytes // 3), np.uint8)
        places = [Pieces(memory[:, at], "uint8", (nbytes,)) for at in (0, 1)]
        eventually(lambda: all(client.get_into(keys, places)), "they are copied before the lease ends")
        assert client.maps_memory
        monkeypatch.setattr(batch, "_copy", slowly)
        late = client.get_into(keys, places)
        assert [result.outcome for result in late] == [Outcome.MISS] * 2
        assert "lease" in late[0].reason
        assert all(client.get_into(keys, blanks(2, nbytes))), "what is checked where it arrived needs no lease"


@pytest.mark.parametrize("bit", HEADER_BITS + PAYLOAD_BITS)
def test_a_flipped_bit_is_noticed_dropped_and_then_a_miss(reached: tuple[Client, Shard], bit: int) -> None:
    client, shard = reached
    keys, buffers = keys_of(3, "flip"), blanks(3, NBYTES)
    values = values_of(keys, NBYTES)
    assert all(client.put(keys, values))
    faults.flip_bit(shard, keys.digests[1], bit)
    first, bad, last = client.get_into(keys, buffers)
    assert (first.outcome, bad.outcome, last.outcome) == (Outcome.HIT, Outcome.CORRUPT, Outcome.HIT)
    assert bad.reason
    assert np.array_equal(buffers[0], values[0])
    assert np.array_equal(buffers[2], values[2])
    assert client.counters["verify_failures"] == 1
    assert client.stat()["counters"]["corrupt_dropped"] == 1
    assert [str(result.outcome) for result in client.get_into(keys, buffers)] == ["hit", "miss", "hit"]
    assert client.counters["verify_failures"] == 1
    assert [str(result.outcome) for result in client.put(keys, values)] == ["present", "stored", "present"]
    assert all(client.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values))


def test_entries_the_index_has_mixed_up_are_never_read_as_one_another(reached: tuple[Client, Shard]) -> None:
    client, shard = reached
    keys, buffers = keys_of(2, "swap"), blanks(2, NBYTES)
    values = values_of(keys, NBYTES)
    assert all(client.put(keys, values))
    faults.swap_entries(shard, *keys.digests)
    results = client.get_into(keys, buffers)
    assert {result.outcome for result in results} == {Outcome.CORRUPT}
    assert all("another key" in result.reason for result in results)
    assert client.stat()["counters"]["corrupt_dropped"] == 2
    assert not any(client.get_into(keys, buffers))
    assert all(client.put(keys, values))
    assert all(client.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values))


def test_reads_that_are_not_verified_let_damage_through(reached: tuple[Client, Shard]) -> None:
    client, shard = reached
    keys, buffers = keys_of(1, "trust"), blanks(1, NBYTES)
    assert all(client.put(keys, values_of(keys, NBYTES)))
    faults.flip_bit(shard, keys.digests[0], PAYLOAD_BITS[0])
    assert client.get_into(keys, buffers, verify=False)[0]
    assert not np.array_equal(buffers[0], value_of(keys.digests[0], NBYTES))
    assert not client.get_into(keys, buffers)[0]


def test_views_show_damage_when_asked_to_verify(reached: tuple[Client, Shard]) -> None:
    client, shard = reached
    keys = keys_of(2, "views")
    assert all(client.put(keys, values_of(keys, NBYTES)))
    faults.flip_bit(shard, keys.digests[0], PAYLOAD_BITS[1])
    faults.flip_bit(shard, keys.digests[1], HEADER_BITS[3])
    with client.acquire(keys) as lease:
        frame = lease.frames[0]
        assert frame is not None
        with pytest.raises(CorruptFrame, match="checksum"):
            frame.verify()
        assert lease.frames[1] is None


def test_a_false_alarm_drops_nothing(reached: tuple[Client, Shard]) -> None:
    client, shard = reached
    keys = keys_of(2, "alarm")
    assert all(client.put(keys, values_of(keys, NBYTES)))
    assert not any(shard.recheck(0, digest) for digest in keys.digests)
    assert client.match_prefix(keys) == 2


def test_an_entry_still_leased_can_be_dropped_without_harm_to_its_reader() -> None:
    with faults.embedded(4 << 20) as (client, shard):
        assert isinstance(client, EmbeddedClient)
        keys = keys_of(1, "leased")
        assert all(client.put(keys, values_of(keys, NBYTES)))
        with client.acquire(keys) as lease:
            faults.flip_bit(shard, keys.digests[0], PAYLOAD_BITS[0])
            assert client.get_into(keys, blanks(1, NBYTES))[0].outcome is Outcome.CORRUPT
            assert client.match_prefix(keys) == 0
            assert all(client.put(keys, values_of(keys, NBYTES)))
            assert lease.frames[0] is not None
            with pytest.raises(CorruptFrame):
                lease.frames[0].verify()
        assert all(client.get_into(keys, blanks(1, NBYTES)))
