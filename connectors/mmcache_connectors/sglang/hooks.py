"""What is changed inside SGLang's scheduler process: how media are identified, that replaced weights are noticed, and
which pages it says come before others.

Four classes get wrapped methods when the backend is made; no file of SGLang is touched. Names as of SGLang 0.5.23.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

from mmcache_connectors.sglang.media import Unidentified, item_identity
from mmcache_connectors.sglang.prefixes import add_own, add_skipped, say_none
from mmcache_connectors.sglang.trust import TRUST

UPDATES: Final = (
    "begin_weight_update",
    "check_weights",  # one of its actions fills them with random numbers
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
)

_installed = False


def identify(made: Any, output: Any, **_: object) -> None:
    """Give each item of a MultimodalInputs an identity of 32 bytes, whatever hash it came with.

    `output`, a MultimodalProcessorOutput, is what it was made from: features that came as CUDA handles are tensors in
    `made` only. The prompt is padded anew from the identities, as SGLang does it. If one cannot be identified nothing
    is changed: the request runs as it is, and the cache is left alone from then on.
    """
    try:
        items = list(made.mm_items)
        identities = [item_identity(item, made.mrope_positions) for item in items]
    except Exception as error:
        TRUST.end(f"a media item cannot be identified ({error if isinstance(error, Unidentified) else repr(error)})")
        return
    for item, identity in zip(items, identities, strict=True):
        item.set_identity(identity)
    if made.padded_input_ids is not None:
        made.padded_input_ids = type(output).build_padded_input_ids(output.input_ids, output.mm_items)


def weights_replaced(*args: object, **_: object) -> None:
    """Somebody puts other weights into a running engine."""
    TRUST.end("the weights of this engine are replaced or tested while it runs")


def installed() -> bool:
    """Whether this process has had the hooks from before it read its weights or met any media."""
    return _installed


def install() -> None:
    """Put the hooks in, once a process. Raises RuntimeError if this SGLang has not the methods they belong to.

    Only for a process that has not yet served anything: `installed` says so from then on.
    """
    global _installed
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    wrap(MultimodalInputs, "from_processor_output", identify, after=True)  # all requests with media pass it
    for name in UPDATES:
        wrap(SchedulerWeightUpdaterManager, name, weights_replaced)
    wrap(UnifiedRadixCache, "get_prefix_hash_values", add_own, after=True)
    wrap(HybridCacheController, "_page_transfer", say_none)
    wrap(HybridCacheController, "_page_transfer_kv_batch", add_skipped)
    _installed = True


def wrap(owner: Any, name: str, hook: Callable[..., None], *, after: bool = False) -> None:
    """Call `hook` with the arguments before each call of a method, or after it, with the result before them.

    A hook that raises ends the trust, and the method goes on as ever. Wrapping twice is
    wrapping once. Raises RuntimeError if there is no such method.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"this SGLang's {owner.__name__} has no {name}; use a version named in docs/sglang.md")
    if getattr(original, "mmcache_hook", None) is hook:
        return

    def call(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception as error:
            TRUST.end(f"{owner.__name__}.{name} was called in a way that is not known ({error!r})")

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            call(*args, **kwargs)
            return original(*args, **kwargs)
        made = original(*args, **kwargs)
        call(made, *args, **kwargs)
        return made

    wrapped.mmcache_hook = hook  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)
