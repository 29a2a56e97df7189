"""Why a key is not there: from what the index holds now, and what its history remembers. PURE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mmcache.store.history import NEVER, Reason
from mmcache.store.index import Index
from mmcache.store.rows import LIVE, RESERVED
from mmcache.store.table import NO_ROW, tenant_prefix
from mmcache.why import Why


class Miss(NamedTuple):
    """A lookup that did not find all it asked for: `key` is the first that was missing, `reason` why it was then."""

    at: float
    tenant: int
    asked: int
    found: int
    prefix: bool
    key: bytes
    reason: Reason


def reason_for(index: Index, tenant: int, key: bytes, now: float, others: Iterable[int] = ()) -> Reason:
    """Why `key` is not there for `tenant`, or that it is. `others`: tenants among whom to look for it too, which
    only an operator may."""
    reason = _own_reason(index, tenant, key, now)
    if reason is NEVER:
        for other in others:
            if other != tenant and _own_reason(index, other, key, now).why in (Why.HERE, Why.READS_STOPPED):
                return Reason(Why.OTHER_TENANT)
    return reason


def _own_reason(index: Index, tenant: int, key: bytes, now: float) -> Reason:
    rows, prefix = index.rows, tenant_prefix(tenant)
    row = rows.table.find(prefix, key)
    if row != NO_ROW and rows.state[row] == RESERVED:
        return Reason(Why.BEING_WRITTEN)
    if row != NO_ROW and rows.state[row] == LIVE:
        if rows.expires_at[row] <= now:
            return Reason(Why.TTL_PASSED, rows.expires_at[row])
        if rows.namespace[row] in index.unreadable:
            return Reason(Why.READS_STOPPED)
        return Reason(Why.HERE, float(rows.stored_at_s[row]), rows.children[row])
    return index.history.find(prefix, key)
