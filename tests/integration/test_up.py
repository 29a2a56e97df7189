"""Clusters of real servers from the command line: up, serve --join, and what status, where and drain say of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import TransportError
from mmcache.testing.process import ServerProcess, children_of, suspend
from tests.integration.redis_bed import Redis
from tests.integration.support import blanks, eventually, keys_of, run_cli, values_of
from tests.integration.test_shards import gone

NBYTES = 64 << 10


@pytest.fixture
def there() -> Iterator[Redis]:
    with Redis() as one:
        yield one


def up(*words: str) -> ServerProcess:
    return ServerProcess("48MiB", *words, command="up")


def joined(there: Redis, *words: str, memory: str = "16MiB") -> ServerProcess:
    return ServerProcess(memory, "--join", url_of(there), *words)


def url_of(there: Redis) -> str:
    return f"mmcache+redis://127.0.0.1:{there.port}/0?cluster=test"


def status_of(url: str) -> dict[str, Any]:
    """Asked again where Redis is too late with its answer, so that nothing is said."""
    said = eventually(lambda: run_cli("cluster", "status", "-c", url, "--json").stdout, "the cluster says how it is")
    found: dict[str, Any] = json.loads(said)
    return found


def members_of(url: str) -> list[str]:
    return [row["id"] for row in status_of(url)["members"]]


def id_of(server: ServerProcess) -> str:
    return str(server.shards[0]["url"]).removeprefix("mmcache://")


def client_of(url: str, **options: Any) -> Client:
    return mmcache.connect(url, deadline_s=20, **options)


def all_come_back(url: str, name: str = "up") -> None:
    keys, buffers = keys_of(32, name), blanks(32, NBYTES)
    with client_of(url) as cache:
        assert all(cache.put(keys, values_of(keys, NBYTES)))
        assert all(cache.get_into(keys, buffers))
    assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))


@contextlib.contextmanager
def not_started_again(cluster: ServerProcess) -> Iterator[None]:
    """Meanwhile nobody starts again what is killed."""
    suspend(cluster.pid)
    try:
        yield
    finally:
        os.kill(cluster.pid, signal.SIGCONT)


def test_up_is_a_cluster_on_this_host_that_ends_when_told() -> None:
    with up() as cluster:
        assert cluster.cluster_url == "mmcache://" + ",".join(one["url"][len("mmcache://") :] for one in cluster.shards)
        all_come_back(cluster.cluster_url)
        found = status_of(cluster.cluster_url)
        assert [row["share"] for row in found["members"]] == [pytest.approx(1 / 3)] * 3
        assert sum(row["entries"] for row in found["members"]) == 32
        assert min(row["entries"] for row in found["members"]) > 0
        holder = children_of(cluster.pid)[1]  # what it held is gone with it
        (server,) = children_of(holder)
        with not_started_again(cluster):
            os.kill(holder, signal.SIGKILL)
            eventually(lambda: gone(server), "its server ended, too")
            ended = run_cli("cluster", "status", "-c", cluster.cluster_url)
            assert ended.returncode == 1
            assert "1 of 3 do not answer" in ended.stderr
        eventually(lambda: run_cli("cluster", "status", "-c", cluster.cluster_url).returncode == 0, "it is back")
        all_come_back(cluster.cluster_url, "again")
        processes = children_of(cluster.pid)
        assert cluster.stop(signal.SIGINT) == 0
        assert all(map(gone, processes))


def test_a_shard_of_up_that_is_killed_comes_back_with_what_it_stored() -> None:
    keys, buffers = keys_of(32, "held"), blanks(32, NBYTES)
    with up() as cluster, client_of(cluster.cluster_url) as cache:
        assert all(cache.put(keys, values_of(keys, NBYTES)))
        before = sum(row["entries"] for row in status_of(cluster.cluster_url)["members"])
        holders = children_of(cluster.pid)
        for holder in holders:
            (server,) = children_of(holder)
            os.kill(server, signal.SIGKILL)
            eventually(lambda: children_of(holder) not in ([], [server]), "another is started")  # noqa: B023
            eventually(lambda: run_cli("cluster", "status", "-c", cluster.cluster_url).returncode == 0, "it is back")
        assert sum(row["entries"] for row in status_of(cluster.cluster_url)["members"]) == before == 32
        eventually(lambda: all(cache.get_into(keys, buffers)), "clients turn to it again")
        assert children_of(cluster.pid) == holders
        assert cluster.stop() == 0
    assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))
    assert cluster.said.count("go on, 0 were dropped") == 3


@pytest.mark.parametrize(
    ("words", "environment", "under"),
    [
        pytest.param(["--no-hold"], {}, (), id="told so"),
        pytest.param([], {"MMCACHE_HOLD": "no"}, (), id="told so by the environment"),
        pytest.param([], {}, (sys.executable, "-m", "tests.integration.without_memfd"), id="no memory to hold"),
    ],
)
def test_up_without_holders(words: list[str], environment: dict[str, str], under: tuple[str, ...]) -> None:
    with ServerProcess("48MiB", *words, command="up", environment=environment, under=under) as cluster:
        all_come_back(cluster.cluster_url)
        assert [children_of(server) for server in children_of(cluster.pid)] == [[]] * 3
        with not_started_again(cluster):
            os.kill(children_of(cluster.pid)[0], signal.SIGKILL)
            eventually(lambda: run_cli("cluster", "status", "-c", cluster.cluster_url).returncode, "one is gone")
        eventually(lambda: run_cli("cluster", "status", "-c", cluster.cluster_url).returncode == 0, "it is back")
        assert sum(row["entries"] for row in status_of(cluster.cluster_url)["members"]) < 32


def test_up_with_redis_joins_each_shard_and_takes_each_out_again(there: Redis) -> None:
    redis = f"redis://127.0.0.1:{there.port}/0"
    with up("--redis", redis, "--cluster", "test") as cluster:
        assert cluster.cluster_url == url_of(there)
        assert all(shard["joined"] for shard in cluster.shards)
        all_come_back(cluster.cluster_url)
        assert sorted(members_of(url_of(there))) == sorted(shard["member"] for shard in cluster.shards)
        bench = run_cli("bench", "media", "--scale", "quick", "-c", url_of(there))
        assert (bench.returncode, "wrong=0 verify_failures=0" in bench.stdout) == (0, True), bench
        assert cluster.stop() == 0
    assert status_of(url_of(there)) == {"view": None, "members": [], "left_out": [], "problems": []}
    assert "no server is in cluster 'test'" in run_cli("cluster", "status", "-c", url_of(there)).stderr


def test_a_server_that_is_told_to_end_leaves_before_it_stops_to_serve(there: Redis) -> None:
    keys, buffers = keys_of(32, "leave"), blanks(32, NBYTES)

    def still_served(one: ServerProcess, two: ServerProcess) -> bool:
        """Between leaving and its end; False where the machine stopped us for as long as that takes."""
        stopped = threading.Thread(target=two.stop)
        leaving = id_of(two)
        stopped.start()
        eventually(lambda: members_of(url_of(there)) == [id_of(one)], "it has left")
        try:
            with mmcache.connect(f"mmcache://{leaving}") as still:
                assert still.stat()["server_id"]
            return [out["why"] for out in status_of(url_of(there))["left_out"]] == ["draining"]
        except TransportError:
            return False
        finally:
            stopped.join()

    with joined(there) as one, client_of(url_of(there)) as cache:

        def leaves() -> bool:
            with joined(there) as two:
                eventually(lambda: len(cache.stat()["shards"]) == 2, "the client has heard of it")
                assert all(cache.put(keys, values_of(keys, NBYTES)))
                return still_served(one, two)

        assert any(leaves() for _ in range(3))
        cache.get_into(keys, buffers)  # what it had is missed, and nothing is raised
        eventually(lambda: len(cache.stat()["shards"]) == 1, "the client has heard that it left")
        assert all(cache.put(keys, values_of(keys, NBYTES)))
        assert all(cache.get_into(keys, buffers))


def test_servers_and_clients_go_on_without_redis(there: Redis) -> None:
    with joined(there) as one, joined(there) as two, client_of(url_of(there)) as cache:
        keys, buffers = keys_of(32, "without"), blanks(32, NBYTES)
        assert all(cache.put(keys, values_of(keys, NBYTES)))
        there.kill()
        assert all(cache.get_into(keys, buffers))
        with joined(there) as late:
            assert late.shards[0]["joined"] is False
            with client_of(late.url) as known:
                assert known.stat()["server_id"]  # it serves who knows it
            there.start()
            expected = sorted(map(id_of, (one, two, late)))
            eventually(lambda: sorted(members_of(url_of(there))) == expected, "all are there again")
            eventually(lambda: len(cache.stat()["shards"]) == 3, "the client has heard of all")
            assert all(cache.get_into(keys, blanks(32, NBYTES)))  # also what the late one owns now
        assert "is not told of this server, it is tried again" in late.said
        assert "start it, or correct the URL" in late.said


@pytest.mark.parametrize("options", ["", "&replicas=2"])
def test_a_lazy_client_misses_until_redis_is_there_and_somebody_has_joined(there: Redis, options: str) -> None:
    there.kill()
    keys, buffers = keys_of(8, "lazy"), blanks(8, NBYTES)
    with pytest.raises(TransportError, match="start it, or correct the URL"):
        mmcache.connect(url_of(there) + options)
    with client_of(url_of(there) + options, lazy=True) as cache:

        def nobody() -> None:
            assert not any(cache.put(keys, values_of(keys, NBYTES)))
            assert (cache.match_prefix(keys), cache.contains(keys)) == (0, [False] * 8)
            assert not any(cache.get_into(keys, buffers))
            with cache.acquire(keys) as leased:
                assert leased.frames == [None] * 8
            with pytest.raises(TransportError):
                cache.stat()
            with pytest.raises(TransportError):
                cache.delete(keys)

        nobody()
        there.start()
        nobody()
        assert not cache.answering
        with joined(there):
            eventually(lambda: cache.answering, "who asks only those that answer asks again")
            eventually(lambda: all(cache.put(keys, values_of(keys, NBYTES))), "it is found")
            assert all(cache.get_into(keys, buffers))
            assert list(cache.stat()["shards"]) == members_of(url_of(there))
    assert all(map(np.array_equal, buffers, values_of(keys, NBYTES)))


def test_weights_are_memory_unless_told(there: Redis) -> None:
    with joined(there, memory="48MiB") as large, joined(there) as small, joined(there, "--weight", "0.0625") as told:
        shares = {row["id"]: row["share"] for row in status_of(url_of(there))["members"]}
    assert shares[id_of(large)] == pytest.approx(3 / 8)
    assert shares[id_of(small)] == pytest.approx(1 / 8)
    assert shares[id_of(told)] == pytest.approx(4 / 8)


def test_shards_advertise_ports_that_count_up(there: Redis) -> None:
    with joined(there, "--shards", "2", "--advertise", "mmcache://127.0.0.1:7000") as server:
        assert [shard["member"] for shard in server.shards] == ["127.0.0.1:7000", "127.0.0.1:7001"]
        found = status_of(url_of(there))
        assert [row["address"] for row in found["members"]] == ["mmcache://127.0.0.1:7000", "mmcache://127.0.0.1:7001"]
        assert all("why" in row for row in found["members"])  # nobody listens there


def test_where_says_who_owns_a_key_and_who_has_it() -> None:
    keys = keys_of(8, "where")
    with up() as cluster:
        with client_of(cluster.cluster_url) as cache:
            assert all(cache.put(keys, values_of(keys, NBYTES)))
        for key in keys:
            found = json.loads(run_cli("cluster", "where", key.hex(), "-c", cluster.cluster_url, "--json").stdout)
            assert found["home"] == key.home.hex()
            assert len(found["owners"]) == 3
            assert found["stored"] == [found["owners"][0]]
            assert found["silent"] == {}
        text = run_cli("cluster", "where", keys[3].hex(), "-c", cluster.cluster_url).stdout.splitlines()
        assert text[0] == f"home {keys[3].home.hex()}"
        assert text[1].endswith(": has it")
        assert text[3].endswith(": has it not")
        absent = run_cli("cluster", "where", "ab" * 32, "-c", cluster.cluster_url)
        assert absent.returncode == 1
        assert f"home {'ab' * 32}" in absent.stdout
        assert "nobody has" in absent.stderr


def test_drain_takes_a_server_out_and_undo_takes_it_back(there: Redis) -> None:
    with joined(there) as one, joined(there) as two:
        names = sorted(map(id_of, (one, two)))
        with client_of(url_of(there)) as cache:
            assert run_cli("cluster", "drain", names[0], "-c", url_of(there)).stdout == f"{names[0]} is out\n"
            eventually(lambda: len(cache.stat()["shards"]) == 1, "the client has heard of it")
            assert members_of(url_of(there)) == names[1:]
            last = run_cli("cluster", "drain", names[1], "-c", url_of(there))
            assert (last.returncode, "is the last one" in last.stderr) == (2, True)
            undone = run_cli("cluster", "drain", names[0], "--undo", "-c", url_of(there), "--json")
            assert json.loads(undone.stdout) == {"id": names[0], "drained": False}
            eventually(lambda: len(cache.stat()["shards"]) == 2, "the client has heard of it")
        unknown = run_cli("cluster", "drain", "nobody:1", "-c", url_of(there))
        assert unknown.returncode == 2
        assert f"there are {', '.join(names)}" in unknown.stderr
        assert run_cli("cluster", "drain", "nobody:1", "--undo", "-c", url_of(there)).returncode == 0
    static = run_cli("cluster", "drain", "a:1", "-c", "mmcache://a:1,b:1")
    assert (static.returncode, "take it out of the list" in static.stderr) == (2, True)


REDIS = "mmcache+redis://127.0.0.1:1/0"
REFUSED: list[tuple[list[str], int, str]] = [
    (["up", "--redis", "redis://127.0.0.1:1"], 1, "start it, or correct the URL"),
    (["up", "--redis", "http://127.0.0.1:1"], 2, "is no Redis URL"),
    (["up", "--cluster", "x"], 2, "give --redis too"),
    (["up", "--redis", "redis://:hunter2@127.0.0.1"], 2, "a password does not belong in a URL"),
    (["cluster", "status", "-c", REDIS], 1, "start it, or correct the URL"),
    (["cluster", "status", "-c", "mmcache+redis://127.0.0.1:1?speed=1"], 2, "unknown option 'speed'"),
    (["serve", "--join", "mmcache://a:1,b:1"], 2, "leave --join out"),
    (["serve", "--join", "mmcache+k8s://ns/cache"], 2, "leave --join out"),
    (["serve", "--join", "nonsense"], 2, "names no cluster"),
    (["serve", "--join", REDIS, "--listen", ""], 2, "--join needs an address"),
    (["serve", "--join", REDIS, "--listen", "0.0.0.0:0", "--insecure-network"], 2, "give --advertise mmcache://HOST"),
    (["serve", "--join", REDIS, "--advertise", "a:1"], 2, "is no address"),
    (["serve", "--join", REDIS, "--advertise", "mmcache://a:1/x"], 2, "is no address"),
    (["serve", "--join", REDIS, "--shards", "2", "--advertise", "mmcache://a:65535"], 2, "no port for shard 1"),
    (["serve", "--join", REDIS, "--weight", "-1"], 2, "weight is -1.0"),
    (["serve", "--join", REDIS, "--weight", "nan"], 2, "weight is nan"),
    (["serve", "--join", REDIS, "--weight", "inf"], 2, "weight is inf"),
    (["serve", "--weight", "2"], 2, "give join"),
]


@pytest.mark.parametrize(("words", "code", "says"), REFUSED)
def test_what_cannot_be_is_refused_with_what_to_do(words: list[str], code: int, says: str) -> None:
    ended = run_cli(*words)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert says in ended.stderr
    assert "hunter2" not in ended.stderr
