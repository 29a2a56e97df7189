"""A partition: packets vanish in the middle of a transfer, on a network of this test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.testing.process import ServerProcess
from tests.integration.support import MiB, blanks, eventually, keys_of, values_of

NAMESPACE = f"mmcache-{os.getpid()}"
OUTSIDE, INSIDE = f"mmo{os.getpid()}"[:15], f"mmi{os.getpid()}"[:15]
HERE, THERE = "198.18.213.1", "198.18.213.2"  # a range for tests between networks: RFC 2544
DEADLINE_S, SLACK_S = 1.5, 2.0
NBYTES, COUNT = 8 * MiB, 2
SLOW = "tbf rate 160mbit burst 256kb latency 400ms"  # a get of them all takes most of a second
NOTHING = "tbf rate 8bit burst 10b limit 10b"  # no packet is that small: each is dropped


def run(*words: str) -> None:
    """One command of iproute2; skips the test where it is not permitted."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespace to be had: {' '.join(words)}: {done.stderr.strip()}")


class Wire:
    """The link between this process and a namespace with a server in it; `limit` says what it lets through."""

    def limit(self, rule: str) -> None:
        run("tc", "qdisc", "replace", "dev", OUTSIDE, "root", *rule.split())
        run("ip", "netns", "exec", NAMESPACE, "tc", "qdisc", "replace", "dev", INSIDE, "root", *rule.split())


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root, ip and tc (iproute2)")
    inside = ("ip", "netns", "exec", NAMESPACE, "ip")
    try:
        run("ip", "netns", "add", NAMESPACE)
        run("ip", "link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", NAMESPACE)
        run("ip", "address", "add", f"{HERE}/30", "dev", OUTSIDE)
        run("ip", "link", "set", OUTSIDE, "up")
        run(*inside, "address", "add", f"{THERE}/30", "dev", INSIDE)
        run(*inside, "link", "set", INSIDE, "up")
        run(*inside, "link", "set", "lo", "up")
        between = Wire()
        between.limit(SLOW)
        yield between
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], capture_output=True, check=False)  # and the link with it


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
    values, buffers = values_of(keys, NBYTES), blanks(COUNT, NBYTES)
    assert all(neighbour.put(keys, values))
    with mmcache.connect(server.url, deadline_s=DEADLINE_S) as cache:
        assert cache.contains(keys) == [True] * COUNT

        def cut() -> None:
            while np.array_equal(buffers[0][:64], blanks(1, 64)[0]):
                time.sleep(0.001)
            wire.limit(NOTHING)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            begin = time.monotonic()
            results = cache.get_into(keys, buffers)
            took_s = time.monotonic() - begin
            thread.join()
            assert not results[-1]
            assert took_s < DEADLINE_S + SLACK_S
            assert not any(cache.get_into(keys, blanks(COUNT, NBYTES)))  # cut off still
            eventually(lambda: neighbour.stat()["counters"]["leases"] == 0, "what was being sent is let go of")
            assert all(neighbour.get_into(keys, blanks(COUNT, NBYTES)))
        finally:
            wire.limit(SLOW)
        small = keys_of(1, "after")
        eventually(lambda: all(cache.put(small, values_of(small, 100))), "the client stores again")
        assert all(cache.get_into(small, blanks(1, 100)))


def test_a_put_that_is_cut_off_is_refused_in_time_and_leaves_nothing(
    wire: Wire, server: ServerProcess, neighbour: Client
) -> None:
    keys = keys_of(COUNT, "cut put")
    values = values_of(keys, NBYTES)
    with mmcache.connect(server.url, deadline_s=DEADLINE_S) as cache:
        assert cache.match_prefix(keys) == 0

        def cut() -> None:
            eventually(lambda: neighbour.stat()["counters"]["reservations"] > 0, "the put has begun")
            wire.limit(NOTHING)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            begin = time.monotonic()
            results = cache.put(keys, values)
            took_s = time.monotonic() - begin
            thread.join()
            assert not any(results)
            assert took_s < DEADLINE_S + SLACK_S
            eventually(
                lambda: (now := neighbour.stat()["counters"])["reservations"] == now["inflight_bytes"] == 0,
                "the server gives up what stopped arriving",
            )
            assert neighbour.match_prefix(keys) == 0
            assert all(neighbour.put(keys, values))
        finally:
            wire.limit(SLOW)
