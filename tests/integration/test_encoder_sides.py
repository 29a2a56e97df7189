"""The encoder cache's two sides against a real server, without an engine: what is fetched, promised and stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmcache
from mmcache.config import ServerConfig
from mmcache.server.serve import Server
from mmcache.testing.process import ServerProcess
from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.ec_items import Form, Named, Save
from mmcache_connectors.vllm.ec_names import Namer
from mmcache_connectors.vllm.ec_scheduler import EncoderScheduler
from mmcache_connectors.vllm.ec_worker import EncoderWorker
from mmcache_connectors.vllm.items import ItemIdentities
from mmcache_connectors.vllm.settings import EncoderSettings
from mmcache_connectors.vllm.shelf import MAX_ITEMS, Shelf
from tests.integration.support import suspend

WIDTH = 64
CPU = torch.device("cpu")
DEADLINE_S = 0.5


class Facts:
    """As EncoderFacts: an engine whose encoder gives WIDTH numbers a row."""

    adapters_count = False
    epoch = ""
    known = True

    def get(self) -> dict[str, object] | None:
        return {"model": "m", "dtype": "float32"} if self.known else None

    def form(self, modality: str, rows: int) -> Form:
        return Form(rows, WIDTH, "float32", measured=True)


class Request(SimpleNamespace):
    """As vLLM's, with one image of 8 embeddings a seed, one after another."""


def request(name: str, *seeds: int, salt: str = "", bare: bool = False) -> Request:
    features = []
    for place, seed in enumerate(seeds):
        rows = {} if bare else {"pixel_values": SimpleNamespace(data=torch.full((4, 4), float(seed)))}
        grid = {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 2, 4]))}
        position = SimpleNamespace(offset=10 * place, length=8, is_embed=None, get_num_embeds=lambda: 8)
        features.append(
            SimpleNamespace(identifier=f"i{seed}", modality="image", mm_position=position, data={**rows, **grid})
        )
        features[-1].data = Data(features[-1].data)
    return Request(request_id=name, mm_features=features, cache_salt=salt, lora_request=None)


class Data(dict[str, Any]):
    """As MultiModalKwargsItem: weak references to it must work."""


def output(seed: int) -> torch.Tensor:
    """What the encoder makes of an image."""
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


class Toy:
    """Both sides, and the engine between them."""

    def __init__(self, url: str, *, reads: bool = True, writes: bool = True, **settings: Any) -> None:
        self.settings = EncoderSettings(url=url, **{"deadline_s": 8.0, **settings})
        self.client = mmcache.connect(url, deadline_s=self.settings.deadline_s, lazy=True)
        self.facts = Facts()
        self.shelf = Shelf(self.client, self.settings.load_buffer_mib << 20)
        items = ItemIdentities(trust_uuids=self.settings.trust_media_uuids)
        namer = Namer(self.facts, items, AdapterIdentities(), 14)  # type: ignore[arg-type]
        self.scheduler = EncoderScheduler(
            self.settings, namer, self.client, self.shelf, reads=reads, writes=writes, steps_in_flight=1,
            placeholder_fields=lambda modality: {"image_grid_thw"},
        )  # fmt: skip
        self.worker = EncoderWorker(self.settings, self.client, CPU, stores=True)
        self.cache: dict[str, torch.Tensor] = {}
        self.encoded = 0

    def wait(self, wanted: Request) -> float:
        """Ask until the request may run; seconds."""
        began_s = time.monotonic()
        while not self.scheduler.available(wanted, 0):
            self.step()
            if wanted.request_id in self.scheduler.take_hopeless():
                raise LookupError(wanted.request_id)
            assert time.monotonic() < began_s + 10
        return time.monotonic() - began_s

    def run(self, wanted: Request) -> float:
        """One request through both sides: every embedding must be right. How long it was put off, in seconds."""
        took_s = self.wait(wanted)
        self.cache.clear()
        missing = []
        for index, feature in enumerate(wanted.mm_features):
            if not self.scheduler.has(feature.identifier):
                missing.append(feature)
            self.scheduler.allocated(wanted, index)
        self.step(missing)
        for feature in wanted.mm_features:
            seed = int(feature.identifier[1:])
            assert torch.equal(self.cache[feature.identifier], output(seed))
        self.scheduler.finished(wanted.request_id)
        return took_s

    def step(self, missing: list[Any] | None = None) -> None:
        step, loads, saves = self.scheduler.take_step()
        self.worker.load(loads, self.cache)
        for feature in missing or ():
            self.encoded += 1
            self.cache[feature.identifier] = made = output(int(feature.identifier[1:]))
            if feature.identifier in saves:
                self.worker.save(saves[feature.identifier], made)
                made = None
        self.scheduler.step_done(step, {})

    def close(self) -> None:
        assert self.worker.flush(5)
        self.scheduler.close(5)
        self.client.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=4 << 20))
    server.start()
    yield server
    server.stop()


