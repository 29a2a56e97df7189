"""SGLang-diffusion's prompt embeddings in mmcache: hooks around its ConditioningCache, which is one process's own.

Where that has no entry and would run a text encoder, mmcache is asked first, and given what was computed. Only prompts
are kept: calls of SGLang's own text-encoding stage, of a worker that computes alone. Everything else goes on as it
would, and so does a call that fails here. Imports SGLang and torch. Interface as of SGLang 0.5.23.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from sglang.multimodal_gen.runtime.cache import conditioning as theirs
from sglang.multimodal_gen.runtime.pipelines_core.stages.text_encoding import TextEncodingStage

import mmcache
from mmcache.client.blocking import Client
from mmcache.errors import CorruptFrame, LeaseLost, MMCacheError
from mmcache.keys import Namespace, embedding_key
from mmcache.keyset import Key
from mmcache.tensors import as_torch
from mmcache_connectors.sglang.conditioning_facts import prompt_namespace
from mmcache_connectors.sglang.diffusion_plugin import PREFIX
from mmcache_connectors.sglang.environment import environment_values
from mmcache_connectors.sglang.faults import Faults
from mmcache_connectors.sglang.media import value_digest
from mmcache_connectors.sglang.settings import Settings, parse_settings
from mmcache_connectors.sglang.trust import TRUST
from mmcache_connectors.sglang.weights import ChangedFiles

log = logging.getLogger("mmcache.sglang")
TENSORS: Final = ("embeds", "mask", "pooled", "embeds_mask")  # of the stage's result, in order; its lengths come last
LENGTHS: Final = "lengths"
ENCODER: Final = "text_encoder"  # how the names of such components begin, in diffusers' folders and SGLang's pipelines
Compute = Callable[[], Any]


class Prompts:
    """One worker's prompt embeddings in a cache. `encoders`: the modules that are known by their weights."""

    def __init__(self, client: Client, namespace: Namespace, settings: Settings, encoders: Mapping[str, Any]) -> None:
        self._client, self._namespace, self._verify = client, namespace, settings.verify
        self._encoders = dict(encoders)
        self._epoch = theirs.conditioning_weights_epoch()
        self._faults = Faults()

    def through(self, call: Mapping[str, Any], compute: Compute) -> Any:
        """What the cache has for this call, else what `compute` returns, which is stored.

        Raises nothing but what `compute` does; adds at most three calls of the cache, each with its deadline.
        """
        key = self._faults.caught(lambda: self._key(call), None)
        if key is None:
            return compute()
        device = call["kwargs"]["device"]
        found = self._faults.caught(lambda: self._read(key, device), None)
        if found is not None:
            return found
        made = compute()
        self._faults.caught(lambda: self._write(key, made, device), None)
        return made

    def _key(self, call: Mapping[str, Any]) -> Key | None:
        """The name of what a call returns; None if it is none of the calls that are kept."""
        if theirs.conditioning_weights_epoch() != self._epoch:
            TRUST.end("the weights of this engine were replaced, or an adapter was loaded, while it ran")
        stage, kwargs, group = call["namespace"], call["kwargs"], call["group"]
        kept = type(stage) is TextEncodingStage and call["cross_request"] and theirs._cross_request_cache.get()
        alone = group is None or group.world_size == 1
        if TRUST.reason is not None or not kept or not alone or theirs._refresh_cache.get():
            return None
        model = call["model"]
        name = next((name for name, module in self._encoders.items() if module is model), None)
        if name is None:
            return None
        device = torch.device(kwargs["device"]).type
        asked = {
            "args": list(call["args"]),
            "kwargs": {name: _text(held) for name, held in kwargs.items()},
            "encoder": [name, f"{type(model).__module__}.{type(model).__qualname__}"],
            "weights": str(next(model.parameters()).dtype),
            "autocast": [torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))],
        }
        return embedding_key(self._namespace, value_digest(asked, "prompt"))

    def _read(self, key: Key, device: str) -> Any:
        """A stored result; None if there is none that is whole."""
        try:
            with self._client.acquire([key]) as leased:
                frame = leased.frames[0]
                if frame is None:
                    return None
                tensors = frame.header.tensors
                if self._verify:
                    frame.verify()
                held = {one.spec.name: as_torch(one.spec, memoryview(bytearray(frame.payload(one)))) for one in tensors}
        except LeaseLost:
            return None
        except CorruptFrame as error:
            log.warning("mmcache: a damaged entry is not used: %s", error)
            buffers = {one.spec.name: bytearray(one.nbytes) for one in tensors}
            self._client.get_into([key], [buffers])  # finds the same, and has the server look at it
            return None
        return _result(held, device)

    def _write(self, key: Key, made: Any, device: str) -> None:
        tensors = _tensors(made, device)
        if tensors:
            self._client.put([key], [tensors])


