"""Benchmarks that check what they read: `media`, `chat`, `diffusion` and `transfer`; and `trace`, which replays.

Here live the workloads, the tensors they can recompute from content, the pure replays they are judged against, and
the reports, for terminals, programs and browsers. Nothing in the cache imports this package, and nothing here decides
what a cache does.
"""

from __future__ import annotations
