"""What SGLang says of the pages before a read, put right: each page is placed as it was when it was stored."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from mmcache.keys import Namespace, Part
from mmcache_connectors.sglang import prefixes
from mmcache_connectors.sglang.pages import page_keys

HASHES = [hashlib.sha256(bytes([number & 255, number >> 8])).hexdigest() for number in range(600)]
SPACE = Namespace(kind="kv", model="m@1", dtype="bfloat16", layout="page_first", block_size=16)
STORED = page_keys(SPACE, Part(), HASHES, [])


@pytest.fixture(autouse=True)
def unsaid() -> Any:
    prefixes.SAID.clear()
    yield
    prefixes.SAID.clear()


def tree(own: list[str]) -> Any:
    """SGLang's tree, of which one node is looked at."""
    return SimpleNamespace(tree_core=SimpleNamespace(get_hash_values=lambda node: own))


def read(operation: Any, batch: int = 128) -> Any:
    """The keys of a read as SGLang 0.5.23 makes its batches."""
    prefixes.say_none(None, operation)
    said, keys = operation.prefix_keys, page_keys(SPACE, Part(), [], [])
    for at in range(0, len(operation.hash_value), batch):
        hashes, info = operation.hash_value[at : at + batch], SimpleNamespace(prefix_keys=said)
        prefixes.add_skipped(None, operation, hashes, None, info, [])
        keys += page_keys(SPACE, Part(), hashes, info.prefix_keys)
        said = None if said is None else said + hashes
    return keys


def operation(before: list[str] | None, start: int, skipped: int = 0) -> Any:
    """A read of all pages from `start` on."""
    return SimpleNamespace(
        prefix_keys=before,
        last_hash=HASHES[start - 1] if start else None,
        all_hash_values=HASHES[start:],
        hash_value=HASHES[start + skipped :],
        prefetch_kv_page_offset=skipped,
    )


@pytest.mark.parametrize("parent", [0, 3, 40])
@pytest.mark.parametrize("upstream_adds_them", [False, True])
def test_the_node_s_own_pages_come_before_too(parent: int, upstream_adds_them: bool) -> None:
    before = HASHES[: 50 if upstream_adds_them else parent]
    prefixes.add_own(before, tree(HASHES[parent:50]), 7)
    assert before == HASHES[:50]
    assert read(operation(before, 50)) == STORED[50:]
    assert prefixes.SAID.is_set()


def test_at_the_root_there_are_none() -> None:
    before: list[str] = []
    prefixes.add_own(before, tree([]), 0)
    assert before == []
    assert read(operation(before, 0)) == STORED


def test_nothing_said_is_none_only_where_sglang_says_which_and_nothing_is_hashed_before() -> None:
    alone = page_keys(SPACE, Part(), HASHES, None)
    assert read(operation(None, 0)) == alone
    prefixes.SAID.set()
    assert read(operation(None, 0)) == STORED
    assert read(operation(None, 50)) == alone[50:]


@pytest.mark.parametrize("skipped", [1, 5, 200])
def test_what_a_read_skips_comes_before_its_batches(skipped: int) -> None:
    assert read(operation(HASHES[:50], 50, skipped)) == STORED[50 + skipped :]
    assert read(operation(None, 50, skipped)) == page_keys(SPACE, Part(), HASHES[50 + skipped :], None)
