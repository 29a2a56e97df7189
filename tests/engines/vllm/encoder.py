"""What the tests of the encoder cache share: engines with MMCacheECConnector, and damage to what is stored.

vLLM's own prefix cache is off in these engines, as it asks for no item of a prefix it knows, and its own encoder cache
is emptied before each question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mmcache
from mmcache.frame import parse_header
from tests.engines.cache import Cache, stored_keys
from tests.engines.vllm.harness import DEADLINE_S, Answer, Ask, Engine, Expected, Settings

ALONE = {
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,  # or vLLM would not look at a picture under a name it knows
    "enable_mm_embeds": True,
}
SIGHT = Settings("vision", ALONE | {"limit_mm_per_prompt": {"image": 3, "video": 1}, "max_num_batched_tokens": 512})


def sharing(
    settings: Settings, url: str, role: str = "ec_both", llm: dict[str, Any] | None = None, **extra: Any
) -> Settings:
    """The same engine with the connector before a cache; `extra` are the connector's settings, `llm` the engine's."""
    connector = {
        "ec_connector": "MMCacheECConnector",
        "ec_connector_module_path": "mmcache_connectors.vllm",
        "ec_role": role,
        "ec_connector_extra_config": {"url": url, "deadline_s": DEADLINE_S, **extra},
    }
    return Settings(settings.model, settings.llm | {"ec_transfer_config": connector} | (llm or {}))


class Encoding:
    """An engine, the cache it shares, and what the plain engine answers. Use as a context manager."""

    def __init__(
        self, settings: Settings, shared: Settings, environment: dict[str, str] | None = None, kv: Any = None
    ) -> None:
        self.expected = Expected.plan(settings)
        self.engine = Engine(shared, kv, environment)

    def __enter__(self) -> Encoding:
        self.engine.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.engine.close()

    def answers(self, *asks: Ask, together: bool = False) -> tuple[list[Answer], int]:
        """(the answers after vLLM's own caches were emptied, how often the encoder ran for them)."""
        self.engine.reset()
        self.engine.call("reset_encoder_cache")
        before = self.passes()
        return self.engine.generate(*asks, together=together), self.passes() - before

    def passes(self) -> int:
        """How often the encoder has run since the start."""
        return int(self.engine.call("encoder_passes"))

    def right(self, *asks: Ask, together: bool = False) -> int:
        """Every answer must be the plain engine's; how often the encoder ran for them."""
        answers, passes = self.answers(*asks, together=together)
        for answer, truth in zip(answers, self.expected.of(*asks), strict=True):
            assert answer.same(truth), (answer, truth, self.engine.log()[-3000:])
        return passes

    def counters(self) -> dict[str, int]:
        """The connector's."""
        return self.engine.counters()["encoder"]


def value(cache: Cache, digest: bytes) -> NDArray[np.float32]:
    """What is stored under a key."""
    with mmcache.connect(cache.url) as client:
        (stored,) = parse_header(client.inspect(digest).header, limit_nbytes=1 << 30).tensors
        found: NDArray[np.float32] = np.empty(stored.spec.shape, np.float32)
        assert client.get_into(stored_keys(client, [digest]), [found])[0]
        return found


def replace(cache: Cache, digests: Sequence[bytes], change: Callable[[NDArray[np.float32]], NDArray[Any]]) -> None:
    """Under these keys, put what `change` makes of the value."""
    with mmcache.connect(cache.url) as client:
        for digest in digests:
            keys, changed = stored_keys(client, [digest]), change(value(cache, digest))
            client.delete(keys)
            assert client.put(keys, [changed])[0].outcome == "stored"


def reshape(cache: Cache, digests: Sequence[bytes]) -> None:
    """Frames of another shape: each value has a row less."""
    replace(cache, digests, lambda value: value[1:].copy())


def retype(cache: Cache, digests: Sequence[bytes]) -> None:
    """Frames of another dtype."""
    replace(cache, digests, lambda value: value.astype(np.float16))


def revalue(cache: Cache, digests: Sequence[bytes]) -> None:
    """Valid frames that hold something else."""
    replace(cache, digests, lambda value: value[::-1].copy())


def flip(cache: Cache, digests: Sequence[bytes]) -> None:
    """A bit of each payload."""
    assert cache.flip(digests, 8 * 4200) == len(digests)
