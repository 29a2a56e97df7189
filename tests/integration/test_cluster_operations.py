"""What operators do to a whole cluster by its URL: list, remove and audit on every shard, also while one is away."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import mmcache
from mmcache.client.operations import MODES, Operations
from mmcache.config import ServerConfig
from mmcache.errors import AccessDenied, TransportError
from mmcache.keys import Namespace
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from mmcache.testing import faults
from tests.integration.access_bed import TOKENS, tenants_file, write_access
from tests.integration.cluster_bed import NBYTES, cluster, prompt, put
from tests.integration.support import MiB, run_cli, values_of

OTHER = Namespace(kind="kv", model="other/model", dtype="uint8", layout="LBHNC", block_size=16)
ALL = pb.Selection()
T = TypeVar("T")


def test_ls_and_rm_reach_every_shard() -> None:
    with cluster(3, deadline_s=10.0) as three:
        cache, keys, others = three.connect(replicas="2"), prompt(1, 20_000), OTHER.block_keys(range(4000))
        put(cache, keys)
        assert all(cache.put(others, values_of(others, NBYTES)))
        operations = Operations(cache)
        listed = [entry.key for entry in operations.entries()]
        assert set(listed) == {*keys.digests, *others.digests}
        assert len(listed) > 1.9 * len(set(listed)), "each is on two shards"
        ours, theirs = operations.namespaces()
        assert (ours.entries + theirs.entries, ours.nbytes > theirs.nbytes) == (len(listed), True)
        assert ours.facts["model"] != theirs.facts["model"] == "other/model"
        lines = run_cli("ls", "--entries", "--model", "other/model", "-c", three.url(), "--json").stdout.splitlines()
        assert {json.loads(line)["key"] for line in lines} == {key.hex() for key in others.digests}
        assert len([*map(json.loads, run_cli("ls", "-c", three.url(), "--json").stdout.splitlines())]) == 2

        seen: list[tuple[int, int]] = []
        done = operations.remove(pb.Selection(facts={"model": "other/model"}), lambda *far: seen.append(far))
        assert (done.entries, done.silent) == (theirs.entries, {})
        assert len(seen) >= 3
        assert seen[-1][0] == seen[-1][1] == max(far for far, _ in seen)
        assert not any(cache.contains(others))
        assert all(cache.contains(keys))
        said = json.loads(run_cli("rm", "--all", "-c", three.url(), "--json").stdout)
        assert said == {"entries": ours.entries, "nbytes": ours.nbytes, "silent": {}}
        assert list(operations.entries()) == []


def test_a_mode_of_one_shard_is_that_of_its_namespaces() -> None:
    with cluster(2, deadline_s=10.0) as two:
        put(two.connect(), prompt(3))
        with mmcache.connect(two.servers[0].url) as one:
            Operations(one).set_mode("write", pb.Selection(kind="kv"))
        with mmcache.connect(two.servers[1].url) as other:
            Operations(other).set_mode("read", pb.Selection(kind="kv"))
        assert [MODES[row.mode] for row in Operations(two.connect()).namespaces()] == ["off"]


def test_who_cannot_be_asked_is_named_and_the_others_are_done() -> None:
    with cluster(3) as three:
        cache, keys = three.connect(), prompt(2, 20_000)
        put(cache, keys)
        before = {f"s{number}": one for number, one in enumerate(map(entries_of, (one.url for one in three.servers)))}
        assert all(before.values())
        three.servers[1].stop(signal.SIGKILL)
        operations = Operations(cache)
        with pytest.raises(TransportError, match=r"1 of 3 shards could not be asked \(s1: "):
            list(operations.entries())
        listed = [entry.key for entry in suppressed(operations.entries(), TransportError)]
        assert sorted(listed) == sorted([*before["s0"], *before["s2"]])
        assert sum(row.entries for row in suppressed(operations.namespaces(), TransportError)) == len(listed)
        audited = operations.audit(1.0)
        assert (audited.entries, set(audited.silent)) == (len(listed), {"s1"})
        ended = run_cli("rm", "--all", "-c", three.url(), "--json")
        assert ended.returncode == 1
        said = json.loads(ended.stdout)
        assert (said["entries"], set(said["silent"])) == (len(listed), {three.address(1)})
        assert f"not done, or not to the end, on {three.address(1)} (" in ended.stderr
        assert "run it again once" in ended.stderr
        ended = run_cli("audit", "-c", three.url())
        assert (ended.returncode, ended.stdout) == (1, "checked 0 entries, 0 B: 0 bad\n")
        assert f"on {three.address(1)} (" in ended.stderr
        for number in (0, 2):
            assert entries_of(three.servers[number].url) == []
            three.servers[number].stop(signal.SIGKILL)
        with pytest.raises(TransportError, match="none of 3 shards answers"):
            operations.remove(ALL)
        with pytest.raises(TransportError, match="3 of 3 shards"):
            list(operations.entries())


def test_an_audit_says_on_which_shard_the_bad_bytes_were() -> None:
    with two_servers_here() as (servers, url), mmcache.connect(url) as cache:
        keys = prompt(4, 20_000)
        assert all(put(cache, keys))
        rotten = entries_of(url_of(servers[1]))[:3]
        for key in rotten:
            faults.flip_bit(servers[1].shard, key, 11)
        ended = run_cli("audit", "-c", url)
        assert ended.returncode == 1
        name = url_of(servers[1]).rpartition("/")[2]
        assert sorted(line for line in ended.stdout.splitlines() if "dropped" in line) == sorted(
            f"  dropped {key.hex()} on {name}" for key in rotten
        )
        assert f"3 entries' bytes had changed in memory; test the memory of {name}" in ended.stderr
        again = json.loads(run_cli("audit", "-c", url, "--json").stdout)
        assert (again["entries"], again["bad"], again["bad_on"]) == (len(keys) - 3, [], [])


def test_a_walk_that_is_interrupted_ends_on_every_shard() -> None:
    with two_servers_here() as (_, url), mmcache.connect(url) as cache:
        put(cache, prompt(5, 20_000))
        turns: list[int] = []

        def interrupt(done: int, total: int) -> None:
            turns.append(done)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Operations(cache).audit(1.0, progress=interrupt)
        assert 1 <= len(turns) <= 2, "a walk a shard, and each ends"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmcache-walk")]


def test_whoever_may_not_is_refused_as_by_one_server(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tenants_file())
    with two_servers_here(access_file=access) as (_, url), mmcache.connect(url, token=TOKENS["a"]) as cache:
        keys = prompt(6, 20_000)
        assert all(put(cache, keys))
        with pytest.raises(AccessDenied, match="admin"):
            Operations(cache).remove(ALL)
        with pytest.raises(AccessDenied, match="admin"):
            Operations(cache).audit(1.0)
        assert {entry.key for entry in Operations(cache).entries()} == set(keys.digests)
        with mmcache.connect(url, token=TOKENS["ops"]) as ops:
            assert Operations(ops).remove(pb.Selection(tenant="b")).entries == 0
            assert Operations(ops).remove(pb.Selection(tenant="a")).entries == len(keys)


def entries_of(url: str) -> list[bytes]:
    with mmcache.connect(url) as client:
        return [entry.key for entry in Operations(client).entries()]


def suppressed(rows: Iterator[T], error: type[Exception]) -> Iterator[T]:
    """As far as they come."""
    with contextlib.suppress(error):
        yield from rows


def url_of(server: Server) -> str:
    assert server.address is not None
    return "mmcache://{}:{}".format(*server.address)


@contextlib.contextmanager
def two_servers_here(**settings: Any) -> Iterator[tuple[list[Server], str]]:
    """Two servers of this process, whose memory a test can spoil, and the URL of both."""
    servers = [Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=64 * MiB, **settings)) for _ in range(2)]
    try:
        for server in servers:
            server.start()
        yield servers, f"mmcache://{','.join(url_of(one).rpartition('/')[2] for one in servers)}?deadline_s=10"
    finally:
        for server in servers:
            server.stop()
