"""A partition: packets vanish in the middle of a transfer, on a network of this test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.testing.process import ServerProcess
from tests.integration.support import MiB, blanks, eventually, in_time, keys_of, values_of
from tests.integration.wire_bed import NAMESPACE, NOTHING, SLOW, THERE, Wire, network

pytestmark = pytest.mark.alone  # one network of these addresses at a time

DEADLINE_S, SLACK_S = 1.5, 2.0
NBYTES, COUNT = 8 * MiB, 2


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with network() as between:
        yield between


@pytest.fixture(scope="module")
def server(wire: Wire) -> Iterator[ServerProcess]:
    process = ServerProcess(
        "64MiB",
        "--insecure-network",
        listen=f"{THERE}:0",
        environment={"MMCACHE_IO_TIMEOUT_S": "1"},
        under=("ip", "netns", "exec", NAMESPACE),
    )
    with process:
        yield process
        assert process.stop() == 0
        assert process.said == ""


@pytest.fixture(scope="module")
def neighbour(server: ServerProcess) -> Iterator[Client]:
    """A client on the server's own host: unix sockets know no network namespaces."""
    with mmcache.connect(f"mmcache+unix://{server.unix_path}", deadline_s=20) as client:
        yield client


def test_a_get_that_is_cut_off_is_a_miss_in_time_and_holds_nothing(
    wire: Wire, server: ServerProcess, neighbour: Client
) -> None:
    keys = keys_of(COUNT, "cut get")
    values = values_of(keys, NBYTES)
    assert all(neighbour.put(keys, values))
    with mmcache.connect(server.url, deadline_s=DEADLINE_S, lazy=True) as cache:
        eventually(lambda: cache.contains(keys) == [True] * COUNT, "it is there")

        def cut_off() -> float:
            """How long the get took; 0 if it ended before it was cut off, as on a machine that pauses."""
            wire.limit(SLOW)
            buffers, over = blanks(COUNT, NBYTES), threading.Event()

            def cut() -> None:
                while np.array_equal(buffers[0][:64], blanks(1, 64)[0]) and not over.wait(0.001):
                    pass
                wire.limit(NOTHING)

            thread = threading.Thread(target=cut)
            thread.start()
            begin = time.monotonic()
            results = cache.get_into(keys, buffers)
            took_s = time.monotonic() - begin
            over.set()
            thread.join()
            for result, buffer, value in zip(results, buffers, values, strict=True):
                assert not result or np.array_equal(buffer, value), "what did not come was a hit"
            began = not np.array_equal(buffers[0][:64], blanks(1, 64)[0])
            return took_s if began and not results[-1] else 0.0

        try:
            in_time(lambda: float(eventually(cut_off, "a get is cut off")), DEADLINE_S + SLACK_S)
            assert not any(cache.get_into(keys, blanks(COUNT, NBYTES)))  # cut off still
            eventually(lambda: neighbour.stat()["counters"]["leases"] == 0, "what was being sent is let go of")
            assert all(neighbour.get_into(keys, blanks(COUNT, NBYTES)))
        finally:
            wire.limit(SLOW)
        small = keys_of(1, "after")
        eventually(lambda: all(cache.put(small, values_of(small, 100))), "the client stores again")
        eventually(lambda: all(cache.get_into(small, blanks(1, 100))), "and reads again")


def test_a_put_that_is_cut_off_is_refused_in_time_and_leaves_nothing(
    wire: Wire, server: ServerProcess, neighbour: Client
) -> None:
    keys = keys_of(COUNT, "cut put")
    values = values_of(keys, NBYTES)
    with mmcache.connect(server.url, deadline_s=DEADLINE_S, lazy=True) as cache:

        def cut_off() -> float:
            """How long the put took; 0 if some of it was stored before it was cut off, or it had not begun."""
            wire.limit(SLOW)
            neighbour.delete(keys)
            cache.match_prefix(keys)
            over, begun = threading.Event(), threading.Event()

            def cut() -> None:
                while not begun.is_set() and not over.wait(0.01):
                    if neighbour.stat()["counters"]["reservations"] > 0:
                        begun.set()
                wire.limit(NOTHING)

            thread = threading.Thread(target=cut)
            thread.start()
            begin = time.monotonic()
            results = cache.put(keys, values)
            took_s = time.monotonic() - begin
            over.set()
            thread.join()
            there = neighbour.contains(keys)
            assert not any(result and not found for result, found in zip(results, there, strict=True)), "not stored"
            return took_s if begun.is_set() and not any(results) and not any(there) else 0.0

        try:
            in_time(lambda: float(eventually(cut_off, "a put is cut off")), DEADLINE_S + SLACK_S)
            eventually(
                lambda: (now := neighbour.stat()["counters"])["reservations"] == now["inflight_bytes"] == 0,
                "the server gives up what stopped arriving",
            )
            assert neighbour.match_prefix(keys) == 0
            assert all(neighbour.put(keys, values))
        finally:
            wire.limit(SLOW)
