"""One SGLang engine in a process of its own: reads a JSON request a line from stdin, answers one a line.

Answers go to the descriptor named by the first argument, as SGLang writes to stdout. The second argument is the JSON of
the engine's arguments. Requests: {"ids": [...]}, {"text": ..., "images": [paths]}, {"weights": path},
{"flush": true}, {"attach": the extra config's JSON}; it ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import sglang
from sglang.srt.mem_cache.pool_host import base

# SGLang wants 10 GiB free besides its pools, which are of a few MiB here. Its processes import this module too.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run one request: tokens and where its prefix came from, or what went wrong."""
    if request.get("flush"):
        return {"flushed": bool(engine.flush_cache().success)}
    if "weights" in request:
        return {"replaced": bool(engine.update_weights_from_disk(request["weights"])[0])}
    if "attach" in request:
        tried = engine.loop.run_until_complete(
            engine.tokenizer_manager.attach_hicache_storage("dynamic", request["attach"])
        )
        return {"attached": bool(tried.success), "said": tried.message}
    extra = {name: request[name] for name in ("mm_hashes", "cache_salt") if name in request}
    made = engine.generate(
        prompt=request.get("text"),
        input_ids=request.get("ids"),
        sampling_params={"temperature": 0.0, "max_new_tokens": request.get("tokens", 8), "ignore_eos": True},
        image_data=request.get("images") or None,
        **extra,
    )
    info = made["meta_info"]
    return {
        "tokens": made["output_ids"],
        "prompt": info["prompt_tokens"],
        "cached": info["cached_tokens"],
        "details": info.get("cached_tokens_details") or {},
    }


def main() -> None:
    """Start, say so, answer until the input ends."""
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)

    engine = sglang.Engine(**json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        try:
            found = answer(engine, json.loads(line))
        except Exception as error:
            found = {"error": repr(error)}
        print(json.dumps(found), file=out)
    engine.shutdown()


if __name__ == "__main__":
    main()
