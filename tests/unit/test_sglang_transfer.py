"""Pages move in calls of bounded size, through a real server."""

from __future__ import annotations

import hashlib

import numpy as np

import mmcache
from mmcache.keys import Keys, Namespace, Part
from mmcache.testing.process import ServerProcess
from mmcache_connectors.sglang.pages import page_keys
from mmcache_connectors.sglang.transfer import read_pages, write_pages

PAGES, PAGE_NBYTES = 11, 4096
LIMIT = 3 * PAGE_NBYTES  # three pages a call
WAIT_S = 60.0


def keys() -> Keys:
    namespace = Namespace(kind="kv", model="m@1", dtype="bfloat16", layout="page_first", block_size=16)
    hashes = [hashlib.sha256(bytes([page])).hexdigest() for page in range(PAGES)]
    return page_keys(namespace, Part(), hashes, [])


def pages(fill: int | None = None) -> list[list[np.ndarray]]:
    """Each page in two halves, as keys and values lie in a host pool."""
    values = [page + 1 if fill is None else fill for page in range(PAGES)]
    return [[np.full(PAGE_NBYTES // 2, value, np.uint8) for _ in range(2)] for value in values]


def test_pages_come_back_as_they_were() -> None:
    with ServerProcess("64MiB") as server, mmcache.connect(server.url, deadline_s=10) as cache:
        assert write_pages(cache, keys(), pages(), LIMIT) == [True] * PAGES
        places = pages(0)
        assert read_pages(cache, keys(), places, WAIT_S, LIMIT) == [True] * PAGES
        assert [[half.tolist() for half in page] for page in places] == [[h.tolist() for h in page] for page in pages()]
        assert [read_pages(cache, keys()[:0], [], WAIT_S, LIMIT), write_pages(cache, keys()[:0], [], LIMIT)] == [[], []]


def test_nothing_is_read_behind_a_call_with_a_page_that_is_not_there() -> None:
    with ServerProcess("64MiB") as server, mmcache.connect(server.url, deadline_s=10) as cache:
        write_pages(cache, keys(), pages(), LIMIT)
        cache.delete(keys()[4:5])
        places = pages(0)
        found = read_pages(cache, keys(), places, WAIT_S, LIMIT)
        assert found == [True] * 4 + [False, True] + [False] * 5
        assert all(half.max() == 0 for page in places[6:] for half in page)


def test_no_call_begins_when_nobody_waits_any_more() -> None:
    with ServerProcess("64MiB") as server, mmcache.connect(server.url, deadline_s=10) as cache:
        write_pages(cache, keys(), pages(), LIMIT)
        assert read_pages(cache, keys(), pages(0), 0.0, LIMIT) == [True] * 3 + [False] * (PAGES - 3)


def test_an_entry_of_another_form_goes_and_the_right_one_can_be_stored() -> None:
    with ServerProcess("64MiB") as server, mmcache.connect(server.url, deadline_s=10) as cache:
        cache.put(keys()[2:3], [b"another form"])
        write_pages(cache, keys(), pages(), LIMIT)
        assert read_pages(cache, keys(), pages(0), WAIT_S, LIMIT) == [True, True] + [False] * (PAGES - 2)
        assert cache.contains(keys()) == [page != 2 for page in range(PAGES)]
        assert write_pages(cache, keys(), pages(), LIMIT) == [True] * PAGES
        assert read_pages(cache, keys(), pages(0), WAIT_S, LIMIT) == [True] * PAGES


def test_without_a_server_every_page_is_missed() -> None:
    with mmcache.connect("mmcache://127.0.0.1:1", lazy=True, deadline_s=0.2) as cache:
        assert read_pages(cache, keys(), pages(0), WAIT_S, LIMIT) == [False] * PAGES
        assert write_pages(cache, keys(), pages(), LIMIT) == [False] * PAGES
