"""Traces of prompts, and two caches that need nothing but one: an exact LRU, and the best that could be.

A trace is JSON lines, one request each, as Mooncake (FAST'25) and Qwen-Bailian publish them: `hash_ids`, the prompt's
blocks in order, each hash standing for all blocks up to it; `input_length`, tokens. Bailian's lines also have
`chat_id`, `parent_chat_id`, `type` and `turn`, which are not needed, and blocks of 16 tokens. Only identities are
replayed: no tensor is made, and no time passes. PURE: lines in, counts out.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from mmcache.errors import UsageError

Request = tuple[int, ...]  # a prompt's blocks
Progress = Callable[[int, int], None]
BAILIAN_BLOCK_TOKENS: Final = 16
MAX_LINE_CHARS: Final = 64 << 20
REPORT_EVERY: Final = 500


@dataclass(frozen=True, slots=True)
class Trace:
    """The prompts in order, and how many tokens a block holds."""

    requests: list[Request]
    block_tokens: int

    @property
    def blocks(self) -> int:
        """All blocks asked for, repeats included."""
        return sum(map(len, self.requests))

    @property
    def unique_blocks(self) -> int:
        """Different blocks."""
        return len({block for request in self.requests for block in request})


def parse(lines: Iterable[str], block_tokens: int = 0) -> Trace:
    """A trace from its lines; blank ones are skipped. `block_tokens` 0: 16 for Bailian's, else what most lengths say.

    Raises UsageError that names the line, the field and what is wrong with it.
    """
    requests: list[Request] = []
    votes: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_CHARS:
            raise UsageError(f"line {number}: longer than {MAX_LINE_CHARS} characters; is this a trace?")
        if not line.strip():
            continue
        record = _record(number, line)
        blocks = tuple(_integers(number, "hash_ids", record.get("hash_ids")))
        requests.append(blocks)
        length = record.get("input_length")
        if length is not None and not (_is_integer(length) and length >= 0):
            raise UsageError(f"line {number}: input_length is {length!r}; expected a number of tokens")
        if "chat_id" in record and "parent_chat_id" in record:
            votes[BAILIAN_BLOCK_TOKENS] = votes.get(BAILIAN_BLOCK_TOKENS, 0) + 1
        elif length and len(blocks) > 1:
            least = -(-length // len(blocks))  # the smallest size of block that holds so many tokens
            power = 1 << (least - 1).bit_length()
            votes[power] = votes.get(power, 0) + 1
    if not requests:
        raise UsageError("the trace holds no request; expected JSON lines with hash_ids")
    if not block_tokens and not votes:
        raise UsageError("no request says how many tokens a block holds (input_length); give --block-tokens")
    return Trace(requests, block_tokens or max(votes, key=lambda size: (votes[size], size)))


def _record(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"line {number}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"line {number}: a {type(record).__name__}; expected an object with hash_ids")
    return record


def _integers(number: int, field: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(_is_integer(one) for one in value):
        found = "missing" if value is None else f"{str(value)[:40]!r}"
        raise UsageError(f"line {number}: {field} is {found}; expected a list of integers, one a block")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Cache(Protocol):
    """What is kept of the blocks seen so far."""

    def __contains__(self, block: int) -> bool:
        """Whether it is there now."""

    def use(self, request: Request) -> None:
        """A request's blocks were read, or computed and stored."""


class LRU:
    """Least recently used first; of one request the last blocks, so that children go before parents."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def use(self, request: Request) -> None:
        """See Cache."""
        for block in reversed(request):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


class Optimal:
    """Belady's: what is used again last goes first, and what never is, is not kept. It knows the whole trace."""

    def __init__(self, capacity_blocks: int, requests: Sequence[Request]) -> None:
        self._capacity = capacity_blocks
        self._next_uses = _next_uses(requests)
        self._turn = 0
        self._kept: dict[int, int] = {}  # block -> the request that uses it next
        self._latest: list[tuple[int, int, int]] = []  # a heap; entries that are no longer true are skipped

    def __contains__(self, block: int) -> bool:
        return block in self._kept

    def use(self, request: Request) -> None:
        """See Cache. Requests come in the trace's order."""
        for depth, (block, again) in enumerate(zip(request, self._next_uses[self._turn], strict=True)):
            if again is None:
                self._kept.pop(block, None)
                continue
            self._kept[block] = again
            heapq.heappush(self._latest, (-again, -depth, block))
        self._turn += 1
        while len(self._kept) > self._capacity:
            again, _, block = heapq.heappop(self._latest)
            if self._kept.get(block) == -again:
                del self._kept[block]


def _next_uses(requests: Sequence[Request]) -> list[list[int | None]]:
    """For each block of each request, the next request that uses it."""
    upcoming: dict[int, int] = {}
    found: list[list[int | None]] = []
    for turn in range(len(requests) - 1, -1, -1):
        found.append([upcoming.get(block) for block in requests[turn]])
        upcoming.update(dict.fromkeys(requests[turn], turn))
    found.reverse()
    return found


def hit_blocks(requests: Sequence[Request], cache: Cache, progress: Progress | None = None) -> int:
    """How many blocks the requests find: of each prompt the leading ones that are there."""
    hits = 0
    for turn, request in enumerate(requests):
        hits += next((depth for depth, block in enumerate(request) if block not in cache), len(request))
        cache.use(request)
        if progress is not None and not turn % REPORT_EVERY:
            progress(turn, len(requests))
    return hits
