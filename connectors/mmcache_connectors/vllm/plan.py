"""What one engine step does with the cache: the jobs that go from the scheduler to its workers, and how they are cut.

No clock, no I/O, nothing of vLLM; jobs are plain columns, because they cross processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmcache.keyset import Keys
from mmcache_connectors.vllm.groups import Group

KeysOf = Callable[[int, int], Keys]  # the keys of blocks first .. stop of a request


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some blocks of one KV group: their keys (for no part yet) and where they lie in the engine's paged memory."""

    group: int
    keys: Keys
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks of one request to load or to save. `lost`: blocks promised to the engine that cannot be loaded; `audit`:
    blocks to save that were found stored, to be compared with it."""

    request_id: str
    blocks: tuple[Blocks, ...]
    lost: tuple[int, ...] = ()
    audit: bool = False


def blocks_to_load(
    groups: Sequence[Group], keys: KeysOf, block_ids: Sequence[Sequence[int]], local: int, hit: int, block_tokens: int
) -> tuple[Blocks, ...]:
    """What must come from the cache for a hit of `hit` blocks, of which the engine itself holds `local`.

    Under a sliding window only the last blocks are read again; the others have no memory (block id 0).
    """
    jobs = []
    for group, ids in zip(groups, block_ids, strict=True):
        first = max(local, group.first_needed_token(hit * block_tokens) // block_tokens)
        jobs.append(_with_memory(group.index, keys, ids, first, hit))
    return tuple(job for job in jobs if job.block_ids)


def blocks_to_save(
    groups: Sequence[Group], keys: KeysOf, block_ids: Sequence[Sequence[int]], first: int, stop: int
) -> tuple[Blocks, ...]:
    """Blocks first .. stop of every group, without those that have no memory any more."""
    jobs = [_with_memory(group.index, keys, ids, first, stop) for group, ids in zip(groups, block_ids, strict=True)]
    return tuple(job for job in jobs if job.block_ids)


def _with_memory(group: int, keys: KeysOf, block_ids: Sequence[int], first: int, stop: int) -> Blocks:
    """The rows after the last one without memory: never block id 0, the engine's null block."""
    rows = list(block_ids[first:stop])
    skip = next((len(rows) - back for back, block_id in enumerate(reversed(rows)) if block_id <= 0), 0)
    return Blocks(group, keys(first + skip, first + len(rows)), rows[skip:])


def savable_blocks(
    computed_tokens: int, known_tokens: int, prompt_tokens: int | None, limit_blocks: int, block_tokens: int
) -> int:
    """How many leading blocks hold final values once `computed_tokens` are computed.

    A draft token's value may be thrown away, so only positions whose token is known count (`known_tokens`); with
    `prompt_tokens` only those of the prompt. `limit_blocks` ends before media of unknown identity.
    """
    tokens = min(computed_tokens, known_tokens)
    if prompt_tokens is not None:
        tokens = min(tokens, prompt_tokens)
    return min(tokens // block_tokens, limit_blocks)
