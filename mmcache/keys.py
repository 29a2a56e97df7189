"""Content keys: what names a stored tensor. Namespaces, placeholder spans, block chains, and the other kinds of key.

A key is 32 bytes of BLAKE3 over everything that decides the bytes of the value: which model and configuration (the
namespace), which content (tokens, media items, prompts), and which part of it (layers, heads). Two values that may
differ must never share a key; a needless difference only costs a miss. docs/keys.md specifies every byte; chain.py
hashes blocks, keyset.py holds what follows from a chain key. PURE: no clock, no randomness, no I/O, no torch; what
reads files to identify a model is in identity.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from mmcache.chain import ChainHasher, PlaceholderSpan, run_bounds
from mmcache.encoding import INT_MAX, INT_MIN, canonical, check_count, check_digest, digest, exact_float, text_bytes
from mmcache.errors import KeyInputError
from mmcache.keyset import NO_PARENT, WHOLE, Key, Keys, NamespaceId, Part, stored_keys

__all__ = [
    "NO_PARENT",
    "ChainHasher",
    "Key",
    "Keys",
    "Namespace",
    "Part",
    "PlaceholderSpan",
    "embedding_key",
    "item_digest",
    "latent_key",
    "namespace_id",
    "opaque_chain",
    "opaque_key",
    "run_bounds",
]

MAX_FACTS: Final = 1024
MAX_FACT_NBYTES: Final = 64 << 10
MAX_FACTS_NBYTES: Final = 256 << 10  # of one namespace, names and texts: it travels to every server it is used with
MAX_BLOCK_SIZE: Final = (1 << 32) - 1
_PATH: Final = re.compile(r"/|~|file:|\\\\|[a-z]:[/\\]|\.\.?([/\\]|$)", re.IGNORECASE)

_WHY_REQUIRED: Final = {
    "model": "two models give different values for the same content",
    "dtype": "the same values in another dtype are other bytes",
    "layout": "layouts of one size order the same bytes differently",
    "block_size": "a block of 16 tokens and one of 32 are not interchangeable",
}
_REQUIRED: Final = {
    "kv": ("model", "dtype", "layout", "block_size"),
    "embedding": ("model", "dtype"),
    "prompt": ("model", "dtype"),
    "latent": ("model", "dtype"),
}


# ------------------------------------------------------------------------------------------------------- content
def item_digest(
    content: bytes,
    *,
    grid: Iterable[int] | None = None,
    processor_kwargs: Mapping[str, object] | None = None,
    timestamps: Iterable[float] | None = None,
    is_embed: Iterable[bool] | None = None,
) -> bytes:
    """32 bytes that identify a media item as the model sees it: the content, and how this request processes it.

    `content` is from `media_digest` or `samples_digest`. `grid` counts patches (t, h, w); `processor_kwargs` are the
    request's own (max_pixels, fps, ...); `timestamps` are those of the sampled frames in seconds; `is_embed` says which
    placeholder positions take an embedding. The same image under another max_pixels is another item. Raises
    KeyInputError, naming the place, for anything without one canonical encoding.
    """
    facts = {
        "grid": None if grid is None else _counts(grid, "grid"),
        "is_embed": None if is_embed is None else _mask_bytes(is_embed),
        "processor_kwargs": None if processor_kwargs is None else _mapping(processor_kwargs, "processor_kwargs"),
        "timestamps": None if timestamps is None else [_seconds(time) for time in _items(timestamps, "timestamps")],
    }
    encoded = [canonical(facts[name], name) for name in sorted(facts)]
    return digest("k1.item", check_digest(content, "content"), *encoded)


def _items(value: Iterable[Any], path: str) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise KeyInputError(f"{path}: object of type {type(value).__name__} is no flat sequence; pass a list") from None


def _counts(value: Iterable[int], path: str, *, length: int | None = None) -> list[int]:
    numbers = [check_count(number, f"{path}[{place}]") for place, number in enumerate(_items(value, path))]
    if length is not None and len(numbers) != length:
        raise KeyInputError(
            f"{path}: expected {length} integers, got {len(numbers)}; see the docstring for their order"
        )
    return numbers


def _name(value: str, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise KeyInputError(f"{path}: expected a non-empty str, got object of type {type(value).__name__}")
    return value


def _mapping(value: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise KeyInputError(f"{path}: object of type {type(value).__name__} is no mapping; pass a dict, {{}} if empty")
    return value


def _mask_bytes(mask: Iterable[bool]) -> bytes:
    values = [value.item() if isinstance(value, np.bool_) else value for value in _items(mask, "is_embed")]
    if not all(isinstance(value, bool) for value in values):
        raise KeyInputError("is_embed: expected a flat sequence of bool, one per placeholder position; use .tolist()")
    return bytes(values)


def _seconds(time: object) -> float:
    if isinstance(time, bool) or not isinstance(time, (int, float, np.integer, np.floating)):
        raise KeyInputError(f"timestamps: object of type {type(time).__name__} is no number of seconds; use .tolist()")
    return exact_float(int(time) if isinstance(time, np.integer) else time, "timestamps")


# ----------------------------------------------------------------------------------------------------- namespace
class Namespace:
    """Everything but the content that decides a stored value's bytes: a kind and sorted text facts. Immutable.

    `kind` is "kv", "embedding", "prompt" or "latent". A fact is any keyword: str as it is, int in decimal, bool as
    true/false, None as not set, anything else as "b3:" and a hash of its canonical encoding. Unknown names are simply
    in: one fact more can only cost a miss. kv needs model, dtype, layout and block_size, the others model and dtype. A
    text that looks like a local path is refused, as other files can be put under one path; only `cache_salt` is free
    text. At most 1024 facts, 64 KiB each and 256 KiB together. Raises KeyInputError.
    """

    __slots__ = ("_block_size", "_facts", "_id", "_kind")

    def __init__(self, /, *, kind: str, block_size: int | None = None, **facts: object) -> None:
        _check_kind(kind)
        if block_size is not None:
            if kind != "kv":
                raise KeyInputError(f'block_size: only kind="kv" has blocks; leave it out of a {kind} namespace')
            block_size = check_count(block_size, "block_size", minimum=1)
            if block_size > MAX_BLOCK_SIZE:
                raise KeyInputError(f"block_size={block_size} is over {MAX_BLOCK_SIZE}; pass the tokens of one block")
            facts["block_size"] = block_size
        texts = {name: _fact_text(name, value) for name, value in facts.items() if value is not None}
        for name in _REQUIRED[kind]:
            if not texts.get(name):
                raise KeyInputError(f'{name} is missing: a kind="{kind}" namespace needs it, {_WHY_REQUIRED[name]}')
        for name, text in texts.items():
            _refuse_path(name, text)
        self._kind = kind
        self._block_size = block_size
        self._facts = dict(sorted(texts.items()))
        self._id = NamespaceId(namespace_id(kind, self._facts), kind, self._facts)

    @property
    def id(self) -> NamespaceId:
        """32 bytes: `namespace_id(kind, facts)`."""
        return self._id

    @property
    def kind(self) -> str:
        """ "kv", "embedding", "prompt" or "latent"."""
        return self._kind

    @property
    def facts(self) -> Mapping[str, str]:
        """Every fact as text, block_size included, sorted by name; read-only."""
        return MappingProxyType(self._facts)

    @property
    def block_size(self) -> int | None:
        """Tokens in a block; None unless the kind is "kv"."""
        return self._block_size

    def block_keys(self, token_ids: Iterable[int], spans: Iterable[PlaceholderSpan] = ()) -> Keys:
        """The keys of every full block of these tokens, in order; tokens after the last full block have no key.

        `token_ids` (0 <= id < 2^64): a list, tuple, range, integer ndarray or CPU tensor. `spans` may come in any
        order but not overlap. A span beyond the tokens, or a value that is no token id, raises KeyInputError.
        """
        hasher = self.hasher()
        keys = hasher.extend(token_ids, spans)
        hasher.require_complete_spans()
        return keys

    def hasher(self) -> ChainHasher:
        """A hasher for a prompt that grows; it gives the keys `block_keys` gives, however the tokens are cut."""
        if self._block_size is None:
            raise KeyInputError(f'block keys need a kind="kv" namespace, this one is "{self._kind}"; use its own key')
        return ChainHasher(self._id, self._block_size)

    def __eq__(self, other: object) -> bool:
        return self._id == other._id if isinstance(other, Namespace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"Namespace(kind={self._kind!r}, id={self._id.hex()[:16]}, facts={self._facts!r})"


def namespace_id(kind: str, facts: Mapping[str, str]) -> bytes:
    """H("k1.namespace", kind, name, text, name, text, ...) in order of name: lets a server check declared facts.

    Raises KeyInputError for an unknown kind, text that has no UTF-8 form, and facts over a limit of `Namespace`.
    """
    _check_kind(kind)
    fields = [text_bytes(text, name) for name in sorted(facts) for text in (name, facts[name])]
    for name, text in zip(fields[::2], fields[1::2], strict=True):
        if len(text) > MAX_FACT_NBYTES:
            raise KeyInputError(f"{name.decode()}: text of more than {MAX_FACT_NBYTES} bytes; pass a digest of it")
    if len(facts) > MAX_FACTS or sum(map(len, fields)) > MAX_FACTS_NBYTES:
        raise KeyInputError(
            f"{len(facts)} facts are more than {MAX_FACTS}, or than {MAX_FACTS_NBYTES} bytes together; "
            "pass one structure as a fact, it is hashed"
        )
    return digest("k1.namespace", kind.encode(), *fields)


def _check_kind(kind: object) -> None:
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise KeyInputError(f"kind={kind!r} is unknown; pass one of {', '.join(_REQUIRED)}")


def _fact_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and INT_MIN <= value <= INT_MAX:
        return f"{value:d}"
    if isinstance(value, str):
        return str.__str__(value)
    return "b3:" + digest("k1.value", canonical(value, name)).hex()


def _refuse_path(name: str, text: str) -> None:
    if name != "cache_salt" and _PATH.match(text):  # a salt stands for no file: whatever it says, it only narrows
        raise KeyInputError(
            f"{name}={text[:200]!r} looks like a local path, and other files can be put under one path; pass "
            f"{name}=mmcache.identity.directory_digest(path) for a folder, file_digest(path) for a file, or a "
            "repository name with its revision"
        )


# ---------------------------------------------------------------------------------------------- the other kinds
def _single_key(chain: bytes, namespace: Namespace, home: bytes | None = None, index: int = 0) -> Key:
    home = chain if home is None else check_digest(home, "home")
    return Key(stored_keys([chain], WHOLE)[0], chain, home, namespace.id, NO_PARENT, check_count(index, "index"))


def opaque_key(namespace: Namespace, data: bytes, home: bytes | None = None, index: int = 0) -> Key:
    """A key for an engine that gives only its own hash (SGLang pages, LMCache chunks): `data` is that hash, whole.

    The namespace adds what such hashes leave out (model, dtype, layout). `home` is the chain key of the first block of
    its run, by default the key's own; `index` the position in the engine's chain. Empty data raises KeyInputError.
    """
    return _single_key(opaque_chain(namespace, data), namespace, home, index)


def opaque_chain(namespace: Namespace, data: bytes) -> bytes:
    """The chain key alone of `opaque_key`: for connectors that build columns of them, with parents and homes."""
    if not isinstance(data, bytes) or not data:
        raise KeyInputError("data: expected the engine's own hash as non-empty bytes; encode text with .encode()")
    return digest("k1.opaque", namespace.id, data)


def embedding_key(namespace: Namespace, item: bytes) -> Key:
    """The key of one item's embedding (kind "embedding") or of one prompt's (kind "prompt"); `item`: `item_digest`."""
    if namespace.kind not in ("embedding", "prompt"):
        raise KeyInputError(f'embedding_key needs kind="embedding" or "prompt", this namespace is "{namespace.kind}"')
    return _single_key(digest("k1.embedding", namespace.id, check_digest(item, "item")), namespace)


def latent_key(
    namespace: Namespace,
    *,
    prompt: bytes,
    conditioning: Mapping[str, bytes],
    scheduler: str,
    scheduler_config: Mapping[str, object],
    timesteps: Sequence[float],
    sigmas: Sequence[float] | None,
    mu: float | None,
    step: int,
    steps: int,
    guidance: object,
    eta: float | None,
    size: tuple[int, int, int],
    initial_state: bytes,
    batch: tuple[int, int],
    step_cache: Mapping[str, object] | None,
    parallelism: Mapping[str, object],
    cpu_threads: int | None,
    **facts: object,
) -> Key:
    """The key of a diffusion latent after `step` of `steps` steps (step == steps: the final latent).

    Every argument decides the bytes, so none has a default; None says "this pipeline has none". `prompt` is the chain
    key of the prompt's embedding; `conditioning` maps image, mask, control, adapter images to digests; `scheduler` is
    its class, with its full config; `timesteps`, `sigmas`, `mu` are those in effect; `guidance` its scales; `size` is
    (height, width, frames); `initial_state` a digest of the initial latents, or of the generator's device and state (a
    seed is not enough); `batch` is (size, index); `step_cache` its method and config; `parallelism` degrees, patches,
    warm-up steps and shard. Further facts are in. A value of unknown type raises KeyInputError: bypass the cache then.
    These keys are version 0 and may change; all others are frozen.
    Source of the list: runs of diffusers and xDiT pipelines that were, and were not, bit-equal.
    """
    if namespace.kind != "latent":
        raise KeyInputError(f'latent_key needs kind="latent", this namespace is "{namespace.kind}"')
    check_digest(prompt, "prompt")
    check_digest(initial_state, "initial_state")
    for name, value in _mapping(conditioning, "conditioning").items():
        check_digest(value, f"conditioning.{name}")
    if check_count(step, "step") > check_count(steps, "steps", minimum=1):
        raise KeyInputError(f"step={step} is beyond steps={steps}; step counts the steps already done")
    provenance = {
        "prompt": prompt,
        "conditioning": conditioning,
        "scheduler": _name(scheduler, "scheduler"),
        "scheduler_config": _mapping(scheduler_config, "scheduler_config"),
        "timesteps": _items(timesteps, "timesteps"),
        "sigmas": sigmas,
        "mu": mu,
        "step": step,
        "steps": steps,
        "guidance": guidance,
        "eta": eta,
        "size": _counts(size, "size", length=3),
        "initial_state": initial_state,
        "batch": _counts(batch, "batch", length=2),
        "step_cache": step_cache,
        "parallelism": _mapping(parallelism, "parallelism"),
        "cpu_threads": cpu_threads,
        "facts": facts,
    }
    return _single_key(digest("k0.latent", namespace.id, canonical(provenance, "latent_key")), namespace)
