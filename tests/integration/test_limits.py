"""Limits of a real server: connections, bytes in flight, leased memory. Each refusal says why, and ends by itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.errors import RequestRefused
from mmcache.pb import cache_pb2 as pb
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome
from tests.integration.support import MiB, Raw, blanks, eventually, frame_bytes, keys_of, values_of


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_a_connection_over_the_limit_is_told_so_and_others_go_on(unix: bool, tmp_path: Path) -> None:
    words = ("--max-connections", "3", "--unix", str(tmp_path / "s"))  # where no other server that starts looks
    with ServerProcess("16MiB", *words) as server, contextlib.ExitStack() as stack:
        url = f"mmcache+unix://{server.unix_path}" if unix else f"{server.url}?transport=tcp"
        inside = stack.enter_context(mmcache.connect(url, deadline_s=20))
        held = [stack.enter_context(Raw(server)) for _ in range(2)]
        for raw in held:
            raw.join()
        for _ in range(10):
            with pytest.raises(RequestRefused, match="raise --max-connections"):
                mmcache.connect(url)
        keys = keys_of(2, "full house")
        values, buffers = values_of(keys, 1000), blanks(2, 1000)
        with mmcache.connect(url, deadline_s=20, lazy=True) as outside:
            refused = outside.put(keys, values)
            assert {result.outcome for result in refused} == {Outcome.UNAVAILABLE}
            assert "--max-connections" in refused[0].reason
            assert all(inside.put(keys, values))
            held[0].sock.close()
            eventually(lambda: all(outside.get_into(keys, buffers)), "there is room for the one outside")
            assert all(map(np.array_equal, buffers, values))


def test_bytes_in_flight_are_bounded_and_come_free() -> None:
    with (
        ServerProcess("64MiB", environment={"MMCACHE_MAX_INFLIGHT_NBYTES": "4MiB"}) as server,
        mmcache.connect(server.url, deadline_s=20) as cache,
    ):
        slow, quick = keys_of(1, "slow"), keys_of(1, "quick")
        frame = frame_bytes(slow, bytes(3 * MiB))
        with Raw(server) as raw:
            raw.join()
            assert raw.reserve(slow, [len(frame)]) == bytes([pb.WANTED])
            assert cache.stat()["counters"]["inflight_bytes"] == len(frame)
            (refused,) = cache.put(quick, values_of(quick, 2 * MiB))
            assert refused.outcome is Outcome.REFUSED
            assert "in flight" in refused.reason
            small = keys_of(1, "small")
            assert all(cache.put(small, values_of(small, MiB // 2)))
            raw.send(frame)
            assert raw.put_done() == bytes([pb.STORED])
            eventually(lambda: cache.stat()["counters"]["inflight_bytes"] == 0, "the bytes have landed")
            assert all(cache.put(quick, values_of(quick, 2 * MiB)))


def test_a_value_over_the_limit_of_bytes_in_flight_is_stored_on_its_own() -> None:
    with (
        ServerProcess("64MiB", environment={"MMCACHE_MAX_INFLIGHT_NBYTES": "1MiB"}) as server,
        mmcache.connect(server.url, deadline_s=20) as cache,
    ):
        keys = keys_of(2, "wide")
        values, buffers = values_of(keys, 5 * MiB), blanks(2, 5 * MiB)
        assert all(cache.put(keys, values))
        assert all(cache.get_into(keys, buffers))
        assert all(map(np.array_equal, buffers, values))


def test_an_arena_full_of_leased_values_refuses_more_and_loses_nothing() -> None:
    every, nbytes = 15, MiB  # less than one more value's room is left
    settings = {"MMCACHE_PINNED_SHARE": "1"}
    with (
        ServerProcess("16MiB", "--lease-s", "60", environment=settings) as server,
        mmcache.connect(server.url, deadline_s=20) as cache,
    ):
        keys = keys_of(every, "pinned")
        values, buffers = values_of(keys, nbytes), blanks(every, nbytes)
        assert all(cache.put(keys, values))
        with contextlib.ExitStack() as stack:
            for start in range(0, every, 3):
                lease = stack.enter_context(cache.acquire(keys[start : start + 3]))
                assert all(lease.frames)
            more = keys_of(8, "more")
            results = cache.put(more, values_of(more, nbytes))
            assert {result.outcome for result in results} == {Outcome.REFUSED}
            assert all("leased" in result.reason and "--memory" in result.reason for result in results)
            assert cache.match_prefix(keys) == every
            for frame in lease.frames:
                assert frame is not None
                frame.verify()
            assert sum(map(bool, cache.get_into(keys, buffers))) == every
            assert all(map(np.array_equal, buffers, values))
        assert all(cache.put(more, values_of(more, nbytes)))


def test_leases_over_their_share_are_not_given_and_what_is_not_leased_can_be_read() -> None:
    with ServerProcess("16MiB", "--lease-s", "60") as server, mmcache.connect(server.url, deadline_s=20) as cache:
        keys = keys_of(12, "greedy")
        values, buffers = values_of(keys, MiB), blanks(12, MiB)
        assert all(cache.put(keys, values))
        with contextlib.ExitStack() as stack:
            leases = [stack.enter_context(cache.acquire(keys[start : start + 2])) for start in range(0, 12, 2)]
            leased = sum(frame is not None for lease in leases for frame in lease.frames)
            assert 4 <= leased <= 8
            held_bytes = cache.stat()["counters"]["held_bytes"]
            assert held_bytes <= 8 * MiB
            results = cache.get_into(keys, buffers)
            for result, value, buffer in zip(results, values, buffers, strict=True):
                assert np.array_equal(value, buffer) if result else "leased" in result.reason
            assert sum(map(bool, results)) >= leased
        assert all(cache.get_into(keys, buffers))
        assert all(map(np.array_equal, values, buffers))


def test_gets_of_more_than_may_be_leased_are_met_piece_by_piece() -> None:
    nbytes = MiB - 4096
    with ServerProcess("16MiB", "--lease-s", "60") as server:
        for transport in ("shm", "tcp"):
            with mmcache.connect(f"{server.url}?transport={transport}", deadline_s=20) as cache:
                keys = keys_of(14, "wide get")
                values, buffers = values_of(keys, nbytes), blanks(14, nbytes)
                assert all(cache.put(keys, values))
                assert all(cache.get_into(keys, buffers))
                assert all(map(np.array_equal, buffers, values))
