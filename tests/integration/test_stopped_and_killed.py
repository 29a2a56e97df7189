"""Real processes killed and stopped in the worst places: memory comes back in time, and no wrong byte is ever read."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.keyset import Keys
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome
from tests.integration.support import (
    PATIENCE_S,
    Bytes,
    MiB,
    blanks,
    child,
    eventually,
    in_time,
    keys_of,
    reserved_address,
    suspend,
    value_of,
    values_of,
)

pytestmark = pytest.mark.alone

LEASE_S = 1.0
MEMORY_NBYTES = 64 * MiB
VALUE_NBYTES = 4 * MiB - 4096  # several exceed what socket buffers hold, so that a sender has to wait for its reader
HELD = 6  # values a child leases: under the half of the memory that leases may take

PATHS = pytest.mark.parametrize("path", ["shm", "tcp"])


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    # by LRU, so that it is known what a flood pushes out
    with ServerProcess(str(MEMORY_NBYTES), "--lease-s", str(LEASE_S), "--policy", "lru") as process:
        yield process


@pytest.fixture
def cache(server: ServerProcess) -> Iterator[Client]:
    with mmcache.connect(server.url, deadline_s=20) as client:
        yield client


def fill(cache: Client, label: str, count: int) -> list[str]:
    keys = keys_of(count, label)
    return [str(result.outcome) for result in cache.put(keys, values_of(keys, VALUE_NBYTES))]


def stores(cache: Client, keys: Keys, values: Sequence[Bytes]) -> bool:
    return all(cache.put(keys, values))


def fill_all(cache: Client, label: str, count: int, patience_s: float = PATIENCE_S) -> None:
    """Put again what a writer that stands still for a lease's time is refused."""
    keys = keys_of(count, label)
    values = values_of(keys, VALUE_NBYTES)
    eventually(lambda: stores(cache, keys, values), f"all of {label} are stored", patience_s)


def turn_memory_over_past_expiry(cache: Client) -> None:
    """Let every lease and reservation expire, then write the whole memory anew twice."""
    time.sleep(1.2 * LEASE_S)
    for batch in range(8):
        fill_all(cache, f"pressure/{batch}", 4)


def reads(cache: Client, keys: Keys, buffers: Sequence[Bytes]) -> bool:
    return all(cache.get_into(keys, buffers))


def still_right(cache: Client, label: str, count: int) -> bool:
    keys = keys_of(count, label)
    buffers = blanks(count, VALUE_NBYTES)
    return all(
        np.array_equal(buffer, value_of(digest, VALUE_NBYTES)) if result else result.outcome is Outcome.MISS
        for result, buffer, digest in zip(cache.get_into(keys, buffers), buffers, keys.digests, strict=True)
    )


def test_memory_leased_by_a_killed_client_is_usable_when_its_lease_ends(server: ServerProcess, cache: Client) -> None:
    fill_all(cache, "held", HELD)
    with child("hold", server.url, "held", str(HELD), str(VALUE_NBYTES)) as holder:
        said = holder.hear()
        assert said["leased"] == HELD
        assert said["right"]
        holder.signal(signal.SIGKILL)
        assert holder.end() == -signal.SIGKILL
        outcomes = fill(cache, "early", 14)
        if time.monotonic() < said["began_s"] + LEASE_S:  # 14 values cannot fit while 6 of 15 are leased
            assert "refused" in outcomes
    time.sleep(max(0.0, said["at_s"] + LEASE_S - time.monotonic()))
    assert cache.delete(keys_of(14, "early")) is not None
    fill_all(cache, "late", 7, patience_s=3)
    fill_all(cache, "later", 7, patience_s=3)
    counters = cache.stat()["counters"]
    assert counters["expired_leases"] == 2  # one request pins a quarter of the memory at most
    assert counters["held_bytes"] == 0
    assert still_right(cache, "held", HELD)


