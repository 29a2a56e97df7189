"""The public carrier over real gRPC: tensors in and out, the same entries as over the framed socket, and its limits."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import mmcache
from mmcache.frame import DTYPES, MAX_NAME_NBYTES
from mmcache.keys import Key
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import as_dtype
from mmcache.testing.process import ServerProcess
from tests.integration.rpc_support import CACHE, Rpc, ones, put_of, put_request, rpc_to, tensor
from tests.integration.support import NAMESPACE, ROOT, MiB, eventually, keys_of, run_cli

LIMIT_NBYTES = 4 * MiB
WORDS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = {"MMCACHE_MAX_GRPC_NBYTES": "4MiB"}
    with ServerProcess("64MiB", "--grpc", "127.0.0.1:0", environment=settings) as running:
        yield running


@pytest.fixture
def rpc(server: ServerProcess) -> Iterator[Rpc]:
    with rpc_to(server.grpc_address) as client:
        yield client


def words_of(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape, dtype=int))
    data = np.random.default_rng(7).bytes(count * DTYPES[dtype][1])
    words = np.frombuffer(data, WORDS.get(dtype, dtype)).reshape(shape)
    return (np.frombuffer(data, np.uint8) & 1).view(bool).reshape(shape) if dtype == "bool" else words


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (1, 2, 1, 2, 1, 2, 1, 2)], ids=str)
def test_every_dtype_goes_both_ways_bit_for_bit(
    rpc: Rpc, server: ServerProcess, dtype: str, shape: tuple[int, ...]
) -> None:
    words = words_of(dtype, shape)
    value = as_dtype(words, dtype) if dtype in WORDS else words
    with mmcache.connect(server.url, deadline_s=20) as client:
        by_rpc, framed = keys_of(1, f"rpc/{dtype}/{shape}"), keys_of(1, f"framed/{dtype}/{shape}")
        assert rpc("Put", put_request(put_of(by_rpc[0], tensor("x", words, dtype)))).status == bytes([pb.STORED])
        back = np.zeros(shape, words.dtype)
        assert client.get_into(by_rpc, [{"x": as_dtype(back, dtype) if dtype in WORDS else back}])[0]
        assert back.tobytes() == words.tobytes()
        assert client.put(framed, [{"x": value}])[0]
    for keys in (by_rpc, framed):
        (entry,) = rpc("Get", pb.GetRequest(keys=keys[0].digest)).entries
        (found,) = entry.tensors
        assert (entry.status, entry.kind, entry.namespace) == (pb.FOUND, "kv", NAMESPACE.id)
        assert (entry.home, entry.parent) == (keys[0].home, b"")
        assert (found.name, found.dtype, tuple(found.shape), found.data) == ("x", dtype, shape, words.tobytes())
        assert found.xxh3_128 == xxhash.xxh3_128_digest(words.tobytes())


def test_a_batch_has_several_tensors_misses_and_a_prefix(rpc: Rpc) -> None:
    keys = keys_of(4, "batch")
    names = ("a", "b", "ü" * (MAX_NAME_NBYTES // 2))
    tensors = [tensor(name, np.arange(place, dtype=np.int64)) for place, name in enumerate(names)]
    stored = [keys[0], keys[1], keys[3]]
    assert rpc("Put", put_request(*(put_of(key, *tensors) for key in stored))).status == bytes([pb.STORED] * 3)
    assert rpc("Put", put_request(put_of(keys[1], *tensors))).status == bytes([pb.PRESENT])
    column = b"".join(keys.digests)
    entries = rpc("Get", pb.GetRequest(keys=column)).entries
    assert [entry.status for entry in entries] == [pb.FOUND, pb.FOUND, pb.MISS, pb.FOUND]
    assert all([found.name for found in entry.tensors] == list(names) for entry in entries if entry.status)
    assert len(rpc("Get", pb.GetRequest(keys=column, prefix=True)).entries) <= 3
    assert rpc("Contains", pb.ContainsRequest(keys=column)).present == bytes([1, 1, 0, 1])
    assert rpc("Delete", pb.DeleteRequest(keys=column)).deleted == bytes([1, 1, 0, 1])
    assert rpc("Stat", pb.StatRequest()).counters["stored"] >= 3
    assert rpc("Inspect", pb.InspectRequest(key=keys[0].digest)) == pb.InspectReply()


def test_ttl_parents_and_facts_are_kept(rpc: Rpc) -> None:
    parent, child, hourly, brief = keys_of(4, "kept")
    link = put_of(child, tensor("x", ones(8)), parent=parent.digest)
    link.chain_index = 1
    lasts = put_of(hourly, tensor("x", ones(8)), ttl_ms=3_600_000)
    entries = (put_of(parent, tensor("x", ones(8))), link, lasts)
    before_ms = time.time_ns() // 1_000_000
    assert rpc("Put", put_request(*entries)).status == bytes([pb.STORED] * 3)
    found = rpc("Get", pb.GetRequest(keys=child.digest + hourly.digest)).entries
    assert (found[0].parent, found[0].chain_index, found[0].expires_ms) == (parent.digest, 1, 0)
    assert found[0].created_ms >= before_ms
    assert found[1].expires_ms == found[1].created_ms + 3_600_000
    told = rpc("Inspect", pb.InspectRequest(key=child.digest))
    assert (told.kind, dict(told.facts)) == ("kv", dict(NAMESPACE.facts))

    def there(key: Key) -> int:
        return int(rpc("Contains", pb.ContainsRequest(keys=key.digest)).present[0])

    passes = put_request(put_of(brief, tensor("x", ones(8)), ttl_ms=300))
    eventually(lambda: rpc("Put", passes).status == bytes([pb.STORED]), "it is stored before its time has passed")
    eventually(lambda: not there(brief), "the time to live passed")
    assert there(hourly)


def bad_puts() -> dict[str, tuple[pb.PutRequest, str]]:
    key = keys_of(1, "bad")[0]
    good = tensor("x", ones(4))

    def changed(**fields: Any) -> pb.PutRequest:
        return put_request(put_of(key, pb.Tensor(**{**_fields(good), **fields})))

    return {
        "a short key": (put_request(pb.PutEntry(key=b"short", tensors=[good])), r"entries\[0\].key has 5 bytes"),
        "a short parent": (put_request(put_of(key, good, parent=b"p")), r"entries\[0\].parent has 1 bytes"),
        "an unknown dtype": (changed(dtype="float4"), "dtype 'float4' cannot be stored; use one of"),
        "another size": (changed(shape=[5]), r"has 4 bytes of data; uint8 of shape \[5\] has 5"),
        "no name": (changed(name=""), "must be 1 to 56 UTF-8 bytes"),
        "a shape that overflows": (changed(shape=[1 << 63, 0, 1 << 63]), "beyond 1099511627776 bytes"),
        "many sizes": (changed(shape=[1] * 100_000), "100000 sizes; the limit is 8"),
        "a short checksum": (changed(xxh3_128=b"x"), "an xxh3_128 of 1 bytes"),
        "two names alike": (put_request(put_of(key, good, good)), "share a name"),
        "an unknown kind": (put_request(put_of(key, good), kind="vector"), "kind 'vector' is unknown; use one of kv"),
        "no namespace": (put_request(put_of(key, good), facts={}), "namespace has 0 bytes"),
        "another namespace": (put_request(put_of(key, good), namespace=bytes(32)), "not the digest of these facts"),
        "an unknown modality": (put_request(put_of(key, good, modality=-1)), "modality -1 is unknown"),
        "an endless life": (put_request(put_of(key, good, ttl_ms=1 << 63)), "leave it out for no limit"),
    }


def _fields(message: pb.Tensor) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


@pytest.mark.parametrize("name", sorted(bad_puts()))
def test_what_cannot_be_stored_is_an_error_that_says_why(rpc: Rpc, name: str) -> None:
    request, words = bad_puts()[name]
    code, details = rpc.refused("Put", request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(words, details), details
    assert rpc("Contains", pb.ContainsRequest(keys=keys_of(1, "bad")[0].digest)).present == b"\0"


def test_a_wrong_checksum_is_one_entrys_bad_frame(rpc: Rpc) -> None:
    keys = keys_of(3, "sums")
    right = xxhash.xxh3_128_digest(ones(9).data)
    sums = (right, right[::-1], b"")
    entries = [put_of(key, tensor("x", ones(9), xxh3_128=given)) for key, given in zip(keys, sums, strict=True)]
    assert rpc("Put", put_request(*entries)).status == bytes([pb.STORED, pb.BAD_FRAME, pb.STORED])
    assert rpc("Contains", pb.ContainsRequest(keys=b"".join(keys.digests))).present == bytes([1, 0, 1])
    explained = rpc("Explain", pb.ExplainRequest(keys=keys[1].digest))
    assert (explained.why, explained.put_status) == (bytes([pb.REFUSED]), bytes([pb.BAD_FRAME])), "not: timed out"


@pytest.mark.parametrize("over", [1 << 10, 16 << 20], ids=["just over", "far over"])
def test_a_message_over_the_limit_is_refused(rpc: Rpc, over: int) -> None:
    request = put_request(put_of(keys_of(1, "large")[0], tensor("x", ones(LIMIT_NBYTES + over))))
    code, details = rpc.refused("Put", request)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    wanted = "send fewer keys at once, raise MMCACHE_MAX_GRPC_NBYTES" if over < LIMIT_NBYTES else "larger than max"
    assert wanted in details
    # What was answered before is given back once the answer is out.
    eventually(lambda: rpc("Stat", pb.StatRequest()).counters["inflight_bytes"] <= 1 << 10, "nothing is in flight")


def test_too_many_small_things_are_refused_before_they_are_parsed(rpc: Rpc, server: ServerProcess) -> None:
    def resident_nbytes() -> int:
        with open(f"/proc/{server.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_nbytes()
    empty_tensors = b"\x32\x00" * (1 << 20)
    body = b"\x0a\x02kv" + b"\x22" + bytes([0x80, 0x80, 0x80, 0x01]) + empty_tensors
    call = rpc.channel.unary_unary(f"/{CACHE.full_name}/Put")
    with pytest.raises(grpc.RpcError) as caught:
        call(body)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "put fewer entries at once" in caught.value.details()
    assert resident_nbytes() - before < 48 * MiB  # parsed, they would take over 100
    assert len(pb.PutRequest.FromString(body).entries[0].tensors) == 1 << 20


def test_a_reply_never_passes_the_limit_and_says_what_is_left(rpc: Rpc) -> None:
    keys = keys_of(5, "replies")
    for key in keys:
        assert rpc("Put", put_request(put_of(key, tensor("x", ones(MiB))))).status == bytes([pb.STORED])
    column = b"".join(keys.digests)
    reply = rpc("Get", pb.GetRequest(keys=column))
    assert [entry.status for entry in reply.entries] == [pb.FOUND] * 3 + [pb.LATER] * 2
    assert reply.ByteSize() <= LIMIT_NBYTES
    assert [entry.status for entry in rpc("Get", pb.GetRequest(keys=column[96:])).entries] == [pb.FOUND] * 2
    little = rpc("Get", pb.GetRequest(keys=column, max_nbytes=2 * MiB))
    assert [entry.status for entry in little.entries] == [pb.FOUND] + [pb.LATER] * 4
    code, details = rpc.refused("Get", pb.GetRequest(keys=column, max_nbytes=MiB))
    assert (code, details.split()[0]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, keys[0].digest.hex())
    assert "raise the request's max_nbytes" in details
    eventually(lambda: rpc("Stat", pb.StatRequest()).counters["held_bytes"] == 0, "nothing is held")


def test_bad_questions_are_errors_with_the_words_of_the_framed_protocol(rpc: Rpc) -> None:
    bad = grpc.StatusCode.INVALID_ARGUMENT
    assert rpc.refused("Get", pb.GetRequest(keys=b"x" * 33)) == (
        bad,
        "a key column of 33 bytes is not a multiple of 32; keys have 32 bytes",
    )
    many = pb.ContainsRequest(keys=bytes(32) * 4097)
    assert rpc.refused("Contains", many)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    for name in ("Get", "Put", "Contains", "Delete"):
        with pytest.raises(grpc.RpcError) as caught:
            rpc.channel.unary_unary(f"/{CACHE.full_name}/{name}")(b"\xff\xff")
        assert caught.value.code() == bad
        assert "cannot be read as" in caught.value.details()


def test_a_newer_client_is_told_and_fields_it_adds_are_ignored(rpc: Rpc) -> None:
    for path in ("/mmcache.v2.Cache/Get", f"/{CACHE.full_name}/Prefetch"):
        with pytest.raises(grpc.RpcError) as caught:
            rpc.channel.unary_unary(path)(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "this server speaks mmcache.v1.Cache, with Get, Put" in caught.value.details()
    newer = pb.GetRequest(keys=bytes(32)).SerializeToString() + b"\xf2\x3f\x05later"  # field 1022
    reply = rpc.channel.unary_unary(f"/{CACHE.full_name}/Get")(newer)
    assert [entry.status for entry in pb.GetReply.FromString(reply).entries] == [pb.MISS]


def test_compressed_requests_are_refused_whole(server: ServerProcess) -> None:
    with rpc_to(server.grpc_address) as rpc:
        call = rpc.channel.unary_unary(f"/{CACHE.full_name}/Put")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(64 * MiB), compression=grpc.Compression.Gzip)
    assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


def test_operators_work_over_grpc_too() -> None:
    with ServerProcess("16MiB", "--grpc", "127.0.0.1:0") as server, rpc_to(server.grpc_address) as rpc:
        keys = keys_of(3, "operators")
        assert rpc("Put", put_request(put_of(keys[0], tensor("x", ones(9))))).status == bytes([pb.STORED])
        (row,) = rpc("List", pb.ListRequest()).namespaces
        assert (row.namespace, row.entries, dict(row.facts)) == (NAMESPACE.id, 1, dict(NAMESPACE.facts))
        assert rpc("Get", pb.GetRequest(keys=keys[1].digest)).entries[0].status == pb.MISS
        assert rpc("Explain", pb.ExplainRequest(keys=keys[0].digest + keys[1].digest)).why == bytes(
            [pb.HERE, pb.NEVER_STORED]
        )
        assert [miss.key for miss in rpc("Recent", pb.RecentRequest(limit=5)).misses] == [keys[1].digest]
        assert rpc("Mode", pb.ModeRequest(set=True, mode=pb.READ)).mode == pb.READ
        stopped = rpc("Put", put_request(put_of(keys[2], tensor("x", ones(9)))))
        assert (stopped.status, stopped.mode) == (bytes([pb.STOPPED]), pb.READ)
        assert rpc("Mode", pb.ModeRequest(set=True, mode=pb.WRITE)).mode == pb.WRITE
        reply = rpc("Get", pb.GetRequest(keys=keys[0].digest))
        assert ([entry.status for entry in reply.entries], reply.mode) == ([pb.MISS], pb.WRITE)
        rpc("Mode", pb.ModeRequest(set=True, mode=pb.BOTH))
        assert rpc("Audit", pb.AuditRequest(share=1)).entries == 1
        assert rpc("Remove", pb.RemoveRequest(of=pb.Selection(namespace=NAMESPACE.id))).entries == 1
        assert rpc("Contains", pb.ContainsRequest(keys=keys[0].digest)).present == b"\0"


def test_damaged_memory_is_a_miss_and_is_dropped() -> None:
    from contextlib import ExitStack

    from mmcache.config import ServerConfig
    from mmcache.server.caller import LOCAL
    from mmcache.server.service import Service
    from mmcache.server.tensor_service import TensorService
    from mmcache.store.shard import Shard

    config = ServerConfig(memory_nbytes=MiB)
    shard = Shard(config)
    service = TensorService(Service(shard, config))
    key = keys_of(1, "damaged")[0]
    body = put_request(put_of(key, tensor("x", ones(1000)))).SerializeToString()
    with ExitStack() as held:
        assert service.call("Put", LOCAL, body, held) == pb.PutReply(status=bytes([pb.STORED])).SerializeToString()
        _, (found,) = shard.acquire(0, [key.digest])
        shard.view(found)[-1] ^= 1  # type: ignore[arg-type]
        ask = pb.GetRequest(keys=key.digest * 2).SerializeToString()
        answer = pb.GetReply.FromString(service.call("Get", LOCAL, ask, held))
        assert answer == pb.GetReply(entries=[pb.Entry(), pb.Entry()])
        assert (shard.stat()["corrupt_dropped"], shard.contains(0, [key.digest], prefix=False)) == (1, [False])
    shard.close()


def test_reflection_lists_the_service_and_its_schema(server: ServerProcess) -> None:
    with rpc_to(server.grpc_address) as rpc:
        database = ProtoReflectionDescriptorDatabase(rpc.channel)
        assert CACHE.full_name in database.get_services()
        file = database.FindFileContainingSymbol(CACHE.full_name)
        assert "Get" in [method.name for method in file.service[0].method]


def test_health_says_serving_then_not_serving_while_the_last_calls_end() -> None:
    patient = {"MMCACHE_DRAIN_S": "30", "MMCACHE_IO_TIMEOUT_S": "30"}
    with (
        ServerProcess("16MiB", "--grpc", "127.0.0.1:0", environment=patient) as server,
        rpc_to(server.grpc_address) as rpc,
    ):
        health = health_pb2_grpc.HealthStub(rpc.channel)
        statuses = health_pb2.HealthCheckResponse
        question = health_pb2.HealthCheckRequest(service=CACHE.full_name)
        assert health.Check(question).status == statuses.SERVING
        watching = health.Watch(question)
        assert next(watching).status == statuses.SERVING
        go_on: list[bytes] = []

        def slowly() -> Iterator[bytes]:
            eventually(lambda: go_on, "the test goes on")
            yield go_on[0]

        call = rpc.channel.stream_unary(f"/{CACHE.full_name}/Contains").future(slowly(), timeout=20)
        assert health.Check(question).status == statuses.SERVING  # so what was sent before it has come, too,
        time.sleep(0.5)  # and what has come is soon under way; nothing can be asked about that
        assert server.process is not None
        server.process.terminate()
        assert next(watching).status == statuses.NOT_SERVING
        assert health.Check(question).status == statuses.NOT_SERVING
        code, details = rpc.refused("Contains", pb.ContainsRequest(keys=bytes(32)))
        assert (code, "stopping" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        go_on.append(pb.ContainsRequest(keys=bytes(32)).SerializeToString())
        assert pb.ContainsReply.FromString(call.result(20)).present == b"\0"
        assert server.process.wait(20) == 0


def test_a_peer_that_sends_nothing_is_let_go_and_others_are_served() -> None:
    settings = {"MMCACHE_IO_TIMEOUT_S": "0.5", "MMCACHE_MAX_GRPC_NBYTES": "1MiB"}
    with (
        ServerProcess("16MiB", "--grpc", "127.0.0.1:0", environment=settings) as server,
        rpc_to(server.grpc_address) as rpc,
    ):
        over = threading.Event()

        def never() -> Iterator[bytes]:
            over.wait(30)
            yield b""

        def is_served() -> bool:
            try:
                return bool(rpc("Contains", pb.ContainsRequest(keys=bytes(32)), timeout_s=15).present == b"\0")
            except grpc.RpcError as error:  # where the server stood still this call was overdue, too
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise
                return False

        eventually(is_served, "it is connected")
        path = f"/{CACHE.full_name}/Contains"
        silent = [rpc.channel.stream_unary(path).future(never()) for _ in range(8)]  # as many as there are workers
        eventually(is_served, "others are served")
        assert {call.code() for call in silent} <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
        over.set()


def test_the_samples_of_the_page_run(server: ServerProcess) -> None:
    page = (ROOT / "docs" / "grpc.md").read_text()
    samples = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(samples) == 2
    for sample in samples:
        assert "127.0.0.1:7601" in sample
        code = sample.replace("127.0.0.1:7601", server.grpc_address)
        code = code.replace("transport=grpc", "transport=grpc&connect_s=15&deadline_s=15")
        ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_an_address_beyond_this_host_is_refused() -> None:
    ended = run_cli("serve", "--listen", "127.0.0.1:0", "--unix", "", "--grpc", "0.0.0.0:0")
    assert ended.returncode == 2
    assert "--grpc 0.0.0.0:0 reaches beyond this host" in ended.stderr


def test_a_port_that_is_taken_is_an_error(server: ServerProcess) -> None:
    ended = run_cli("serve", "--listen", "127.0.0.1:0", "--unix", "", "--grpc", server.grpc_address)
    assert ended.returncode == 1
    assert "choose another --grpc" in ended.stderr
