"""One batch over one session, as flows: reading what an Acquire covers, and sending what a Reserve wants."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import xxhash

from mmcache._version import __version__
from mmcache.client.lending import lend
from mmcache.client.protocol import PLANNING_NBYTES, Flow, Work, put_result
from mmcache.client.sending import LentWay, Outgoing, send_frames, way_of
from mmcache.client.session import Session
from mmcache.errors import KeyInputError, TransportError
from mmcache.frame import FrameMeta, Kind, pack_header
from mmcache.hashing import Hasher
from mmcache.keyset import Keys, NamespaceId
from mmcache.media import Media
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import Bytes, HostTensor, specs_of
from mmcache.transport.base import Found, Op, Outcome, Result
from mmcache.transport.nixl import STAGED_NBYTES, Reader
from mmcache.transport.planned import plan_frames
from mmcache.transport.shm import Copier

GIVE_BACK_S: Final = 0.05  # of a call's time, to give a lease back after its deadline for reading
WRITER: Final = f"mmcache/{__version__}"
_KINDS: Final = {kind.name.lower(): kind for kind in Kind}


def get_run(
    session: Session,
    copier: Copier,
    digests: Sequence[bytes],
    targets: Sequence[Mapping[str, HostTensor]],
    results: list[Result],
    run: range,
    verify: bool,
) -> Flow[int]:
    """Read the keys of `run` that one Acquire covers; returns where the next one starts."""
    conversation, arena, reader = session.conversation, session.arena, session.reader
    column = b"".join(digests[run.start : run.stop])
    limit = session.joined.limits.inline_nbytes
    if reader is not None:
        limit = min(limit, STAGED_NBYTES)
    acquired = yield from conversation.acquire(column, inline=arena is None and reader is None, max_nbytes=limit)
    found = [(position, place) for position, place in zip(run, acquired.entries, strict=True) if place]
    read: list[Result] = []
    nbytes = sum([place.nbytes for _, place in found]) + len(found) * PLANNING_NBYTES
    if arena is not None:
        places = [place for _, place in found]
        read = yield Work(partial(_copy, copier, arena.data, places, found, digests, targets, verify), nbytes)
    elif reader is not None:
        try:
            until = session.deadline - GIVE_BACK_S
            fetch = partial(_fetch, reader, until, copier, found, digests, targets, verify)
            read = yield Work(fetch, nbytes, waits=True)
        except TransportError:  # the link ends with it, the lease does not
            if acquired.lease_id:
                with contextlib.suppress(TransportError):
                    yield from conversation.release_quietly(acquired.lease_id)
            raise
    else:
        for position, place in found:
            frame = conversation.receive_frame(place, digests[position], targets[position], verify)
            read.append((yield from frame))
    if acquired.lease_id:
        if verify and not (arena is not None and copier.by_lease(targets[at] for at, _ in found)):
            yield from session.release(acquired)
        else:
            request = pb.FinishRequest(lease_id=acquired.lease_id)
            if not (yield from conversation.call(Op.FINISH, request, pb.FinishReply())).held:
                read = [Result(Outcome.MISS, "the lease expired while the entry was being read")] * len(read)
    for (position, _), result in zip(found, read, strict=True):
        results[position] = result
    if acquired.later_from is None:
        return run.stop
    if acquired.later_from == 0:
        results[run.start] = Result(Outcome.MISS, "too much memory is leased; release leases or raise --memory")
        return run.start + 1
    return run.start + acquired.later_from


def _fetch(
    reader: Reader,
    deadline: float,
    copier: Copier,
    found: Sequence[tuple[int, Found]],
    digests: Sequence[bytes],
    targets: Sequence[Mapping[str, HostTensor]],
    verify: bool,
) -> list[Result]:
    """By NIXL into memory of the reader's, and from there as out of a mapped arena."""
    memory, places = reader.read([place for _, place in found], deadline)
    return _copy(copier, memory, places, found, digests, targets, verify)


def _copy(
    copier: Copier,
    memory: Bytes,
    places: Sequence[Found],
    found: Sequence[tuple[int, Found]],
    digests: Sequence[bytes],
    targets: Sequence[Mapping[str, HostTensor]],
    verify: bool,
) -> list[Result]:
    positions = [at for at, _ in found]
    keys, into = [digests[at] for at in positions], [targets[at] for at in positions]
    return copier.copy(plan_frames(memory, places, keys, into, verify), verify)