@PATHS
def test_memory_reserved_by_a_killed_client_is_usable_at_once(path: str) -> None:
    with (
        ServerProcess(str(MEMORY_NBYTES), "--lease-s", "60") as server,  # so that it cannot be the lease that ends
        mmcache.connect(server.url, deadline_s=20) as cache,
    ):
        _memory_is_usable_at_once(server, cache, path)


def _memory_is_usable_at_once(server: ServerProcess, cache: Client, path: str) -> None:
    nbytes = MEMORY_NBYTES // 2 - MiB
    with child("wait_in_put", f"{server.url}?transport={path}", "half", str(nbytes)) as writer:
        assert writer.hear() == {"reserved": [0]}
        said = writer.hear()
        counters = cache.stat()["counters"]
        assert counters["reservations"] == 1
        assert counters["inflight_bytes"] > nbytes
        writer.signal(signal.SIGKILL)
        assert writer.end() == -signal.SIGKILL
    eventually(
        lambda: (now := cache.stat()["counters"])["held_bytes"] == now["inflight_bytes"] == now["reservations"] == 0,
        "the reservation ends with its connection",
    )
    assert time.monotonic() - said["at_s"] < 20
    keys = keys_of(1, "half")
    assert cache.match_prefix(keys) == 0
    assert all(cache.put(keys, values_of(keys, nbytes)))


@pytest.mark.parametrize("own_socket", [False, True], ids=["port", "unix"])
def test_clients_miss_while_the_server_is_dead_and_recover_when_it_is_back(tmp_path: Path, own_socket: bool) -> None:
    unix = str(tmp_path / "shard.sock")
    words = ["--unix", unix] if own_socket else []
    keys = keys_of(3, "dead")
    values, deadline_s = values_of(keys, 1000), 5.0
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(reserved_address())
        first = stack.enter_context(ServerProcess("16MiB", *words, listen=place))
        url = f"mmcache+unix://{unix}" if own_socket else first.url
        cache, late = (stack.enter_context(mmcache.connect(url, deadline_s=deadline_s)) for _ in range(2))
        assert all(cache.put(keys, values))
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        for client in (cache, late):
            began = time.monotonic()
            assert {result.outcome for result in client.get_into(keys, blanks(3, 1000))} == {Outcome.UNAVAILABLE}
            assert {result.outcome for result in client.put(keys, values)} == {Outcome.UNAVAILABLE}
            assert client.match_prefix(keys) == 0
            with client.acquire(keys) as lease:
                assert lease.frames == [None] * 3
            assert time.monotonic() - began < 1.6 * deadline_s  # nobody is there to be waited for
        with ServerProcess("16MiB", *words, listen=place):
            for client in (cache, late):
                eventually(partial(stores, client, keys, values), "the client stores again")
                buffers = blanks(3, 1000)
                assert all(client.get_into(keys, buffers))
                assert all(map(np.array_equal, buffers, values))
                assert client.stat()["transport"] == "shm"


@pytest.mark.parametrize("lazy", [False, True], ids=["known", "unknown"])
def test_a_stopped_server_costs_a_call_its_deadline_and_no_more(
    server: ServerProcess, cache: Client, lazy: bool
) -> None:
    keys, deadline_s = keys_of(2, "asleep"), 2.0
    values = values_of(keys, 1000)
    assert all(cache.put(keys, values))

    def took_s() -> float:
        """Two calls of a client that has not failed before, while the server is stopped."""
        with mmcache.connect(server.url, deadline_s=deadline_s, lazy=lazy) as client:
            suspend(server.pid)
            try:
                began = time.monotonic()
                assert not any(client.get_into(keys, blanks(2, 1000)))
                assert time.monotonic() - began > 0.8 * deadline_s
                assert not any(client.get_into(keys, blanks(2, 1000)))  # the breaker is open: no second wait
                ended = time.monotonic()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            buffers = blanks(2, 1000)
            eventually(lambda: reads(client, keys, buffers), "the client hits again")
        assert all(map(np.array_equal, buffers, values))
        return ended - began

    in_time(took_s, 1.5 * deadline_s)


