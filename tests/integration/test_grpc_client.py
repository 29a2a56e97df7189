"""The Python client over gRPC: limits, who asks, other ways to the same entries, threads, forks, and no gRPC at all."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client import core
from mmcache.client.operations import Operations
from mmcache.errors import AccessDenied, ConfigError, TransportError
from mmcache.keys import Namespace
from mmcache.media import Media
from mmcache.tensors import as_dtype
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome
from tests.integration.certificates import Authority
from tests.integration.support import MiB, blanks, eventually, keys_of, values_of
from tests.integration.test_grpc_access import TOKENS, write_access

SMALL = {"MMCACHE_MAX_GRPC_NBYTES": str(MiB), "MMCACHE_MAX_BATCH_KEYS": "8"}


def url_of(server: ServerProcess, options: str = "", scheme: str = "mmcache") -> str:
    return f"{scheme}://{server.grpc_address}?transport=grpc&connect_s=15&deadline_s=15{options}"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("64MiB", "--grpc", "127.0.0.1:0", environment=SMALL) as running:
        yield running


def test_batches_keep_the_servers_limit_of_a_message_and_what_passes_it_says_so(server: ServerProcess) -> None:
    keys = keys_of(21, "messages")
    values = [np.resize(value, 400_000 if at % 3 else 20_000) for at, value in enumerate(values_of(keys, 400_000))]
    values[7] = np.ones(MiB, np.uint8)
    with mmcache.connect(url_of(server)) as cache, mmcache.connect(server.url, deadline_s=15) as framed:
        results = cache.put(keys, values)
        refused = results.pop(7)
        assert refused.outcome is Outcome.REFUSED
        assert "MMCACHE_MAX_GRPC_NBYTES" in refused.reason
        assert {str(result.outcome) for result in results} == {"stored"}
        assert all(framed.put(keys[7], values[7:8]))
        buffers = [np.zeros_like(value) for value in values]
        results = cache.get_into(keys, buffers)
        too_large = results.pop(7)
        assert too_large.outcome is Outcome.MISS
        assert "this reply may have 1048576: raise the request's max_nbytes or" in too_large.reason
        assert all(results)
        assert all(np.array_equal(a, b) for at, (a, b) in enumerate(zip(values, buffers, strict=True)) if at != 7)
        with cache.acquire(keys) as lease:
            assert [frame is None for frame in lease.frames] == [at == 7 for at in range(21)]
        assert cache.counters["failures"] == 0


def test_entries_of_many_tensors_are_put_few_at_a_time(server: ServerProcess) -> None:
    keys = keys_of(6, "many tensors")
    value = {f"t{at}": np.full((2, 3), at, np.int16) for at in range(10)}
    huge = {f"t{at}": np.full(1, at, np.int16) for at in range(1000)}  # more fields than this server takes in a call
    with mmcache.connect(url_of(server)) as cache:
        results = cache.put(keys, [value, value, huge, value, value, value])
        refused = results.pop(2)
        assert refused.outcome is Outcome.REFUSED
        assert "fields" in refused.reason
        assert all(results)
        into = [{name: np.zeros_like(array) for name, array in value.items()} for _ in range(5)]
        assert all(cache.get_into(keys[:2] + keys[3:], into))
        assert all(np.array_equal(one[name], value[name]) for one in into for name in value)


def test_what_one_way_stored_the_other_finds_with_all_that_belongs_to_it(server: ServerProcess) -> None:
    namespace = Namespace(kind="kv", model="by/grpc", dtype="bfloat16", layout="LBHNC", block_size=16)
    chain = namespace.block_keys(list(range(32)))
    words = [np.arange(64, dtype=np.uint16) + at for at in range(2)]
    both = chain + keys_of(1, "another namespace")
    with mmcache.connect(url_of(server)) as cache, mmcache.connect(server.url, deadline_s=15) as framed:
        media = [Media("image", 400), None, None]
        values = [*(as_dtype(one, "bfloat16") for one in words), np.ones(9, np.uint8)]
        assert all(cache.put(both, values, ttl_s=1000, media=media))
        with framed.acquire(chain) as lease, cache.acquire(chain) as received:
            for at, (frame, same) in enumerate(zip(lease.frames, received.frames, strict=True)):
                assert frame is not None
                assert same is not None
                frame.verify()
                same.verify()
                meta = frame.header.meta
                assert (meta.key, meta.parent, meta.home) == (chain.digests[at], chain.parents[at], chain.homes[at])
                assert (meta.namespace, meta.chain_index) == (namespace.id, at)
                assert 900_000 < meta.expires_ms - time.time() * 1000 <= 1_000_000
                assert same.header.tensors == frame.header.tensors
                assert same.header.meta._replace(writer=meta.writer) == meta
                assert same.data[frame.header.header_nbytes :] == frame.data[frame.header.header_nbytes :]
        assert dict(cache.inspect(chain.digests[0]).facts) == dict(namespace.facts)
        rows = {entry.key: entry for entry in Operations(cache).entries()}
        assert (rows[chain.digests[0]].modality, rows[chain.digests[0]].units) == (2, 400)
        into = [as_dtype(np.zeros_like(one), "bfloat16") for one in words]
        assert all(framed.get_into(chain, into))
        assert all(np.array_equal(one.array, word) for one, word in zip(into, words, strict=True))


def test_a_prefix_is_counted_and_not_pinned(server: ServerProcess) -> None:
    keys = keys_of(20, "prefix")
    with mmcache.connect(url_of(server)) as cache:
        assert all(cache.put(keys[:11], values_of(keys[:11], 100)))
        pinned = cache.pin_prefix(keys)
        assert pinned.count == 11
        eventually(lambda: cache.stat()["counters"]["leases"] == 0, "no lease is left, and none is new")
        assert pinned.release()


def test_what_operators_stopped_is_known_and_left_alone(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(1, "stopped")
    with mmcache.connect(url_of(server)) as cache:
        operations = Operations(cache)
        operations.set_mode("read")
        monkeypatch.setattr(core, "STOPPED_PAUSE_S", 60.0)  # however long it takes from one put to the next
        try:
            first, second = cache.put(keys, values_of(keys, 10)), cache.put(keys, values_of(keys, 10))
            assert {one.outcome for one in first + second} == {Outcome.REFUSED}
            assert "an operator has stopped writes" in second[0].reason
            assert cache.counters["stopped"] == 1
        finally:
            operations.set_mode("both")
            monkeypatch.undo()
        eventually(lambda: all(cache.put(keys, values_of(keys, 10))), "it stores again")


def test_many_threads_share_a_client(server: ServerProcess) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        keys = keys_of(4, f"thread {number}")
        values, buffers = values_of(keys, 50_000), blanks(4, 50_000)
        for _ in range(5):
            if not (all(cache.put(keys, values)) and all(cache.get_into(keys, buffers))):
                wrong.append("no hit")
            if not all(map(np.array_equal, values, buffers)):
                wrong.append("another value")

    with mmcache.connect(url_of(server), deadline_s=20) as cache:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


# --------------------------------------------------------------------------------------------- who asks
def test_a_wrong_token_is_denied_and_a_new_one_in_its_file_is_used_at_once(tmp_path: Path) -> None:
    file, token = tmp_path / "access.toml", tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKENS["team-a"])
    keys = keys_of(1, "token")
    with ServerProcess("16MiB", "--grpc", "127.0.0.1:0", "--access", write_access(file)) as server:
        with pytest.raises(AccessDenied, match="no valid token"):
            mmcache.connect(url_of(server), token="wrong")
        with mmcache.connect(url_of(server), token="wrong", lazy=True) as stranger:
            (result,) = stranger.put(keys, values_of(keys, 10))
            assert result.outcome is Outcome.UNAVAILABLE
            assert not stranger.answering
        with mmcache.connect(url_of(server, f"&token_file={token}")) as cache:
            assert all(cache.put(keys, values_of(keys, 10)))
            with pytest.raises(AccessDenied, match="admin"):
                Operations(cache).set_mode("off")
            write_access(file, without="team-a")

            def denied() -> bool:
                return cache.get_into(keys, blanks(1, 10))[0].outcome is Outcome.UNAVAILABLE

            eventually(denied, "a revoked token is refused")
            token.write_text(TOKENS["team-b"])
            eventually(lambda: cache.contains(keys) == [False] and cache.answering, "another tenant sees nothing")
            assert all(cache.put(keys, values_of(keys, 10)))
            token.chmod(0o644)
            with pytest.raises(TransportError, match="mode 0644"):
                cache.stat()


def test_a_token_does_not_travel_readable_to_another_host() -> None:
    url = "mmcache://cache.invalid:7601?transport=grpc&deadline_s=1"
    with pytest.raises(TransportError, match="unencrypted to another host and was not sent; use mmcaches"):
        mmcache.connect(url, token="secret")
    with pytest.raises(TransportError, match=r"gRPC to cache\.invalid:7601|deadline"):
        mmcache.connect(url + "&insecure_network=true", token="secret")


def test_a_server_is_verified_and_a_certificate_says_who_asks(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    cert, key = authority.issue("server")
    ours = "&cert={}&key={}".format(*authority.issue("team-a-client"))
    access = write_access(tmp_path / "access.toml")
    words = ["--access", access, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca]
    with ServerProcess("16MiB", "--grpc", "127.0.0.1:0", *words) as server:
        url = url_of(server, f"&ca={authority.ca}", "mmcaches")
        with mmcache.connect(url + ours) as cache:
            assert cache.stat()["transport"] == "grpc-tls"
        with mmcache.connect(url + ours + "&server_name=localhost", token=TOKENS["team-a"]) as cache:
            assert cache.stat()["transport"] == "grpc-tls"
        for bad in (
            url_of(server, f"&ca={other.ca}", "mmcaches") + ours,
            url + ours + "&server_name=elsewhere.example",
            url,
            url_of(server),
        ):
            with pytest.raises(TransportError):
                mmcache.connect(bad, deadline_s=5)
        with pytest.raises(AccessDenied):
            mmcache.connect(url + ours, token=TOKENS["team-b"])
    with pytest.raises(ConfigError, match=r"no-such\.pem"):
        mmcache.connect(f"mmcaches://127.0.0.1:1?transport=grpc&ca={tmp_path}/no-such.pem", lazy=True)


# --------------------------------------------------------------------------------------------- processes
def test_a_forked_child_misses_and_says_why_and_the_parent_goes_on(server: ServerProcess) -> None:
    keys = keys_of(1, "forked")
    with mmcache.connect(url_of(server)) as cache:
        assert all(cache.put(keys, values_of(keys, 10)))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                (result,) = cache.get_into(keys, blanks(1, 10))
                code = 0 if "does not survive a fork" in result.reason else 2
                cache.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert all(cache.get_into(keys, blanks(1, 10)))


def test_without_grpc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcache.transport.rpc", raising=False)
    monkeypatch.delattr(mmcache.transport, "rpc", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmcache\[grpc\]'"):
        mmcache.connect("mmcache://127.0.0.1:7601?transport=grpc", lazy=True)


def test_the_framed_port_is_no_grpc_port_and_a_closed_one_is_told_too(server: ServerProcess) -> None:
    for address in (server.url, "mmcache://127.0.0.1:1"):
        with pytest.raises(TransportError, match="is `serve --grpc` there"):
            mmcache.connect(f"{address}?transport=grpc", deadline_s=15)
