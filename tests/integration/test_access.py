"""Who may come in: tokens on every socket, tenants that cannot see each other, admin operations, rotation."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.client import credentials
from mmcache.config import parse_url
from mmcache.errors import AccessDenied, ConfigError, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.server.access import DENIED
from mmcache.server.access_edit import find_token, with_token, without_token
from mmcache.server.grants import digest_of, parse_grants
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import PROTOCOL, Op, pack_prelude
from mmcache.transport.shm import Ring
from mmcache.transport.tcp import Channel
from tests.integration.access_bed import EXPIRED, TOKENS, ask_join, tenants_file, write_access
from tests.integration.support import Raw, blanks, eventually, in_time, keys_of, values_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Without TLS: tokens alone, on loopback TCP and the unix socket."""
    access = write_access(tmp_path_factory.mktemp("access") / "access.toml", tenants_file())
    with ServerProcess("32MiB", "--access", access, "--max-connections", "64") as process:
        yield process


def places(server: ServerProcess) -> dict[str, ServerProcess | str]:
    return {"tcp": server, "unix": server.unix_path}


STRANGERS = {"none": "", "wrong": "token-of-x", "expired": EXPIRED, "a prefix": TOKENS["a"][:-1], "long": "x" * 30_000}


@pytest.mark.parametrize("place", ["tcp", "unix"])
@pytest.mark.parametrize("token", STRANGERS.values(), ids=STRANGERS)
def test_whoever_has_no_valid_token_hears_the_same_words_and_is_disconnected(
    server: ServerProcess, place: str, token: str
) -> None:
    with Raw(places(server)[place]) as raw:
        op, body = ask_join(raw, token)
        refusal = pb.ErrorReply.FromString(body)
        assert (op, refusal.code, refusal.message) == (Op.ERROR, pb.ErrorReply.DENIED, DENIED)
        assert raw.closed_by_peer()


@pytest.mark.parametrize("op", [op for op in Op if op not in (Op.ERROR, Op.JOIN, Op.PUT_DONE)])
def test_nothing_is_answered_to_strangers(server: ServerProcess, op: Op) -> None:
    with Raw(server) as raw:
        raw.ask(op, pb.StatRequest())
        assert "JOIN must be the first message" in raw.refusal().message


def test_of_strangers_nothing_large_is_read(server: ServerProcess) -> None:
    with Raw(server) as raw:
        raw.ask(Op.JOIN, pb.JoinRequest(protocol=1, token="x" * 70_000))
        assert "over the limit of 65536" in raw.refusal().message


def test_strangers_are_few_and_cannot_keep_the_known_ones_out_of_their_connections(server: ServerProcess) -> None:
    with (
        mmcache.connect(server.url, token=TOKENS["ops"]) as operator,
        mmcache.connect(server.url, token=TOKENS["a"]) as known,
    ):
        eventually(lambda: operator.stat()["counters"]["connections"] == 2, "strangers of earlier tests are gone")
        # A quarter of 64, and more: any server that starts on this host looks in here, and may take a place meanwhile.
        strangers = [Raw(server) for _ in range(20)]
        assert "16 connections that have not joined yet" in strangers[-1].refusal().message
        assert known.stat()["server"]
        for stranger in strangers:
            stranger.sock.close()


