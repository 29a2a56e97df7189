"""Explain names the right reason: each situation is planted in a real server, then asked for from outside."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.chain import ChainHasher
from mmcache.client.operations import Operations, Reason
from mmcache.config import ServerConfig
from mmcache.errors import UsageError
from mmcache.explain import Item, Recorded, differences, explain, parse, record
from mmcache.keys import Namespace, item_digest, namespace_id
from mmcache.keyset import Keys, NamespaceId
from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import Caller
from mmcache.server.serve import Server
from mmcache.store.landing import Landing
from mmcache.store.usage import Quota
from mmcache.testing import faults
from mmcache.transport.base import PROTOCOL, Op
from mmcache.why import Why
from tests.integration.support import NAMESPACE, MiB, Raw, eventually, keys_of, run_cli, values_of

NBYTES = 60_000
HALF = Namespace(kind="kv", model="test/model", dtype="float16", layout="LBHNC", block_size=16)


@dataclass
class Bed:
    """A server in this process that can be damaged, its client, and a clock-free way to ask."""

    server: Server
    client: mmcache.Client

    @property
    def url(self) -> str:
        assert self.server.address is not None
        return "mmcache://{}:{}".format(*self.server.address)

    def put(self, keys: Keys, ttl_s: float | None = None) -> None:
        self.client.put(keys, values_of(keys, NBYTES), ttl_s=ttl_s)

    def why(self, keys: Keys) -> Reason:
        return Operations(self.client).explain(keys.digests)[0]


@pytest.fixture
def bed() -> Iterator[Bed]:
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=MiB))
    server.start()
    assert server.address is not None
    with mmcache.connect("mmcache://{}:{}?deadline_s=10".format(*server.address)) as client:
        yield Bed(server, client)
    server.stop()


def never_stored(bed: Bed) -> Keys:
    return keys_of(1, "never")


def evicted(bed: Bed) -> Keys:
    first = keys_of(1, "first")
    bed.put(first)
    bed.put(keys_of(40, "flood"))
    return first


def expired(bed: Bed) -> Keys:
    tries = itertools.count()

    def stored() -> Keys | None:
        keys = keys_of(1, f"brief/{next(tries)}")
        return keys if all(bed.client.put(keys, values_of(keys, NBYTES), ttl_s=0.05)) else None

    keys: Keys = eventually(stored, "it arrives before it expires")
    time.sleep(0.06)
    return keys


def expired_and_looked_up(bed: Bed) -> Keys:
    keys = expired(bed)
    assert bed.client.match_prefix(keys) == 0
    return keys


def deleted(bed: Bed) -> Keys:
    keys = keys_of(1, "deleted")
    bed.put(keys)
    assert bed.client.delete(keys) == [True]
    return keys


def removed(bed: Bed) -> Keys:
    keys = keys_of(1, "removed")
    bed.put(keys)
    assert Operations(bed.client).remove(pb.Selection(kind="kv")).entries == 1
    return keys


def bad_bytes(bed: Bed) -> Keys:
    keys = keys_of(1, "flipped")
    bed.put(keys)
    faults.flip_bit(bed.server.shard, keys.digests[0], 8 * 5000)
    assert not bed.client.get_into(keys, [np.zeros(NBYTES, np.uint8)])[0]
    return keys


def too_large(bed: Bed) -> Keys:
    keys = keys_of(1, "large")
    bed.client.put(keys, [np.zeros(2 * MiB, np.uint8)])
    return keys


def over_quota(bed: Bed) -> Keys:
    bed.server.shard.index.usage.quotas = {0: Quota(nbytes=100_000)}
    keys = keys_of(2, "quota")
    bed.put(keys)
    return keys[1:]


def writes_stopped(bed: Bed) -> Keys:
    Operations(bed.client).set_mode("read")
    keys = keys_of(1, "stopped")
    bed.put(keys)
    return keys


def announced(bed: Bed) -> tuple[Raw, Keys]:
    """A writer that says it will write, and then writes nothing."""
    keys = keys_of(1, "announced")
    raw = Raw(bed.server.unix_path)
    raw.ask(Op.JOIN, pb.JoinRequest(protocol=PROTOCOL))
    raw.answer()
    request = pb.ReserveRequest(keys=keys.digests[0], parents=bytes(32), frame_nbytes=[NBYTES], kinds=b"\1")
    raw.ask(Op.RESERVE, request)
    assert pb.ReserveReply.FromString(raw.answer()[1]).status == bytes([pb.WANTED])
    return raw, keys


def timed_out(bed: Bed) -> Keys:
    raw, keys = announced(bed)
    raw.sock.close()
    eventually(lambda: bed.why(keys).why is not Why.BEING_WRITTEN, "the broken write ended")
    return keys


def reads_stopped(bed: Bed) -> Keys:
    keys = keys_of(1, "unread")
    bed.put(keys)
    Operations(bed.client).set_mode("write")
    return keys


def namespace_stopped(bed: Bed) -> Keys:
    keys = keys_of(1, "unread")
    bed.put(keys)
    Operations(bed.client).set_mode("off", pb.Selection(facts={"model": "model"}))
    return keys


def another_tenants(bed: Bed) -> Keys:
    """Stored by the tenant "other" alone: the frame is made in another cache and landed through the shard."""
    keys = keys_of(1, "theirs")
    with faults.embedded(MiB) as (maker, made):
        maker.put(keys, values_of(keys, NBYTES))
        data = bytes(made.view(faults.locate(made, keys.digests[0])))
    tenant = bed.server.service.tenants.number("other")
    landing = bed.server.shard.reserve(tenant, keys.digests[0], bytes(32), len(data), 1)
    assert isinstance(landing, Landing)

    def fill(view: memoryview) -> int:
        view[:] = data[landing.landed_nbytes : landing.landed_nbytes + len(view)]
        return len(view)

    while landing.left_nbytes:
        landing.land(1 << 16, fill, memoryview(bytearray(1 << 16)))
    assert landing.commit() is None
    return keys


SITUATIONS: list[tuple[Callable[[Bed], Keys], Why, str]] = [
    (never_stored, Why.NEVER_STORED, ""),
    (evicted, Why.EVICTED, ""),
    (expired, Why.TTL_PASSED, ""),
    (expired_and_looked_up, Why.TTL_PASSED, ""),
    (deleted, Why.DELETED, ""),
    (removed, Why.REMOVED, ""),
    (bad_bytes, Why.BAD_BYTES, ""),
    (too_large, Why.REFUSED, "larger than the server stores"),
    (over_quota, Why.REFUSED, "quota"),
    (writes_stopped, Why.REFUSED, "stopped writes"),
    (timed_out, Why.TIMED_OUT, ""),
    (reads_stopped, Why.READS_STOPPED, ""),
    (namespace_stopped, Why.READS_STOPPED, ""),
    (another_tenants, Why.OTHER_TENANT, ""),
]


@pytest.mark.parametrize(("plant", "why", "detail"), SITUATIONS, ids=[plant.__name__ for plant, _, _ in SITUATIONS])
def test_the_reason_is_the_one_that_was_planted(bed: Bed, plant: Callable[[Bed], Keys], why: Why, detail: str) -> None:
    keys = plant(bed)
    asked_s = time.monotonic()
    reason = bed.why(keys)
    assert reason.why is why
    assert detail in reason.detail
    if why not in (Why.NEVER_STORED, Why.READS_STOPPED, Why.OTHER_TENANT):
        assert reason.ago_s is not None
        assert 0 <= reason.ago_s < time.monotonic() - asked_s + 30
    assert not bed.client.match_prefix(keys)


def test_a_write_under_way_is_told_and_then_stored_is_stored(bed: Bed) -> None:
    raw, keys = announced(bed)
    assert bed.why(keys).why is Why.BEING_WRITTEN
    raw.sock.close()
    eventually(lambda: bed.why(keys).why is Why.TIMED_OUT, "the broken write ended")
    bed.put(keys)
    assert bed.why(keys).why is Why.HERE


def test_a_key_stored_again_is_no_longer_explained_by_its_past(bed: Bed) -> None:
    keys = deleted(bed)
    bed.put(keys)
    assert bed.why(keys).why is Why.HERE
    assert bed.client.delete(keys) == [True]
    assert bed.why(keys).why is Why.DELETED
    ended = run_cli("explain", keys[0].hex(), keys_of(1, "never")[0].hex(), "-c", bed.url)
    assert ended.returncode == 0
    assert re.search(r"deleted by a client, \d+\.\d s ago\n.*never stored", ended.stdout)


def test_only_an_operator_hears_of_other_tenants(bed: Bed) -> None:
    keys = another_tenants(bed)
    service = bed.server.service
    body = pb.ExplainRequest(keys=keys.digests[0]).SerializeToString()
    tenant = Caller(service.tenants.number("third"), "third", admin=False)
    reply = service.handle(Op.EXPLAIN, tenant, body)
    assert isinstance(reply, pb.ExplainReply)
    assert reply.why == bytes([Why.NEVER_STORED])
    never = pb.ExplainRequest(keys=bytes(32)).SerializeToString()
    assert reply == service.handle(Op.EXPLAIN, tenant, never), "the two answers must not differ"
    assert bed.why(keys).why is Why.OTHER_TENANT


def test_recent_lookups_tell_what_they_missed_first(bed: Bed) -> None:
    keys = NAMESPACE.block_keys(range(64))
    bed.put(keys[:2])
    assert bed.client.match_prefix(keys) == 2
    bed.client.get_into(keys, [np.zeros(NBYTES, np.uint8) for _ in keys])
    bed.client.delete(keys[:1])
    assert bed.client.match_prefix(keys) == 0
    last, read, first = Operations(bed.client).recent(3)
    assert (last.keys, last.found, last.prefix, last.key, last.why) == (4, 0, True, keys.digests[0], pb.DELETED)
    assert (read.keys, read.found, read.prefix, read.key) == (4, 2, False, keys.digests[2])
    assert (first.found, first.key, first.why) == (2, keys.digests[2], pb.NEVER_STORED)
    ended = run_cli("explain", "--recent", "5", "-c", bed.url, "--json")
    assert [json.loads(line)["found"] for line in ended.stdout.splitlines()] == [0, 2, 2]


# ------------------------------------------------------------------------------------------------ recorded requests

PICTURE = bytes(range(32))


def picture(**about: object) -> Item:
    """An item of 20 placeholder tokens from token 20 on."""
    kwargs = {"max_pixels": about.get("max_pixels", 200_704)}
    item = item_digest(PICTURE, grid=(1, 8, 10), processor_kwargs=kwargs)
    return Item(mmcache.PlaceholderSpan(20, 20, item), {"content": PICTURE.hex(), "processor_kwargs": kwargs})


TOKENS = [*range(20), *[9] * 20, *range(40, 80)]


def test_a_namespace_that_differs_is_named_with_its_field(bed: Bed) -> None:
    bed.put(record(HALF, TOKENS).keys())
    found = explain(Operations(bed.client), record(NAMESPACE, TOKENS))
    assert (found.blocks, found.first_missing, found.reason.why) == (5, 0, Why.NEVER_STORED)
    (finding,) = found.findings
    assert finding == (
        "namespace differs: dtype is 'uint8' here and 'float16' there. Under that one 5 of 5 blocks are stored"
    )


def test_the_first_block_that_differs_is_found_with_its_item(bed: Bed) -> None:
    bed.put(record(NAMESPACE, TOKENS, [picture()]).keys())
    other = record(NAMESPACE, TOKENS, [picture(max_pixels=50_176)])
    found = explain(Operations(bed.client), other)
    assert (found.first_missing, found.reason.why) == (1, Why.NEVER_STORED)
    assert found.findings == [
        "first differing block: 1 (tokens 16 to 31, part of item 0). The block before it is stored and goes on in 1 "
        "other way: a token or an item differs there"
    ]


def test_facts_that_are_no_namespaces_of_ours_are_passed_over(bed: Bed) -> None:
    for odd in ({"block_size": "many"}, {"kind": "kv"}):  # as a client in another language may declare them
        facts = {**NAMESPACE.facts, **odd}
        bed.put(ChainHasher(NamespaceId(namespace_id("kv", facts), "kv", facts), 16).extend(TOKENS[:16]))
    bed.put(record(HALF, TOKENS).keys())
    (finding,) = explain(Operations(bed.client), record(NAMESPACE, TOKENS)).findings
    assert "dtype is 'uint8' here and 'float16' there" in finding


def test_what_differs_between_two_requests_is_named() -> None:
    one = record(NAMESPACE, TOKENS, [picture()])
    assert list(differences(one, record(NAMESPACE, TOKENS, [picture()]))) == []
    words = list(differences(one, record(NAMESPACE, TOKENS, [picture(max_pixels=1)])))
    assert words == [
        "first differing block: 1, at token 20: item 0 differs: processor_kwargs is {'max_pixels': 200704} here and "
        "{'max_pixels': 1} there"
    ]
    assert list(differences(one, record(NAMESPACE, [*TOKENS[:50], 7, *TOKENS[51:]], [picture()]))) == [
        "first differing block: 3, at token 50: 50 here and 7 there"
    ]
    assert list(differences(record(NAMESPACE, TOKENS), record(HALF, TOKENS[:70]))) == [
        "namespace differs: dtype is 'uint8' here and 'float16' there",
        "first differing block: 4, at token 70: the other ends there",
    ]


def test_a_recorded_request_survives_its_file_and_the_command_line(bed: Bed, tmp_path: Path) -> None:
    request = record(NAMESPACE, TOKENS, [picture()])
    again = parse(request.to_json())
    assert again == request
    assert again.keys().digests == request.keys().digests
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    here.write_text(request.to_json())
    there.write_text(record(NAMESPACE, TOKENS, [picture(max_pixels=1)]).to_json())
    bed.put(request.keys())
    ended = run_cli("explain", "--request", str(here), "-c", bed.url)
    assert ended.stdout == "all 5 blocks are stored\n"
    ended = run_cli("explain", "--request", str(there), "--against", str(here), "-c", bed.url, "--json")
    found = json.loads(ended.stdout)
    assert (found["first_missing"], found["why"]) == (1, "never_stored")
    assert "max_pixels" in found["findings"][0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, found list"),
        ("{}", "namespace: expected an object"),
        ('{"namespace": {"kind": "kv", "facts": {}}, "token_ids": []}', "model is missing"),
        ('{"namespace": {"kind": "kv", "facts": []}, "token_ids": []}', "namespace.facts: expected an object"),
        ('{"namespace": {"kind": "kv", "facts": {"model": "m"}}, "token_ids": 3}', "token_ids: expected a list"),
        (
            '{"namespace": {"kind": "kv", "facts": {"model": "m", "dtype": "x", '
            '"layout": "L", "block_size": "4"}}, "token_ids": [], "spans": [{}]}',
            r"spans\[0\]: 'offset'",
        ),
    ],
)
def test_a_recording_that_is_none_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_what_to_explain_must_be_said(bed: Bed) -> None:
    ended = run_cli("explain", "-c", bed.url)
    assert ended.returncode == 2
    assert "give KEYs, or --request FILE" in ended.stderr
    ended = run_cli("explain", "--request", "/nowhere/at/all.json", "-c", bed.url)
    assert ended.returncode == 2
    assert "cannot read" in ended.stderr
    assert isinstance(record(NAMESPACE, [1]), Recorded)
