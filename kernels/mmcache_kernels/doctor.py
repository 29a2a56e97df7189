"""What `mmcache doctor` says of the kernels: which code moves blocks on each device of this machine, and why."""

from __future__ import annotations

import importlib

Row = tuple[str, str, str]


def findings() -> list[Row]:
    """A row for each GPU, or one that says why there is none to ask."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return [("kernels", "no", "torch is not installed here; connectors run in the engine's environment: ask there")]
    layout = importlib.import_module("mmcache_kernels.mover")
    if not torch.cuda.is_available():
        why = f"torch {torch.__version__} sees no CUDA device; blocks in host memory are copied by the processor"
        return [("kernels", "no", why)]
    rows = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        reason = layout.why_no_kernels(device)
        text = reason or "Triton kernels move its blocks: tried, and equal to the reference"
        rows.append((f"kernels on {torch.cuda.get_device_name(device)}", "no" if reason else "yes", text))
    return rows
