"""Every call of a client: its arguments checked, its conversation as a flow, and what it comes to when that fails.

Both clients run these; what differs between them is only who waits for the socket, and how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

from mmcache.client import rpc
from mmcache.client.batch import PutBatch, described, get_run
from mmcache.client.plan import batches, put_batches
from mmcache.client.protocol import STOPPED_READS, STOPPED_WORDS, STOPPED_WRITES, Flow
from mmcache.client.session import Session
from mmcache.errors import ProtocolError, UsageError
from mmcache.frame import check_specs, layout_of
from mmcache.hashing import Hasher, PlainHasher
from mmcache.keyset import Key, Keys
from mmcache.media import Media
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import HostTensor, check_count, named_tensors, specs_of
from mmcache.transport.base import HIT, MISS, Op, Outcome, Result
from mmcache.transport.shm import Copier

LONGEST_TTL_S: Final = 1e10
RECHECK_KEYS: Final = 64
AnyKeys = Keys | Key | Iterable[Key]
AnyMedia = Media | Sequence[Media | None] | None
NewHasher = Callable[[], Hasher]


class Get:
    """Reading into destinations. `results` holds one Result a key: what is known so far, or in the end."""

    def __init__(self, rows: Keys, targets: Sequence[Mapping[str, HostTensor]], verify: bool, copier: Copier) -> None:
        self.rows, self.targets, self.verify, self._copier = rows, targets, verify, copier
        self.results = [MISS] * len(rows)

    @classmethod
    def of(cls, keys: AnyKeys, buffers: Sequence[Any], verify: bool, copier: Copier) -> Get:
        """From a caller's arguments. Raises TensorError for destinations that can never be filled."""
        rows = Keys.of(keys)
        check_count(rows, buffers, "destinations")
        return cls(rows, [named_tensors(buffer, writable=True) for buffer in buffers], verify, copier)

    def part(self, run: range) -> Get:
        """The same for some of the keys."""
        stop = run.stop
        return Get(self.rows[run.start : stop], self.targets[run.start : stop], self.verify, self._copier)

    def pick(self, positions: Sequence[int]) -> Get:
        """The same for these of the keys."""
        return Get(self.rows.pick(positions), [self.targets[row] for row in positions], self.verify, self._copier)

    def sizes(self) -> list[int]:
        """How many bytes each key's destinations take."""
        return [sum(tensor.data.nbytes for tensor in target.values()) for target in self.targets]

    def flow(self, session: Session) -> Flow[None]:
        """Ask, and fill the destinations."""
        rows, results = self.rows, self.results
        results[:] = [MISS] * len(rows)  # a second try writes the destinations anew
        if session.rpc is not None:
            return (yield from rpc.get(session, rows.digests, self.targets, results, self.verify))
        for run in batches(len(rows), session.joined.limits.batch_keys):
            position = run.start
            while position < run.stop:
                rest = range(position, run.stop)
                position = yield from get_run(
                    session, self._copier, rows.digests, self.targets, results, rest, self.verify
                )

    def fail(self, reason: str) -> None:
        """What was not read is unavailable, or, where reads are stopped, a miss."""
        stopped = reason == STOPPED_WORDS[STOPPED_READS]
        lost = Result(Outcome.MISS if stopped else Outcome.UNAVAILABLE, reason)
        self.results[:] = [lost if result is MISS else result for result in self.results]

    def counts(self) -> dict[str, int]:
        """What the counters gain."""
        hits = nbytes = corrupt = 0
        for target, result in zip(self.targets, self.results, strict=True):
            if result is HIT:
                hits += 1
                for tensor in target.values():
                    nbytes += tensor.data.nbytes
            elif result.outcome is Outcome.CORRUPT:
                corrupt += 1
        misses = len(self.results) - hits
        return {"hits": hits, "misses": misses, "verify_failures": corrupt, "bytes_read": nbytes}

    def corrupt(self) -> list[bytes]:
        """The keys that read as corrupt, for the server to look at."""
        rows = zip(self.rows.digests, self.results, strict=True)
        return list(dict.fromkeys([key for key, result in rows if result[0] is Outcome.CORRUPT]))


