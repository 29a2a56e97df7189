"""How much a server does in one go: slices, however large the value; and the counter that says so can rise."""

from __future__ import annotations

import pytest

import mmcache
from mmcache.config import ServerConfig
from mmcache.frame import Kind
from mmcache.frame_view import Frame
from mmcache.store.landing import Landing
from mmcache.store.shard import Shard
from mmcache.testing import faults
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import SLICE_NBYTES
from tests.integration.support import MiB, blanks, frame_bytes, keys_of, value_of, values_of

VALUE_NBYTES = 3 * MiB + 77


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_large_value_is_landed_and_rechecked_in_slices(transport: str) -> None:
    keys = keys_of(2, "steps")
    with ServerProcess("64MiB") as server, mmcache.connect(f"{server.url}?transport={transport}") as cache:
        assert all(cache.put(keys, values_of(keys, VALUE_NBYTES)))
        assert all(cache.get_into(keys, blanks(2, VALUE_NBYTES)))
        assert 64 << 10 <= cache.stat()["counters"]["longest_step_bytes"] <= SLICE_NBYTES


def test_a_recheck_goes_in_slices_and_still_finds_the_last_bit() -> None:
    with faults.embedded(32 * MiB) as (client, shard):
        keys = keys_of(2, "recheck")
        assert all(client.put(keys, values_of(keys, VALUE_NBYTES)))
        shard.longest_step_nbytes = 0
        faults.flip_bit(shard, keys.digests[1], -1)
        assert [shard.recheck(0, digest) for digest in keys.digests] == [False, True]
        assert shard.longest_step_nbytes == SLICE_NBYTES


def test_a_step_that_is_too_long_shows() -> None:
    shard = Shard(ServerConfig(memory_nbytes=16 * MiB))
    try:
        keys = keys_of(1, "long")
        frame = frame_bytes(keys, value_of(keys.digests[0], MiB))
        landing = shard.reserve(0, keys.digests[0], bytes(32), len(frame), Kind.KV)
        assert isinstance(landing, Landing)

        def fill(target: memoryview) -> int:
            target[:] = frame
            return len(frame)

        landing.land(len(frame), fill, memoryview(b""))
        assert landing.commit() is None
        assert shard.stat()["longest_step_bytes"] == len(frame) > SLICE_NBYTES
    finally:
        shard.close()


@pytest.mark.parametrize("step_nbytes", [1000, MiB, 64 * MiB])
def test_verifying_in_steps_is_verifying(step_nbytes: int) -> None:
    keys = keys_of(1, "frame")
    data = bytearray(frame_bytes(keys, value_of(keys.digests[0], VALUE_NBYTES)))
    Frame.parse(data).verify(step_nbytes=step_nbytes)
    data[-1] ^= 1
    with pytest.raises(mmcache.errors.FrameError):
        Frame.parse(data).verify(step_nbytes=step_nbytes)
