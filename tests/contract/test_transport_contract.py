"""The contract of mmcache.testing for every way to a shard, whoever waits for it: embedded, shared memory, unix
without it, TCP, TLS, NIXL where it is installed, and gRPC; and for several shards behind one client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import mmcache
from mmcache.config import ClientConfig, ServerConfig
from mmcache.embedded import EmbeddedClient
from mmcache.errors import ConfigError
from mmcache.testing.contract import BATCH_KEYS, CHECKS, INLINE_NBYTES, LIMITS, MEMORY, Check
from tests.contract.ways import WAYS, way_of
from tests.integration.on_a_loop import OnALoop

NAMES = ("embedded", "shm in Python", *WAYS)
PAIRS = [("blocking", name) for name in NAMES]
PAIRS += [("blocking", "cluster")]
PAIRS += [("asyncio", name) for name in NAMES if not name.startswith("grpc")]


@contextlib.contextmanager
def embedded(waits: str) -> Iterator[Any]:
    limits = ServerConfig(
        listen="", unix_path="", memory_nbytes=MEMORY, max_batch_keys=BATCH_KEYS, max_inline_nbytes=INLINE_NBYTES
    )
    config = ClientConfig(scheme="embedded", deadline_s=20)
    if waits == "asyncio":
        with OnALoop(mmcache.AsyncClient(config, server_config=limits)) as looped:
            yield looped
    else:
        with EmbeddedClient(config, limits) as client:
            yield client


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    waits, name = request.param
    with contextlib.ExitStack() as stack:
        if name == "embedded":
            client = stack.enter_context(embedded(waits))
        elif name == "cluster":
            way = replace(way_of("shm", tmp_path_factory.mktemp("way")), environment=LIMITS)
            addresses = [way.address(stack.enter_context(way.server(MEMORY))) for _ in range(3)]
            client = stack.enter_context(mmcache.connect(f"mmcache://{','.join(addresses)}", deadline_s=20))
        else:
            way = way_of("shm" if name == "shm in Python" else name, tmp_path_factory.mktemp("way"))
            server = stack.enter_context(replace(way, environment={**LIMITS, "MMCACHE_LEASE_S": "60"}).server(MEMORY))
            url = way.url(way.address(server)) + ("&native=no" if name == "shm in Python" else "")
            url += "&connect_s=20" if "?" in url else "?connect_s=20"
            connect = mmcache.connect if waits == "blocking" else lambda *w, **o: OnALoop(mmcache.AsyncClient(*w, **o))
            client = stack.enter_context(connect(url, deadline_s=20))
        assert client.stat()["transport"] == dict.fromkeys(("cluster", "embedded", "shm in Python"), "shm").get(
            name, name
        )
        yield client


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_contract_holds(cache: Any, check: Check) -> None:
    check.run(cache)


def test_a_check_can_fail() -> None:
    """A client that reads another value than was stored breaks the contract."""

    class Wrong(EmbeddedClient):
        def get_into(self, keys: Any, buffers: Any, **options: Any) -> Any:
            results = super().get_into(keys, buffers, **options)
            buffers[0].reshape(-1)[:1] ^= 1
            return results

    limits = ServerConfig(listen="", unix_path="", memory_nbytes=MEMORY)
    with Wrong(ClientConfig(scheme="embedded"), limits) as cache, pytest.raises(AssertionError):
        CHECKS[0].run(cache)


def test_the_asyncio_client_says_that_it_does_not_speak_grpc() -> None:
    with pytest.raises(ConfigError, match="does not speak gRPC; use transport=tcp"):
        mmcache.AsyncClient("mmcache://127.0.0.1:7601?transport=grpc")
