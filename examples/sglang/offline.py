"""SGLang in a Python program, with mmcache: the same prompts three times, and what of them was computed.

    python examples/sglang/offline.py MODEL --url mmcache://127.0.0.1:7600

The second time SGLang's own caches have them, the third time, after they were emptied, mmcache. Run the program again:
it is another process, and mmcache has them the first time, too.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

CONTEXT = "You answer questions about this library of plans. " * 40
QUESTIONS = ("How many floors has the station?", "Where is the lift?", "Which exit is nearest to the tram?")


def main() -> None:
    """One line for each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--url", required=True, help="of the cache")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more arguments of sglang.Engine")
    asked = parser.parse_args()
    import sglang

    backend = {
        "backend_name": "mmcache",
        "module_path": "mmcache_connectors.sglang.hicache",
        "class_name": "MMCacheHiCacheStorage",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "url": asked.url,
    }
    engine = sglang.Engine(
        model_path=asked.model,
        enable_hierarchical_cache=True,
        hicache_mem_layout="page_first_direct",
        hicache_io_backend="direct",
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=json.dumps(backend),
        **asked.engine,
    )
    first = _round(engine, "first time")
    assert _round(engine, "again") == first
    time.sleep(2.0)  # pages are stored in the background
    assert engine.flush_cache().success
    assert _round(engine, "SGLang's own caches emptied") == first
    engine.shutdown()


def _round(engine: Any, what: str) -> list[str]:
    began = time.perf_counter()
    prompts = [CONTEXT + question for question in QUESTIONS]
    answers = [engine.generate(prompt, {"temperature": 0.0, "max_new_tokens": 16}) for prompt in prompts]
    seconds = time.perf_counter() - began
    told = [answer["meta_info"] for answer in answers]
    tokens, cached = (sum(one[name] for one in told) for name in ("prompt_tokens", "cached_tokens"))
    stored = sum((one.get("cached_tokens_details") or {}).get("storage", 0) for one in told)
    print(f"{what}: {cached} of {tokens} prompt tokens cached, {stored} from mmcache, {seconds:.2f} s", flush=True)
    return [answer["text"] for answer in answers]


if __name__ == "__main__":
    main()
