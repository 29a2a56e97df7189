"""vLLM in a Python program, with mmcache: the same prompts three times, and what of them was computed.

    python examples/vllm/offline.py MODEL --url mmcache://127.0.0.1:7600

The second time vLLM's own prefix cache has them, the third time, after it was emptied, mmcache. Run the program again:
it is another process, and mmcache has them the first time, too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

CONTEXT = "You answer questions about this library of plans. " * 40
QUESTIONS = ("How many floors has the station?", "Where is the lift?", "Which exit is nearest to the tram?")


def main() -> None:
    """One line for each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--url", required=True, help="of the cache")
    parser.add_argument("--max-model-len", type=int, default=4096)
    asked = parser.parse_args()
    from vllm import LLM

    llm = LLM(
        model=asked.model,
        max_model_len=asked.max_model_len,
        kv_transfer_config={
            "kv_connector": "MMCacheKVConnector",
            "kv_connector_module_path": "mmcache_connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"url": asked.url},
        },
    )
    first = _round(llm, "first time")
    assert _round(llm, "again") == first
    time.sleep(1.0)  # blocks are stored in the background
    llm.reset_prefix_cache()
    assert _round(llm, "vLLM's own cache emptied") == first


def _round(llm: Any, what: str) -> list[str]:
    from vllm import SamplingParams

    began = time.perf_counter()
    prompts = [CONTEXT + question for question in QUESTIONS]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    print(f"{what}: {cached} of {tokens} prompt tokens cached, {seconds:.2f} s", flush=True)
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main()
