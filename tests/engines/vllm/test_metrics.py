"""The connector's counts in vLLM's own metrics: what is sent, added up over ranks and steps, and shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from tests.engines.cache import Cache
from tests.engines.vllm.harness import BLOCK, DEADLINE_S, Engine, Expected, Settings, ask, words

# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
TEXT = Settings("text", {"disable_log_stats": False})
WARM, NEW = ask(words(750, 300)), ask(words(751, 200))
EXPECTED = Expected.plan(TEXT, WARM, NEW)
KV_NBYTES = 2 * 2 * 2 * 32 * 4  # of one token of the text model: layers, keys and values, heads, head size, float32


def report(reporter: Any, counters: dict[str, int], **times: list[float]) -> Any:
    return reporter.report(counters, times)


def test_steps_and_ranks_add_up() -> None:
    from mmcache_connectors.vllm.connector import MMCacheKVConnector
    from mmcache_connectors.vllm.metrics import StatsReporter

    first, second = StatsReporter(), StatsReporter()
    build = MMCacheKVConnector.build_kv_connector_stats
    total = report(first, {"blocks_saved": 3, "lookups": 0}, load_seconds=[0.25])
    total = total.aggregate(
        report(second, {"blocks_saved": 4, "saves_dropped": 1}, load_seconds=[0.75], save_seconds=[])
    )
    assert report(first, {"blocks_saved": 3, "lookups": 0}, load_seconds=[]) is None
    total = build(total.to_dict()).aggregate(report(first, {"blocks_saved": 5, "lookups": 1}))
    assert total.reduce() == {
        "mmcache_blocks_saved": 9, "mmcache_load_seconds": 0.5, "mmcache_lookups": 1, "mmcache_saves_dropped": 1,
    }  # fmt: skip
    assert not total.is_empty()
    assert build().is_empty()


def test_an_accumulated_log_leaves_a_step_as_it_was_sent() -> None:
    from mmcache_connectors.vllm.connector import MMCacheKVConnector
    from mmcache_connectors.vllm.metrics import StatsReporter

    sent = {"lookups": 2}
    MMCacheKVConnector.build_kv_connector_stats(sent).aggregate(report(StatsReporter(), {"lookups": 5}))
    assert sent == {"lookups": 2}


def test_every_series_is_there_from_the_start_and_holds_its_count() -> None:
    """Two engines behind one server; what no metric is made of is left out."""
    from mmcache_connectors.vllm.connector import MMCacheKVConnector
    from mmcache_connectors.vllm.metrics import COUNTERS, TIMES

    config = SimpleNamespace(kv_transfer_config=None)
    labels = {0: ["m", "0"], 1: ["m", "1"]}
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    before = set(REGISTRY._collector_to_names)
    prom = MMCacheKVConnector.build_prom_metrics(config, types, ["model_name", "engine"], labels)
    try:
        told = {count: 10 + i for i, count in enumerate(c for m in COUNTERS for c in m.series.values())}
        assert len(told) == sum(len(metric.series) for metric in COUNTERS)  # no count is shown twice
        prom.observe({**told, "load_seconds": [0.002, 3.0], "client_hits": 5}, 1)
        prom.observe(told, 1)
        for metric in COUNTERS:
            for values, count in metric.series.items():
                more = dict(zip(metric.labels, values, strict=True))
                for engine, wanted in (("0", 0), ("1", 2 * told[count])):
                    found = REGISTRY.get_sample_value(
                        f"{metric.name}_total", {"model_name": "m", "engine": engine, **more}
                    )
                    assert found == wanted, (metric.name, values)
        for name in TIMES:
            one = {"model_name": "m", "engine": "1"}
            assert REGISTRY.get_sample_value(f"vllm:mmcache_{name}_count", one) == (2 if name == "load_seconds" else 0)
            assert REGISTRY.get_sample_value(f"vllm:mmcache_{name}_sum", one) == (
                3.002 if name == "load_seconds" else 0
            )
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_an_engine_shows_what_it_did(mode: str) -> None:
    EXPECTED.prepare()
    with Cache() as cache, Engine(TEXT, {"url": cache.url, "load_mode": mode}) as engine:
        engine.generate(WARM)
        cache.settle()
        engine.fresh(WARM, NEW)
        cache.settle()
        (again,) = engine.fresh(ask(words(752, 40)))
        assert again.cached == 0
        cache.settle()
        engine.generate(ask(words(754, 8), max_tokens=2))  # a step in which what ended since the last one is told
        shown = engine.call("metrics", prefix="vllm:mmcache_")
        for tail in (words(755 + i, 100) for i in range(3)):  # a busy machine learns the reason too late
            told = engine.call("transfer_params", asks=[WARM, ask(words(751, 200) + tail, max_tokens=64)])
            if told[1]["mmcache"]["missed"]["reason"] != "not known yet":
                break
    assert shown["vllm:mmcache_lookups"] == 4
    assert shown["vllm:mmcache_hit_tokens{transport=shared_memory}"] == 288
    assert shown["vllm:mmcache_bytes{direction=load,transport=shared_memory}"] == 288 * KV_NBYTES
    saved = shown["vllm:mmcache_saves{outcome=stored}"]
    assert saved == (307 // BLOCK) + (207 // BLOCK) + (47 // BLOCK)
    assert shown["vllm:mmcache_bytes{direction=save,transport=shared_memory}"] == saved * BLOCK * KV_NBYTES
    assert shown["vllm:mmcache_load_seconds.count"] == 1
    assert 0 < shown["vllm:mmcache_load_seconds.sum"] < DEADLINE_S
    assert shown["vllm:mmcache_save_seconds.count"] > 0
    for name in ("load_failures", "verify_failures", "lookup_timeouts", "audit_differences", "saves{outcome=dropped}"):
        assert shown[f"vllm:mmcache_{name}"] == 0
    assert told[0]["mmcache"]["cached_tokens"] == 288
    assert told[1]["mmcache"] == {
        "cached_tokens": 192,
        "missed": {"tokens": 96, "reason": "never stored, or so long ago that it is forgotten"},
    }


@pytest.mark.full
def test_two_caches_under_vllms_multi_connector() -> None:
    """Their counts add up, and only one of the two answers for a request: vLLM ends where both do."""
    with Cache() as one, Cache() as other:
        connectors = [
            {
                "kv_connector": "MMCacheKVConnector",
                "kv_connector_module_path": "mmcache_connectors.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"url": cache.url, "deadline_s": DEADLINE_S},
            }
            for cache in (one, other)
        ]
        both = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"connectors": connectors},
        }
        with Engine(Settings("text", TEXT.llm | {"kv_transfer_config": both}), {}) as engine:
            engine.generate(WARM)
            stored = [one.settle(), other.settle()]
            told = engine.call("transfer_params", asks=[WARM])
            shown = engine.call("metrics", prefix="vllm:mmcache_")
    assert stored == [307 // BLOCK] * 2
    assert told == [{"mmcache": {"cached_tokens": 288}}]
    assert shown["vllm:mmcache_saves{outcome=stored}"] == sum(stored)
    assert shown["vllm:mmcache_bytes{direction=load,transport=shared_memory}"] == 288 * KV_NBYTES
