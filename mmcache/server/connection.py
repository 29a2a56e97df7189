"""One connection's thread: read a message, have the service answer it, move the payload. Never trusts a length.

A client that breaks the rules, stops mid-message or goes away costs only its own connection: what it was writing is
aborted, and its leases end when they expire.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import Message

from mmcache.errors import MMCacheError, ProtocolError, TransportError
from mmcache.frame import SUM_NBYTES
from mmcache.pb import cache_pb2 as pb
from mmcache.server.access import DENIED, Pass
from mmcache.server.caller import LOCAL
from mmcache.server.incoming import LentStream, RingStream, SocketStream
from mmcache.server.refuse import BadRequest, parse
from mmcache.server.service import Service, status_of
from mmcache.store.landing import Landing
from mmcache.transport.base import (
    LENT_MEMORIES,
    MAGIC,
    PRELUDE_NBYTES,
    PROTOCOL,
    Op,
    Prelude,
    is_http,
    pack_prelude,
    parse_prelude,
)
from mmcache.transport.lent import LentView, view_lent
from mmcache.transport.shm import RingView
from mmcache.transport.tcp import SPIN_S, Channel, close_fds
from mmcache.transport.tls import HANDSHAKE_START, PeerCertificate, TlsChannel, first_bytes

log = logging.getLogger("mmcache.server")
MAX_SPINNING: Final = 4  # with more connections than this, none waits awake for its next request
SLOWEST_NBYTES_PER_S: Final = 4 << 20  # slower payload, either way, is not waited for: it holds memory
MAX_JOIN_NBYTES: Final = 64 << 10  # of strangers nothing large is read
LINGER_S: Final = 1.0  # how long a peer that broke the rules may take to read why
_STATUS_V1: Final = bytes(pb.OVERLOADED if code in (pb.QUOTA, pb.STOPPED) else code for code in range(256))
_HTTP_TEXT = b"This port speaks mmcache's framed protocol, not HTTP. Connect with mmcache://HOST:PORT.\n"
_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
    % (len(_HTTP_TEXT), _HTTP_TEXT)
)


def pack_error(request_id: int, code: int, message: str) -> bytes:
    """A whole ERROR message; request id 0: about the connection."""
    body = pb.ErrorReply(code=code, message=message).SerializeToString()  # type: ignore[arg-type]
    return pack_prelude(Op.ERROR, request_id, len(body)) + body


class Connection:
    """Serves one client until it leaves, misbehaves, or the server drains."""

    def __init__(
        self, channel: Channel, service: Service, *, same_host: bool, tls: ssl.SSLContext | None = None
    ) -> None:
        self.channel, self.service, self._tls = channel, service, tls
        self.same_host, self.caller = same_host, LOCAL
        self.admitted: Pass | None = None  # what it came in with, once it has joined
        self.certificate: PeerCertificate | None = None
        self._join_by = self._deadline()
        self._protocol = PROTOCOL
        self.idle = True
        self._ring: RingView | None = None
        self._lent: dict[int, LentView] = {}
        self._may_lend = False
        self._joined = False

    @property
    def is_stranger(self) -> bool:
        """True until it has said who it is, where that is asked."""
        return not self._joined and (self._tls is not None or self.service.access is not None)

    def serve(self) -> None:
        """Answer messages until the connection ends. Raises nothing."""
        try:
            if self._tls is not None:
                self._begin_tls(self._tls)
            while True:
                self.idle = True
                head, fds = self._receive_head()
                self.idle = False
                try:
                    self._serve_one(head, fds)
                finally:
                    close_fds(fds)
        except ProtocolError as error:
            self._complain(error)
        except TransportError as error:
            log.debug("connection ended: %s", error)
        except Exception:
            log.exception("connection dropped after an internal error")
        finally:
            self.channel.close()

    def _deadline(self, payload_nbytes: int = 0) -> float:
        return time.monotonic() + self.service.config.io_timeout_s + payload_nbytes / SLOWEST_NBYTES_PER_S

    def _begin_tls(self, context: ssl.SSLContext) -> None:
        start = first_bytes(self.channel, len(MAGIC), self._join_by)
        if is_http(start):
            self._last_words(_HTTP_ANSWER)
            raise TransportError("an HTTP client")
        if start[:1] != HANDSHAKE_START:
            raise ProtocolError("this port speaks TLS; use mmcaches://HOST:PORT, with ?ca=PATH for a CA of your own")
        channel = TlsChannel(self.channel, context, None)
        self.channel = channel
        channel.handshake(self._join_by)
        self.certificate = channel.certificate

    def _receive_head(self) -> tuple[bytes, list[int]]:
        """The next prelude. After Join its first byte may take as long as it likes; nothing else may."""
        if not self._joined:
            if self.same_host:
                return self.channel.recv_with_fds(PRELUDE_NBYTES, self._join_by)
            deadline = self._join_by
            start = self.channel.recv(len(MAGIC), deadline)
            if is_http(start):  # such a request may be shorter than a prelude
                self._last_words(_HTTP_ANSWER)
                raise TransportError("an HTTP client")
            return start + self.channel.recv(PRELUDE_NBYTES - len(MAGIC), deadline), []
        self.channel.spin_s = SPIN_S if self.service.connections <= MAX_SPINNING else 0.0
        self.channel.wait_message()
        return self.channel.recv(PRELUDE_NBYTES, self._deadline()), []

    def _serve_one(self, head: bytes, fds: list[int]) -> None:
        limit = self.service.config.max_body_nbytes
        if self.is_stranger:
            limit = min(limit, MAX_JOIN_NBYTES)
        prelude = parse_prelude(head, limit)
        if not prelude.request_id and prelude.op != Op.FINISH:
            raise ProtocolError(f"{prelude.op.name} with request id 0; only FINISH may go without an answer")
        if prelude.payload_nbytes:
            raise ProtocolError(f"{prelude.op.name} announces payload; it follows only after the server's answer")
        deadline = self._deadline() if self._joined else self._join_by
        body = self.channel.recv(prelude.body_nbytes, deadline) if prelude.body_nbytes else b""
        try:
            if prelude.op == Op.JOIN and not self._joined:
                self._join(prelude, body, fds)
            elif self._joined == (prelude.op == Op.JOIN):
                raise BadRequest("JOIN must be the first message of a connection, and comes once")
            elif prelude.op == Op.ACQUIRE:
                self._acquire(prelude, body)
            elif prelude.op == Op.RESERVE:
                self._put(prelude, body)
            elif prelude.op == Op.LEND:
                self._borrow(prelude, body)
            else:
                reply = self.service.handle(prelude.op, self.caller, body)
                if prelude.request_id:
                    self._reply(prelude, reply)
        except BadRequest as error:
            if not prelude.request_id:
                raise ProtocolError(str(error)) from None
            if error.code == pb.ErrorReply.DENIED and not self._joined:
                self._last_words(pack_error(prelude.request_id, error.code, str(error)))
                raise TransportError("access denied") from None
            self._error(prelude.request_id, error.code, str(error))

    def _reply(
        self,
        prelude: Prelude,
        message: Message,
        payload: Sequence[memoryview] = (),
        op: Op | None = None,
    ) -> None:
        body = message.SerializeToString()
        payload_nbytes = sum(map(len, payload)) if payload else 0
        head = pack_prelude(op or prelude.op, prelude.request_id, len(body), payload_nbytes) + body
        self.channel.send([head, *payload], self._deadline(payload_nbytes))

    def _error(self, request_id: int, code: int, message: str) -> None:
        self.channel.send([pack_error(request_id, code, message)], self._deadline())

    def _complain(self, error: ProtocolError) -> None:
        log.info("connection dropped: %s", error)
        self._last_words(pack_error(0, pb.ErrorReply.BAD_REQUEST, str(error)))

    def _last_words(self, data: bytes) -> None:
        try:
            self.channel.send([data], self._deadline())
            self.channel.linger(time.monotonic() + LINGER_S)
        except MMCacheError:
            log.debug("the peer left before the complaint")

    def _join(self, prelude: Prelude, body: bytes, fds: list[int]) -> None:
        request = parse(pb.JoinRequest(), body)
        admitted = self.service.admit(request.token, self.certificate.common_name if self.certificate else None)
        if request.ring_slots:
            if len(fds) != 1:
                raise BadRequest("a ring was announced without its one file descriptor")
            try:
                self._ring = RingView(fds.pop(), request.ring_slots, request.ring_slot_nbytes)
            except TransportError as error:
                raise BadRequest(str(error)) from None
        why_not = self._why_no_arena(admitted)
        with_arena = self.same_host and request.want_arena and not why_not
        reply = self.service.join_reply(request, with_arena=with_arena)
        if request.want_arena and request.protocol > 1:
            reply.no_arena_why = why_not
        reply.lends = self._may_lend = self._ring is not None and admitted.shared_memory
        if request.want_nixl:
            reply.nixl.CopyFrom(self.service.nixl_offer(admitted))
        reads_memory = with_arena or bool(reply.nixl.metadata)
        self.admitted, self.caller = admitted._replace(shared_memory=reads_memory), admitted.caller
        if not self.service.still(self.admitted):  # revoked just now, before it could be seen here
            raise BadRequest(DENIED, pb.ErrorReply.DENIED)
        self._joined, self._protocol = True, reply.protocol
        if not with_arena:
            self._reply(prelude, reply)
            return
        answer = reply.SerializeToString()
        head = pack_prelude(Op.JOIN, prelude.request_id, len(answer)) + answer
        self.channel.send_with_fds(head, [self.service.shard.arena.fd], self._deadline())

    def _why_no_arena(self, admitted: Pass) -> str:
        if why := self.service.shard.arena.why_not_shared:
            return f"the server's memory cannot be shared ({why})"
        if not admitted.shared_memory:
            return "the server does not share its memory with this client's tenant (docs/access.md)"
        return ""

    def _borrow(self, prelude: Prelude, body: bytes) -> None:
        """Map memory that the client lends: its descriptor comes after a first reply, as nothing else reads for one."""
        request = parse(pb.LendRequest(), body)
        if not self._may_lend or request.number >= LENT_MEMORIES:
            raise BadRequest(f"memory {request.number} cannot be lent over this connection; see Join's reply")
        self._reply(prelude, pb.LendReply())
        _, fds = self.channel.recv_with_fds(1, self._deadline())
        why = ""
        try:
            if len(fds) != 1:
                raise ProtocolError("memory was lent without its one file descriptor")
            self._lent.pop(request.number, None)
            self._lent[request.number] = view_lent(fds.pop(), request.nbytes)
        except ProtocolError:
            raise
        except TransportError as error:
            why = str(error)
        finally:
            close_fds(fds)
        self._reply(prelude, pb.LendReply(why=why))

    def _acquire(self, prelude: Prelude, body: bytes) -> None:
        reply, found, inline = self.service.acquire(self.caller, body)
        if not inline:
            self._reply(prelude, reply)
            self.service.shard.tell_uses()
            return
        lease_id, reply.lease_id = reply.lease_id, 0
        try:
            self._reply(prelude, reply, [self.service.shard.view(entry) for entry in found])
        finally:
            if lease_id:
                self.service.shard.release(self.caller.tenant, lease_id)
            self.service.shard.tell_uses()

    def _put(self, prelude: Prelude, body: bytes) -> None:
        request = parse(pb.ReserveRequest(), body)
        if request.ring and self._ring is None:
            raise BadRequest("the payload is to come through a ring, but this connection has none")
        if request.lent and not (self._lent and request.sums_last):
            raise BadRequest(
                "the payload is to come out of lent memory, but none was lent, or checksums do not come last"
            )
        status, landings = self.service.reserve(self.caller, request)
        try:
            with self.service.inflight(sum(landing.left_nbytes for landing in landings)) as fits:
                if not fits:
                    status = status.replace(bytes([pb.WANTED]), bytes([pb.OVERLOADED]))
                mode = self.service.mode
                forks = self.service.forks(self.caller, request)
                self._reply(prelude, pb.ReserveReply(status=self._known(status), forks=forks, mode=mode))
                if fits and landings:
                    results = self._receive_frames(landings, request)
                    self._reply(prelude, pb.PutReply(status=self._known(results), mode=mode), op=Op.PUT_DONE)
        finally:
            for landing in landings:
                landing.abort()

    def _known(self, status: bytes) -> bytes:
        """Put statuses as the peer's protocol knows them."""
        return status.translate(_STATUS_V1) if self._protocol == 1 else status

    def _receive_frames(self, landings: Sequence[Landing], request: pb.ReserveRequest) -> bytes:
        """Have all frames land, and then commit; a PutStatus each."""
        deadline = self._deadline(sum(landing.left_nbytes for landing in landings))
        stream: RingStream | LentStream | SocketStream
        if request.lent:
            stream = LentStream(self.channel, self._lent, self._deadline, deadline)
        elif request.ring and self._ring is not None:
            stream = RingStream(self.channel, self._ring, self._deadline, deadline)
        else:
            stream = SocketStream(self.channel, self._deadline, deadline)
        for landing in landings:
            while landing.left_nbytes:
                stream.land(landing)
            if request.sums_last:
                landing.seal(stream.take(SUM_NBYTES))
        stream.end()
        if isinstance(stream, LentStream):
            self.service.lent(stream.lent_nbytes)
        return bytes([status_of(landing.commit()) for landing in landings])
