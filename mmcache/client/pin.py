"""Pinning without looking: what a scheduler does so that a worker finds, a moment later, what was promised to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmcache.client.plan import batches
from mmcache.client.protocol import Flow
from mmcache.client.session import Session
from mmcache.errors import RequestRefused
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op


class Pinned:
    """`count` leading keys are stored; the first of them, as many as the server may pin at once, stay until `release`.

    The lease ends by itself after the server's lease time, so a Pinned that is forgotten costs memory for that long
    and nothing else. Whoever reads the entries need not be who pinned them.
    """

    __slots__ = ("_lease_ids", "_release", "count")

    def __init__(
        self, count: int, lease_ids: Sequence[int] = (), release: Callable[[Sequence[int]], bool] | None = None
    ) -> None:
        self.count = count
        self._lease_ids, self._release = list(lease_ids), release

    def release(self) -> bool:
        """Give the lease back; True if it was held until now, or nothing was pinned. Safe to call twice."""
        lease_ids, self._lease_ids = self._lease_ids, []
        return self._release(lease_ids) if lease_ids and self._release else True


def pin_prefix(session: Session, digests: Sequence[bytes]) -> Flow[tuple[int, list[int]]]:
    """Pin leading stored entries; where no more may be pinned, and over gRPC, only count. How many, and the leases."""
    if session.rpc is not None:
        return (yield from count_prefix(session, digests)), []
    limits = session.joined.limits
    lease_ids: list[int] = []
    count = 0
    try:
        while count < len(digests):
            wanted = digests[count : count + limits.batch_keys]
            acquired = yield from session.conversation.acquire(
                b"".join(wanted), prefix=True, max_nbytes=limits.inline_nbytes
            )
            if acquired.lease_id:
                lease_ids.append(acquired.lease_id)
            found = next((row for row, entry in enumerate(acquired.entries) if entry is None), len(acquired.entries))
            count += found
            if found == 0 and acquired.later_from == 0:  # no more may be pinned
                count += yield from count_prefix(session, digests[count:])
                break
            if found < len(wanted) and acquired.later_from != found:
                break  # the next one is not stored
    except RequestRefused:
        for lease_id in lease_ids:
            yield from session.conversation.release_quietly(lease_id)
        raise
    return count, lease_ids


def count_prefix(session: Session, digests: Sequence[bytes]) -> Flow[int]:
    """How many leading keys are stored; nothing is pinned."""
    matched = 0
    for run in batches(len(digests), session.joined.limits.batch_keys):
        request = pb.ContainsRequest(keys=b"".join(digests[run.start : run.stop]), prefix=True)
        reply = yield from session.conversation.call(Op.CONTAINS, request, pb.ContainsReply())
        present = reply.present[: len(run)]
        absent = present.find(0)
        matched += len(present) if absent < 0 else absent
        if matched < run.stop:
            break
    return matched