def test_who_does_not_join_in_time_is_disconnected_however_busy(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", tenants_file())
    with ServerProcess("1MiB", "--access", access, environment={"MMCACHE_IO_TIMEOUT_S": "0.6"}) as server:
        started = time.monotonic()
        with Raw(server) as raw, contextlib.suppress(OSError, AssertionError):
            while time.monotonic() < started + 20:
                raw.ask(Op.STAT, pb.StatRequest())
                raw.answer()
                time.sleep(0.1)
        assert 0.4 < time.monotonic() - started < 10


# ------------------------------------------------------------------------------------------ another tenant
@pytest.mark.parametrize("other", ["b", "ops"])
def test_another_tenant_finds_nothing_and_changes_nothing(server: ServerProcess, other: str) -> None:
    keys = keys_of(3, f"mine/{other}")
    values = values_of(keys, 5000)
    with (
        mmcache.connect(server.url, token=TOKENS["a"]) as ours,
        mmcache.connect(server.url, token=TOKENS[other]) as theirs,
    ):
        assert all(ours.put(keys, values))
        assert theirs.contains(keys) == [False] * 3
        assert theirs.match_prefix(keys) == 0
        assert [str(result.outcome) for result in theirs.get_into(keys, blanks(3, 5000))] == ["miss"] * 3
        with theirs.acquire(keys) as lease:
            assert lease.frames == [None] * 3
        assert not theirs.inspect(keys.digests[0]).found
        assert theirs.delete(keys) == [False] * 3
        with Raw(server) as raw:
            assert ask_join(raw, TOKENS[other])[0] == Op.JOIN
            raw.ask(Op.RECHECK, pb.RecheckRequest(keys=b"".join(keys.digests)))
            assert raw.answer() == (Op.RECHECK, pb.RecheckReply(dropped=bytes(3)).SerializeToString())
        assert all(str(result.outcome) == "stored" for result in theirs.put(keys, [value ^ 1 for value in values]))
        back = blanks(3, 5000)
        assert all(ours.get_into(keys, back))
        assert all(map(np.array_equal, back, values))


def test_a_lease_of_another_tenant_cannot_be_given_back(server: ServerProcess) -> None:
    keys = keys_of(1, "lease")
    with mmcache.connect(server.url, token=TOKENS["a"]) as ours:
        assert all(ours.put(keys, values_of(keys, 100)))
    with Raw(server) as mine, Raw(server) as other:
        assert ask_join(mine, TOKENS["a"])[0] == ask_join(other, TOKENS["b"])[0] == Op.JOIN
        mine.ask(Op.ACQUIRE, pb.AcquireRequest(keys=keys.digests[0]))
        lease_id = pb.AcquireReply.FromString(mine.answer()[1]).lease_id
        assert lease_id
        other.ask(Op.FINISH, pb.FinishRequest(lease_id=lease_id))
        assert not pb.FinishReply.FromString(other.answer()[1]).held
        mine.ask(Op.FINISH, pb.FinishRequest(lease_id=lease_id))
        assert pb.FinishReply.FromString(mine.answer()[1]).held


def test_numbers_of_everybody_are_for_admins(server: ServerProcess) -> None:
    with (
        mmcache.connect(server.url, token=TOKENS["a"]) as ours,
        mmcache.connect(server.url, token=TOKENS["ops"]) as operator,
    ):
        assert "entries" not in ours.stat()["counters"]
        assert ours.stat()["server"].startswith("mmcache/")
        assert operator.stat()["counters"]["connections"] >= 2


ADMIN = {
    Op.MODE: pb.ModeRequest(set=True, mode=pb.BOTH),
    Op.REMOVE: pb.RemoveRequest(of=pb.Selection(tenant="nobody")),
    Op.AUDIT: pb.AuditRequest(),
}


@pytest.mark.parametrize("op", ADMIN, ids=lambda op: op.name)
def test_what_operators_ask_needs_an_admin_token(server: ServerProcess, op: Op) -> None:
    with Raw(server) as raw:
        assert ask_join(raw, TOKENS["a"])[0] == Op.JOIN
        raw.ask(op, ADMIN[op])
        refusal = raw.refusal()
        assert refusal.code == pb.ErrorReply.DENIED
        assert "admin token" in refusal.message
        raw.ask(Op.STAT, pb.StatRequest())
        assert raw.answer()[0] == Op.STAT  # the connection goes on
    with Raw(server) as raw:
        assert ask_join(raw, TOKENS["ops"])[0] == Op.JOIN
        raw.ask(op, ADMIN[op])
        answer, body = raw.answer()
        assert answer == op or pb.ErrorReply.FromString(body).code != pb.ErrorReply.DENIED


@pytest.mark.parametrize("asked_for", ["", "b", "no such tenant"])
@pytest.mark.parametrize("entries", [True, False])
def test_what_is_listed_to_a_tenant_is_its_own_whatever_it_asks_for(
    server: ServerProcess, asked_for: str, entries: bool
) -> None:
    for tenant in ("a", "b"):
        with mmcache.connect(server.url, token=TOKENS[tenant]) as cache:
            keys = keys_of(1, f"listed/{tenant}")
            assert all(cache.put(keys, values_of(keys, 100)))
    with Raw(server) as raw:
        assert ask_join(raw, TOKENS["a"])[0] == Op.JOIN
        raw.ask(Op.LIST, pb.ListRequest(entries=entries, of=pb.Selection(tenant=asked_for)))
        reply = pb.ListReply.FromString(raw.answer()[1])
        rows = [row.tenant for row in reply.entries] + [row.tenant for row in reply.namespaces]
        assert rows
        assert set(rows) == {"a"}


def test_rules_about_other_tenants_are_not_told(server: ServerProcess) -> None:
    with Raw(server) as operator, Raw(server) as raw:
        assert ask_join(operator, TOKENS["ops"])[0] == ask_join(raw, TOKENS["a"])[0] == Op.JOIN
        for tenant in ("a", "b"):
            operator.ask(Op.MODE, pb.ModeRequest(set=True, mode=pb.READ, of=pb.Selection(tenant=tenant, kind="x")))
            assert operator.answer()[0] == Op.MODE
        raw.ask(Op.MODE, pb.ModeRequest())
        rules = pb.ModeReply.FromString(raw.answer()[1]).rules
        assert [rule.of.tenant for rule in rules] == ["a"]
        operator.ask(Op.MODE, pb.ModeRequest())
        assert len(pb.ModeReply.FromString(operator.answer()[1]).rules) == 2


def test_memory_holds_everybodys_entries_so_no_tenant_maps_it(server: ServerProcess) -> None:
    with mmcache.connect(f"mmcache+unix://{server.unix_path}", token=TOKENS["a"]) as cache:
        assert cache.stat()["transport"] == "unix"
        assert cache.shared_memory is None
    with mmcache.connect(server.url, token=TOKENS["a"]) as cache:
        assert cache.stat()["transport"] == "tcp"
    with pytest.raises(TransportError, match="no shared memory"):
        mmcache.connect(f"mmcache+unix://{server.unix_path}?transport=shm", token=TOKENS["a"])


def test_who_is_not_let_into_the_memory_may_not_lend_any(server: ServerProcess) -> None:
    ring = Ring()
    request = pb.JoinRequest(protocol=PROTOCOL, token=TOKENS["a"])
    request.ring_slots, request.ring_slot_nbytes = ring.slots, ring.slot_nbytes
    body = request.SerializeToString()
    with Raw(server.unix_path) as raw:
        socket.send_fds(raw.sock, [pack_prelude(Op.JOIN, 1, len(body)) + body], [ring.fd])
        op, body = raw.answer()
        assert op == Op.JOIN
        assert not pb.JoinReply.FromString(body).lends
        raw.ask(Op.LEND, pb.LendRequest(nbytes=4096))
        assert "cannot be lent" in raw.refusal().message
    ring.close_fd()


# ------------------------------------------------------------------------------------------ rotation
def test_two_shards_follow_one_file_and_rotation_with_overlap_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    text = with_token("", "a", digest_of("old").hex())
    access = write_access(path, text)
    token_file = tmp_path / "token"
    token_file.touch(0o600)
    token_file.write_text("old\n")
    keys = keys_of(4, "rotation")
    values = values_of(keys, 20_000)
    with ServerProcess("8MiB", "--access", access) as one, ServerProcess("8MiB", "--access", access) as two:
        options = f"token_file={token_file}&transport=tcp&deadline_s=20"
        shards = [mmcache.connect(f"{server.url}?{options}") for server in (one, two)]
        came_with = {"old": joined(one, two, token="old")}
        assert all(all(shard.put(keys, values)) for shard in shards)
        bad: list[object] = []
        reads = [0, 0]
        stop = threading.Event()

        def read(number: int) -> None:
            back = blanks(4, 20_000)
            while not stop.is_set():
                results = shards[number].get_into(keys, back)
                bad.extend(result for result in results if not result)
                reads[number] += 1

        readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for reader in readers:
            reader.start()
        try:
            for token in ("spare", "another", "new"):
                text = with_token(text, "a", digest_of(token).hex())
            write_access(path, text)
            eventually(lambda: lets_in(one, "new") and lets_in(two, "new"), "the new token is known")
            assert lets_in(one, "old")
            assert lets_in(two, "old")
            token_file.write_text("new\n")
            before = list(reads)
            came_with |= {token: joined(one, two, token=token) for token in ("spare", "another")}

            def ends_s() -> float:
                """Until those who came with a token are out, once it is revoked."""
                nonlocal text
                token, raws = next(iter(came_with.items()))
                del came_with[token]
                text = without_token(text, find_token(parse_grants(text), digest_of(token).hex()))
                revoked_s = time.monotonic()
                write_access(path, text)
                for raw in raws:
                    assert raw.closed_by_peer()
                    raw.sock.close()
                return time.monotonic() - revoked_s

            in_time(ends_s, 4.0)  # the first of them is "old"
            assert not lets_in(one, "old")
            assert not lets_in(two, "old")
            eventually(lambda: all(now > then for now, then in zip(reads, before, strict=True)), "reads go on")
        finally:
            stop.set()
            for reader in readers:
                reader.join()
            for raw in itertools.chain(*came_with.values()):
                raw.sock.close()
        assert bad == []
        for shard in shards:
            assert shard.match_prefix(keys) == 4
            shard.close()


def joined(*servers: ServerProcess, token: str) -> list[Raw]:
    raws = [Raw(server) for server in servers]
    for raw in raws:
        assert ask_join(raw, token)[0] == Op.JOIN
    return raws


def lets_in(server: ServerProcess, token: str) -> bool:
    with Raw(server) as raw:
        return ask_join(raw, token)[0] == Op.JOIN


def test_the_only_tenant_reads_in_shared_memory_until_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "access.toml"
    text = with_token("", "a", digest_of("a1").hex())
    with ServerProcess("8MiB", "--access", write_access(path, text)) as server:
        with monkeypatch.context() as patched, mmcache.connect(server.url, token="a1", lazy=True) as cache:
            patched.setattr(credentials, "_FRIENDS", ())  # as if the server's user were a stranger
            patched.setattr(os, "geteuid", lambda: 12345)
            assert cache.stat()["transport"] == "tcp"  # the token does not go to his unix socket
        with mmcache.connect(server.url, token="a1") as cache:
            assert cache.stat()["transport"] == "shm"
            write_access(path, with_token(text, "b", digest_of("b1").hex()))
            eventually(lambda: cache.stat()["transport"] == "tcp", "its connection over shared memory ends")
        with mmcache.connect(server.url, token="b1") as cache:
            assert cache.stat()["transport"] == "tcp"


# ------------------------------------------------------------------------------------------ the client's side
def test_a_refused_client_reads_misses_and_leaves_the_server_alone(server: ServerProcess) -> None:
    keys = keys_of(2, "denied")
    with pytest.raises(AccessDenied, match="token_file=PATH"):
        mmcache.connect(server.url, token="wrong")
    with mmcache.connect(server.url, token="wrong", lazy=True) as cache:

        def left_alone() -> bool:  # for a moment only: the pause grows with each refusal
            assert cache.contains(keys) == [False, False]
            return not cache.answering

        eventually(left_alone, "the server is left alone")
        result = cache.put(keys, values_of(keys, 10))[0]
        assert str(result.outcome) == "unavailable"
        with pytest.raises(AccessDenied):
            cache.stat()


def test_a_token_file_others_can_read_is_refused_and_so_is_a_token_in_a_url(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644.*chmod 600"):
        mmcache.connect(f"mmcache://127.0.0.1:1?token_file={path}", lazy=True)
    path.chmod(0o600)
    path.write_text("two words\n")
    with pytest.raises(ConfigError, match="does not hold one token"):
        mmcache.connect(f"mmcache://127.0.0.1:1?token_file={path}", lazy=True)
    with pytest.raises(ConfigError, match="token does not belong in a URL") as refusal:
        mmcache.connect("mmcache://127.0.0.1:1?token=secret")
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match="give one of them"):
        mmcache.connect(f"mmcache://127.0.0.1:1?token_file={path}", token="x")
    assert "secret" not in repr(parse_url("mmcache://h", token="secret"))


def test_a_token_file_that_becomes_loose_is_a_miss_not_an_exception(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text(TOKENS["a"])
    keys = keys_of(1, "loose")
    with mmcache.connect(f"{server.url}?token_file={path}", lazy=True) as cache:
        path.chmod(0o640)
        assert cache.contains(keys) == [False]
        with pytest.raises(TransportError, match="mode 0640"):
            cache.stat()
        path.chmod(0o600)
        assert cache.stat()["server"]


def test_a_token_does_not_travel_readable_to_another_host(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Channel, "is_loopback", False)
    with pytest.raises(TransportError, match="unencrypted to another host and was not sent; use mmcaches"):
        mmcache.connect(server.url, token=TOKENS["a"])
    with mmcache.connect(f"{server.url}?insecure_network=true", token=TOKENS["a"]) as cache:
        assert cache.stat()["transport"] == "tcp"
