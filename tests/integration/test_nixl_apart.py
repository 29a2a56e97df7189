"""NIXL between two networks: other devices only where they are named, and a link that is cut during a read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mmcache
from mmcache.testing.process import ServerProcess
from tests.integration.nixl_bed import OVER_TCP, agent_of, listens_on, needs_nixl
from tests.integration.support import ROOT, MiB, eventually, in_time, keys_of, values_of
from tests.integration.wire_bed import HERE, INSIDE, NAMESPACE, NOTHING, OUTSIDE, SLOW, THERE, Wire, network

pytestmark = [needs_nixl, pytest.mark.alone]

DEADLINE_S = 2.0
NBYTES, COUNT = 8 * MiB, 2
# A process of its own, as one's agent has the devices of its first use: reads each time it is told to, says what came.
READER = """
import contextlib, json, os, sys, time
import mmcache
from mmcache.transport.nixl import client_agent
from tests.integration.nixl_bed import listens_on
from tests.integration.support import blanks, keys_of, values_of
nbytes, count = int(sys.argv[2]), int(sys.argv[3])
keys = keys_of(count, "apart")
with mmcache.connect(sys.argv[1], deadline_s=float(sys.argv[4]), lazy=True) as cache:
    for line in sys.stdin:
        buffers, began = blanks(count, nbytes), time.monotonic()
        results = cache.get_into(keys, buffers)
        took_s = time.monotonic() - began
        right = all(bytes(b) == bytes(v) for r, b, v in zip(results, buffers, values_of(keys, nbytes)) if r)
        said = {"outcomes": [str(r.outcome) for r in results], "right": right, "took_s": took_s,
                "listens": listens_on(os.getpid()), "held": client_agent().abandoned_nbytes}
        if line == "path\\n":
            with contextlib.suppress(mmcache.MMCacheError):
                said["path"] = cache.stat()["transport"]
        print(json.dumps(said), flush=True)
"""


@pytest.fixture
def wire() -> Iterator[Wire]:
    with network() as between:
        yield between


@pytest.fixture
def server(wire: Wire) -> Iterator[ServerProcess]:
    arguments = ("64MiB", "--insecure-network", "--nixl", INSIDE)
    under = ("ip", "netns", "exec", NAMESPACE)
    with ServerProcess(*arguments, listen=f"{THERE}:0", environment=OVER_TCP, under=under) as process:
        yield process


def address(text: str) -> str:
    """As the kernel lists it."""
    return "".join(f"{int(part):02X}" for part in reversed(text.split(".")))


def test_reads_over_named_devices_and_through_a_cut(wire: Wire, server: ServerProcess) -> None:
    keys = keys_of(COUNT, "apart")
    with mmcache.connect(f"mmcache+unix://{server.unix_path}", deadline_s=20) as neighbour:
        assert all(neighbour.put(keys, values_of(keys, NBYTES)))
    assert set(listens_on(agent_of(server))) == {address(THERE)}
    command = [sys.executable, "-c", READER, f"{server.url}?transport=nixl", str(NBYTES), str(COUNT), str(DEADLINE_S)]
    environment = {**os.environ, **OVER_TCP, "UCX_NET_DEVICES": OUTSIDE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=-1, stdout=-1, text=True) as reader:
        try:
            assert reader.stdin is not None
            assert reader.stdout is not None

            def ask(word: str = "") -> None:
                print(word, file=reader.stdin, flush=True)

            def hear() -> dict[str, Any]:
                said: dict[str, Any] = json.loads(reader.stdout.readline())  # type: ignore[union-attr]
                assert said["right"]
                assert set(said["outcomes"]) <= {"hit", "unavailable"}
                return said

            def whole() -> dict[str, Any]:
                ask("path")
                said = hear()
                return said if said["outcomes"] == ["hit"] * COUNT and said.get("path") == "nixl" else {}

            first = eventually(whole, "a read ends within its time")
            assert set(first["listens"]) == {address(HERE)}

            def again() -> bool:
                said = whole()
                return bool(said) and not said["held"]

            def cut_off() -> float:
                """How long the read took; 0 if some of it came before it was cut off, as on a machine that pauses."""
                ask()
                time.sleep(0.3)  # a read of them all takes most of a second
                wire.limit(NOTHING)
                said = hear()
                wire.limit(SLOW)
                eventually(again, "reads are hits again, and what was given up has ended", 60)
                return float(said["took_s"]) if said["outcomes"] == ["unavailable"] * COUNT else 0.0

            in_time(lambda: float(eventually(cut_off, "a read is cut off", 60)), DEADLINE_S + 1)
        finally:
            reader.kill()
