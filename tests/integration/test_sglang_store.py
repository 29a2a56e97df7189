"""Pages of pools in host memory through a real server: several kinds at once, cut by heads, found by their policies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmcache
from mmcache.keys import Namespace, Part
from mmcache.testing.process import ServerProcess
from mmcache_connectors.sglang.pages import split_heads
from mmcache_connectors.sglang.pools import FirstPool, FurtherPool, arrays_at, page_sizes
from mmcache_connectors.sglang.store import NO_LIMIT, PageStore

PAGE, LAYERS, HEADS, DIM, PAGES = 4, 3, 4, 8, 12
HASHES = [hashlib.sha256(bytes([page])).hexdigest() for page in range(PAGES)]


class Memory:
    """A host pool as SGLang lays it out by heads: `[2, page, head, token, layer, dim]`, and its two ways to point."""

    def __init__(self, pages: int = PAGES, heads: int = HEADS, fill: int | None = None) -> None:
        self.page_size, self.heads = PAGE, heads
        shape = (2, pages, heads, PAGE, LAYERS, DIM)
        self.kv_buffer: Any = torch.randn(shape) if fill is None else torch.full(shape, float(fill))

    def get_split_heads_page_buffer_meta(self, indices: Any, pieces: int) -> tuple[list[int], list[int]]:
        heads = self.heads // pieces
        found = [
            self.kv_buffer[half, page, start : start + heads]
            for page in (indices[::PAGE] // PAGE).tolist()
            for start in range(0, self.heads, heads)
            for half in range(2)
        ]
        return [one.data_ptr() for one in found], [one.nbytes for one in found]

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        return self.get_split_heads_page_buffer_meta(indices, 1)


def space(page: str) -> Namespace:
    return Namespace(kind="kv", model="m@1", dtype="float32", layout="page_head", block_size=PAGE, page=page)


def first_pool(memory: Any, parts: list[Part] | None = None) -> FirstPool:
    part = parts[0] if parts and len(parts) == 1 else Part()
    return FirstPool(memory, space("buffers"), space("flat"), part, parts or [part])


def tokens(*pages: int) -> torch.Tensor:
    return torch.tensor([page * PAGE + token for page in pages for token in range(PAGE)])


def transfer(name: str, pages: list[int], policy: str = "all_pages", hashes: list[str] | None = None) -> Any:
    keys = HASHES[: len(pages)] if hashes is None else hashes
    return SimpleNamespace(
        name=name, keys=keys, host_indices=tokens(*pages), hit_policy=policy, block_pages=0, group_pages=0
    )


@pytest.fixture
def cache() -> Iterator[mmcache.Client]:
    with ServerProcess("64MiB") as server, mmcache.connect(server.url) as client:
        yield client


def test_pages_written_whole_are_read_where_others_lie(cache: mmcache.Client) -> None:
    source, target = Memory(), Memory(fill=0)
    assert PageStore(cache, first_pool(source), NO_LIMIT).write(HASHES, tokens(*range(PAGES)), []) == [True] * PAGES
    places = [*range(PAGES)][::-1]
    reader = PageStore(cache, first_pool(target), NO_LIMIT)
    assert reader.read(HASHES, tokens(*places), []) == [True] * PAGES
    assert torch.equal(target.kv_buffer[:, places], source.kv_buffer)
    assert reader.count_leading(HASHES, [], flat=False) == PAGES
    assert reader.count_leading(HASHES, [], flat=True) == 0


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (1, 4), (4, 2)])
def test_ranks_of_one_number_read_what_those_of_another_wrote(
    cache: mmcache.Client, writers: int, readers: int
) -> None:
    """Cut for the least common multiple of both, as `tp_lcm_size` says."""
    most, whole, found = max(writers, readers), Memory(), Memory(fill=0)
    for ranks, memory in ((writers, whole), (readers, found)):
        each = HEADS // ranks
        for rank in range(ranks):
            mine = Memory(heads=each)
            heads = slice(rank * each, (rank + 1) * each)
            mine.kv_buffer.copy_(memory.kv_buffer[:, :, heads])
            parts = split_heads(Part(kv_heads=(rank * each, (rank + 1) * each, HEADS)), each, most // ranks)
            store = PageStore(cache, first_pool(mine, parts), NO_LIMIT)
            if memory is whole:
                assert store.write(HASHES, tokens(*range(PAGES)), []) == [True] * PAGES
                continue
            assert store.count_leading(HASHES, [], flat=False) == PAGES
            assert store.read(HASHES, tokens(*range(PAGES)), []) == [True] * PAGES
            memory.kv_buffer[:, :, heads] = mine.kv_buffer
    assert torch.equal(whole.kv_buffer, found.kv_buffer)


def test_a_page_with_a_piece_missing_is_not_there(cache: mmcache.Client) -> None:
    parts = split_heads(Part(), HEADS, 2)
    pool = first_pool(Memory(), parts)
    store = PageStore(cache, pool, NO_LIMIT)
    store.write(HASHES, tokens(*range(PAGES)), [])
    cache.delete(pool.keys(HASHES, [])[9:10])  # the second half of the fifth page
    assert store.count_leading(HASHES, [], flat=False) == 4
    assert store.read(HASHES, tokens(*range(PAGES)), []) == [page != 4 for page in range(PAGES)]


def several(cache: mmcache.Client, memory: dict[str, Memory]) -> PageStore:
    store = PageStore(cache, first_pool(memory["kv"]), NO_LIMIT)
    for name in ("swa", "indexer"):
        store.further[name] = FurtherPool(memory[name], space(f"buffers of {name}"))
    return store


def test_several_kinds_of_pages_go_and_come_in_one_request_each(cache: mmcache.Client) -> None:
    source = {name: Memory() for name in ("kv", "swa", "indexer")}
    target = {name: Memory(fill=0) for name in source}
    moved = [transfer(name, [*range(PAGES)]) for name in source]
    everything = {name: [True] * PAGES for name in source}
    before = cache.stat()["counters"]
    assert several(cache, source).write_all(moved, []) == everything
    written = cache.stat()["counters"]
    assert several(cache, target).read_all(moved, []) == everything
    read = cache.stat()["counters"]
    assert all(torch.equal(source[name].kv_buffer, target[name].kv_buffer) for name in source)
    assert written["stored"] - before["stored"] == read["hits"] - written["hits"] == 3 * PAGES


def test_how_far_a_prompt_reaches_is_one_question_about_all_kinds(cache: mmcache.Client) -> None:
    """Every page of the first kind and the index, and of the window those before the third and the eighth page."""
    memory = {name: Memory() for name in ("kv", "swa", "indexer")}
    store = several(cache, memory)
    every = [transfer(name, [*range(10)]) for name in ("kv", "indexer")]
    windows = [transfer("swa", [at, at + 1], hashes=HASHES[at : at + 2]) for at in (1, 6)]
    store.write_all(every, [])
    for window in windows:  # each begins after other pages
        store.write_all([window], HASHES[: HASHES.index(window.keys[0])])
    asked = [
        transfer("swa", [0, 1], "trailing_pages", HASHES[10:]),
        transfer("indexer", [*range(PAGES)], "all_pages", HASHES),
    ]
    assert store.find(HASHES, asked, [], flat=False) == ([3, 8], {"kv": 10, "swa": 8, "indexer": 10})
    cache.delete(store.further["indexer"].keys(first_pool(memory["kv"]), HASHES, [])[5:6])
    assert store.find(HASHES, asked, [], flat=False) == ([3], {"kv": 10, "swa": 8, "indexer": 5})
    assert store.find(HASHES, asked[:1], [], flat=True) == ([], {})


def test_where_the_first_kind_has_no_memory_the_others_decide(cache: mmcache.Client) -> None:
    memory = {name: Memory() for name in ("kv", "swa", "indexer")}
    memory["kv"].kv_buffer = None  # as SGLang's LogicalHostPool has it
    store = several(cache, memory)
    assert store.write(HASHES, tokens(*range(PAGES)), []) == store.read(HASHES, tokens(*range(PAGES)), [])
    store.write_all([transfer("indexer", [*range(7)])], [])
    asked = [transfer("indexer", [*range(PAGES)], "all_pages", HASHES)]
    assert store.find(HASHES, asked, [], flat=False) == ([*range(1, 8)], {"kv": PAGES, "indexer": 7})


def test_what_moved_is_told_once(cache: mmcache.Client) -> None:
    store = PageStore(cache, first_pool(Memory()), NO_LIMIT)
    store.write(HASHES, tokens(*range(PAGES)), [])
    store.read(HASHES[:5], tokens(*range(5)), [])
    store.read([HASHES[0][::-1]], tokens(0), None)  # nothing there
    read, written = store.moved.take()
    assert (read.pages, written.pages) == ([5], [PAGES])
    assert min(*read.gb_per_s, *written.gb_per_s) > 0
    assert store.moved.take() == (([], []), ([], []))


def test_indices_that_are_no_pages_are_refused(cache: mmcache.Client) -> None:
    store = several(cache, {name: Memory() for name in ("kv", "swa", "indexer")})
    wrong = transfer("swa", [0, 1])
    for indices in (None, wrong.host_indices[1:]):
        wrong.host_indices = indices
        with pytest.raises(ValueError, match="indices for 2 pages of 4 tokens"):
            store.read_all([wrong], [])


def test_a_pool_whose_pages_come_in_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    assert page_sizes(memory) == [HEADS * PAGE * LAYERS * DIM * 4] * 2
    ask = memory.get_page_buffer_meta
    backwards: Any = lambda at: [part[::-1] for part in ask(at)]  # noqa: E731
    monkeypatch.setattr(memory, "get_page_buffer_meta", backwards)
    with pytest.raises(ValueError, match="do not come page after page"):
        page_sizes(memory)
    assert arrays_at([], []) == []
