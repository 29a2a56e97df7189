"""What each request without payload means: protobuf in, shard call, protobuf out. No sockets here.

Requests that carry payload (Acquire inline, Reserve) are driven by connection.py; their decisions are here too.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from google.protobuf.message import Message

from mmcache._version import __version__
from mmcache.config import ServerConfig
from mmcache.errors import KeyInputError, MMCacheError
from mmcache.frame import Kind, parse_header
from mmcache.pb import cache_pb2 as pb
from mmcache.server.access import DENIED, Access, Pass
from mmcache.server.admin import Admin
from mmcache.server.caller import LOCAL, Caller
from mmcache.server.nixl import NixlAgent
from mmcache.server.refuse import BadRequest, parse
from mmcache.server.tenants import Tenants
from mmcache.store.answers import Found, Modality, Refusal, pack_media
from mmcache.store.landing import Landing
from mmcache.store.shard import Shard
from mmcache.transport.base import OLDEST_PROTOCOL, PROTOCOL, Op, pack_places

KEY_NBYTES: Final = 32
MAX_RECHECK_KEYS: Final = 64  # each is hashed whole
_KINDS: Final = frozenset(map(int, Kind))
_FOUND, _MISS, _LATER = int(pb.FOUND), int(pb.MISS), int(pb.LATER)
_ONE_FOUND: Final = bytes([_FOUND])
_PUT_STATUS: Final[dict[Refusal, int]] = {
    Refusal.PRESENT: pb.PRESENT,
    Refusal.BUSY: pb.BUSY,
    Refusal.FULL: pb.FULL,
    Refusal.AGAIN: pb.FULL,
    Refusal.TOO_LARGE: pb.TOO_LARGE,
    Refusal.NO_ENTRIES: pb.NO_ENTRIES,
    Refusal.LOST: pb.LOST,
    Refusal.BAD_FRAME: pb.BAD_FRAME,
    Refusal.EXPIRED: pb.EXPIRED,
    Refusal.QUOTA: pb.QUOTA,
    Refusal.STOPPED: pb.STOPPED,
}
_ADMIN_OPS: Final = frozenset({Op.REMOVE, Op.AUDIT})
_MODALITIES: Final = frozenset(map(int, Modality))


def status_of(reason: Refusal | None) -> int:
    """The PutStatus that tells a client why a key was not stored, or, for None, that it was."""
    return pb.STORED if reason is None else _PUT_STATUS[reason]


class Service:
    """Answers requests for one shard. Thread-safe: connections call it concurrently."""

    def __init__(
        self, shard: Shard, config: ServerConfig, access: Access | None = None, tenants: Tenants | None = None
    ) -> None:
        self.shard, self.config, self.access = shard, config, access
        self.server_id = secrets.token_bytes(16)
        self.unix_path = ""
        self.nixl: NixlAgent | None = None
        self.started_at = time.monotonic()
        self.connections = 0
        self.tenants = tenants or (access.tenants if access is not None else Tenants())
        self.admin = Admin(shard, self.tenants, lambda refusal: status_of(refusal))
        self._inflight_nbytes = 0
        self._inflight_lock = threading.Lock()
        self._plain: dict[Op, tuple[Callable[[], Message], Callable[..., Message]]] = {
            Op.DECLARE: (pb.DeclareRequest, self._declare),
            Op.CONTAINS: (pb.ContainsRequest, self._contains),
            Op.FINISH: (pb.FinishRequest, self._finish),
            Op.DELETE: (pb.DeleteRequest, self._delete),
            Op.RECHECK: (pb.RecheckRequest, self._recheck),
            Op.INSPECT: (pb.InspectRequest, self._inspect),
            Op.STAT: (pb.StatRequest, self._stat),
            Op.EXPLAIN: (pb.ExplainRequest, self._explain),
            **self.admin.handlers,
        }

    def handle(self, op: Op, caller: Caller, body: bytes) -> Message:
        """The reply to a request without payload. Raises BadRequest."""
        if op not in self._plain:
            raise BadRequest(f"{op.name} is not a request", pb.ErrorReply.UNSUPPORTED)
        make, answer = self._plain[op]
        request = parse(make(), body)
        if not caller.admin and (op in _ADMIN_OPS or (isinstance(request, pb.ModeRequest) and request.set)):
            raise BadRequest(f"{op.name} needs an admin token; see docs/access.md", pb.ErrorReply.DENIED)
        return answer(caller, request)

    @property
    def mode(self) -> pb.Mode:
        """What is stopped for everybody, as every reply of a data operation says it."""
        return int(self.shard.stopped)  # type: ignore[return-value]

    def admit(self, token: str, common_name: str | None) -> Pass:
        """Who joins with this token ("": without) and this verified certificate (None: without).

        Raises BadRequest, which says the same whatever was wrong.
        """
        if self.access is None:
            return Pass(LOCAL, True, b"", None)
        admitted = self.access.admit(token, common_name)
        if admitted is None:
            raise BadRequest(DENIED, pb.ErrorReply.DENIED)
        return admitted

    def still(self, admitted: Pass) -> bool:
        """Whether who joined with this may go on."""
        return self.access is None or self.access.still(admitted)

    def join_reply(self, request: pb.JoinRequest, *, with_arena: bool) -> pb.JoinReply:
        """What a client is told when it joins. Raises BadRequest for a protocol this release does not speak."""
        if request.protocol < OLDEST_PROTOCOL:
            raise BadRequest(
                f"protocol {request.protocol} is too old; this server speaks {OLDEST_PROTOCOL} to {PROTOCOL}: "
                "upgrade the client",
                pb.ErrorReply.UNSUPPORTED,
            )
        config = self.config
        return pb.JoinReply(
            protocol=min(request.protocol, PROTOCOL),
            server=f"mmcache/{__version__}",
            server_id=self.server_id,
            arena_nbytes=self.shard.arena.nbytes if with_arena else 0,
            arena_prefaulted=config.prefault,
            alignment=config.alignment,
            lease_s=config.lease_s,
            unix_path=self.unix_path,
            limits=pb.Limits(
                batch_keys=config.max_batch_keys,
                inline_nbytes=config.max_batch_nbytes,
            ),
            mode=self.mode,
            sums_last=request.protocol > 1,
        )

    def nixl_offer(self, admitted: Pass) -> pb.NixlOffer:
        """How who joined with this reads the arena by NIXL, which shows it whole, or why not."""
        if self.nixl is None:
            return pb.NixlOffer(why="the server runs without --nixl")
        if not admitted.shared_memory:
            return pb.NixlOffer(why="this client may not see the server's whole memory (docs/access.md)")
        return self.nixl.offer()

    def acquire(self, caller: Caller, body: bytes) -> tuple[pb.AcquireReply, list[Found], bool]:
        """Look up and pin: the reply, the found frames in order, and whether the client wants them inline.

        The lease is in the reply. With inline it does not expire: the caller must release it after sending, so that
        what is being sent stays what it was, however long this process is suspended meanwhile.
        """
        request = parse(pb.AcquireRequest(), body)
        if request.release:
            self.shard.release(caller.tenant, request.release)
        keys = self.split(request.keys)
        lease_id, entries = self.shard.acquire(
            caller.tenant, keys, prefix=request.prefix, max_nbytes=self._limit(request), lasting=request.inline
        )
        try:
            found = [entry for entry in entries if type(entry) is Found]
            if len(found) == len(entries):
                status = _ONE_FOUND * len(found)
            else:
                status = bytes([_FOUND if type(entry) is Found else _LATER if entry else _MISS for entry in entries])
            forks = self.shard.forks(caller.tenant, keys)
            places = pack_places(found)
            reply = pb.AcquireReply(lease_id=lease_id, status=status, places=places, forks=forks, mode=self.mode)
        except BaseException:
            self.shard.release(caller.tenant, lease_id)
            raise
        return reply, found, request.inline

    def _limit(self, request: pb.AcquireRequest) -> int:
        limit = self.config.max_batch_nbytes
        return min(limit, request.max_nbytes) if request.max_nbytes else limit

    def reserve(self, caller: Caller, request: pb.ReserveRequest) -> tuple[bytes, list[Landing]]:
        """Decide on each key of a Reserve: its status bytes, and a landing for each WANTED one, in order."""
        keys, parents = self.split(request.keys), self.split(request.parents)
        sizes = request.frame_nbytes
        if not len(keys) == len(parents) == len(sizes) == len(request.kinds):
            raise BadRequest(
                f"{len(keys)} keys, {len(parents)} parents, {len(sizes)} sizes, {len(request.kinds)} kinds; "
                "send one of each per key"
            )
        namespaces = self._namespaces(request.namespaces, len(keys))
        media = _media(request, len(keys))
        status = bytearray()
        landings: list[Landing] = []
        room = self.config.max_batch_nbytes
        try:
            columns = zip(keys, parents, sizes, request.kinds, namespaces, media, strict=True)
            for key, parent, nbytes, kind, namespace, one in columns:
                if not nbytes or kind not in _KINDS:
                    status.append(pb.BAD_FRAME)
                    continue
                if landings and nbytes > room:
                    status.append(pb.OVERLOADED)
                    continue
                answer = self.shard.reserve(
                    caller.tenant, key, parent, nbytes, kind, namespace, one, sums_last=request.sums_last
                )
                if isinstance(answer, Landing):
                    room -= nbytes
                    landings.append(answer)
                    status.append(pb.WANTED)
                else:
                    status.append(status_of(answer))
        except BaseException:
            for landing in landings:
                landing.abort()
            raise
        return bytes(status), landings

    def forks(self, caller: Caller, request: pb.ReserveRequest) -> bytes:
        """What of a Reserve's keys and their parents are forks, as its reply says."""
        if not self.shard.has_forks:
            return b""
        return self.shard.forks(caller.tenant, self.split(request.parents) + self.split(request.keys))

    def _namespaces(self, column: bytes, count: int) -> list[bytes]:
        """One namespace a key: all the same one, or none that is known."""
        namespaces = self.split(column) or [b""]
        if len(namespaces) == 1:
            return namespaces * count
        if len(namespaces) != count:
            raise BadRequest(f"{len(namespaces)} namespaces for {count} keys; send one of all, or one a key")
        return namespaces

    @contextmanager
    def inflight(self, nbytes: int) -> Iterator[bool]:
        """Account for payload on its way in; yields False, with nothing accounted, when there is too much already.

        A request on its own always fits: what it asks for may be more than the limit, but never forbidden for ever.
        """
        with self._inflight_lock:
            in_flight = self._inflight_nbytes
            fits = not in_flight or in_flight + nbytes <= self.config.max_inflight_nbytes
            if fits:
                self._inflight_nbytes += nbytes
        try:
            yield fits
        finally:
            if fits:
                with self._inflight_lock:
                    self._inflight_nbytes -= nbytes

    def lent(self, nbytes: int) -> None:
        """So many bytes came out of lent memory."""
        with self.shard.lock:
            self.shard.counters["bytes_lent"] += nbytes

    def split(self, column: bytes) -> list[bytes]:
        """A column of 32-byte keys as a list. Raises BadRequest for another length or too many."""
        if len(column) % KEY_NBYTES:
            raise BadRequest(
                f"a key column of {len(column)} bytes is not a multiple of {KEY_NBYTES}; keys have 32 bytes"
            )
        if len(column) > self.config.max_batch_keys * KEY_NBYTES:
            raise BadRequest(
                f"{len(column) // KEY_NBYTES} keys in one batch; the limit is {self.config.max_batch_keys}: split it",
                pb.ErrorReply.LIMIT,
            )
        return [column[start : start + KEY_NBYTES] for start in range(0, len(column), KEY_NBYTES)]

    def _declare(self, caller: Caller, request: pb.DeclareRequest) -> Message:
        try:
            self.shard.declare(caller.tenant, request.namespace, request.kind, request.facts)
        except KeyInputError as error:
            raise BadRequest(str(error)) from None
        return pb.DeclareReply()

    def _contains(self, caller: Caller, request: pb.ContainsRequest) -> Message:
        keys = self.split(request.keys)
        present = self.shard.contains(caller.tenant, keys, prefix=request.prefix)
        return pb.ContainsReply(present=bytes(present), forks=self.shard.forks(caller.tenant, keys), mode=self.mode)

    def _finish(self, caller: Caller, request: pb.FinishRequest) -> Message:
        return pb.FinishReply(held=self.shard.release(caller.tenant, request.lease_id))

    def _delete(self, caller: Caller, request: pb.DeleteRequest) -> Message:
        return pb.DeleteReply(deleted=bytes(self.shard.delete(caller.tenant, self.split(request.keys))))

    def _recheck(self, caller: Caller, request: pb.RecheckRequest) -> Message:
        keys = self.split(request.keys)
        if len(keys) > MAX_RECHECK_KEYS:
            raise BadRequest(f"{len(keys)} keys to recheck; the limit is {MAX_RECHECK_KEYS}", pb.ErrorReply.LIMIT)
        return pb.RecheckReply(dropped=bytes(bool(self.shard.recheck(caller.tenant, key)) for key in keys))

    def _explain(self, caller: Caller, request: pb.ExplainRequest) -> Message:
        return self.admin.explain(caller, self.split(request.keys))

    def _inspect(self, caller: Caller, request: pb.InspectRequest) -> Message:
        keys = self.split(request.key)
        if len(keys) != 1:
            raise BadRequest("inspect takes one key")
        lease_id, (found,) = self.shard.acquire(caller.tenant, keys, counts=False)
        if not isinstance(found, Found):
            return pb.InspectReply(found=False)
        try:
            header = bytes(self.shard.view(found)[: found.header_nbytes])
        finally:
            self.shard.release(caller.tenant, lease_id)
        try:
            declared = self.shard.declared(
                caller.tenant, parse_header(header, limit_nbytes=found.nbytes).meta.namespace
            )
        except MMCacheError:
            declared = None
        return pb.InspectReply(
            found=True,
            header=header,
            kind=declared.kind if declared else "",
            facts=dict(declared.facts) if declared else {},
        )

    def counters(self) -> dict[str, int]:
        """Every number that is counted, by name: see mmcache.metrics."""
        return {**self.shard.stat(), "inflight_bytes": self._inflight_nbytes, "connections": self.connections}

    def _stat(self, caller: Caller, request: pb.StatRequest) -> Message:
        return pb.StatReply(
            counters=self.counters() if caller.admin else self.shard.stat_of(caller.tenant),
            server=f"mmcache/{__version__}",
            server_id=self.server_id,
            uptime_s=time.monotonic() - self.started_at,
        )


def _media(request: pb.ReserveRequest, count: int) -> list[int]:
    """One `pack_media` a key, from the columns that say what each was computed from, if they are there."""
    if not request.modalities and not request.media_units:
        return [0] * count
    if not len(request.modalities) == len(request.media_units) == count:
        sizes = f"{len(request.modalities)} modalities and {len(request.media_units)} amounts"
        raise BadRequest(f"{sizes} for {count} keys; send one of each a key, or none")
    if not _MODALITIES.issuperset(request.modalities):
        raise BadRequest(f"modality {max(request.modalities)} is unknown to this release")
    return [pack_media(*one) for one in zip(request.modalities, request.media_units, strict=True)]
