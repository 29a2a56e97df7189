"""Faults planted in a real store, so that a test or a benchmark can show that they are noticed.

They reach into a `Shard` of this process (an embedded server's): real bytes in the real arena are changed, and real
index rows point at the wrong entry. Nothing in the product imports this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmcache.config import ClientConfig
from mmcache.embedded import EmbeddedClient
from mmcache.errors import UsageError
from mmcache.store.answers import Found
from mmcache.store.rows import RECORD
from mmcache.store.shard import Shard
from mmcache.store.table import NO_ROW, tenant_prefix

_TENANT = 0


@contextmanager
def embedded(memory_nbytes: int, verify: bool = True) -> Iterator[tuple[EmbeddedClient, Shard]]:
    """A client with a server in this process, and that server's shard."""
    with EmbeddedClient(ClientConfig(scheme="embedded", memory_nbytes=memory_nbytes, verify=verify)) as client:
        yield client, client.shard


def locate(shard: Shard, digest: bytes) -> Found:
    """Where a stored key lies. Raises UsageError if it is not stored."""
    lease_id, found = shard.acquire(_TENANT, [digest])
    shard.release(_TENANT, lease_id)
    if not isinstance(found[0], Found):
        raise UsageError(f"{digest.hex()} is not stored, so no fault can be planted in it")
    return found[0]


def flip_bit(shard: Shard, digest: bytes, bit: int) -> None:
    """Flip one bit of a stored frame; `bit` counts from the frame's start, modulo its size."""
    found = locate(shard, digest)
    position = found.offset + bit // 8 % found.nbytes
    shard.arena.view[position] ^= 1 << bit % 8


def swap_entries(shard: Shard, first: bytes, second: bytes) -> None:
    """Make the index hold each of two keys at the other's place: valid frames, wrong keys.

    Raises UsageError if one of them is not stored, or is leased: its lease would then free the other's place.
    """
    locate(shard, first)
    locate(shard, second)
    with shard.lock:
        rows = shard.index.rows
        prefix = tenant_prefix(_TENANT)
        one, other = rows.table.find(prefix, first), rows.table.find(prefix, second)
        if NO_ROW in (one, other) or any(shard.index._pins[rows.node[row]] for row in (one, other)):
            raise UsageError("one of the two was evicted meanwhile, or is leased, so no fault can be planted in it")
        rows.node[one], rows.node[other] = rows.node[other], rows.node[one]
        here, there = (RECORD.unpack_from(rows.records, row * RECORD.size) for row in (one, other))
        RECORD.pack_into(rows.records, one * RECORD.size, *there)
        RECORD.pack_into(rows.records, other * RECORD.size, *here)