class Put:
    """Storing values. `results` holds one Result a key."""

    def __init__(
        self,
        rows: Keys,
        values: Sequence[Mapping[str, HostTensor]],
        ttl_s: float | None,
        media: Sequence[Media | None] = (),
        hasher: NewHasher = PlainHasher,
    ) -> None:
        self.rows, self.values, self.ttl_s, self.media = rows, values, ttl_s, media
        self._hasher = hasher
        self._namespaces = {described(namespace) for namespace in rows.namespaces}
        self.results = [Result(Outcome.UNAVAILABLE)] * len(rows)

    @classmethod
    def of(
        cls,
        keys: AnyKeys,
        tensors: Sequence[Any],
        ttl_s: float | None,
        media: AnyMedia = None,
        hasher: NewHasher = PlainHasher,
    ) -> Put:
        """From a caller's arguments. Raises TensorError and UsageError for what can never be stored."""
        if ttl_s is not None and not (isinstance(ttl_s, Real) and 0 < ttl_s < LONGEST_TTL_S):
            raise UsageError(f"ttl_s is {ttl_s!r}; give seconds, above 0 and below {LONGEST_TTL_S:g}, or None")
        rows = Keys.of(keys)
        check_count(rows, tensors, "tensors")
        values = [named_tensors(value) for value in tensors]
        for value in values:
            check_specs(specs_of(value))
        known = [media] * len(rows) if isinstance(media, Media) else list(media or ())
        if not all(one is None or isinstance(one, Media) for one in known) or len(known) not in (0, len(rows)):
            raise UsageError("media: give one Media, or one Media or None a key")
        return cls(rows, values, ttl_s, known, hasher)

    def part(self, run: range) -> Put:
        """The same for some of the keys."""
        part = slice(run.start, run.stop)
        return Put(self.rows[part], self.values[part], self.ttl_s, self.media[part], self._hasher)

    def pick(self, positions: Sequence[int]) -> Put:
        """The same for these of the keys."""
        values = [self.values[row] for row in positions]
        media = [self.media[row] for row in positions] if self.media else ()
        return Put(self.rows.pick(positions), values, self.ttl_s, media, self._hasher)

    def sizes(self) -> list[int]:
        """How many bytes each value has."""
        return [sum(tensor.data.nbytes for tensor in value.values()) for value in self.values]

    def flow(self, session: Session) -> Flow[None]:
        """Declare the namespaces this server has not heard of on this link, and store batch by batch."""
        if session.rpc is not None:
            return (yield from rpc.put(session, self.rows, self.values, self.results, self.ttl_s, self.media))
        for namespace in self._namespaces - session.declared:
            request = pb.DeclareRequest(namespace=namespace, kind=namespace.kind, facts=namespace.facts)
            yield from session.conversation.call(Op.DECLARE, request, pb.DeclareReply())
            session.declared.add(namespace)
        alignment, limits = session.joined.alignment, session.joined.limits
        sizes = [layout_of([t.data.nbytes for t in value.values()], alignment).frame_nbytes for value in self.values]
        for run in put_batches(sizes, limits.batch_keys, limits.inline_nbytes):
            batch = PutBatch(self.rows, self.values, sizes, run, alignment, self.ttl_s, self.media)
            self.results[run.start : run.stop] = yield from batch.send(session, self._hasher)

    def fail(self, reason: str) -> None:
        """What is not known to be stored is unavailable, or, where writes are stopped, refused."""
        stopped = reason == STOPPED_WORDS[STOPPED_WRITES]
        lost = Result(Outcome.REFUSED if stopped else Outcome.UNAVAILABLE, reason)
        self.results[:] = [lost if result.outcome is Outcome.UNAVAILABLE else result for result in self.results]

    def counts(self) -> dict[str, int]:
        """What the counters gain."""
        counts = Counter(f"put_{result.outcome}" for result in self.results)
        rows = zip(self.values, self.results, strict=True)
        stored = [value for value, result in rows if result.outcome is Outcome.STORED]
        counts["bytes_written"] = sum(tensor.data.nbytes for value in stored for tensor in value.values())
        return counts


def contains(session: Session, digests: Sequence[bytes]) -> Flow[list[bool]]:
    """Per key, whether it is stored."""
    flags = bytearray()
    for run in batches(len(digests), session.joined.limits.batch_keys):
        request = pb.ContainsRequest(keys=b"".join(digests[run.start : run.stop]))
        flags += (yield from session.conversation.call(Op.CONTAINS, request, pb.ContainsReply())).present
    return _flags(flags, len(digests))


def delete(session: Session, digests: Sequence[bytes]) -> Flow[list[bool]]:
    """Forget entries; per key, whether it was there."""
    flags = bytearray()
    for run in batches(len(digests), session.joined.limits.batch_keys):
        request = pb.DeleteRequest(keys=b"".join(digests[run.start : run.stop]))
        flags += (yield from session.conversation.call(Op.DELETE, request, pb.DeleteReply())).deleted
    return _flags(flags, len(digests))


def stat(session: Session) -> Flow[dict[str, Any]]:
    """The server's counters and gauges, and how this link reaches it."""
    reply = yield from session.conversation.call(Op.STAT, pb.StatRequest(), pb.StatReply())
    return {
        "server": reply.server,
        "server_id": reply.server_id.hex(),
        "uptime_s": reply.uptime_s,
        "transport": session.path,
        "transport_why": session.why,
        "counters": dict(sorted(reply.counters.items())),
    }


def inspect(session: Session, digest: bytes) -> Flow[pb.InspectReply]:
    """What is known of one stored key."""
    return session.conversation.call(Op.INSPECT, pb.InspectRequest(key=digest), pb.InspectReply())


def give_back(session: Session, lease_ids: Sequence[int]) -> Flow[bool]:
    """Give leases back; True if all were held until now."""
    held = True
    for lease_id in lease_ids:
        request = pb.FinishRequest(lease_id=lease_id)
        held &= (yield from session.conversation.call(Op.FINISH, request, pb.FinishReply())).held
    return held


def recheck(session: Session, digests: Sequence[bytes]) -> Flow[pb.RecheckReply]:
    """Have the server look at entries that read as corrupt."""
    request = pb.RecheckRequest(keys=b"".join(digests[:RECHECK_KEYS]))
    return session.conversation.call(Op.RECHECK, request, pb.RecheckReply())


def _flags(flags: bytes | bytearray, count: int) -> list[bool]:
    if len(flags) != count:
        raise ProtocolError(f"the server answered {len(flags)} of {count} keys")
    return [bool(flag) for flag in flags]