def described(namespace: bytes) -> NamespaceId:
    """The id of a Namespace as itself. Raises KeyInputError for bare bytes, which nothing is known of."""
    if not isinstance(namespace, NamespaceId):
        raise KeyInputError("a key to be stored must carry the id of a Namespace (Namespace.id), not bare bytes")
    return namespace


def _kind_of(namespace: bytes) -> Kind:
    return _KINDS[described(namespace).kind]


class PutBatch:
    """One Reserve and the frames it wants: headers are made, and payloads hashed, only for what is wanted."""

    def __init__(
        self,
        rows: Keys,
        values: Sequence[Mapping[str, HostTensor]],
        sizes: Sequence[int],
        run: range,
        alignment: int,
        ttl_s: float | None,
        media: Sequence[Media | None] = (),
    ) -> None:
        self.rows, self.values, self.sizes, self.run, self.alignment = rows, values, sizes, run, alignment
        self._media = media[run.start : run.stop]
        self.created_ms = time.time_ns() // 1_000_000
        self.expires_ms = self.created_ms + max(1, int(ttl_s * 1000)) if ttl_s is not None else 0

    def send(self, session: Session, hasher: Callable[[], Hasher]) -> Flow[list[Result]]:
        """Reserve, send what is wanted, and say what became of each key."""
        sums_last = session.joined.sums_last
        start, stop = self.run.start, self.run.stop
        rows, conversation = self.rows, session.conversation
        lent = (yield from lend(session, self.values[start:stop])) if sums_last else None
        status = yield from conversation.reserve(
            b"".join(rows.digests[start:stop]),
            b"".join(rows.parents[start:stop]),
            self.sizes[start:stop],
            bytes(_kind_of(rows.namespaces[position]) for position in self.run),
            session.ring is not None and lent is None,
            **(self._provenance() if session.joined.protocol > 1 else {}),
            **({"sums_last": True} if sums_last else {}),
            **({"lent": True} if lent is not None else {}),
        )
        wanted = [position for position, code in zip(self.run, status, strict=True) if code == pb.WANTED]
        stored: Iterator[int] = iter(())
        if wanted:
            frames = (self._frame(position, hashed=not sums_last) for position in wanted)
            way = LentWay(lent) if lent is not None else way_of(conversation, session.ring)
            sending = send_frames(frames, hasher() if sums_last else None, way)
            stored = iter((yield from conversation.put_done(sending, len(wanted))))
        return [put_result(next(stored) if code == pb.WANTED else code) for code in status]

    def _provenance(self) -> dict[str, Any]:
        """The columns of protocol 2: which namespace each key is of, one where all are of one, and from which media."""
        namespaces = self.rows.namespaces[self.run.start : self.run.stop]
        same = namespaces.count(namespaces[0]) == len(namespaces)
        columns: dict[str, Any] = {"namespaces": namespaces[0] if same else b"".join(namespaces)}
        if any(self._media):
            columns["modalities"] = bytes(one.code if one else 0 for one in self._media)
            columns["media_units"] = [one.units if one else 0 for one in self._media]
        return columns

    def _frame(self, position: int, *, hashed: bool) -> Flow[Outgoing]:
        """What to send of a value. With `hashed` its header has the tensors' checksums already."""
        tensors = list(self.values[position].values())
        payloads = [tensor.data.data for tensor in tensors]
        sums = (yield Work(partial(_digests, payloads), self.sizes[position])) if hashed else None
        rows = self.rows
        namespace = described(rows.namespaces[position])
        meta = FrameMeta(
            kind=_kind_of(namespace),
            key=rows.digests[position],
            namespace=namespace,
            parent=rows.parents[position],
            home=rows.homes[position],
            chain_index=rows.indices[position],
            created_ms=self.created_ms,
            expires_ms=self.expires_ms,
            writer=WRITER,
        )
        header = pack_header(meta, specs_of(self.values[position]), sums, self.alignment)
        return Outgoing(header, payloads, self.alignment, self.sizes[position])


def _digests(payloads: Sequence[memoryview]) -> list[bytes]:
    return [xxhash.xxh3_128_digest(payload) for payload in payloads]
