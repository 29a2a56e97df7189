"""What operators do to a shard: stop reads or writes, remove, list, audit, explain. A bounded piece of work a call.

Thread-safe like the shard: its lock is held for one piece at a time, and never while bytes are hashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from mmcache.store import sweep
from mmcache.store.explain import Miss, reason_for
from mmcache.store.history import Reason
from mmcache.store.namespaces import Known, Selection, Stopped
from mmcache.store.shard import READS_STOPPED, Shard
from mmcache.why import Why

AUDIT_NBYTES: Final = 256 << 20  # hashed by one call, or one entry
EVERYTHING: Final = Selection()


class Removed(NamedTuple):
    """One piece's result. `following`: where the next one starts, 0 after the last; `rows`: in all."""

    entries: int
    nbytes: int
    following: int
    rows: int


class Audited(NamedTuple):
    """As Removed, for entries checked; `bad`: keys dropped, as their bytes did not match their checksums."""

    entries: int
    nbytes: int
    bad: list[bytes]
    following: int
    rows: int


class NamespaceUse(NamedTuple):
    """A namespace with what it holds, and what is stopped for it."""

    known: Known
    entries: int
    nbytes: int
    stopped: Stopped


class Steward:
    """Operators' view of one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def stopped(self) -> tuple[Stopped, list[tuple[Selection, Stopped]]]:
        """What is stopped for everything, and the rules for namespaces."""
        with self._shard.lock:
            return self._shard.stopped, self._shard.namespaces.rules()

    def stop(self, stopped: Stopped, selection: Selection = EVERYTHING) -> bool:
        """Stop reads, writes or both from now on; False: there are too many rules for namespaces already.

        Without a selection for everything. Stopped reads are misses, stopped writes are refused; nothing is removed.
        """
        shard = self._shard
        with shard.lock:
            if selection == EVERYTHING:
                shard.stopped = stopped
            elif not shard.namespaces.stop(selection, stopped):
                return False
            shard.stop_changed()
            return True

    def remove(self, selection: Selection, start: int) -> Removed:
        """Remove the selected entries of one piece of rows."""
        shard = self._shard
        with shard.lock:
            now, index = shard.now(), shard.index
            before_s = now - selection.older_than_s if selection.older_than_s else math.inf
            numbers = set(shard.namespaces.selected(selection))
            select = sweep.chosen(index, numbers, before_s)
            entries, nbytes, following = sweep.remove(index, start, select, now)
            return Removed(entries, nbytes, following, index.rows.table.bound)

    def namespaces(self, selection: Selection) -> list[NamespaceUse]:
        """The selected namespaces, those that hold the most first."""
        shard = self._shard
        found = []
        with shard.lock:
            usage = shard.index.usage
            for number in shard.namespaces.selected(selection):
                known = shard.namespaces.known(number)
                if known is not None:
                    held = usage.entries_by_namespace[number], usage.by_namespace[number]
                    found.append(NamespaceUse(known, *held, shard.namespaces.stopped(number)))
        return sorted(found, key=lambda one: -one.nbytes)

    def entries(self, selection: Selection, start: int) -> tuple[list[tuple[sweep.Entry, bytes]], int]:
        """The selected entries of one piece of rows, each with its namespace's id; where the next piece starts."""
        shard = self._shard
        with shard.lock:
            before_s = shard.now() - selection.older_than_s if selection.older_than_s else math.inf
            numbers = set(shard.namespaces.selected(selection))
            entries, following = sweep.listed(shard.index, start, sweep.chosen(shard.index, numbers, before_s))
            known = [shard.namespaces.known(entry.namespace) for entry in entries]
        ids = [one.namespace if one is not None else b"" for one in known]
        return list(zip(entries, ids, strict=True)), following

    def audit(self, share: float, seed: int, start: int) -> Audited:
        """Check the stored bytes of a share of one piece's entries, and drop those that are bad."""
        shard = self._shard
        with shard.lock:
            chosen, following = sweep.sampled(shard.index, start, share, seed, AUDIT_NBYTES)
            rows = shard.index.rows.table.bound
        dropped = [shard.recheck(tenant, key) for tenant, key, _ in chosen]
        checked = [one for one, was in zip(chosen, dropped, strict=True) if was is not None]
        bad = [key for (_, key, _), was in zip(chosen, dropped, strict=True) if was]
        return Audited(len(checked), sum(nbytes for _, _, nbytes in checked), bad, following, rows)

    def explain(self, tenant: int, keys: Sequence[bytes], others: Sequence[int]) -> list[tuple[Reason, float | None]]:
        """Per key why it is, or is not, there, and how many seconds ago that came to be."""
        shard = self._shard
        answers = []
        for key in keys:  # the lock for one at a time: there may be thousands of others
            with shard.lock:
                now = shard.now()
                reason = reason_for(shard.index, tenant, key, now, others)
                if reason.why is Why.HERE and shard.stopped & Stopped.READS:
                    reason = READS_STOPPED
                answers.append((reason, None if reason.since is None else max(0.0, now - reason.since)))
        return answers

    def recent(self, tenant: int | None, limit: int) -> list[tuple[Miss, float]]:
        """The last lookups that missed something, of one tenant or of all, newest first, with their ages in seconds."""
        shard = self._shard
        with shard.lock:
            now = shard.now()
            mine = [miss for miss in reversed(shard.recent) if tenant in (None, miss.tenant)]
        return [(miss, now - miss.at) for miss in mine[:limit]]
