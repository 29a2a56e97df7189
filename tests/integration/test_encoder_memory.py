"""Embeddings on their way between a real server and an engine: the memory they lie in, and who gives it back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm.ec_items import Form, Named, Save
from mmcache_connectors.vllm.shelf import MAX_ITEMS, Shelf
from tests.integration.support import eventually, suspend
from tests.integration.toy_encoder import WIDTH, Toy, output, request, toys_of_one_server

DEADLINE_S = 6.0
ONE_DEADLINE_S = 1.8 * DEADLINE_S  # never two of them, even where the machine stands still for a while


@pytest.fixture
def toys() -> Iterator[Any]:
    with toys_of_one_server() as make:
        yield make


def test_what_has_no_room_on_the_shelf_is_encoded(toys: Any) -> None:
    first = toys()
    wide = [request(f"a{seed}", seed) for seed in range(1, 4)]
    for one in wide:
        first.run(one)
    assert first.worker.flush(10)
    small = toys()
    small.shelf._limit_nbytes = 2 * 8 * WIDTH * 4  # the setting is in MiB
    held = request("b", 1, 2)
    small.wait(held)
    small.run(request("c", 3))
    assert small.encoded == 1
    assert small.shelf.snapshot()["no_room"] == 2
    waits = request("e", 3)
    assert not small.scheduler.available(waits, 0)
    assert small.scheduler._background.flush(10)
    small.scheduler.finished("b")
    small.run(waits)
    assert small.encoded == 1, "what nobody uses any more makes room, also for a request that found none at first"


def test_many_threads_fetch_one_item_once(toys: Any) -> None:
    first, second = toys(), toys()
    first.run(request("a", 1))
    assert first.worker.flush(10)
    waiting = [request(f"b{index}", 1) for index in range(16)]
    for one in waiting:
        second.scheduler.available(one, 0)
    for one in waiting:
        second.run(one)
    assert second.encoded == 0
    assert second.shelf.snapshot()["fetched_nbytes"] == 8 * WIDTH * 4


def test_an_aborted_request_gives_back_what_was_fetched_for_it(toys: Any) -> None:
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    gone = request("b", 1)
    toy.scheduler.available(gone, 0)
    toy.scheduler.finished("b")
    toy.scheduler.close(5)
    toy.step()
    assert [item.users for item in toy.shelf._items.values()] == [0]


def test_what_comes_long_after_the_deadline_is_given_back_too(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or host memory would be taken by it for good, and at some time nothing were loaded any more."""
    first, second = toys(), toys(deadline_s=0.5)
    second.client.config = replace(second.client.config, deadline_s=8.0)
    first.run(request("a", 1))
    assert first.worker.flush(10)
    names, go = second.scheduler._namer.names, threading.Event()

    def late(*asked: Any) -> Any:
        go.wait(10)  # as if a long clip's features were being hashed
        return names(*asked)

    monkeypatch.setattr(second.scheduler._namer, "names", late)
    second.run(request("b", 1))
    assert second.encoded == 1
    time.sleep(1.2)
    go.set()
    second.scheduler.close(5)
    second.step()
    assert [item.users for item in second.shelf._items.values()] == [0]


def test_items_larger_than_the_cache_and_full_buffers_only_cost_their_caching(toys: Any) -> None:
    toy = toys(save_buffer_mib=8)
    toy.wait(request("a", 1))
    (item,) = toy.scheduler._asked["a"].items.values()
    rows = (6 << 20) // (4 * WIDTH)
    large = Named("large", item.name.key, Form(rows, WIDTH, "float32", measured=True), None)
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    assert toy.worker.flush(10)
    assert toy.worker.snapshot()["saves_refused"] == 1
    stop = threading.Event()
    toy.worker._saver.submit(stop.wait)  # what is on its way waits
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    stop.set()
    assert toy.worker.snapshot()["saves_dropped"] == 1


def test_a_cache_that_stops_and_dies_delays_a_request_by_the_deadline_at_most() -> None:
    server = ServerProcess("64MiB").start()
    try:
        toy = Toy(server.url, deadline_s=DEADLINE_S)
        toy.run(request("a", 1))
        assert toy.worker.flush(10)
        suspend(server.pid)
        for name in ("b", "c"):
            assert toy.run(request(name, 1, 2)) < ONE_DEADLINE_S
        assert toy.encoded >= 3
        server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        _until_hit(toy)
        server.stop(signal.SIGKILL)
        assert toy.run(request("e", 1)) < ONE_DEADLINE_S
        toy.close()
    finally:
        server.stop(signal.SIGKILL)


def _until_hit(toy: Toy) -> None:
    until = time.monotonic() + 20
    while True:
        before = toy.encoded
        toy.shelf = toy.scheduler._shelf = Shelf(toy.client, 1 << 20)
        toy.run(request("d", 1))
        if toy.encoded == before:
            return
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_memory_is_one_that_another_process_maps(toys: Any) -> None:
    """The worker of a tensor-parallel engine is another process than the scheduler."""
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    wanted = request("b", 1)
    toy.wait(wanted)
    toy.scheduler.allocated(wanted, 0)
    _, (load,), _ = toy.scheduler.take_step()
    code = (
        "from mmcache_connectors.vllm.ec_items import Form, Place; from mmcache_connectors.vllm.shelf import mapped;"
        f"print(mapped(Place({load.place.pid}, {load.place.fd}, {load.place.nbytes}), "
        f"Form(8, {WIDTH}, 'float32', True)).sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(float(output(1).sum()))


def test_a_worker_that_may_not_map_it_asks_the_cache_itself(toys: Any, caplog: pytest.LogCaptureFixture) -> None:
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    wanted = request("b", 1)
    toy.wait(wanted)
    toy.scheduler.allocated(wanted, 0)
    _, (load,), _ = toy.scheduler.take_step()
    nowhere = replace(load, place=replace(load.place, fd=1 << 20))
    toy.worker.load([nowhere], toy.cache)
    assert torch.equal(toy.cache["i1"], output(1))
    assert "cannot map" in caplog.text
    toy.scheduler.finished("b")
    toy.scheduler.step_done(0, toy.worker.snapshot())
    before = toy.encoded
    toy.run(request("c", 1))
    assert toy.encoded == before + 1, "a worker that must ask the cache itself is promised nothing more"


def test_small_items_do_not_take_all_open_files(toys: Any) -> None:
    first, second = toys(), toys()
    for seed in range(MAX_ITEMS + 8):
        first.run(request(f"a{seed}", seed))
    assert first.worker.flush(10)
    before, opened = set(embeddings()), len(os.listdir("/proc/self/fd"))
    for seed in range(MAX_ITEMS + 8):
        second.run(request(f"b{seed}", seed))
    assert second.encoded == 0
    assert len([inode for inode in embeddings() if inode not in before]) == 2 * MAX_ITEMS
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= opened + 2 * MAX_ITEMS + 8, "nothing else stays open")


def embeddings() -> list[int]:
    """The memory of embeddings that this process has open, by inode, as often as it has."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if "mmcache-embedding" in os.readlink(path):
                found.append(path.stat().st_ino)
    return found
