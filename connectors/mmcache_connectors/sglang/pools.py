"""SGLang's host pools as the cache sees them: where their pages lie in this process's memory, and their names."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcache.keys import Keys, Namespace, Part
from mmcache_connectors.sglang.pages import beside, by_page, in_page_order, in_pieces, instead, page_keys


@dataclass(frozen=True)
class FirstPool:
    """The pool to whose pages those of all others belong: keys and values of full attention, as a rule.

    SGLang's two interfaces hand over one page as other tensors, so they share no namespace: `buffers` where it points
    to memory, `flat` where it passes a tensor. In memory a page is in `parts`, by kv heads, where SGLang is to cut it.
    Some models have no such pages: `holds_pages` is false, and only those of their further pools exist.
    """

    pool: Any
    buffers: Namespace
    flat: Namespace
    part: Part
    parts: Sequence[Part]

    @property
    def holds_pages(self) -> bool:
        """Whether there is memory behind the pages."""
        return getattr(self.pool, "kv_buffer", self) is not None

    def names(self, hashes: Sequence[str], prefix: Sequence[str] | None) -> Keys:
        """One key a page, of its first part: beside which the pages of further pools are."""
        return page_keys(self.buffers, self.parts[0], hashes, prefix)

    def keys(self, hashes: Sequence[str], prefix: Sequence[str] | None) -> Keys:
        """The keys of pages in memory as they are stored: one for each of `parts` a page."""
        return in_pieces(self.names(hashes, prefix), self.parts)

    def flat_keys(self, hashes: Sequence[str]) -> Keys:
        """The keys of pages that are passed as tensors, of which SGLang never says what came before."""
        return page_keys(self.flat, self.part, hashes, None)

    def places(self, host_indices: Any, pages: int) -> list[list[Any]]:
        """The memory of pages as writable arrays, a list for each key."""
        pieces = len(self.parts)
        if pieces > 1:
            found = self.pool.get_split_heads_page_buffer_meta(host_indices, pieces)
        else:
            found = self.pool.get_page_buffer_meta(host_indices)
        return by_page(arrays_at(*found), pages * pieces)


@dataclass(frozen=True)
class FurtherPool:
    """A pool of another kind of pages: a sliding window's, a state's, an index's, a draft model's."""

    pool: Any
    namespace: Namespace

    def keys(self, first: FirstPool, hashes: Sequence[str], prefix: Sequence[str] | None) -> Keys:
        """One key a page."""
        names = first.names(hashes, prefix)
        if first.holds_pages:
            return beside(self.namespace, names, hashes)
        return instead(self.namespace, names, hashes, prefix)

    def places(self, host_indices: Any, pages: int) -> list[list[Any]]:
        """The memory of pages as writable arrays, a list for each. Raises ValueError for a wrong number of indices."""
        if host_indices is None or len(host_indices) != pages * self.pool.page_size:
            count = 0 if host_indices is None else len(host_indices)
            raise ValueError(f"{count} indices for {pages} pages of {self.pool.page_size} tokens")
        return by_page(arrays_at(*self.pool.get_page_buffer_meta(host_indices)), pages)


def arrays_at(pointers: Sequence[int], sizes: Sequence[int]) -> list[Any]:
    """Writable uint8 views of this process's memory; valid as long as what lies there.

    Cut from one array that spans them all, which takes a fifth of the time of making each by itself; nothing between
    them is touched.
    """
    if not len(pointers):
        return []
    begin = min(pointers)
    span = max(pointer + size for pointer, size in zip(pointers, sizes, strict=True)) - begin
    memory: Any = (ctypes.c_uint8 * span).from_address(begin)
    whole = np.frombuffer(memory, np.uint8)
    return [whole[pointer - begin : pointer - begin + size] for pointer, size in zip(pointers, sizes, strict=True)]


def page_sizes(pool: Any) -> list[int]:
    """How many bytes each buffer of one page has, in order. Raises ValueError if the pool's pages cannot be reached."""
    import torch

    size = pool.page_size
    pages = torch.arange(2 * size).split(size)
    pointers, *alone = [[*zip(*pool.get_page_buffer_meta(at), strict=True)] for at in (torch.cat(pages), *pages)]
    by_page(pointers, len(pages))
    if not in_page_order(pointers, alone):
        raise ValueError("they do not come page after page")
    return [nbytes for _, nbytes in alone[0]]
