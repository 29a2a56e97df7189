"""What a joined connection knows, whoever drives it: limits, the arena's map, the write ring. And Join, as a flow."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from mmcache._version import __version__
from mmcache.client.protocol import (
    RIDER_NBYTES,
    Acquired,
    Conversation,
    Flow,
    Recv,
    RecvWithFds,
    Send,
    SendWithFds,
    Work,
    refusal_of,
)
from mmcache.errors import ProtocolError, TransportError
from mmcache.frame import layout_of
from mmcache.keyset import NamespaceId
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import MAX_BODY_NBYTES, OLDEST_PROTOCOL, PRELUDE_NBYTES, PROTOCOL, Op, parse_prelude
from mmcache.transport.lent import Lendable
from mmcache.transport.nixl import Reader, RemoteArena
from mmcache.transport.shm import ArenaMap, Ring
from mmcache.transport.tcp import close_fds

E = TypeVar("E")
T = TypeVar("T")
FAREWELL_S: Final = 0.1
NIXL_AGAIN_S: Final = 5.0


class Wire(Protocol):
    """What a session asks of its channel itself."""

    @property
    def is_unix(self) -> bool:
        """True for a unix socket."""

    @property
    def is_tls(self) -> bool:
        """True where what is sent is encrypted."""

    @property
    def is_loopback(self) -> bool:
        """True if the peer is on this host's loopback interface."""

    def close(self) -> None:
        """Close this end."""


class Joined(NamedTuple):
    """What Join gave: the server's reply; with shared memory the arena's map and the ring; with NIXL the way to read
    the arena, or why there is none."""

    reply: pb.JoinReply
    arena: ArenaMap | None
    ring: Ring | None
    reader: Reader | None = None
    no_reader: str = ""


class Session:
    """A channel after Join. One call at a time; when anything goes wrong in it, it is closed and never used again."""

    rpc: Callable[[str, bytes], bytes] | None = None  # over gRPC: calls a method with a body, for its reply's

    def __init__(self, channel: Wire, joined: Joined) -> None:
        self.channel = channel
        self.joined, self.arena, self.ring, self.reader, self.no_reader = joined
        self.deadline = 0.0  # of the call under way
        self.why = ""  # it goes by this path and no faster one, in words
        # On monotonic time. One that was to read by NIXL makes room for another that might.
        self.good_until = time.monotonic() + NIXL_AGAIN_S if self.no_reader else math.inf
        self.conversation = Conversation()
        self.declared: set[NamespaceId] = set()
        self.lent: weakref.WeakKeyDictionary[Lendable, int] = weakref.WeakKeyDictionary()  # to the server -> its number
        self.refused: weakref.WeakSet[Lendable] = weakref.WeakSet()  # it could not map these
        self.kept = False  # used before: the server may have gone away since

    def release(self, acquired: Acquired) -> Flow[None]:
        """Give a lease back whose answer nobody needs: now, or, if it pins little, with the next Acquire.

        Should none come, it ends when it expires.
        """
        conversation = self.conversation
        if not conversation.rider and sum(found.nbytes for found in acquired.entries if found) <= RIDER_NBYTES:
            conversation.rider = acquired.lease_id
        else:
            yield from conversation.release_quietly(acquired.lease_id)

    @property
    def path(self) -> str:
        """How the bytes that are read travel: shm, nixl, unix, tls or tcp."""
        if self.arena is not None:
            return "shm"
        if self.reader is not None:
            return "nixl"
        if self.channel.is_tls:
            return "tls"
        return "unix" if self.channel.is_unix else "tcp"

    def close(self) -> None:
        """Close this process's end, and let go of the ring: whoever still holds the link in a traceback holds less."""
        self.ring = None
        if self.reader is not None:
            self.reader.close()
        self.channel.close()


def drive(flow: Generator[E, Any, T], perform: Callable[[E], Any]) -> T:
    """Perform every effect of a flow; what goes wrong is the flow's to hear first. Returns what it returns."""
    try:
        effect = next(flow)
        while True:
            try:
                answer = perform(effect)
            except BaseException as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


