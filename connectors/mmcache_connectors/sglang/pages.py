"""From SGLang's page hashes to mmcache keys. PURE.

SGLang names a page of tokens by the SHA-256 chain of its prompt up to and with that page, in hex; a cache salt or an
adapter seeds the chain. Nothing of the model or the memory layout is in it: the namespace holds that, the part which
layers and heads. So a page's chain key is `opaque_key(namespace, bytes.fromhex(hash))`. A model with pools of several
kinds (sliding window, state space, an index, a draft model's) has pages of each under one hash: every kind has a
namespace of its own, and its pages lie and leave with the page of the first kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mmcache.keys import NO_PARENT, Keys, Namespace, Part, opaque_chain, run_bounds
from mmcache.keyset import WHOLE, stored_keys, woven

T = TypeVar("T")


def page_keys(namespace: Namespace, part: Part, hashes: Sequence[str], prefix: Sequence[str] | None) -> Keys:
    """The keys of consecutive pages. `prefix`: hashes of all pages before them, None if unknown.

    With it, a page's parent is the page before it, its home the first page of its run, its index its place in the
    prompt. Without, each page stands alone, its own home: the same key, but placed and evicted by itself. Raises
    ValueError for a hash that is not 64 hexadecimal digits.
    """
    chains = [_chain(namespace, page) for page in hashes]
    digests = stored_keys(chains, part)
    namespaces: list[bytes] = [namespace.id] * len(chains)
    orphans = [NO_PARENT] * len(chains)
    if prefix is None or not chains:
        return Keys(digests, chains, list(chains), namespaces, orphans, [0] * len(chains), orphans)
    above = _chain(namespace, prefix[-1]) if prefix else NO_PARENT
    parent = stored_keys([above], part)[0] if prefix else NO_PARENT
    first = len(prefix)
    return Keys(
        digests,
        chains,
        _homes(namespace, chains, prefix),
        namespaces,
        [parent, *digests[:-1]],
        range(first, first + len(chains)),
        [above, *chains[:-1]],
    )


def in_pieces(keys: Keys, parts: Sequence[Part]) -> Keys:
    """The keys of pages that are stored in several parts: all parts of the first page, of the second, and so on.

    `keys` are those of the first part.
    """
    return keys if len(parts) == 1 else woven([keys.for_part(part) for part in parts])


def beside(namespace: Namespace, first: Keys, hashes: Sequence[str]) -> Keys:
    """The keys of another kind of pages, given those of the first kind under the same hashes.

    They are placed where the first kind's are, and each is evicted before the page it belongs to.
    """
    chains = [_chain(namespace, page) for page in hashes]
    spaces: list[bytes] = [namespace.id] * len(chains)
    return Keys(stored_keys(chains, WHOLE), chains, first.homes, spaces, first.digests, first.indices, first.chains)


def instead(namespace: Namespace, first: Keys, hashes: Sequence[str], prefix: Sequence[str] | None) -> Keys:
    """As `beside`, where the first kind has pages in name only: each is evicted before the one that comes before it."""
    own = page_keys(namespace, WHOLE, hashes, prefix)
    return Keys(own.digests, own.chains, first.homes, own.namespaces, own.parents, own.indices, own.parent_chains)


def _chain(namespace: Namespace, page: str) -> bytes:
    data = bytes.fromhex(page)
    if len(data) != 32:
        raise ValueError(f"{page!r} is no SHA-256 in hex; this SGLang names its pages in a way mmcache does not know")
    return opaque_chain(namespace, data)


def _homes(namespace: Namespace, chains: list[bytes], prefix: Sequence[str]) -> list[bytes]:
    size = namespace.block_size
    assert size is not None
    homes: list[bytes] = []
    first = len(prefix)
    while len(homes) < len(chains):
        page = first + len(homes)
        start, end = run_bounds(page * size)
        home = -(-start // size)  # the first page that begins in the run
        in_run = -(-end // size) - page
        chain = chains[home - first] if home >= first else _chain(namespace, prefix[home])
        homes += [chain] * min(in_run, len(chains) - len(homes))
    return homes


def rank_part(heads: int, heads_total: int, rank: int, ranks: int) -> Part | None:
    """Which part of a page one rank's memory holds; None if that cannot be said in ranges.

    `heads` kv heads of `heads_total` are on each of `ranks` tensor-parallel ranks, either divided among them or, with
    fewer heads than ranks, each on several. `heads_total` 0: a value without heads (MLA), the same on every rank.
    """
    if not heads_total:
        return WHOLE
    if heads * ranks == heads_total:
        return Part(kv_heads=(rank * heads, (rank + 1) * heads, heads_total))
    if heads == 1 and ranks % heads_total == 0:
        head = rank * heads_total // ranks
        return Part(kv_heads=(head, head + 1, heads_total))
    return None


def split_heads(part: Part, heads: int, pieces: int) -> list[Part]:
    """A part that holds `heads` kv heads, cut by them into equal pieces: what ranks of a larger number hold each.

    Raises ValueError if they do not divide.
    """
    if heads % pieces:
        raise ValueError(f"{heads} kv heads cannot be cut into {pieces} equal pieces")
    start, stop, total = part.kv_heads or (0, heads, heads)
    each = (stop - start) // pieces
    return [Part(kv_heads=(first, first + each, total)) for first in range(start, stop, each)]


def by_page(buffers: Sequence[T], pages: int) -> list[list[T]]:
    """Group a pool's buffers, which come page after page, by page. Raises ValueError if they do not divide."""
    each, rest = divmod(len(buffers), pages)
    if rest or not each:
        raise ValueError(f"{len(buffers)} buffers are no whole number for each of {pages} pages")
    return [list(buffers[place : place + each]) for place in range(0, len(buffers), each)]


def cuts(sizes: Sequence[int], limit: int) -> list[slice]:
    """Consecutive ranges of at most `limit` bytes each; one that is larger by itself stands alone."""
    made: list[slice] = []
    start = held = 0
    for place, nbytes in enumerate(sizes):
        if held and held + nbytes > limit:
            made.append(slice(start, place))
            start, held = place, 0
        held += nbytes
    return [*made, slice(start, len(sizes))] if len(sizes) else []


def in_page_order(together: Sequence[T], one_by_one: Sequence[Sequence[T]]) -> bool:
    """Whether a pool lists the buffers of several pages page after page, given also each page's by itself."""
    return list(together) == [buffer for page in one_by_one for buffer in page]