_prompts: list[Prompts] = []  # of this worker; empty: not (yet) cached


def loaded(result: Any, worker: Any) -> None:
    """A worker has loaded its model: name what it will encode, and connect.

    Raises ConfigError for settings that cannot be taken. What cannot be named is not cached, and the log says why.
    """
    settings = parse_settings(environment_values(os.environ, PREFIX, Settings))
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        TRUST.end("several processes compute together, which must agree on what is found")
        return
    try:
        modules = worker.pipeline.modules.items()
        encoders = {name: module for name, module in modules if name.startswith(ENCODER)}
        namespace = prompt_namespace(worker.pipeline, encoders, settings.model_identity)
    except Exception as error:
        TRUST.end(str(error) if isinstance(error, (ChangedFiles, MMCacheError)) else f"prompts have no name: {error!r}")
        return
    client = mmcache.connect(settings.url, lazy=True, deadline_s=settings.deadline_s, verify=settings.verify)
    _prompts[:] = [Prompts(client, namespace, settings, encoders)]
    log.info("mmcache: prompt embeddings go to %s as namespace %s", settings.url, namespace.id.hex())


def around_run(original: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """In place of ConditioningCache.run(self, model, method, args, kwargs, compute, group=None, **more)."""
    if not _prompts or len(args) not in (6, 7):
        return original(*args, **more)
    cache, model, method, given, kwargs, compute, *group = args
    call = {
        "model": model,
        "args": given,
        "kwargs": kwargs,
        "group": group[0] if group else more.get("group"),
        "namespace": more.get("namespace"),
        "cross_request": more.get("cross_request", True),
    }
    return original(cache, model, method, given, kwargs, lambda: _prompts[0].through(call, compute), *group, **more)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, (torch.dtype, torch.device)) else value


def _tensors(made: Any, device: str) -> dict[str, Any] | None:
    """What is stored of a stage's result; None if it is of another form."""
    if type(made) is not tuple or len(made) != len(TENSORS) + 1 or not isinstance(made[0], torch.Tensor):
        return None
    *tensors, lengths = made
    given = {name: one for name, one in zip(TENSORS, tensors, strict=True) if one is not None}
    wanted = torch.device(device).type
    for one in given.values():
        if type(one) is not torch.Tensor or one.requires_grad or one.device.type != wanted:
            return None
    held = {name: one.detach().cpu().contiguous() for name, one in given.items()}
    if lengths is not None:
        if type(lengths) is not list or not all(type(length) is int for length in lengths):
            return None
        held[LENGTHS] = torch.tensor(lengths, dtype=torch.int64)
    return held


def _result(held: Mapping[str, Any], device: str) -> tuple[Any, ...] | None:
    """A stage's result; None if what was stored is of another form."""
    if "embeds" not in held or not held.keys() <= {*TENSORS, LENGTHS}:
        return None
    lengths: Sequence[int] | None = held[LENGTHS].tolist() if LENGTHS in held else None
    return (*(held[name].to(device) if name in held else None for name in TENSORS), lengths)
