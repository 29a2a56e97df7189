"""What became of keys, remembered in a ring; numbers for namespaces; bytes by who has them."""

from __future__ import annotations

import pytest

from mmcache.store import namespaces as module
from mmcache.store.answers import Modality, pack_media
from mmcache.store.history import NEVER, History, Reason
from mmcache.store.namespaces import Namespaces, Selection, Stopped
from mmcache.store.table import tenant_prefix
from mmcache.store.usage import UNKNOWN, Quota, Usage
from mmcache.why import Why

PREFIX = tenant_prefix(0)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_the_ring_keeps_the_newest_and_a_key_once() -> None:
    history = History(4, seed=1)
    for number in range(4):
        history.note(PREFIX + key(number), Why.EVICTED, float(number))
    history.note(PREFIX + key(0), Why.DELETED, 10.0)
    history.note(PREFIX + key(9), Why.REFUSED, 11.0, detail=3)
    assert history.find(PREFIX, key(0)) == Reason(Why.DELETED, 10.0)
    assert history.find(PREFIX, key(1)) is NEVER, "the oldest made room"
    assert history.find(PREFIX, key(2)) == Reason(Why.EVICTED, 2.0)
    assert history.find(PREFIX, key(9)) == Reason(Why.REFUSED, 11.0, 3)
    assert history.find(tenant_prefix(1), key(9)) is NEVER
    for number in range(100, 1000):
        history.note(PREFIX + key(number), Why.EVICTED, 0.0)
    assert sum(history.find(PREFIX, key(number)) is not NEVER for number in range(1000)) == 4


def test_namespaces_are_numbered_once_and_idle_ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMESPACES", 3)
    names = Namespaces()
    first, second, third = (names.number(0, bytes([n]) * 32, {}) for n in range(3))
    assert names.number(0, bytes(32), {}) == first
    assert names.number(1, bytes(32), {first: 1, third: 1}) not in (first, second, third), "the idle one went"
    assert names.known(second) is None
    assert names.find(0, bytes([1]) * 32) is None
    everyone = dict.fromkeys(range(100), 1)
    assert names.number(0, bytes([7]) * 32, everyone) == UNKNOWN, "all are in use"


def test_a_rule_binds_what_it_selects_now_later_and_once_declared() -> None:
    names = Namespaces()
    number = names.number(0, b"n" * 32, {})
    of = Selection(facts={"model": "VL-7B"})
    assert names.stop(of, Stopped.READS)
    assert names.stopped(number) == Stopped.NOTHING, "nothing is known of it yet"
    names.declare(number, "kv", {"model": "Qwen/VL-7B"})
    assert names.stopped(number) == Stopped.READS
    other = names.number(0, b"o" * 32, {})
    names.declare(other, "kv", {"model": "Qwen/VL-72B"})
    assert names.stopped(other) == Stopped.NOTHING
    assert names.stop(Selection(namespace=b"n"), Stopped.WRITES)
    assert names.stopped(number) == Stopped.BOTH, "rules add up"
    assert names.stop(of, Stopped.NOTHING)
    assert names.stopped(number) == Stopped.WRITES
    assert len(names.rules()) == 1


def test_there_is_an_end_to_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RULES", 2)
    names = Namespaces()
    assert [names.stop(Selection(kind=kind), Stopped.READS) for kind in ("kv", "latent", "prompt")] == [
        True,
        True,
        False,
    ]
    assert names.stop(Selection(kind="kv"), Stopped.WRITES), "one given before is replaced"


def test_quotas_count_what_is_being_written() -> None:
    usage = Usage()
    usage.quotas = {1: Quota(nbytes=100, namespace_nbytes=60)}
    assert usage.fits(1, 5, 60)
    usage.claim(1, 5, 60)
    assert not usage.fits(1, 5, 1), "the namespace is full"
    assert usage.fits(1, 6, 40)
    assert not usage.fits(1, 6, 41), "the tenant would be over"
    assert usage.fits(2, 5, 1000), "another tenant has none"
    usage.free(1, 5, 60)
    assert usage.fits(1, 5, 60)
    assert not usage.by_tenant
    assert not usage.by_namespace


def test_media_are_counted_where_writers_say_what_they_are() -> None:
    usage = Usage()
    image, sound = pack_media(Modality.IMAGE, 640 * 480), pack_media(Modality.AUDIO, 1 << 40)
    usage.stored(2, image)
    usage.stored(2, sound)
    usage.stored(1, 0)
    usage.hit(bytes([2, 2, 1]), [image, image, 0])
    numbers = usage.numbers()
    assert (numbers["stored_image"], numbers["stored_image_pixels"]) == (1, 307_200)
    assert (numbers["hits_image"], numbers["hits_image_pixels"]) == (2, 614_400)
    assert numbers["stored_audio_ms"] == (1 << 29) - 1, "more than fits is cut, and stays of its modality"
    assert (numbers["hits_embedding"], numbers["hits_kv"], numbers["stored_kv"]) == (2, 1, 1)
