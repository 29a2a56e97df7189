"""One SGLang engine in a process of its own: reads a JSON request a line from stdin, answers one a line.

Answers go to the descriptor named by the first argument, as SGLang writes to stdout. The second argument is the JSON of
the engine's arguments. Requests: {"ids": [...]}, {"many": [[...], ...]} for several at once, {"text": ..., "images":
[paths]}, {"weights": path}, {"flush": true}, {"attach": the extra config's JSON}, {"detach": true}; it ends with its
input.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import sglang
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.pool_host import base

# SGLang wants 10 GiB free besides its pools, which are of a few MiB here. Its processes import this module too.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def in_the_window(run: Callable[..., Any]) -> Callable[..., Any]:
    """Have SGLang's CPU attention read a sliding window where it is.

    It writes the keys and values of such layers to their own pool's places but reads them by those of the full pool,
    which are the same only until something is evicted or loaded: wrong tokens, without any cache (SGLang 0.5.23).
    """

    @functools.wraps(run)
    def read(self: Any, q: Any, o: Any, keys: Any, values: Any, places: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_sliding_window_kv_pool and kwargs.get("sliding_window_size") is not None:
            places = self.token_to_kv_pool.translate_loc_from_full_to_swa(places.long())
        return run(self, q, o, keys, values, places, *args, **kwargs)

    return read


for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
    setattr(TorchNativeAttnBackend, name, in_the_window(getattr(TorchNativeAttnBackend, name)))


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
    if "detach" in request:
        gone = engine.loop.run_until_complete(engine.tokenizer_manager.detach_hicache_storage())
        return {"detached": bool(gone.success), "said": gone.message}
    extra = {name: request[name] for name in ("mm_hashes", "cache_salt") if name in request}
    made = engine.generate(
        prompt=request.get("text"),
        input_ids=request.get("many") or request.get("ids"),
        sampling_params={"temperature": 0.0, "max_new_tokens": request.get("tokens", 8), "ignore_eos": True},
        image_data=request.get("images") or None,
        **extra,
    )
    return {"all": [told(one) for one in made]} if "many" in request else told(made)


def told(made: dict[str, Any]) -> dict[str, Any]:
    """What is passed on of an answer."""
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
