"""Benchmarks that check what they read. `media` is the first: photos and videos, embeddings and KV blocks.

Here live the workloads, the tensors they can recompute from content, the pure replays they are judged against, and
the reports. Nothing in the cache imports this package, and nothing here decides what a cache does.
"""

from __future__ import annotations
