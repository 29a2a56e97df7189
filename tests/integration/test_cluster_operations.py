"""What operators do to a whole cluster by its URL: list, remove, audit, explain, watch; also while a shard is away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mmcache
from mmcache.client.cluster import ClusterClient
from mmcache.client.operations import MODES, Operations
from mmcache.cluster.placement import Member, View
from mmcache.cluster.settings import parse_cluster_url
from mmcache.config import ServerConfig
from mmcache.errors import AccessDenied, TransportError, UsageError
from mmcache.explain import Recorded
from mmcache.keys import Namespace
from mmcache.pb import cache_pb2 as pb
from mmcache.server.serve import Server
from mmcache.store import sweep
from mmcache.testing import faults
from mmcache.testing.process import suspend
from mmcache.top import Rates, top_table
from mmcache.why import Why
from tests.integration.access_bed import TOKENS, tenants_file, write_access
from tests.integration.cluster_bed import NBYTES, Told, cluster, prompt, put
from tests.integration.support import NAMESPACE, MiB, eventually, run_cli, values_of

OTHER = Namespace(kind="kv", model="other/model", dtype="uint8", layout="LBHNC", block_size=16)
ALL = pb.Selection()


class Here:
    """Servers of this process, whose memory and pieces of work a test can change. To a client of `url` they are their
    `addresses`, to one of `connect` s0, s1 and so on, so that every run places alike."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.addresses = ["{}:{}".format(*one.address) for one in servers if one.address is not None]
        self.urls = [f"mmcache://{address}" for address in self.addresses]
        self.url = f"mmcache://{','.join(self.addresses)}?deadline_s=10"
        self.view = View(tuple(Member(f"s{number}", url) for number, url in enumerate(self.urls)))

    def connect(self, view: View | None = None) -> ClusterClient:
        return ClusterClient(parse_cluster_url(self.url), Told(view or self.view))


@contextlib.contextmanager
def servers_here(count: int = 2, **settings: Any) -> Iterator[Here]:
    servers = [Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=64 * MiB, **settings)) for _ in range(count)]
    try:
        for server in servers:
            server.start()
        yield Here(servers)
    finally:
        for server in servers:
            server.stop()


def entries_of(url: str) -> list[bytes]:
    with mmcache.connect(url) as client:
        return [entry.key for entry in Operations(client).entries()]


# ------------------------------------------------------------------------------------------ all are there
def test_ls_and_rm_reach_every_shard() -> None:
    with cluster(3) as three:
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
        shown = run_cli("ls", "-c", three.url())
        assert (shown.stdout.count("entries, "), shown.returncode) == (2, 0)

        removed = operations.remove(pb.Selection(facts={"model": "other/model"}))
        assert (removed.entries, operations.silent) == (theirs.entries, {})
        assert not any(cache.contains(others))
        assert all(cache.contains(keys))
        said = json.loads(run_cli("rm", "--all", "-c", three.url(), "--json").stdout)
        assert said == {"entries": ours.entries, "nbytes": ours.nbytes, "silent": {}}
        assert list(operations.entries()) == []


def test_walks_of_many_steps_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ROWS_PER_PIECE", 64)
    with servers_here(3) as here, here.connect() as cache:
        keys = prompt(7, 20_000)
        assert all(put(cache, keys))
        operations, far = Operations(cache), list[tuple[int, int]]()
        assert operations.audit(1.0, progress=lambda *now: far.append(now)).entries == len(keys)
        assert len(far) > 12
        assert all(done <= total for done, total in far)
        assert far[-1][0] == far[-1][1]
        assert max(total for _, total in far) < 2 * far[-1][1]
        assert sorted(entry.key for entry in operations.entries()) == sorted(keys.digests)
        assert operations.remove(ALL).entries == len(keys)


def test_namespaces_are_one_of_each_tenant_with_what_any_shard_was_told(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tenants_file())
    with servers_here(access_file=access) as here:
        small, large = prompt(8, 9_000), prompt(8, 18_000)
        for tenant, keys in (("a", small), ("b", large)):
            with mmcache.connect(here.url, token=TOKENS[tenant]) as cache:
                assert all(put(cache, keys))
        with mmcache.connect(here.url, token=TOKENS["ops"]) as ops:
            rows = Operations(ops).namespaces()
            assert [(row.tenant, row.entries) for row in rows] == [("b", len(large)), ("a", len(small))]
            assert {row.facts["model"] for row in rows} == {"test/model"}
            assert Operations(ops).remove(pb.Selection(tenant="a")).entries == len(small)


def test_a_mode_of_one_shard_is_that_of_its_namespaces() -> None:
    with servers_here() as here, here.connect() as cache:
        assert all(put(cache, prompt(3, 20_000)))
        for url, mode in zip(here.urls, ("write", "read"), strict=True):
            with mmcache.connect(url) as one:
                Operations(one).set_mode(mode, pb.Selection(kind="kv"))
        assert [MODES[row.mode] for row in Operations(cache).namespaces()] == ["off"]