def url_of(server: Server) -> str:
    assert server.address is not None
    return "mmcache://{}:{}".format(*server.address)


@pytest.fixture
def toys(server: Server) -> Iterator[Any]:
    made: list[Toy] = []

    def make(**settings: Any) -> Toy:
        made.append(Toy(url_of(server), **settings))
        return made[-1]

    yield make
    for toy in made:
        toy.close()


def test_one_engine_encodes_and_another_loads(toys: Any) -> None:
    first, second = toys(), toys()
    first.run(request("a", 1, 2))
    assert first.worker.flush(5)
    second.run(request("b", 2, 3))
    assert (first.encoded, second.encoded) == (2, 1)
    assert first.worker.snapshot()["items_saved"] == 2
    assert second.scheduler.snapshot()["items_hit"] == 1


def test_a_tenant_finds_only_its_own(toys: Any) -> None:
    toy = toys()
    for salt, encoded in (("x", 1), ("y", 2), ("", 3), ("x", 3)):
        toy.run(request("a", 1, salt=salt))
        assert toy.worker.flush(5)
        assert toy.encoded == encoded


def test_a_name_is_not_what_an_embedding_is_found_by(toys: Any) -> None:
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(5)
    forged = request("b", 2)
    forged.mm_features[0].identifier = "i1"
    toy.wait(forged)
    assert not toy.scheduler.has("i1")


def test_with_trusted_names_an_embedding_may_be_left_out_of_a_request(toys: Any) -> None:
    toy = toys(trust_media_uuids=True)
    toy.run(request("a", 1))
    assert toy.worker.flush(5)
    toy.run(request("b", 1, bare=True))
    assert toy.encoded == 1
    with pytest.raises(LookupError):
        toy.run(request("c", 2, bare=True))
    careful = toys()
    with pytest.raises(LookupError):
        careful.run(request("d", 1, bare=True))


def test_what_has_no_room_on_the_shelf_is_encoded(toys: Any) -> None:
    first = toys()
    wide = [request(f"a{seed}", seed) for seed in range(1, 4)]
    for one in wide:
        first.run(one)
    assert first.worker.flush(5)
    small = toys()
    small.shelf._limit_nbytes = 2 * 8 * WIDTH * 4  # the setting is in MiB
    held = request("b", 1, 2)
    small.wait(held)
    small.run(request("c", 3))
    assert small.encoded == 1
    assert small.shelf.snapshot()["no_room"] == 1
    small.scheduler.finished("b")
    small.run(request("d", 3))
    assert small.encoded == 1, "what nobody uses any more makes room"


def test_many_threads_fetch_one_item_once(toys: Any) -> None:
    first, second = toys(), toys()
    first.run(request("a", 1))
    assert first.worker.flush(5)
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
    assert toy.worker.flush(5)
    gone = request("b", 1)
    toy.scheduler.available(gone, 0)
    toy.scheduler.finished("b")
    toy.scheduler.close(5)
    assert [item.users for item in toy.shelf._items.values()] == [0]


