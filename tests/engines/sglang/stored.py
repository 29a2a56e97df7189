"""Pages in a cache server, found by what SGLang names them, and damage to them while the server runs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmcache
from mmcache.keys import Key, Keys, Part
from mmcache.keyset import NamespaceId
from mmcache_connectors.sglang.pages import page_keys
from tests.engines.sglang.harness import Cache, Engine
from tests.engines.sglang.prompts import PAGE


def keys_of(engine: Engine, ids: list[int], pool: str = "") -> Keys:
    """The keys of a prompt's full pages: SHA-256 chains over little-endian tokens of 4 bytes, as SGLang 0.5.23 has."""
    found = re.search(f"{f'pool {pool} are in' if pool else 'as'} namespace ([0-9a-f]{{64}})", engine.log())
    assert found
    namespace: Any = SimpleNamespace(id=bytes.fromhex(found[1]), block_size=PAGE)
    above, hashes = b"", []
    for start, stop in pairwise(range(0, len(ids) + 1, PAGE)):
        tokens = b"".join(token.to_bytes(4, "little") for token in ids[start:stop])
        above = hashlib.sha256(above + tokens).digest()
        hashes.append(above.hex())
    return page_keys(namespace, Part(), hashes, [])


def forget(cache: Cache, keys: Keys | list[Key]) -> None:
    """Delete entries; all must have been there."""
    with mmcache.connect(cache.url) as client:
        assert all(client.delete(keys))


def reshape(cache: Cache, keys: Keys) -> None:
    """Put something of another form in place of entries."""
    with mmcache.connect(cache.url) as client:
        known = client.inspect(keys.digests[0])
        forget(cache, keys)
        space = NamespaceId(keys.namespaces[0], known.kind, dict(known.facts))
        for key in keys:
            assert all(client.put(dataclasses.replace(key, namespace=space), [b"another form"]))


def flip(cache: Cache, key: Keys | list[Key]) -> None:
    """Change one byte in the middle of one entry's first tensor, and of its equals, in the server's memory."""
    wanted: set[bytes] = set()
    for url in cache.urls:  # behind a fork a page lies where only who has heard of the fork looks
        with mmcache.connect(url) as client, client.acquire(key) as leased:
            wanted |= {bytes(frame.payload(frame.header.tensors[0])) for frame in leased.frames if frame is not None}
    (middle,) = {len(payload) // 2 for payload in wanted}
    assert all(flip_found(cache, payload, lambda _: middle) for payload in wanted)


def flip_found(cache: Cache, wanted: bytes, offset: Callable[[memoryview], int | None]) -> int:
    """Change a bit behind each place in the server's memory that holds `wanted`; how many were changed.

    `offset` is told what lies from there on, and says how far on the byte is; None leaves it.
    """
    return sum(_flip_found(holder, wanted, offset) for holder in cache.holders)


def _flip_found(pid: int, wanted: bytes, offset: Callable[[memoryview], int | None]) -> int:
    with Path(f"/proc/{pid}/maps").open() as maps:
        places = [line.split()[0] for line in maps if "mmcache-arena" in line]
    flips = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for place in places:
            start, stop = (int(number, 16) for number in place.split("-"))
            memory.seek(start)
            data = memory.read(stop - start)
            for found in re.finditer(re.escape(wanted), data):
                there = offset(memoryview(data)[found.start() :])
                if there is not None:
                    at = found.start() + there
                    memory.seek(start + at)
                    flips += memory.write(bytes([data[at] ^ 4]))
    return flips
