"""Operators at work while clients run: modes, removal, listing, audit, quotas, the live view, logs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mmcache
from mmcache.client.operations import Operations
from mmcache.config import ServerConfig
from mmcache.errors import ConfigError, RequestRefused
from mmcache.keys import Namespace, embedding_key
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import Caller
from mmcache.server.refuse import BadRequest
from mmcache.server.serve import Server
from mmcache.store.usage import Quota
from mmcache.testing import faults
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Op, Outcome
from tests.integration.support import NAMESPACE, MiB, blanks, eventually, keys_of, run_cli, values_of

NBYTES = 20_000
OTHER = Namespace(kind="kv", model="other/model", dtype="uint8", layout="LBHNC", block_size=16)
PICTURES = Namespace(kind="embedding", model="test/model", dtype="uint8")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 * MiB))
    server.start()
    yield server
    server.stop()


def url_of(server: Server) -> str:
    assert server.address is not None
    return "mmcache://{}:{}".format(*server.address)


@pytest.fixture
def client(server: Server) -> Iterator[mmcache.Client]:
    with mmcache.connect(url_of(server), deadline_s=20) as client:
        yield client


def store(client: mmcache.Client, keys: Keys) -> None:
    assert all(client.put(keys, values_of(keys, NBYTES)))


def three_kinds(client: mmcache.Client) -> tuple[Keys, Keys, Keys]:
    """A prompt of each of two models, and three pictures of the first one's encoder."""
    ours, theirs = NAMESPACE.block_keys(range(80)), OTHER.block_keys(range(64))
    pictures = Keys.of(embedding_key(PICTURES, bytes([number]) * 32) for number in range(3))
    for keys in (ours, theirs, pictures):
        store(client, keys)
    return ours, theirs, pictures