def test_items_larger_than_the_cache_and_full_buffers_only_cost_their_caching(toys: Any) -> None:
    toy = toys(save_buffer_mib=8)
    toy.wait(request("a", 1))
    (item,) = toy.scheduler._asked["a"].items.values()
    rows = (6 << 20) // (4 * WIDTH)
    large = Named("large", item.name.key, Form(rows, WIDTH, "float32", measured=True), None)
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    assert toy.worker.flush(5)
    assert toy.worker.snapshot()["saves_refused"] == 1
    stop = threading.Event()
    toy.worker._saver.submit(stop.wait)  # what is on its way waits
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    toy.worker.save(Save(large), torch.zeros(rows, WIDTH))
    stop.set()
    assert toy.worker.snapshot()["saves_dropped"] == 1


def test_an_output_of_another_form_is_not_stored(toys: Any) -> None:
    toy = toys()
    toy.wait(request("a", 1))
    (item,) = toy.scheduler._asked["a"].items.values()
    toy.worker.save(Save(item.name), torch.zeros(9, WIDTH))
    toy.worker.save(Save(item.name), torch.zeros(8, WIDTH, dtype=torch.float16))
    assert toy.worker.flush(5)
    assert toy.worker.snapshot() == {"saves_odd": 2}


def test_an_encoder_instance_does_not_encode_what_is_stored(toys: Any) -> None:
    producer = toys(reads=False)
    producer.run(request("a", 1))
    assert producer.worker.flush(5)
    again = request("b", 1)
    producer.wait(again)
    assert producer.scheduler.has("i1")
    producer.scheduler.allocated(again, 0)
    assert producer.scheduler.take_step()[1:] == ([], {})


def test_nothing_is_cached_while_the_weights_are_unknown(toys: Any) -> None:
    toy = toys()
    toy.facts.known = False
    toy.run(request("a", 1))
    assert toy.worker.snapshot() == {}
    toy.facts.known = True
    toy.run(request("b", 1))
    assert toy.worker.flush(5)
    assert toy.worker.snapshot()["items_saved"] == 1


def test_a_cache_that_stops_and_dies_delays_a_request_by_the_deadline_at_most() -> None:
    server = ServerProcess("64MiB").start()
    try:
        toy = Toy(server.url, deadline_s=DEADLINE_S)
        toy.run(request("a", 1))
        assert toy.worker.flush(5)
        suspend(server.pid)
        for name in ("b", "c"):
            assert toy.run(request(name, 1, 2)) < DEADLINE_S + 0.3
        assert toy.encoded >= 3
        server.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        _until_hit(toy)
        server.stop(signal.SIGKILL)
        assert toy.run(request("e", 1)) < DEADLINE_S + 0.3
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
    assert toy.worker.flush(5)
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
    assert toy.worker.flush(5)
    wanted = request("b", 1)
    toy.wait(wanted)
    toy.scheduler.allocated(wanted, 0)
    _, (load,), _ = toy.scheduler.take_step()
    nowhere = replace(load, place=replace(load.place, fd=1 << 20))
    toy.worker.load([nowhere], toy.cache)
    assert torch.equal(toy.cache["i1"], output(1))
    assert "cannot map" in caplog.text


def test_small_items_do_not_take_all_open_files(toys: Any) -> None:
    first, second = toys(), toys()
    for seed in range(MAX_ITEMS + 8):
        first.run(request(f"a{seed}", seed))
    assert first.worker.flush(10)
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(MAX_ITEMS + 8):
        second.run(request(f"b{seed}", seed))
    assert second.encoded == 0
    assert 2 * MAX_ITEMS <= len(os.listdir("/proc/self/fd")) - before <= 2 * MAX_ITEMS + 8
