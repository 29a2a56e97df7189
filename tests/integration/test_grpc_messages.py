"""How the Python client cuts what it moves over gRPC into messages, and what the server's heap does with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.client.rpc import MESSAGE_NBYTES
from mmcache.testing.process import ServerProcess
from mmcache.transport.rpc import RpcChannel
from tests.integration.support import ROOT, MiB, blanks, keys_of, values_of

HEADS_NBYTES = 64 << 10


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        ServerProcess("256MiB", "--grpc", "127.0.0.1:0") as server,
        mmcache.connect(f"mmcache://{server.grpc_address}?transport=grpc&connect_s=15", deadline_s=20) as client,
    ):
        yield client


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each call, as (method, bytes of the larger of request and reply)."""
    calls: list[tuple[str, int]] = []
    real = RpcChannel.call

    def call(channel: RpcChannel, method: str, body: bytes, *rest: Any) -> bytes:
        calls.append((method, len(body)))
        reply = real(channel, method, body, *rest)
        calls[-1] = (method, max(len(body), len(reply)))
        return reply

    monkeypatch.setattr(RpcChannel, "call", call)
    return calls


def test_many_values_go_in_messages_of_a_few_mib(client: Client, seen: list[tuple[str, int]]) -> None:
    keys, buffers = keys_of(20, "many"), blanks(20, MiB)
    assert all(client.put(keys, values_of(keys, MiB)))
    assert all(client.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values_of(keys, MiB)))
    for method in ("Put", "Get"):
        sizes = [nbytes for name, nbytes in seen if name == method]
        assert len(sizes) == 3
        assert max(sizes) <= MESSAGE_NBYTES + HEADS_NBYTES


def test_a_larger_value_goes_alone_and_at_the_first_try(client: Client, seen: list[tuple[str, int]]) -> None:
    nbytes = 20 * MiB
    keys, buffers = keys_of(2, "large"), blanks(2, nbytes)
    assert all(client.put(keys, values_of(keys, nbytes)))
    assert all(client.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values_of(keys, nbytes)))
    for method in ("Put", "Get"):
        sizes = [size for name, size in seen if name == method]
        assert len(sizes) == 2
        assert nbytes < min(sizes) <= max(sizes) < nbytes + HEADS_NBYTES


def test_a_lease_of_a_larger_value_asks_again(client: Client, seen: list[tuple[str, int]]) -> None:
    keys, nbytes = keys_of(1, "leased"), 20 * MiB
    assert all(client.put(keys, values_of(keys, nbytes)))
    with client.acquire(keys) as lease:
        (frame,) = lease.frames
        assert frame is not None
        assert bytes(frame.payload(frame.header.tensors[0])) == values_of(keys, nbytes)[0].tobytes()
    assert [name for name, _ in seen].count("Get") == 2


FAULTS = """
import resource, sys
from mmcache.server.heap import keep_freed_memory
data = bytes(8 << 20)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        several = [b"".join([data, b"x"]) for _ in range(4)]  # as one message, in several copies on its way
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
before, kept, after = faults(), keep_freed_memory(), (faults(), faults())[1]
print(before, kept, after)
"""


def test_what_messages_were_in_is_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    if kept != "True":
        pytest.skip("the C library is not glibc")
    assert int(before) > 1000  # else there was nothing to gain
    assert int(after) < int(before) / 10