class Engine(threading.Thread):
    """Goes on looking up, reading and storing, as an engine does, and keeps when the last calls that had anything of it
    began: when they are over says nothing, as a machine may stop us after the answer."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self._ending = url, threading.Event()
        self.last_read_s = self.last_stored_s = 0.0
        self.rounds = 0
        self.trouble: list[BaseException] = []

    def run(self) -> None:
        try:
            with mmcache.connect(self._url) as cache:
                while not self._ending.is_set():
                    self._round(cache)
        except BaseException as error:
            self.trouble.append(error)

    def _round(self, cache: mmcache.Client) -> None:
        known, new = keys_of(1, "known"), keys_of(1, f"new {self.rounds}")
        began_s = time.monotonic()
        if any(cache.get_into(known, blanks(1, NBYTES))) or cache.match_prefix(known):
            self.last_read_s = began_s
        began_s = time.monotonic()
        if cache.put(new, values_of(new, NBYTES))[0].outcome is Outcome.STORED:
            self.last_stored_s = began_s
        self.rounds += 1

    def stop(self) -> None:
        self._ending.set()
        self.join(10)


def test_mode_off_stops_running_clients_and_both_lets_them_go_on() -> None:
    with ServerProcess("64MiB") as process:
        with mmcache.connect(process.url, deadline_s=20) as cache:
            store(cache, keys_of(1, "known"))
        engines = [Engine(process.url), Engine(f"{process.url}?transport=tcp")]
        for engine in engines:
            engine.start()
        eventually(lambda: all(e.last_read_s and e.last_stored_s for e in engines), "engines read and store")
        assert run_cli("mode", "off", "-c", process.url).stdout == "mode off\n"
        off_s = time.monotonic()
        rounds = [engine.rounds for engine in engines]
        eventually(lambda: all(e.rounds > r + 5 for e, r in zip(engines, rounds, strict=True)), "engines go on")
        for engine in engines:
            assert engine.last_read_s <= off_s
            assert engine.last_stored_s <= off_s
        stopped_s = time.monotonic()
        assert json.loads(run_cli("mode", "both", "-c", process.url, "--json").stdout) == {"mode": "both", "rules": []}
        eventually(lambda: all(e.last_read_s > stopped_s for e in engines), "engines read again")
        eventually(lambda: all(e.last_stored_s > stopped_s for e in engines), "engines store again")
        for engine in engines:
            engine.stop()
            assert engine.trouble == []


def test_reads_and_writes_are_stopped_apart(client: mmcache.Client) -> None:
    known, operations = keys_of(1, "known"), Operations(client)
    store(client, known)
    operations.set_mode("read")
    refused = client.put(keys_of(1, "new"), values_of(keys_of(1, "new"), NBYTES))[0]
    assert refused.outcome is Outcome.REFUSED
    assert "an operator has stopped writes" in refused.reason
    assert client.get_into(known, blanks(1, NBYTES))[0]
    operations.set_mode("write")
    assert eventually(lambda: client.put(keys_of(1, "new"), values_of(keys_of(1, "new"), NBYTES))[0], "stored")
    assert not client.get_into(known, blanks(1, NBYTES))[0]
    assert client.match_prefix(known) == 0
    assert client.contains(known) == [False]
    assert client.acquire(known).frames == [None]
    assert operations.mode().mode == pb.WRITE
    told = client.counters["stopped"]
    assert told > 0, "a client that was told asks once a second, not every time"
    misses = client.stat()["counters"]["misses"]
    for _ in range(50):
        assert client.get_into(known, blanks(1, NBYTES))[0].outcome is Outcome.MISS
    assert client.stat()["counters"]["misses"] - misses < 10
    operations.set_mode("both")
    eventually(lambda: client.get_into(known, blanks(1, NBYTES))[0], "read again", 5)


def test_a_stopped_client_that_asks_for_numbers_all_the_time_goes_on_too(client: mmcache.Client) -> None:
    known, operations = keys_of(1, "known"), Operations(client)
    store(client, known)
    operations.set_mode("off")
    assert not client.get_into(known, blanks(1, NBYTES))[0]
    operations.set_mode("both")

    def reads() -> bool:
        client.stat()  # its answer does not tell the mode
        return bool(client.get_into(known, blanks(1, NBYTES))[0])

    eventually(reads, "read again", 5)


def test_a_mode_of_namespaces_leaves_the_others_alone_and_binds_those_to_come(client: mmcache.Client) -> None:
    operations = Operations(client)
    ours, theirs, pictures = three_kinds(client)
    of = pb.Selection(kind="kv", facts={"model": "model"})
    operations.set_mode("off", of)
    assert [client.match_prefix(keys) for keys in (ours, theirs, pictures[:1])] == [0, 0, 1]
    operations.set_mode("read", of)
    assert [client.match_prefix(keys) for keys in (ours, theirs)] == [5, 4]
    later = Namespace(kind="kv", model="third/model", dtype="uint8", layout="L", block_size=16).block_keys(range(16))
    assert client.put(later, values_of(later, NBYTES))[0].outcome is Outcome.REFUSED
    (rule,) = operations.mode().rules
    assert (rule.of, rule.mode) == (of, pb.READ)
    assert [row.mode for row in operations.namespaces() if row.kind == "embedding"] == [pb.BOTH]
    operations.set_mode("both", of)
    assert operations.mode().rules == []
    store(client, later)


def test_rm_removes_exactly_what_is_selected(server: Server, client: mmcache.Client) -> None:
    ours, theirs, pictures = three_kinds(client)
    before = client.stat()["counters"]["bytes_used"]
    ended = run_cli("rm", "--model", "other/model", "-c", url_of(server), "--json")
    removed = json.loads(ended.stdout)
    assert removed["entries"] == 4
    assert 4 * NBYTES < removed["nbytes"] < 4 * NBYTES + 4000
    assert 0 <= before - client.stat()["counters"]["bytes_used"] - removed["nbytes"] < 4 * 64
    assert [client.match_prefix(keys) for keys in (ours, theirs)] == [5, 0]
    assert client.contains(pictures) == [True] * 3
    operations = Operations(client)
    assert operations.remove(pb.Selection(older_than_s=3600)).entries == 0
    assert operations.remove(pb.Selection(kind="embedding", facts={"model": "other/model"})).entries == 0
    assert operations.remove(pb.Selection(namespace=PICTURES.id[:3])).entries == 3
    assert operations.remove(pb.Selection(tenant="nobody")).entries == 0
    assert client.match_prefix(ours) == 5
    aged = 0

    def all_were_old_enough() -> bool:  # one after another, as they were stored
        nonlocal aged
        aged += operations.remove(pb.Selection(older_than_s=0.5)).entries
        return aged == 5

    eventually(all_were_old_enough, "old enough", 5)
    server.shard.index.check_integrity()
    assert run_cli("rm", "--all", "-c", url_of(server)).stdout == "removed 0 entries, 0 B\n"


def test_what_is_being_read_stays_until_it_is_read(server: Server, client: mmcache.Client) -> None:
    keys = keys_of(1, "leased")
    store(client, keys)
    with client.acquire(keys) as leased:
        assert Operations(client).remove(pb.Selection(kind="kv")).entries == 1
        assert leased.frames[0] is not None
        leased.frames[0].verify()
        assert client.match_prefix(keys) == 0
    assert client.stat()["counters"]["bytes_used"] == 0


def test_ls_shows_namespaces_and_entries(server: Server, client: mmcache.Client) -> None:
    ours, _, pictures = three_kinds(client)
    client.put(keys_of(1, "brief"), values_of(keys_of(1, "brief"), NBYTES), ttl_s=1000)
    rows = [json.loads(line) for line in run_cli("ls", "-c", url_of(server), "--json").stdout.splitlines()]
    assert [(row["kind"], row["entries"], row["mode"]) for row in rows] == [
        ("kv", 6, "both"), ("kv", 4, "both"), ("embedding", 3, "both")
    ]  # fmt: skip
    assert rows[0]["facts"] == dict(NAMESPACE.facts)
    assert rows[0]["namespace"] == NAMESPACE.id.hex()
    text = run_cli("ls", "-c", url_of(server)).stdout
    assert "    model = other/model" in text
    lines = run_cli("ls", "--entries", "--model", "test/model", "-c", url_of(server), "--json").stdout.splitlines()
    entries = {row["key"]: row for row in map(json.loads, lines)}
    assert entries.keys() == {key.hex() for key in [*ours, *pictures, *keys_of(1, "brief")]}
    assert entries[ours[0].hex()]["children"] == 1
    assert entries[pictures[0].hex()]["kind"] == "embedding"
    assert 900 < entries[keys_of(1, "brief")[0].hex()]["expires_in_s"] <= 1000
    assert entries[ours[0].hex()]["expires_in_s"] is None
    assert f"{ours[0].hex()}  kv " in run_cli("ls", "--entries", "-c", url_of(server)).stdout


def test_ls_shows_what_clients_declare_without_its_control_characters(server: Server, client: mmcache.Client) -> None:
    assert run_cli("ls", "--json", "-c", url_of(server)).stdout == ""
    odd = Namespace(kind="embedding", model="m", dtype="uint8", cache_salt="a\x1b[2J\nb = c")
    keys = Keys.of(embedding_key(odd, bytes(32)))
    store(client, keys)
    for words in (("ls",), ("inspect", keys[0].hex())):
        assert "cache_salt = a\\x1b[2J\\nb = c\n" in run_cli(*words, "-c", url_of(server)).stdout


def test_audit_finds_planted_flipped_bits_and_nothing_else(server: Server, client: mmcache.Client) -> None:
    keys = keys_of(200, "audited")
    store(client, keys)
    planted = {keys[7].hex(), keys[150].hex(), keys[199].hex()}
    for number, bit in ((7, 8 * 3), (150, 8 * 19_000 + 5), (199, 8 * 400)):
        faults.flip_bit(server.shard, keys.digests[number], bit)
    order = server.shard.index.rows.policy.listed()
    ended = run_cli("audit", "-c", url_of(server), "--json")
    assert ended.returncode == 1
    assert "test this host's memory" in ended.stderr
    report = json.loads(ended.stdout)
    assert report["entries"] == 200
    assert set(report["bad"]) == planted
    assert client.contains(keys) == [key.hex() not in planted for key in keys]
    assert client.stat()["counters"]["corrupt_dropped"] == 3
    assert [row for row in order if row in server.shard.index.rows.policy.listed()] == (
        server.shard.index.rows.policy.listed()
    ), "an audit is no use of what it checks"
    assert run_cli("audit", "-c", url_of(server)).stdout.startswith("checked 197 entries, ")


def test_an_audit_of_a_share_takes_about_that_share(client: mmcache.Client) -> None:
    keys = keys_of(400, "sampled")
    assert all(client.put(keys, values_of(keys, 1000)))
    operations = Operations(client)
    counts = [operations.audit(0.25, seed).entries for seed in range(4)]
    assert len(set(counts)) > 1, "other seeds look at other entries"
    assert all(50 < count < 150 for count in counts)
    assert operations.audit(0.25, 3).entries == counts[3]


def test_a_quota_is_kept_within_a_batch_and_by_writers_at_once(server: Server, client: mmcache.Client) -> None:
    server.shard.index.usage.quotas = {0: Quota(nbytes=3 * NBYTES + 3000, namespace_nbytes=None)}
    keys = keys_of(5, "quota")
    results = client.put(keys, values_of(keys, NBYTES))
    assert [result.outcome for result in results] == [Outcome.STORED] * 3 + [Outcome.REFUSED] * 2
    assert "quota" in results[4].reason
    assert client.delete(keys[:1]) == [True]
    assert client.put(keys[4:], values_of(keys[4:], NBYTES))[0].outcome is Outcome.STORED
    assert client.stat()["counters"]["put_quota"] == 2
    server.shard.index.usage.quotas = {0: Quota(namespace_nbytes=4 * NBYTES)}
    picture = Keys.of(embedding_key(PICTURES, bytes(32)))
    assert client.put(picture, values_of(picture, NBYTES))[0].outcome is Outcome.STORED
    assert client.put(keys[:1], values_of(keys[:1], NBYTES))[0].outcome is Outcome.REFUSED
    server.shard.index.check_integrity()


def test_operators_requests_need_an_operator(server: Server) -> None:
    tenant = Caller(server.service.tenants.number("team"), "team", admin=False)
    for op, request in (
        (Op.REMOVE, pb.RemoveRequest()),
        (Op.AUDIT, pb.AuditRequest(share=1)),
        (Op.MODE, pb.ModeRequest(set=True, mode=pb.OFF)),
    ):
        with pytest.raises(BadRequest, match=f"{op.name} needs an admin token") as refused:
            server.service.handle(op, tenant, request.SerializeToString())
        assert refused.value.code == pb.ErrorReply.DENIED
    told = server.service.handle(Op.MODE, tenant, b"")
    assert isinstance(told, pb.ModeReply)
    assert told.mode == pb.BOTH


def test_a_tenant_lists_its_own_only(server: Server, client: mmcache.Client) -> None:
    three_kinds(client)
    team = Caller(server.service.tenants.number("team"), "team", admin=False)
    for request in (pb.ListRequest(), pb.ListRequest(entries=True), pb.ListRequest(of=pb.Selection(kind="kv"))):
        reply = server.service.handle(Op.LIST, team, request.SerializeToString())
        assert reply == pb.ListReply()


def test_bad_selections_and_modes_are_refused(server: Server, client: mmcache.Client) -> None:
    operations = Operations(client)
    with pytest.raises(RequestRefused, match="older_than_s is -1"):
        operations.remove(pb.Selection(older_than_s=-1))
    with pytest.raises(RequestRefused, match="leave out older_than_s"):
        operations.set_mode("off", pb.Selection(older_than_s=5))
    with pytest.raises(RequestRefused, match="share is 2"):
        operations.audit(2.0)
    for words, message in (
        (("rm",), "say what to remove"),
        (("rm", "--all", "--kind", "kv"), "--all alone"),
        (("rm", "--kind", "video"), "'video' is unknown"),
        (("rm", "--namespace", "xyz"), "neither NAME=VALUE nor"),
        (("rm", "--kind", "kv", "--model", ""), "neither NAME=VALUE nor"),
        (("rm", "--all", "--tenant", ""), "--tenant is empty"),
        (("rm", "--older-than", "soon"), "'soon' is no age"),
        (("mode", "--kind", "kv"), "say what to allow"),
        (("mode", "half"), "'half' is no mode"),
        (("audit", "--share", "0"), "'0' is no share"),
    ):
        ended = run_cli(*words, "-c", url_of(server))
        assert (ended.returncode, message in ended.stderr) == (2, True), ended.stderr
    with pytest.raises(ConfigError, match="mode is 'half'"):
        ServerConfig(mode="half")


def test_top_shows_what_happens_between_two_looks() -> None:
    with ServerProcess("1GiB") as process, mmcache.connect(process.url, deadline_s=20) as client:
        store(client, keys_of(3, "top"))
        engine = Engine(process.url)  # which does not fill so much memory so soon
        engine.start()

        def two_looks() -> list[Any]:
            ended = run_cli("top", "--interval", "0.3", "--count", "2", "-c", process.url, "--json")
            looks = list(map(json.loads, ended.stdout.splitlines()))
            happened = looks[1]["per_s"]["stored"] > 0 and looks[1]["hit_rate"] is not None
            return looks if happened else []

        first, second = eventually(two_looks, "the engine comes to store and to read something between two looks")
        table = run_cli("top", "--interval", "0.2", "--count", "2", "-c", process.url)
        engine.stop()
    assert 0 <= second["hit_rate"] <= 1
    assert second["bytes_by_kind"]["kv"] > first["bytes_by_kind"]["kv"] > 3 * NBYTES
    assert table.stdout.count("hit rate") == 2
    assert table.stdout.endswith("\n")
    assert "of 1.0 GiB" in table.stdout


def test_a_server_starts_in_the_mode_it_is_told_and_logs_json() -> None:
    with ServerProcess("16MiB", "--mode", "off", "--log", "json", "--verbose") as process:
        with mmcache.connect(process.url, deadline_s=20) as cache:
            assert cache.put(keys_of(1, "x"), values_of(keys_of(1, "x"), 10))[0].outcome is Outcome.REFUSED
        with pytest.raises(mmcache.MMCacheError):
            mmcache.connect(f"{process.url}?transport=none")
    lines = [json.loads(line) for line in process.said.splitlines()]
    assert lines
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