def test_a_view_held_too_long_by_a_stopped_reader_is_reported_lost(server: ServerProcess, cache: Client) -> None:
    fill_all(cache, "viewed", HELD)
    with child("hold", server.url, "viewed", str(HELD), str(VALUE_NBYTES)) as reader:
        said = reader.hear()
        assert (said["leased"], said["right"]) == (HELD, True)
        reader.signal(signal.SIGSTOP)
        reader.wait_stopped()
        turn_memory_over_past_expiry(cache)
        reader.signal(signal.SIGCONT)
        reader.tell()
        assert reader.hear() == {"lost": True, "right": False}  # the bytes did change, and the reader was told
        assert reader.end() == 0


def test_a_lease_given_back_in_time_held(server: ServerProcess, cache: Client) -> None:
    with (
        ServerProcess(str(MEMORY_NBYTES), "--lease-s", "60") as patient,
        mmcache.connect(patient.url, deadline_s=20) as writer,
    ):
        fill_all(writer, "viewed", HELD)
        with child("hold", patient.url, "viewed", str(HELD), str(VALUE_NBYTES)) as reader:
            assert reader.hear()["leased"] == HELD
            refused = fill(writer, "pressure", 14)
            reader.tell()
            assert reader.hear() == {"lost": False, "right": True}
        assert "refused" in refused
        assert still_right(writer, "viewed", HELD)
        fill_all(writer, "pressure again", 7)


@PATHS
@pytest.mark.parametrize("check", ["verify", "trust"])
def test_a_reader_stopped_while_reading_never_returns_wrong_bytes(
    server: ServerProcess, cache: Client, path: str, check: str
) -> None:
    fill_all(cache, "read", HELD)
    url = f"{server.url}?transport={path}"
    with child("stop_in_get", url, "read", str(HELD), str(VALUE_NBYTES), check) as reader:
        reader.wait_stopped()
        turn_memory_over_past_expiry(cache)
        reader.signal(signal.SIGCONT)
        said = reader.hear()
    assert said["wrong"] == 0, said
    if path != "tcp":  # there the server keeps what it is still sending, so hits, all of them right, are fine
        assert "hit" not in said["outcomes"], said
        assert check == "trust" or said["verify_failures"] > 0, said  # bytes did change under it
    assert cache.stat()["counters"].get("corrupt_dropped", 0) == 0


@PATHS
@pytest.mark.parametrize("pressed", [True, False], ids=["memory taken", "memory left"])
def test_a_writer_stopped_while_writing_harms_nobody(
    server: ServerProcess, cache: Client, path: str, pressed: bool
) -> None:
    nbytes = 3 * MiB + 17
    with child("stop_in_put", f"{server.url}?transport={path}", "slow", str(nbytes)) as writer:
        assert writer.hear() == {"reserved": [0]}
        writer.wait_stopped()
        if pressed:
            turn_memory_over_past_expiry(cache)
        else:
            time.sleep(1.2 * LEASE_S)
        fill(cache, "others", 3)
        writer.signal(signal.SIGCONT)
        said = writer.hear()
    assert said["outcome"] in ("refused", "stored"), said
    keys, buffers = keys_of(1, "slow"), blanks(1, nbytes)
    (read,) = cache.get_into(keys, buffers)
    if said["outcome"] == "stored":
        assert read
        assert np.array_equal(buffers[0], value_of(keys.digests[0], nbytes))
    else:
        assert "expired" in said["reason"]
        assert read.outcome is Outcome.MISS
        assert all(cache.put(keys, values_of(keys, nbytes)))
    if pressed:
        assert said["outcome"] == "refused"
    assert still_right(cache, "others", 3)
    counters = cache.stat()["counters"]
    assert counters["reservations"] == 0
