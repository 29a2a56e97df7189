"""Block chains: the keys of a prompt's blocks, hashed as it grows, and the runs in which blocks are placed.

chain_i = BLAKE3(namespace id, chain_{i-1}, the tokens of block i, the media spans that touch it); docs/keys.md has the
bytes. PURE: no clock, no randomness, no I/O, no torch (a CPU tensor is read through numpy).
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from blake3 import blake3

from mmcache.encoding import check_count, check_digest, framed
from mmcache.errors import KeyInputError
from mmcache.keyset import NO_PARENT, WHOLE, Keys, stored_keys

RUN_STARTS: Final = (0, 512, 1024, 2048)  # tokens; then every RUN_PERIOD. A constant of keys v1: changing it is keys v2
RUN_PERIOD: Final = 4096
_NO_SPANS: Final = struct.pack("<I", 0)
_SEGMENT: Final = struct.Struct("<II32sQQ")
_TOKENS_WANTED: Final = "pass one prompt's ids, 0 <= id < 2^64, as a list, tuple, range, integer ndarray or CPU tensor"


def run_bounds(token: int) -> tuple[int, int]:
    """(first token, end token) of the run that holds this token position: 0, 512, 1024, 2048, 4096, then every 4096."""
    if token >= RUN_STARTS[-1]:
        end = token - token % RUN_PERIOD + RUN_PERIOD
        return (max(end - RUN_PERIOD, RUN_STARTS[-1]), end)
    place = bisect_right(RUN_STARTS, token)
    return RUN_STARTS[place - 1], RUN_STARTS[place]


@dataclass(frozen=True, slots=True)
class PlaceholderSpan:
    """`length` placeholder tokens from token position `offset` on that stand for one media item.

    `item` is the item's digest (`item_digest`): 32 bytes. `offset` counts from the start of the prompt.
    """

    offset: int
    length: int
    item: bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", check_count(self.offset, "PlaceholderSpan.offset"))
        object.__setattr__(self, "length", check_count(self.length, "PlaceholderSpan.length", minimum=1))
        check_digest(self.item, "PlaceholderSpan.item")

    @property
    def end(self) -> int:
        """The token position just after the span."""
        return self.offset + self.length


class ChainHasher:
    """The block keys of one prompt that grows. Not thread-safe. An `extend` that raises leaves it as it was."""

    __slots__ = ("_blocks", "_chain", "_home", "_namespace_id", "_size", "_spans", "_stored", "_tail")

    def __init__(self, namespace_id: bytes, block_size: int) -> None:
        self._namespace_id = namespace_id
        self._size = block_size
        self._blocks = 0
        self._chain = self._stored = self._home = NO_PARENT
        self._tail = b""  # tokens not yet in a full block, u64-LE each
        self._spans: list[PlaceholderSpan] = []  # declared, not yet wholly hashed; sorted, disjoint

    def extend(self, token_ids: Iterable[int], spans: Iterable[PlaceholderSpan] = ()) -> Keys:
        """Append tokens; returns the keys of the blocks they completed, possibly none.

        Span offsets are absolute, from the first token ever given. A span may reach beyond the tokens given so far, but
        must be declared before its first token is hashed into a full block. Raises KeyInputError, changing nothing.
        """
        tokens = self._tail + _token_bytes(token_ids)
        declared = self._declare(spans)
        count = len(tokens) // (8 * self._size)
        first, hashed = self._blocks, (self._blocks + count) * self._size
        chains = self._hash_blocks(tokens, count, _segments(declared, first, count, self._size))
        homes = self._homes(chains)
        stored = stored_keys(chains, WHOLE)
        keys = Keys(
            stored,
            chains,
            homes,
            [self._namespace_id] * count,
            [self._stored, *stored[:-1]] if count else [],
            range(first, first + count),
            [self._chain, *chains[:-1]] if count else [],
        )
        self._tail = tokens[count * 8 * self._size :]
        self._spans = [span for span in declared if span.end > hashed]
        if count:
            self._blocks += count
            self._chain, self._stored, self._home = chains[-1], stored[-1], homes[-1]
        return keys

    def require_complete_spans(self) -> None:
        """Raises KeyInputError if a declared span reaches beyond the tokens given so far."""
        given = self._blocks * self._size + len(self._tail) // 8
        for span in self._spans:
            if span.end > given:
                place = f"span {span.offset}+{span.length}"
                raise KeyInputError(f"{place} reaches beyond the {given} tokens; check its offset and length")

    def _declare(self, spans: Iterable[PlaceholderSpan]) -> list[PlaceholderSpan]:
        try:
            new = list(spans)
        except TypeError:
            found = type(spans).__name__
            raise KeyInputError(f"spans: object of type {found} is no sequence of spans; pass a list") from None
        hashed = self._blocks * self._size
        for span in new:
            if not isinstance(span, PlaceholderSpan):
                raise KeyInputError(f"spans: object of type {type(span).__name__} is no PlaceholderSpan")
            if span.offset < hashed:
                raise KeyInputError(
                    f"span {span.offset}+{span.length} starts before token {hashed}, which is hashed already; "
                    "declare a span before, or together with, its first token"
                )
        if not new:
            return self._spans
        ordered = sorted([*self._spans, *new], key=lambda span: span.offset)
        for left, right in pairwise(ordered):
            if left.end > right.offset:
                raise KeyInputError(
                    f"spans {left.offset}+{left.length} and {right.offset}+{right.length} overlap; a token position "
                    "belongs to one item, and each span is declared once"
                )
        return ordered

    def _hash_blocks(self, tokens: bytes, count: int, segments: Mapping[int, bytes]) -> list[bytes]:
        prefix = framed(b"k1.block") + self._namespace_id + struct.pack("<I", self._size)
        width = 8 * self._size
        chain = self._chain
        chains = []
        for block in range(count):
            row = tokens[block * width : (block + 1) * width]
            chain = blake3(prefix + chain + row + segments.get(block, _NO_SPANS)).digest()
            chains.append(chain)
        return chains

    def _homes(self, chains: Sequence[bytes]) -> list[bytes]:
        homes: list[bytes] = []
        home, size = self._home, self._size
        while len(homes) < len(chains):
            block = self._blocks + len(homes)
            start, end = run_bounds(block * size)
            if block == 0 or (block - 1) * size < start:
                home = chains[len(homes)]
            blocks_in_run = -(-end // size) - block
            homes += [home] * min(blocks_in_run, len(chains) - len(homes))
        return homes


def _segments(spans: Sequence[PlaceholderSpan], first: int, count: int, size: int) -> dict[int, bytes]:
    """For each of the blocks first .. first+count that spans touch (numbered from 0): count and segments, encoded."""
    touched: dict[int, list[bytes]] = {}
    for span in spans:
        for block in range(max(span.offset // size, first), min((span.end - 1) // size + 1, first + count)):
            begin = max(span.offset, block * size)
            end = min(span.end, (block + 1) * size)
            segment = _SEGMENT.pack(begin - block * size, end - begin, span.item, span.length, begin - span.offset)
            touched.setdefault(block - first, []).append(segment)
    return {block: struct.pack("<I", len(parts)) + b"".join(parts) for block, parts in touched.items()}


def _token_bytes(token_ids: Any) -> bytes:
    """Each token id as u64-LE, or KeyInputError. Plain sequences go through array("Q"): it refuses all but ints."""
    if isinstance(token_ids, np.ma.MaskedArray):
        raise KeyInputError("token_ids: a masked array's mask would be lost; pass .compressed() or .filled(id)")
    if isinstance(token_ids, (str, bytes, bytearray)):
        raise KeyInputError(f"token_ids: object of type {type(token_ids).__name__}; {_TOKENS_WANTED}")
    try:
        if isinstance(token_ids, Sequence):
            ids = np.frombuffer(array("Q", token_ids), dtype=np.uint64)
            # A bool passes as 0 or 1, so only those places need a look at the type.
            valid = not any(isinstance(token_ids[place], bool) for place in np.flatnonzero(ids <= 1).tolist())
        else:
            ids = np.asarray(token_ids)
            valid = ids.ndim == 1 and ids.dtype.kind in "iu" and (ids.dtype.kind == "u" or not (ids < 0).any())
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise KeyInputError(f"token_ids: {error}; {_TOKENS_WANTED}") from None
    if not valid:
        raise KeyInputError(f"token_ids: bool, negative, float or not one-dimensional; {_TOKENS_WANTED}")
    return ids.astype("<u8", copy=False).tobytes()