class NoSharedMemory(TransportError):
    """The server lets this client in, but not into its memory."""


def join(*, shared: bool, nixl_by: float | None = None, known: ArenaMap | None = None, token: str = "") -> Flow[Joined]:
    """Join over a fresh channel; with `shared` (unix sockets only), map the arena and offer a ring; with `nixl_by`, a
    deadline, get ready to read it by NIXL, if that can be.

    `known` is the map that there is already: where the server hands over the same file, also one that was started again
    on it, it stays, so that a process maps each arena once. Raises TransportError: close the channel then.
    """
    ring: Ring | None = None
    fds: list[int] = []
    try:
        request = pb.JoinRequest(protocol=PROTOCOL, client=f"mmcache-python/{__version__}", token=token)
        request.want_nixl = nixl_by is not None
        if shared:
            try:
                ring = Ring()
            except TransportError as error:
                raise NoSharedMemory(f"this process cannot have any: {error}") from error
            request.want_arena = True
            request.ring_slots, request.ring_slot_nbytes = ring.slots, ring.slot_nbytes
        message = Conversation().request(Op.JOIN, request)
        with contextlib.suppress(TransportError):  # a server that refuses at once may have hung up already: hear why
            yield Send((message,)) if ring is None else SendWithFds(message, [ring.fd])
        if ring is None:
            head = yield Recv(PRELUDE_NBYTES)
        else:
            head, fds = yield RecvWithFds(PRELUDE_NBYTES)
        reply = yield from _read_join(head)
        arena = None
        if reply.arena_nbytes and fds:
            if known is not None and known.is_of(fds[0]):
                arena = known
            else:

                def map_arena() -> ArenaMap:
                    return ArenaMap(fds.pop(), reply.arena_nbytes, populate=reply.arena_prefaulted)

                arena = yield Work(map_arena, reply.arena_nbytes if reply.arena_prefaulted else 0)
        if shared and arena is None:
            if reply.arena_nbytes:
                raise NoSharedMemory("the server's memory was offered, but did not come through its unix socket")
            raise NoSharedMemory(reply.no_arena_why or "the server does not share its memory with this client")
        if nixl_by is None:
            return Joined(reply, arena, ring)
        return Joined(reply, arena, ring, *(yield Work(partial(_reader, reply, nixl_by), 0, waits=True)))
    finally:
        close_fds(fds)
        if ring is not None:
            ring.close_fd()


def _reader(reply: pb.JoinReply, deadline: float) -> tuple[Reader | None, str]:
    offer = reply.nixl
    if not offer.metadata:
        return None, offer.why or "the server is an older release and does not offer NIXL"
    try:
        return Reader(RemoteArena(offer.metadata, offer.base, offer.nbytes), deadline), ""
    except TransportError as error:
        return None, str(error)


def _read_join(head: bytes) -> Flow[pb.JoinReply]:
    prelude = parse_prelude(head, MAX_BODY_NBYTES)
    body = (yield Recv(prelude.body_nbytes)) if prelude.body_nbytes else b""
    try:
        if prelude.op == Op.ERROR:
            raise refusal_of(pb.ErrorReply.FromString(body))
        if prelude.op != Op.JOIN:
            raise ProtocolError(f"the server answered {prelude.op.name} to JOIN")
        reply = pb.JoinReply.FromString(body)
        layout_of([], reply.alignment)
        if (
            not OLDEST_PROTOCOL <= reply.protocol <= PROTOCOL
            or not reply.limits.batch_keys
            or not reply.limits.inline_nbytes
        ):
            raise ProtocolError(f"the server's Join reply makes no sense: protocol {reply.protocol}, {reply.limits}")
        return reply
    except TransportError:
        raise
    except Exception as error:
        raise ProtocolError(f"the server's Join reply cannot be read: {error}") from None
