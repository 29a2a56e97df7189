"""What every workload does to a cache: timed reads and writes, each value that comes back compared bit for bit.

`CheckedCache` counts and compares; `PrefixEngine` is the request flow of an engine with KV blocks and embeddings.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mmcache.bench import encoder
from mmcache.bench.inject import Injector
from mmcache.bench.oracle import PrefixStep, Tallies
from mmcache.bench.workload import Request
from mmcache.client.blocking import Client
from mmcache.keys import Namespace, embedding_key, opaque_key
from mmcache.keyset import Key, Keys
from mmcache.media import Media
from mmcache.tensors import as_dtype
from mmcache.transport.base import Outcome, Result

KV = encoder.QWEN2_VL_2B
_ONE_PICTURE = Media("image", pixels=encoder.SIDE**2)  # as the encoder sees each
POISON = 0xA5  # what every destination holds before a read

T = TypeVar("T")
Array = npt.NDArray[Any]
Value = Array | Mapping[str, Array]  # one tensor, or several by name


class CheckedCache:
    """A client whose calls are timed, whose outcomes are counted, and whose every read is compared with the truth."""

    def __init__(self, client: Client, kinds: Sequence[str], injector: Injector | None, seed: int) -> None:
        self.client = client
        self.seed = seed
        self._injector = injector
        nothing = Namespace(kind="embedding", model="benchmark/none", dtype="uint8")
        self._absent = opaque_key(nothing, b"never stored")
        self._stored: dict[str, list[Key]] = {}  # by kind, where damage is to be planted
        self.tallies = Tallies.of(*kinds)
        self.outcomes: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}  # outcome -> the first reason given for it
        self.times_ns: dict[str, list[int]] = {}
        self.compared = 0
        self.wrong = 0

    def timed(self, op: str, call: Callable[[], T]) -> T:
        """Call, and note under `op` how long that took."""
        started_ns = time.perf_counter_ns()
        value = call()
        self.times_ns.setdefault(op, []).append(time.perf_counter_ns() - started_ns)
        return value

    def read(self, kind: str, keys: Keys, expected: Sequence[Value], dtype: str = "") -> list[bool]:
        """Read entries that ought to hold `expected`; says which came back. Those are compared, wrong or not.

        `dtype` labels raw words: "bfloat16" for uint16. Counts bytes; what is a lookup and a hit the caller knows.
        """
        if not len(keys):
            return []
        blanks = [_poisoned(value) for value in expected]
        targets = [as_dtype(blank, dtype) if dtype else blank for blank in blanks]  # type: ignore[arg-type]
        results = self._noted(self.timed(f"get {kind}", lambda: self.client.get_into(keys, targets)))
        for value, blank, result in zip(expected, blanks, results, strict=True):
            if result:
                self.compared += 1
                self.wrong += not _same_bits(blank, value)
                self.tallies[kind].bytes_read += nbytes_of(value)
        return [bool(result) for result in results]

    def store(
        self, kind: str, keys: Keys, values: Sequence[Value], dtype: str = "", media: Media | None = None
    ) -> None:
        """Store entries, and count the bytes of those that were not there already, or refused."""
        if not len(keys):
            return
        labelled = [as_dtype(value, dtype) if dtype else value for value in values]  # type: ignore[arg-type]
        results = self._noted(self.timed(f"put {kind}", lambda: self.client.put(keys, labelled, media=media)))
        for key, value, result in zip(keys, values, results, strict=True):
            if result.outcome == Outcome.STORED:
                self.tallies[kind].bytes_written += nbytes_of(value)
                if self._injector is not None:
                    self._stored.setdefault(kind, []).append(key)

    def get_or_store(
        self, kind: str, keys: Sequence[Key], expected: Sequence[Value], media: Media | None = None
    ) -> None:
        """Look up entries that stand alone, and store those that are missing."""
        if not keys:
            return
        if self._injector is not None:
            self.damage(kind, keys, nbytes_of(expected[0]))
        found = self.read(kind, Keys.of(keys), expected)
        tally = self.tallies[kind]
        tally.lookups += len(keys)
        tally.hits += sum(found)
        missing = [(key, value) for key, value, hit in zip(keys, expected, found, strict=True) if not hit]
        self.store(kind, Keys.of(key for key, _ in missing), [value for _, value in missing], media=media)

    def damage(self, kind: str, about_to_be_read: Sequence[Key], nbytes: int) -> None:
        """Perhaps damage one of these entries where damage was asked for. One that stands alone is paired with another
        of its kind, as it takes two to be exchanged."""
        if self._injector is None:
            return
        # The lease of the last read waits to be given back with the next one, and what is leased must not be exchanged.
        self.client.get_into(self._absent, [bytearray(1)])
        present = [key for key, there in zip(about_to_be_read, self._present(about_to_be_read), strict=True) if there]
        if len(present) == 1:
            others = [key for key in self._stored.get(kind, [])[-8:] if key not in present]
            present += [key for key, there in zip(others, self._present(others), strict=True) if there][:1]
        self._injector.damage(present, nbytes)

    def _present(self, keys: Sequence[Key]) -> list[bool]:
        return self.client.contains(Keys.of(keys)) if keys else []

    def _noted(self, results: list[Result]) -> list[Result]:
        for outcome, reason in results:
            self.outcomes[outcome.value] += 1
            if reason:
                self.reasons.setdefault(outcome.value, reason)
        return results


class PrefixEngine:
    """Serves prompts as an inference engine would: leading KV blocks first, embeddings for what those do not cover."""

    def __init__(self, cache: CheckedCache, salt: str) -> None:
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
        vision = encoder.VisionEncoder(cache.seed)
        self._embedding_of = lru_cache(maxsize=128)(lambda picture: vision.encode(picture.pixels))  # at most 67 MB

    def serve(self, request: Request, step: PrefixStep) -> None:
        """One request, from its keys to the last block stored."""
        cache, tally = self._cache, self._cache.tallies["kv"]
        ids = [*request.token_ids, *request.answer]
        keys = cache.timed("block_keys", lambda: self._kv.block_keys(ids, request.spans()))
        contents = [entry.content for entry in (*step.blocks, *step.generated)]
        asked = keys[: len(step.blocks)]
        present = cache.timed("match_prefix", lambda: cache.client.match_prefix(asked))
        cache.damage("kv", keys[:present], KV.nbytes)
        found = cache.read("kv", keys[:present], [_block(content) for content in contents[:present]], "bfloat16")
        hits = next((count for count, hit in enumerate(found) if not hit), len(found))
        tally.lookups += len(asked)
        tally.hits += hits
        uncovered = [picture for covered_by, picture in request.pictures(KV.block_size) if hits < covered_by]
        pictures = list({picture.truth: picture for picture in uncovered}.values())
        cache.get_or_store(
            "embedding",
            [embedding_key(self._embedding, picture.item) for picture in pictures],
            [self._embedding_of(picture) for picture in pictures],
            _ONE_PICTURE,
        )
        cache.store("kv", keys[hits:], [_block(content) for content in contents[hits:]], "bfloat16")


def nbytes_of(value: Value) -> int:
    """Payload bytes of a value."""
    return sum(array.nbytes for array in value.values()) if isinstance(value, Mapping) else value.nbytes


def _block(content: bytes) -> npt.NDArray[np.uint16]:
    return encoder.kv_block(KV, content)


def _poisoned(value: Value) -> Value:
    if isinstance(value, Mapping):
        return {name: _poisoned_array(array) for name, array in value.items()}
    return _poisoned_array(value)


def _poisoned_array(array: Array) -> Array:
    blank = np.empty_like(array)
    blank.view(np.uint8).fill(POISON)
    return blank


def _same_bits(got: Value, expected: Value) -> bool:
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        return all(_same_bits(got[name], expected[name]) for name in expected)
    assert isinstance(got, np.ndarray)
    assert isinstance(expected, np.ndarray)
    return np.array_equal(got.view(np.uint8), expected.view(np.uint8))
