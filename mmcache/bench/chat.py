"""`mmcache bench chat`: many users in conversations about photos, through a real cache, every hit checked bit for bit.

Each request is served as in media.py; what is added are turns: an answer's KV blocks are stored too, and the next
prompt begins with them.
"""

from __future__ import annotations

from mmcache.bench import conversation, encoder, extras
from mmcache.bench.engine import KV, CheckedCache, PrefixEngine
from mmcache.bench.media import COMPARED, MODELLED, SHAPES
from mmcache.bench.report import Report
from mmcache.bench.run import Options, Progress, Serve, Workload, run_workload
from mmcache.units import count

SCALES = {"full": conversation.FULL, "quick": conversation.QUICK}


def run(options: Options, progress: Progress | None = None) -> Report:
    """Run the workload once and report. `progress` is called with (requests done, requests in all).

    `full` is about 150 requests of 24 users with a working set of about 0.5 GB, `quick` about 20 of 5 users.

    Raises:
        ConfigError: options that cannot work, or media libraries that are not installed.
        TransportError: as `run_workload`.
    """
    extras.check("chat")
    return run_workload(_planned(SCALES[options.scale], options.seed), options, progress)


def _planned(scale: conversation.ChatScale, seed: int) -> Workload:
    requests = conversation.requests(scale, seed)
    steps = [request.step(KV, encoder.EMBEDDING_NBYTES) for request in requests]

    def engine(cache: CheckedCache, salt: str) -> Serve:
        prefix = PrefixEngine(cache, salt)
        return lambda index: prefix.serve(requests[index], steps[index])

    return Workload(
        name="chat",
        about=f"{count(scale.photos, 'photo')} by {count(scale.users, 'user')}",
        kinds=("embedding", "kv"),
        steps=steps,
        engine=engine,
        entry_nbytes=KV.nbytes,
        facts={
            "users": scale.users,
            "photos": scale.photos,
            "prompt_tokens": sum(len(request.token_ids) for request in requests),
            "generated_tokens": sum(len(request.answer) for request in requests),
            "longest_prompt_tokens": max(len(request.token_ids) for request in requests),
            **SHAPES,
        },
        measured=(COMPARED, "photos scikit-image ships, read from its files and decoded"),
        modelled=(
            *MODELLED,
            "what is said and answered (made-up tokens), who sends which photo, when; photos are asked about by rank, "
            "the k-th 1/k as often as the first",
            "ideal (an endless cache) and exact LRU: replays, not caches",
        ),
    )
