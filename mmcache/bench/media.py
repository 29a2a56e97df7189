"""`mmcache bench media`: questions about photos and videos through a real cache, every hit checked bit for bit.

For each request it does what an engine does: look up the prompt's KV blocks, read the leading ones that are there,
look up an embedding for every picture those do not cover, encode and store the missing ones, compute and store the
remaining blocks. Whatever a read delivers is compared with a recomputation from the content. What a cache should have
answered comes from the pure replays in oracle.py.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mmcache.bench import corpus, encoder, extras, workload
from mmcache.bench.inject import Injector
from mmcache.bench.oracle import ExactLRU, Step, Tallies, replay
from mmcache.bench.report import Injection, Latency, Report
from mmcache.client.blocking import Client
from mmcache.config import parse_nbytes
from mmcache.connect import connect
from mmcache.errors import ConfigError
from mmcache.frame import DEFAULT_ALIGNMENT, layout_of
from mmcache.keys import Namespace, embedding_key
from mmcache.keyset import Key, Keys
from mmcache.tensors import as_dtype
from mmcache.testing import faults
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Outcome, Result

KV = encoder.QWEN2_VL_2B
POISON = 0xA5  # what every destination holds before a read
DEADLINE_S = 30.0  # a busy machine must not turn hits into misses here
LEASE_S = 5 * DEADLINE_S  # of its own server: longer than any call
SCALES = {"full": workload.FULL, "quick": workload.QUICK}

T = TypeVar("T")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """What to run.

    Attributes:
        connect: URL of a running server; None starts one in its own process and stops it again.
        memory: capacity of that own server: a size ("512MiB"), a share of the working set ("10%"), or "auto", enough
            for all of it.
        scale: "full" (240 requests, a working set of about 0.54 GB) or "quick" (32 requests, about 60 MB).
        questions: questions asked about each photo and video; None takes the scale's number.
        inject: damage stored entries between requests; this runs the cache inside this process.
        verify: let the client verify what it reads. Off, only the benchmark's own comparison stands.
        seed: of the encoder, the order of requests and the injected damage; 0 or more.
    """

    connect: str | None = None
    memory: str = "auto"
    scale: str = "full"
    questions: int | None = None
    inject: Injection | None = None
    verify: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(f"scale {self.scale!r} is unknown: choose one of {', '.join(SCALES)}")
        if self.inject not in (None, "wrong", "corrupt"):
            raise ConfigError(f"inject {self.inject!r} is unknown: choose wrong or corrupt")
        if self.inject and self.connect:
            raise ConfigError("damage can only be planted in an own cache: leave out either inject or connect")
        if self.connect and self.memory != "auto":
            raise ConfigError(
                "memory is that of an own server, and connect names one that has its memory already: leave out either "
                "memory or connect"
            )
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative: choose 0 or more")
        if self.questions is not None and not 1 <= self.questions <= len(workload.QUESTIONS):
            raise ConfigError(f"{self.questions} questions asked for: choose 1 to {len(workload.QUESTIONS)}")


def run(options: MediaOptions, progress: Progress | None = None) -> Report:
    """Run the workload once and report. `progress` is called with (requests done, requests in all).

    Raises:
        ConfigError: options that cannot work, or media libraries that are not installed.
        TransportError: the server cannot be reached or started. Later failures of the server are outcomes, and the
            report is not ok.
    """
    extras.check()
    scale = SCALES[options.scale]
    if options.questions is not None:
        scale = workload.Scale(scale.photos, scale.videos, scale.video_s, options.questions)
    requests = workload.requests(scale, options.seed)
    steps = [request.step(KV, encoder.EMBEDDING_NBYTES) for request in requests]
    endless = _exact_lru(float("inf"))
    ideal = replay(steps, endless)
    memory_nbytes = _memory_nbytes(options.memory, endless.used_nbytes)
    started = time.perf_counter()
    with _opened(options, memory_nbytes) as (cache, injector, where):
        engine = _Engine(cache, encoder.VisionEncoder(options.seed), injector)
        capacity_nbytes = int(cache.stat()["counters"]["bytes_capacity"])
        for done, (request, step) in enumerate(zip(requests, steps, strict=True)):
            engine.serve(request, step)
            if progress is not None:
                progress(done + 1, len(requests))
        verify_failures = cache.counters["verify_failures"]
    wall_s = time.perf_counter() - started
    return Report(
        workload=_describe(options, scale, requests, endless.used_nbytes, capacity_nbytes),
        requests=len(requests),
        got=engine.tallies,
        ideal=ideal,
        lru=replay(steps, _exact_lru(capacity_nbytes)),
        compared=engine.compared,
        wrong=engine.wrong,
        verify_failures=verify_failures,
        verify=options.verify,
        inject=options.inject,
        injected=injector.planted if injector else 0,
        outcomes=engine.outcomes,
        reasons=engine.reasons,
        latency_us={op: Latency.of(times_ns) for op, times_ns in engine.times_ns.items()},
        wall_s=wall_s,
        measured=(
            f"hits, bytes and times of one client and {where}",
            "every value that came back, compared bit for bit with a recomputation from token ids, pixels and settings",
            "photos scikit-image ships; videos: camera moves over those photos, really encoded to mp4 and decoded",
        ),
        modelled=(
            f"KV values: seeded random bits at {KV.model}'s shape {KV.shape} bfloat16, {KV.nbytes:,} B a block",
            f"embeddings: a seeded linear patch projection at CLIP ViT-L/14's shape {encoder.EMBEDDING_SHAPE} float16",
            f"{encoder.TOKENS_PER_PICTURE} prompt tokens a picture (2 x 2 merged patches); words as made-up token ids",
            "which questions are asked, in which order; ideal (an endless cache) and exact LRU: replays, not caches",
        ),
    )


class _Engine:
    """Serves requests through the cache as an inference engine would, and checks everything it is given."""

    def __init__(self, cache: Client, vision: encoder.VisionEncoder, injector: Injector | None) -> None:
        salt = secrets.token_hex(16)  # every run starts cold, on a shared server too
        self._kv = Namespace(
            kind="kv",
            block_size=KV.block_size,
            model=KV.model,
            dtype="bfloat16",
            layout="L2THD",
            cache_salt=salt,
        )
        self._embedding = Namespace(kind="embedding", model="CLIP ViT-L/14", dtype="float16", cache_salt=salt)
        self._cache = cache
        self._embedding_of = lru_cache(maxsize=128)(lambda picture: vision.encode(picture.pixels))  # at most 67 MB
        self._injector = injector
        self.tallies = Tallies()
        self.outcomes: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}  # outcome -> the first reason given for it
        self.times_ns: dict[str, list[int]] = {}
        self.compared = 0
        self.wrong = 0

    def serve(self, request: workload.Request, step: Step) -> None:
        """One request, from its keys to the last block stored."""
        keys = self._timed("block_keys", lambda: self._kv.block_keys(request.token_ids, request.spans()))
        contents = [entry.content for entry in step.blocks]
        present = self._timed("match_prefix", lambda: self._cache.match_prefix(keys))
        if self._injector is not None:
            self._injector.damage(keys[:present], KV.nbytes)
        hits = self._read_blocks(keys[:present], contents[:present])
        tally = self.tallies.kv
        tally.lookups += len(keys)
        tally.hits += hits
        self._embeddings(request, hits)
        if hits < len(keys):
            blocks = [as_dtype(encoder.kv_block(KV, content), "bfloat16") for content in contents[hits:]]
            tally.bytes_written += KV.nbytes * self._put("put kv", keys[hits:], blocks)

    def _read_blocks(self, keys: Keys, contents: Sequence[bytes]) -> int:
        """Read a prefix; returns how many leading blocks came back. Whatever came back is compared, wrong or not."""
        if not len(keys):
            return 0
        buffers = np.full((len(keys), *KV.shape), POISON, dtype=np.uint16)
        labelled = [as_dtype(buffer, "bfloat16") for buffer in buffers]
        results = self._get("get kv", keys, labelled)
        for content, buffer, result in zip(contents, buffers, results, strict=True):
            if result:
                self._compare(buffer, encoder.kv_block(KV, content))
                self.tallies.kv.bytes_read += KV.nbytes
        return next((count for count, result in enumerate(results) if not result), len(results))

    def _embeddings(self, request: workload.Request, blocks: int) -> None:
        """Get or make the embedding of every picture that `blocks` leading blocks do not cover, each once."""
        uncovered = [picture for covered_by, picture in request.pictures(KV.block_size) if blocks < covered_by]
        pictures = list({picture.truth: picture for picture in uncovered}.values())
        if not pictures:
            return
        keys = [embedding_key(self._embedding, picture.item) for picture in pictures]
        if self._injector is not None:
            present = [key for key in keys if self._cache.match_prefix(Keys.of(key))]
            self._injector.damage(present, encoder.EMBEDDING_NBYTES)
        buffers = np.full((len(keys), *encoder.EMBEDDING_SHAPE), POISON, dtype=np.float16)
        results = self._get("get embedding", Keys.of(keys), list(buffers))
        tally = self.tallies.embedding
        tally.lookups += len(keys)
        missing: list[tuple[Key, npt.NDArray[np.float16]]] = []
        for key, picture, buffer, result in zip(keys, pictures, buffers, results, strict=True):
            expected = self._embedding_of(picture)
            if result:
                self._compare(buffer, expected)
                tally.hits += 1
                tally.bytes_read += encoder.EMBEDDING_NBYTES
            else:
                missing.append((key, expected))
        if missing:
            stored = self._put("put embedding", Keys.of(key for key, _ in missing), [tensor for _, tensor in missing])
            tally.bytes_written += encoder.EMBEDDING_NBYTES * stored

    def _get(self, op: str, keys: Keys, buffers: Sequence[Any]) -> list[Result]:
        return self._noted(self._timed(op, lambda: self._cache.get_into(keys, buffers)))

    def _put(self, op: str, keys: Keys, tensors: Sequence[Any]) -> int:
        """Store; returns how many values were stored (and not already there or refused)."""
        results = self._noted(self._timed(op, lambda: self._cache.put(keys, tensors)))
        return sum(result.outcome == Outcome.STORED for result in results)

    def _noted(self, results: list[Result]) -> list[Result]:
        for outcome, reason in results:
            self.outcomes[outcome.value] += 1
            if reason:
                self.reasons.setdefault(outcome.value, reason)
        return results

    def _compare(self, got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        self.compared += 1
        self.wrong += not np.array_equal(got.view(np.uint16), expected.view(np.uint16))

    def _timed(self, op: str, call: Callable[[], T]) -> T:
        started_ns = time.perf_counter_ns()
        value = call()
        self.times_ns.setdefault(op, []).append(time.perf_counter_ns() - started_ns)
        return value


@contextmanager
def _opened(options: MediaOptions, memory_nbytes: int) -> Iterator[tuple[Client, Injector | None, str]]:
    """A client of the chosen server, what damages it if asked for, and what the server is, in words."""
    if options.inject is not None:
        with faults.embedded(memory_nbytes, verify=options.verify) as (client, shard):
            yield client, Injector(options.inject, shard, options.seed), "a cache inside this process"
    elif options.connect is not None:
        with connect(options.connect, verify=options.verify) as client:
            yield client, None, "the server it was told to connect to"
    else:
        with (
            ServerProcess(str(memory_nbytes), "--lease-s", f"{LEASE_S:g}") as server,
            connect(server.url, verify=options.verify, deadline_s=DEADLINE_S) as client,
        ):
            yield client, None, "a server in another process of this machine"


def _exact_lru(capacity_nbytes: float) -> ExactLRU:
    """A replay store that charges what a frame of one tensor takes in the arena."""
    return ExactLRU(capacity_nbytes, overhead_nbytes=layout_of([0]).header_nbytes, alignment=DEFAULT_ALIGNMENT)


def _memory_nbytes(memory: str, working_set_nbytes: int) -> int:
    """Bytes for the own server. Raises ConfigError for what is neither a size, nor a share, nor "auto"."""
    if memory == "auto":
        return working_set_nbytes + working_set_nbytes // 8 + (1 << 20)
    if not memory.endswith("%"):
        return parse_nbytes(memory)
    try:
        share = float(memory[:-1]) / 100
    except ValueError:
        share = 0.0
    if not share > 0:
        raise ConfigError(f"memory {memory!r} is no share of the working set: write for example 10%, 512MiB or auto")
    return int(share * working_set_nbytes)


def _describe(
    options: MediaOptions,
    scale: workload.Scale,
    requests: Sequence[workload.Request],
    working_set_nbytes: int,
    capacity_nbytes: int,
) -> dict[str, Any]:
    return {
        "name": "media",
        "scale": options.scale,
        "seed": options.seed,
        "photos": scale.photos,
        "videos": scale.videos,
        "video_s": scale.video_s,
        "video_fps": corpus.VIDEO_FPS,
        "questions": scale.questions,
        "prompt_tokens": sum(len(request.token_ids) for request in requests),
        "working_set_nbytes": working_set_nbytes,
        "capacity_nbytes": capacity_nbytes,
        "capacity_frames": capacity_nbytes // layout_of([KV.nbytes]).frame_nbytes,
        "kv_model": KV.model,
        "kv_block_shape": list(KV.shape),
        "embedding_model": "CLIP ViT-L/14",
        "embedding_shape": list(encoder.EMBEDDING_SHAPE),
    }
