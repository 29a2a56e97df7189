"""What is changed inside SGLang's scheduler process: how media are identified, and that replaced weights are noticed.

Two classes get wrapped methods when the backend is made; no file of SGLang is touched. Names as of SGLang 0.5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from mmcache_connectors.sglang.media import Unidentified, item_identity
from mmcache_connectors.sglang.trust import TRUST

UPDATES: Final = (
    "begin_weight_update",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
)


def identify(output: Any) -> None:
    """Give each item of a MultimodalProcessorOutput an identity of 32 bytes, whatever hash it came with.

    The prompt is then padded anew from them. If one cannot be identified the request runs as it is, and the cache is
    left alone from then on.
    """
    try:
        for item in output.mm_items:
            if item.is_valid():
                item.set_identity(item_identity(item, output.mrope_positions))
        output.padded_input_ids = None
    except Exception as error:
        TRUST.end(f"a media item cannot be identified ({error if isinstance(error, Unidentified) else repr(error)})")


def weights_replaced(*args: object) -> None:
    """Somebody puts other weights into a running engine."""
    TRUST.end("the weights of this engine are replaced while it runs")


def install() -> None:
    """Put the hooks in, once a process. Raises RuntimeError if this SGLang has not the methods they belong to."""
    from sglang.srt.managers.schedule_batch import MultimodalInputs
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    _before(MultimodalInputs, "from_processor_output", identify, static=True)  # all requests with media pass it
    for name in UPDATES:
        _before(SchedulerWeightUpdaterManager, name, weights_replaced)


def _before(owner: Any, name: str, hook: Callable[..., None], *, static: bool = False) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"this SGLang's {owner.__name__} has no {name}; use a version named in docs/sglang.md")
    if getattr(original, "mmcache_hook", None) is hook:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hook(*args)
        return original(*args, **kwargs)

    wrapped.mmcache_hook = hook  # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)
