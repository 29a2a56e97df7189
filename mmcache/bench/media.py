"""`mmcache bench media`: questions about photos and videos through a real cache, every hit checked bit for bit.

For each request it does what an engine does: look up the prompt's KV blocks, read the leading ones that are there,
look up an embedding for every picture those do not cover, encode and store the missing ones, compute and store the
remaining blocks. Whatever a read delivers is compared with a recomputation from the content. What a cache should have
answered comes from the pure replays in oracle.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmcache.bench import corpus, encoder, extras, workload
from mmcache.bench.engine import KV, CheckedCache, PrefixEngine
from mmcache.bench.report import Report
from mmcache.bench.run import Options, Progress, Serve, Workload, run_workload
from mmcache.errors import ConfigError
from mmcache.units import count

SCALES = {"full": workload.FULL, "quick": workload.QUICK}
# What chat, whose values are the same, models too.
MODELLED = (
    f"KV values: seeded random bits at {KV.model}'s shape {KV.shape} bfloat16, {KV.nbytes:,} B a block",
    f"embeddings: a seeded linear patch projection at CLIP ViT-L/14's shape {encoder.EMBEDDING_SHAPE} float16",
    f"{encoder.TOKENS_PER_PICTURE} prompt tokens a picture (2 x 2 merged patches); words as made-up token ids",
)
COMPARED = "every value that came back, compared bit for bit with a recomputation from token ids, pixels and settings"
SHAPES = {
    "kv_model": KV.model,
    "kv_block_shape": list(KV.shape),
    "embedding_model": "CLIP ViT-L/14",
    "embedding_shape": list(encoder.EMBEDDING_SHAPE),
}


@dataclass(frozen=True, kw_only=True)
class MediaOptions(Options):
    """What to run: `full` is 240 requests with a working set of about 0.54 GB, `quick` 32 with about 60 MB.

    Attributes:
        questions: questions asked about each photo and video; None takes the scale's number.
    """

    questions: int | None = None

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.questions is not None and not 1 <= self.questions <= len(workload.QUESTIONS):
            raise ConfigError(f"{self.questions} questions asked for: choose 1 to {len(workload.QUESTIONS)}")


def run(options: MediaOptions, progress: Progress | None = None) -> Report:
    """Run the workload once and report. `progress` is called with (requests done, requests in all).

    Raises:
        ConfigError: options that cannot work, or media libraries that are not installed.
        TransportError: as `run_workload`.
    """
    extras.check("media")
    scale = SCALES[options.scale]
    if options.questions is not None:
        scale = workload.Scale(scale.photos, scale.videos, scale.video_s, options.questions)
    return run_workload(_planned(scale, options.seed), options, progress)


def _planned(scale: workload.Scale, seed: int) -> Workload:
    requests = workload.requests(scale, seed)
    steps = [request.step(KV, encoder.EMBEDDING_NBYTES) for request in requests]

    def engine(cache: CheckedCache, salt: str) -> Serve:
        prefix = PrefixEngine(cache, salt)
        return lambda index: prefix.serve(requests[index], steps[index])

    return Workload(
        name="media",
        about=f"{count(scale.photos, 'photo')} and {count(scale.videos, 'video')}",
        kinds=("embedding", "kv"),
        steps=steps,
        engine=engine,
        entry_nbytes=KV.nbytes,
        facts={
            "photos": scale.photos,
            "videos": scale.videos,
            "video_s": scale.video_s,
            "video_fps": corpus.VIDEO_FPS,
            "questions": scale.questions,
            "prompt_tokens": sum(len(request.token_ids) for request in requests),
            **SHAPES,
        },
        measured=(
            COMPARED,
            "photos scikit-image ships; videos: camera moves over those photos, really encoded to mp4 and decoded",
        ),
        modelled=(
            *MODELLED,
            "which questions are asked, in which order; ideal (an endless cache) and exact LRU: replays, not caches",
        ),
    )
