"""The index's integrity check: everything that must agree between rows, extents and claims. For tests. PURE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mmcache.store.extents import Extents
from mmcache.store.leases import Leases, Reservations
from mmcache.store.rows import LIVE, RECORD, RESERVED, Rows
from mmcache.store.table import tenant_of
from mmcache.store.usage import Usage


def check(
    rows: Rows,
    extents: Extents,
    pins: Sequence[int],
    leases: Leases,
    reservations: Reservations,
    held: Mapping[int, int],
    usage: Usage,
) -> None:
    """Walks everything; raises AssertionError saying what is wrong. O(entries)."""
    want = dict.fromkeys(held, 0)
    extents.check_integrity()
    used = rows.check_integrity(lambda row: pins[rows.node[row]] > 0)
    owners = [row for row in used if rows.state[row] in (RESERVED, LIVE)]
    reserved = {reservation.row: reservation.tenant for reservation in reservations}
    assert len(reserved) == len(reservations), "two reservations have one row"
    unclaimed = {row for row in used if rows.state[row] == RESERVED} ^ reserved.keys()
    assert not unclaimed, f"rows {unclaimed} are reserved without a reservation, or the reverse"
    claims = Counter((node, lease.tenant) for lease in leases for _, node in lease.pairs())
    for (node, tenant), count in claims.items():
        assert pins[node] == count, f"node {node} counts {pins[node]} pins of tenant {tenant}'s {count}"
        want[tenant] = want.get(tenant, 0) + extents.size_bytes[node]
    assert sum(pins) == claims.total(), "extents are pinned by nobody"
    for row, tenant in reserved.items():
        want[tenant] = want.get(tenant, 0) + extents.size_bytes[rows.node[row]]
    assert want == held, f"held bytes by tenant are {want}, counted as {held}"
    known = {rows.node[row] for row in owners} | {node for node, _ in claims}
    assert all(map(extents.is_allocated, known)), "an entry's extent is free"
    assert len(known) == extents.allocated, f"{extents.allocated - len(known)} extents have no owner"
    for row in owners:
        offset, nbytes, _, _ = RECORD.unpack_from(rows.records, row * RECORD.size)
        extent = extents.offset_bytes[rows.node[row]], extents.size_bytes[rows.node[row]]
        assert (offset, extents.rounded(nbytes)) == extent, f"row {row} is not where its extent is: {extent}"
    _check_usage(rows, owners, usage)


def _check_usage(rows: Rows, owners: Sequence[int], usage: Usage) -> None:
    kinds: Counter[int] = Counter()
    tenants: Counter[int] = Counter()
    namespaces: Counter[int] = Counter()
    for row in owners:
        nbytes = RECORD.unpack_from(rows.records, row * RECORD.size)[1]
        kinds[rows.kind[row]] += nbytes if rows.state[row] == LIVE else 0
        tenants[tenant_of(rows.table.name(row))] += nbytes
        namespaces[rows.namespace[row]] += nbytes
    assert +kinds == +usage.by_kind, f"bytes by kind are {kinds}, counted as {usage.by_kind}"
    assert tenants == usage.by_tenant, f"bytes by tenant are {tenants}, counted as {usage.by_tenant}"
    assert namespaces == usage.by_namespace, f"bytes by namespace are {namespaces}, counted as {usage.by_namespace}"
    counts = Counter(rows.namespace[row] for row in owners)
    assert counts == usage.entries_by_namespace, f"entries by namespace are {counts}"