def test_an_audit_says_on_which_shard_the_bad_bytes_were() -> None:
    with servers_here() as here, here.connect() as cache:
        keys = prompt(4, 20_000)
        assert all(put(cache, keys))
        name = here.addresses[1]
        rotten = entries_of(here.urls[1])[:3]
        for key in rotten:
            faults.flip_bit(here.servers[1].shard, key, 11)
        ended = run_cli("audit", "-c", here.url)
        assert ended.returncode == 1
        assert sorted(line for line in ended.stdout.splitlines() if "dropped" in line) == sorted(
            f"  dropped {key.hex()} on {name}" for key in rotten
        )
        assert f"3 entries' bytes had changed in memory; test the memory of {name}\n" in ended.stderr
        again = json.loads(run_cli("audit", "-c", here.url, "--json").stdout)
        assert (again["entries"], again["bad"], again["bad_on"], again["silent"]) == (len(keys) - 3, [], [], {})


# ------------------------------------------------------------------------------------------ some are not
def test_who_cannot_be_asked_is_named_and_the_others_are_done() -> None:
    with cluster(3) as three:
        cache, keys = three.connect(), prompt(2, 20_000)
        put(cache, keys)
        before = [entries_of(server.url) for server in three.servers]
        assert all(before)
        three.servers[1].stop(signal.SIGKILL)
        operations, there = Operations(cache), [*before[0], *before[2]]
        assert sorted(entry.key for entry in operations.entries()) == sorted(there)
        assert set(operations.silent) == {"s1"}
        assert sum(row.entries for row in operations.namespaces()) == len(there)
        assert set(operations.silent) == {"s1"}
        assert operations.audit(1.0).entries == len(there)
        assert set(operations.silent) == {"s1"}
        reasons = operations.explain([before[1][0], before[0][0]])
        assert [reason.why for reason in reasons] == [Why.NEVER_STORED, Why.HERE]
        assert reasons[0].text.endswith(": as far as is known, for 1 of 3 shards could not be asked")
        again = operations.explain([bytes([number % 256]) * 32 for number in range(1100)])
        assert {reason.text for reason in again} == {reasons[0].text}, "in every batch"
        name = three.address(1)
        for words in (("ls",), ("ls", "--entries"), ("audit",), ("explain", before[0][0].hex()), ("rm", "--all")):
            ended = run_cli(*words, "-c", three.url())
            assert ended.returncode == 1
            assert ended.stdout
            assert f"not done, or not to the end, on {name} (" in ended.stderr
        assert operations.remove(ALL) == (0, 0)
        assert (entries_of(three.servers[0].url), entries_of(three.servers[2].url)) == ([], [])
        for number in (0, 2):
            three.servers[number].stop(signal.SIGKILL)
        calls: list[Callable[[], Any]] = [
            lambda: operations.remove(ALL), lambda: list(operations.entries()), operations.namespaces,
            lambda: operations.audit(1.0), lambda: operations.explain([bytes(32)]), operations.recent, operations.mode,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(TransportError, match="none of 3 shards answers"):
                call()


def test_a_shard_that_refuses_costs_nobody_elses_answer() -> None:
    # Any server that starts on this host looks in at unix sockets: it takes no place here.
    with servers_here(max_connections=3, unix_path="") as here, contextlib.ExitStack() as stack:
        keys = prompt(9, 20_000)
        with here.connect() as cache:
            assert all(put(cache, keys))
        there = entries_of(here.urls[1])
        held: list[mmcache.Client] = []

        def another() -> bool:  # those of before may not have been let go yet
            with contextlib.suppress(TransportError):
                held.append(stack.enter_context(mmcache.connect(here.urls[0])))
            return len(held) == 3

        eventually(another, "no more may connect")
        eventually(lambda: not here.servers[1].service.connections, "the other one has let all go")
        with here.connect() as cache:
            operations = Operations(cache)
            assert sorted(entry.key for entry in operations.entries()) == sorted(there)
            assert "connections are open" in operations.silent["s0"]
            assert operations.remove(ALL).entries == len(there)
            assert "connections are open" in operations.silent["s0"]
        assert held[0].stat()["counters"]["entries"] == len(keys) - len(there)


def test_whoever_may_not_is_refused_as_by_one_server(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tenants_file())
    with servers_here(access_file=access) as here, mmcache.connect(here.url, token=TOKENS["a"]) as cache:
        keys = prompt(6, 20_000)
        assert all(put(cache, keys))
        with pytest.raises(AccessDenied, match="admin"):
            Operations(cache).remove(ALL)
        with pytest.raises(AccessDenied, match="admin"):
            Operations(cache).audit(1.0)
        assert {entry.key for entry in Operations(cache).entries()} == set(keys.digests)


def test_a_member_that_cannot_be_used_is_named() -> None:
    with servers_here() as here:
        view = View((*here.view.members, Member("nonsense", "mmcache://127.0.0.1:1?no_such_option=1")))
        with here.connect(view) as cache:
            keys = prompt(10, 20_000)
            put(cache, keys)
            operations = Operations(cache)
            stored = len(list(operations.entries()))
            assert 0 < stored < len(keys)
            assert "no_such_option" in operations.silent["nonsense"]
            assert operations.remove(ALL).entries == stored
            assert set(operations.silent) == {"nonsense"}
            assert "no_such_option" in cache.stat()["shards"]["nonsense"]
            with pytest.raises(TransportError, match="1 of 3 shards could not be asked to delete"):
                cache.delete(keys[:2])
            with pytest.raises(TransportError, match=r"1 of 3 shards could not be asked \(nonsense"):
                operations.set_mode("both")


def test_a_shard_that_leaves_during_a_walk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ROWS_PER_PIECE", 64)
    with servers_here() as here:
        told = Told(here.view)
        with ClusterClient(parse_cluster_url(here.url), told) as cache:
            keys = prompt(11, 20_000)
            assert all(put(cache, keys))
            operations, (goes, stays) = Operations(cache), sorted(here.view.members)
            iterator = operations.entries()
            listed = [next(iterator).key]
            told.now = View((stays,))
            cache.contains(keys[:1])  # so that the client knows
            listed += [entry.key for entry in iterator]
            assert set(operations.silent) == {goes.id}
            assert set(entries_of(stays.address)) < set(listed) < set(keys.digests)


def raised() -> None:
    raise KeyboardInterrupt


def sent() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(name="interruptible")
def fixture_interruptible() -> Iterator[None]:
    """What is started in the background of a shell ignores SIGINT: not here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interrupt", [raised, sent])
def test_an_interruption_ends_the_walk_on_every_shard(
    interrupt: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "ROWS_PER_PIECE", 16)
    with servers_here() as here, here.connect() as cache:
        put(cache, prompt(5, 30_000))
        far: list[float] = []

        def slowly(done: int, total: int) -> None:
            far.append(done / total)
            if len(far) == 4:
                interrupt()
            # Who is interrupted may be slow to hear of it: the end of all comes much later.
            time.sleep(0.02 if len(far) < 4 else 0.2)

        with pytest.raises(KeyboardInterrupt):
            Operations(cache).audit(1.0, progress=slowly)
        assert far[-1] < 0.5, "each ends after its step"
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmcache-ask")]


def test_where_threads_are_scarce_each_server_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = list[str](), threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name.startswith("mmcache-ask"):
            started.append(thread.name)
            if len(started) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(sweep, "ROWS_PER_PIECE", 64)
    with servers_here(3) as here, here.connect() as cache:
        keys = prompt(14, 20_000)
        assert all(put(cache, keys))
        monkeypatch.setattr(threading.Thread, "start", scarce)
        assert Operations(cache).audit(1.0).entries == len(keys)
        assert len(started) >= 2


def test_a_request_is_explained_with_what_all_its_questions_left_out(tmp_path: Path) -> None:
    with cluster(2) as two:
        tokens = [*range(20_000)]
        put(two.connect(), NAMESPACE.block_keys(tokens[:9_000]))
        request = tmp_path / "request.json"
        request.write_text(Recorded(NAMESPACE, tokens).to_json())
        whole = run_cli("explain", "--request", str(request), "-c", two.url())
        assert (whole.returncode, whole.stderr) == (0, "")
        assert "block 562 of 1250 is missing: never stored" in whole.stdout
        two.servers[1].stop(signal.SIGKILL)
        part = run_cli("explain", "--request", str(request), "-c", two.url())
        assert part.returncode == 1
        assert "1 of 2 shards could not be asked" in part.stdout
        assert f"on {two.address(1)} (" in part.stderr


def test_nobody_in_the_cluster_is_said() -> None:
    with servers_here(1) as here, here.connect(View((Member("", ""),))) as cache:
        with pytest.raises(TransportError, match="nobody is in the cluster yet"):
            Operations(cache).remove(ALL)
        with pytest.raises(TransportError, match="nobody is in the cluster yet"):
            list(Operations(cache).entries())


def test_a_closed_client_is_said() -> None:
    with servers_here() as here:
        cache = here.connect()
        cache.close()
        with pytest.raises(UsageError, match="closed"):
            Operations(cache).remove(ALL)


def test_top_leaves_out_a_shard_that_does_not_answer_and_says_so() -> None:
    with cluster(2, deadline_s=4.0) as two:
        cache, patient, keys = two.connect(), two.connect(deadline_s=20), prompt(12, 20_000)
        assert all(put(patient, keys))
        rates = Rates(cache.stat(), 0.0)
        suspend(two.servers[0].pid)
        look = rates.look(cache.stat(), 1.0)
        assert set(look["silent"]) == {"s0"}
        assert min(look["per_s"].values()) == 0.0
        assert "no answer" in [str(cell) for cell in top_table(look, "url").columns[0].cells][-1]
        os.kill(two.servers[0].pid, signal.SIGCONT)
        eventually(lambda: cache.answering and cache._shards.open_to("s0"), "it is asked again")
        assert max(rates.look(cache.stat(), 2.0)["per_s"].values()) < len(keys), "what it counted before is no growth"
        assert all(put(patient, prompt(13, 20_000)))
        look = rates.look(cache.stat(), 3.0)
        assert (look["per_s"]["stored"], look["silent"]) == (len(keys), {})
