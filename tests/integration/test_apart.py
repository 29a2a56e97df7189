"""What one tenant does must not reach another, nor what operators decided: quotas, namespaces, their facts, audits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mmcache.config import ServerConfig
from mmcache.frame import Kind
from mmcache.keys import namespace_id
from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import LOCAL
from mmcache.server.refuse import BadRequest
from mmcache.server.serve import Server
from mmcache.store import index as index_module
from mmcache.store import namespaces as namespaces_module
from mmcache.store.answers import Refusal
from mmcache.store.landing import Landing
from mmcache.store.namespaces import Namespaces, Selection, Stopped
from mmcache.store.shard import Shard
from mmcache.store.steward import Steward
from mmcache.store.usage import UNKNOWN, Quota
from mmcache.testing import faults
from mmcache.transport.base import Op
from tests.integration.support import NAMESPACE, MiB, frame_bytes, keys_of

NBYTES = 20_000
QUOTA = Quota(namespace_nbytes=50_000)


@pytest.fixture
def shard() -> Iterator[Shard]:
    shard = Shard(ServerConfig(memory_nbytes=16 * MiB))
    yield shard
    shard.index.check_integrity()
    shard.close()


def put(shard: Shard, name: str, *, tenant: int = 0, namespace: bytes = b"") -> Refusal | None:
    """Store a value under a key of this name; `namespace` is what is said of it before the bytes come."""
    keys = keys_of(1, name)
    data = frame_bytes(keys, np.ones(NBYTES, np.uint8))
    landing = shard.reserve(tenant, keys.digests[0], keys.parents[0], len(data), int(Kind.KV), namespace)
    if not isinstance(landing, Landing):
        return landing

    def fill(target: memoryview) -> int:
        target[:] = data[landing.landed_nbytes : landing.landed_nbytes + len(target)]
        return len(target)

    while landing.left_nbytes:
        landing.land(landing.left_nbytes, fill, memoryview(b""))
    return landing.commit()


def test_a_namespaces_quota_holds_for_writers_that_do_not_say_the_namespace_first(shard: Shard) -> None:
    shard.index.usage.quotas = {1: QUOTA}
    assert [put(shard, f"unsaid {n}", tenant=1) for n in range(4)] == [None, None, Refusal.QUOTA, Refusal.QUOTA]
    assert put(shard, "said", tenant=1, namespace=NAMESPACE.id) is Refusal.QUOTA
    assert shard.index.usage.by_tenant[1] < QUOTA.namespace_nbytes  # type: ignore[operator]


def test_writes_of_one_tenant_do_not_use_up_anothers_namespace_quota(shard: Shard) -> None:
    shard.index.usage.quotas = {1: QUOTA, 2: QUOTA}
    writing = [shard.reserve(1, key, bytes(32), NBYTES, int(Kind.KV)) for key in keys_of(3, "under way").digests]
    assert all(isinstance(one, Landing) for one in writing)
    assert put(shard, "mine", tenant=2) is None
    for landing in writing:
        assert isinstance(landing, Landing)
        landing.abort()


def test_a_tenant_that_names_namespaces_without_end_pushes_out_its_own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MAX_NAMESPACES", 100)
    names = Namespaces()
    number = names.number(1, NAMESPACE.id, {})
    names.declare(number, "kv", NAMESPACE.facts)
    for n in range(1000):
        names.number(2, n.to_bytes(32, "little"), {})
    found = names.find(1, NAMESPACE.id)
    assert found is not None
    assert found.facts == NAMESPACE.facts
    assert list(names.selected(Selection(tenant=1))) == [number]
    assert len(list(names.selected(Selection()))) == 101, "with UNKNOWN"


def test_no_namespace_is_looked_at_without_end_for_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MAX_NAMESPACES", 8)
    monkeypatch.setattr(namespaces_module, "MAX_LOOKS", 4)
    names = Namespaces()
    numbers = [names.number(0, bytes([n]) * 32, {}) for n in range(8)]
    in_use = dict.fromkeys(numbers[:7], 1)
    assert names.number(0, b"x" * 32, {**in_use, numbers[7]: 1}) == UNKNOWN
    assert names.number(0, b"x" * 32, in_use) > numbers[7], "those looked at before come last"


def test_facts_of_one_tenant_do_not_push_out_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MAX_FACTS_NBYTES", 5000)
    shard = Shard(ServerConfig(memory_nbytes=MiB))
    shard.declare(1, NAMESPACE.id, NAMESPACE.kind, NAMESPACE.facts)
    steward = Steward(shard)
    rule = Selection(facts={"model": NAMESPACE.facts["model"]})
    for n in range(20):
        facts = {"model": f"m{n}", "text": "x" * 1000}
        shard.declare(2, namespace_id("kv", facts), "kv", facts)
    assert steward.stop(Stopped.READS, rule)
    assert [use.stopped for use in steward.namespaces(rule)] == [Stopped.READS], "the operator's rule still finds it"
    shard.close()


def test_rules_add_up_whether_they_are_new_replaced_or_taken_back() -> None:
    names = Namespaces()
    number = names.number(0, NAMESPACE.id, {})
    by_id, by_tenant = Selection(namespace=NAMESPACE.id), Selection(tenant=0)
    for selection, stopped, then in (
        (by_id, Stopped.READS, Stopped.READS),
        (by_tenant, Stopped.WRITES, Stopped.BOTH),
        (by_id, Stopped.WRITES, Stopped.WRITES),
        (by_tenant, Stopped.READS, Stopped.BOTH),
        (by_id, Stopped.NOTHING, Stopped.READS),
        (by_tenant, Stopped.NOTHING, Stopped.NOTHING),
    ):
        assert names.stop(selection, stopped)
        assert names.stopped(number) == then


def test_an_audit_checks_what_may_not_be_read(shard: Shard) -> None:
    assert put(shard, "stopped") is None
    key = keys_of(1, "stopped").digests[0]
    faults.flip_bit(shard, key, 8 * 15_000)
    steward = Steward(shard)
    assert steward.stop(Stopped.READS, Selection(namespace=NAMESPACE.id))
    audited = steward.audit(1.0, 0, 0)
    assert (audited.entries, audited.bad) == (1, [key])


def test_an_audit_counts_only_what_it_could_check() -> None:
    shard = Shard(ServerConfig(memory_nbytes=MiB, pinned_share=0.05))
    assert [put(shard, name) for name in ("one", "two", "three")] == [None] * 3
    lease, found = shard.acquire(0, [keys_of(1, name).digests[0] for name in ("one", "two")])
    assert lease
    assert None not in found
    assert Steward(shard).audit(1.0, 0, 0).entries == 2, "the third cannot be leased now"
    shard.close()


def test_a_mode_for_a_tenant_that_is_not_there_is_refused() -> None:
    server = Server(ServerConfig(listen="", unix_path="", memory_nbytes=MiB))
    of = pb.Selection(tenant="typo")
    request = pb.ModeRequest(set=True, mode=pb.OFF, of=of)
    with pytest.raises(BadRequest, match="there is no tenant 'typo'"):
        server.service.handle(Op.MODE, LOCAL, request.SerializeToString())
    told = server.service.handle(Op.MODE, LOCAL, b"")
    assert isinstance(told, pb.ModeReply)
    assert not told.rules
    server.stop()


def test_a_tenant_that_opens_leases_without_end_leaves_some_to_others(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MAX_CLAIMS", 64)
    assert [put(shard, "theirs", tenant=1), put(shard, "ours", tenant=2)] == [None, None]
    opened = [shard.acquire(1, keys_of(1, "theirs").digests)[0] for _ in range(100)]
    assert sum(map(bool, opened)) == 32
    lease, _ = shard.acquire(2, keys_of(1, "ours").digests)
    assert lease
    assert all(shard.release(1, one) for one in opened if one)
    assert shard.acquire(1, keys_of(1, "theirs").digests)[0], "what ended counts no longer"


def test_a_namespace_too_many_to_number_is_unknown_and_breaks_nothing(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces_module, "MAX_NUMBER", 1)
    assert put(shard, "numbered", namespace=NAMESPACE.id) is None
    landing = shard.reserve(0, bytes([7]) * 32, bytes(32), NBYTES, int(Kind.KV), b"another namespace, of 32 bytes..")
    assert isinstance(landing, Landing)
    assert shard.index.usage.by_namespace[UNKNOWN] == NBYTES
    landing.abort()
