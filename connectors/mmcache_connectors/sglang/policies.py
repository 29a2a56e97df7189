"""How much of a prompt can be restored where a model has pages of several kinds. PURE.

SGLang asks for each kind of pages by a policy of its own: every page (`all_pages`), the last ones before the point
where the prompt goes on (`trailing_pages`: a sliding window, a state), or none, but with an answer of how far they
reach (`block_groups`: pages that hold a second form of others). Source: PoolHitPolicy in mem_cache/hicache_storage.py
of SGLang 0.5.23, which names the last but asks for it nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of pages: its policy, and for each page of the prompt whether it is there.

    `window` is how many trailing pages are needed. Of block groups there is one for each `block_pages` pages, of
    `group_pages` pages from the first of these on.
    """

    policy: str
    present: Sequence[bool]
    window: int = 1
    block_pages: int = 0
    group_pages: int = 0


class Restorable(NamedTuple):
    """`lengths`: after how many pages the prompt can go on, ascending. `reach`: how far each kind goes by itself."""

    lengths: list[int]
    reach: list[int]


def restorable(pages: int, kinds: Sequence[Kind]) -> Restorable:
    """What can be restored of `pages` leading pages of the first kind. Raises ValueError for an unknown policy."""
    lengths = list(range(1, pages + 1))
    reach = []
    for kind in kinds:
        if kind.policy == "block_groups":
            reach.append(_covered(pages, kind))
            continue
        held = set(_held(pages, kind))
        reach.append(max(held, default=0))
        lengths = [length for length in lengths if length in held]
    return Restorable(lengths, reach)


def _held(pages: int, kind: Kind) -> list[int]:
    """The lengths, up to `pages`, that a kind has all pages for which it needs."""
    run, found = 0, []  # run: how many pages in a row are there
    for length, there in enumerate(kind.present[:pages], 1):
        run = run + 1 if there else 0
        needed = {"all_pages": length, "trailing_pages": min(max(kind.window, 1), length)}.get(kind.policy)
        if needed is None:
            raise ValueError(f"this SGLang has a policy {kind.policy!r} that mmcache does not know")
        if run >= needed:
            found.append(length)
    return found


def _covered(pages: int, kind: Kind) -> int:
    """How many pages the leading whole groups stand for."""
    if not 0 < kind.group_pages <= kind.block_pages:
        raise ValueError(f"a block of {kind.block_pages} pages with a group of {kind.group_pages} holds nothing")
    start = 0
    while start + kind.block_pages <= pages and all(kind.present[start : start + kind.group_pages]):
        start += kind.block_pages
    return start
