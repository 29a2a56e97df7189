"""Which pages SGLang says come before those of a call, put right: by them a page is placed, and looked for.

SGLang 0.5.23 is right where it stores. Before it reads it leaves out the pages of the node that it goes on from, and
those that it has skipped meanwhile; and where none come before, it may say nothing, as if it were set so. What is read
would then be looked for in another place than where it was stored. hooks.py puts these in.
"""

from __future__ import annotations

import threading
from typing import Any, Final

SAID: Final = threading.Event()  # set: SGLang says which pages come before, so where it says nothing there are none


def add_own(prefix: list[str], tree: Any, node: Any) -> None:
    """After UnifiedRadixCache.get_prefix_hash_values, of which only reads make use: the node's own pages are added."""
    SAID.set()
    own = list(tree.tree_core.get_hash_values(node))
    if prefix[len(prefix) - len(own) :] != own:
        prefix += own


def say_none(_: Any, operation: Any) -> None:
    """Before HybridCacheController._page_transfer, a read in batches: where nothing is hashed before, no page is.

    SGLang counts its batches from there, if it was told so.
    """
    if SAID.is_set() and operation.prefix_keys is None and operation.last_hash is None:
        operation.prefix_keys = []


def add_skipped(_: Any, operation: Any, hashes: Any, indices: Any, batch: Any, *__: Any) -> None:
    """Before HybridCacheController._page_transfer_kv_batch: the pages that the read has skipped at its front."""
    skipped = operation.prefetch_kv_page_offset
    if skipped and batch.prefix_keys is not None:
        at = len(operation.prefix_keys)
        batch.prefix_keys = [
            *operation.prefix_keys,
            *operation.all_hash_values[:skipped],
            *batch.prefix_keys[at:],
        ]
