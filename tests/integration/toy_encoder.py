"""Both sides of the encoder cache against a real server, and the engine between them, whose encoder is a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

import mmcache
from mmcache.config import ServerConfig
from mmcache.server.serve import Server
from mmcache_connectors.vllm.adapters import AdapterIdentities
from mmcache_connectors.vllm.ec_items import Form
from mmcache_connectors.vllm.ec_names import Namer
from mmcache_connectors.vllm.ec_scheduler import EncoderScheduler
from mmcache_connectors.vllm.ec_worker import EncoderWorker
from mmcache_connectors.vllm.items import ItemIdentities
from mmcache_connectors.vllm.settings import EncoderSettings
from mmcache_connectors.vllm.shelf import Shelf
from tests.integration.support import PATIENCE_S

WIDTH = 64
CPU = torch.device("cpu")


class Facts:
    """As EncoderFacts: an engine whose encoder gives WIDTH numbers a row."""

    adapters_count = False
    epoch = ""
    known = True

    def get(self) -> dict[str, object] | None:
        epoch = {"weights_epoch": self.epoch} if self.epoch else {}
        return {"model": "m", "dtype": "float32", **epoch} if self.known else None

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
    return Request(request_id=name, mm_features=features, cache_salt=salt, lora_request=None, num_preemptions=0)


class Data(dict[str, Any]):
    """As MultiModalKwargsItem: weak references to it must work."""


def output(seed: int) -> torch.Tensor:
    """What the encoder makes of an image."""
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


class Toy:
    """Both sides, and the engine between them."""

    def __init__(self, url: str, *, reads: bool = True, encodes_only: bool = False, **settings: Any) -> None:
        self.settings = EncoderSettings(url=url, **{"deadline_s": 8.0, **settings})
        self.client = mmcache.connect(url, deadline_s=self.settings.deadline_s, lazy=True)
        self.facts = Facts()
        self.shelf = Shelf(self.client, self.settings.load_buffer_mib << 20)
        items = ItemIdentities(trust_uuids=self.settings.trust_media_uuids)
        namer = Namer(self.facts, items, AdapterIdentities(), 14)  # type: ignore[arg-type]
        self.scheduler = EncoderScheduler(
            self.settings, namer, self.client, self.shelf, reads=reads, writes=True, encodes_only=encodes_only,
            steps_in_flight=1, placeholder_fields=lambda modality: {"image_grid_thw"},
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
            assert time.monotonic() < began_s + PATIENCE_S
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
        assert self.worker.flush(20)
        self.scheduler.close(5)
        self.client.close()


@contextmanager
def toys_of_one_server() -> Iterator[Callable[..., Toy]]:
    """Gives a function that makes a Toy with the settings it is given, all before one server of 4 MiB."""
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=4 << 20))
    server.start()
    assert server.address is not None
    url = "mmcache://{}:{}".format(*server.address)
    made: list[Toy] = []

    def make(**settings: Any) -> Toy:
        made.append(Toy(url, **settings))
        return made[-1]

    try:
        yield make
        for toy in made:
            toy.close()
    finally:
        server.stop()
