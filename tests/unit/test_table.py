"""The hash table: probing, deletion that shifts back, and the secret seed."""

from __future__ import annotations

import random

import pytest

from mmcache.store.table import Table, tenant_prefix
from tests.unit.index_bed import key


def test_probing_and_deleting_survive_a_full_table_of_colliding_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every name hashes to one of the last three slots, so that every chain of probes wraps around the end.
    def colliding(name: bytes, seed: int) -> int:
        return (0xFFFFFFFF - name[4] % 3 * 0x02000000) << 32

    monkeypatch.setattr("mmcache.store.table.xxh3_64_intdigest", colliding)
    table, prefix, rng = Table(40, seed=1), tenant_prefix(0), random.Random(3)
    rows: dict[bytes, int] = {}
    for _ in range(600):
        name = key(rng.randrange(60))
        if name in rows:
            table.remove(rows.pop(name))
        elif table.available():
            rows[name] = table.add(prefix, name)
        assert table.check_integrity() == set(rows.values())
        assert table.find_all(prefix, [key(n) for n in range(60)], False) == [rows.get(key(n), -1) for n in range(60)]


def test_the_hash_depends_on_the_seed() -> None:
    def slots(seed: int) -> list[int]:
        table = Table(8, seed)
        for number in range(8):
            table.add(tenant_prefix(0), key(number))
        return [entry & 0xFFFFFFFF for entry in table._slots]

    assert slots(1) != slots(2)
