"""One joined connection to a shard: it drives the protocol's flows over a blocking socket, with a deadline.

A link belongs to one process and one thread at a time. When anything goes wrong in it, it is closed and never used
again; the next call opens another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from mmcache._version import __version__
from mmcache.client.protocol import RIDER_NBYTES, Acquired, Conversation, Effect, Flow, Recv, Send
from mmcache.config import ClientConfig
from mmcache.errors import ProtocolError, RequestRefused, TransportError
from mmcache.frame import layout_of
from mmcache.keyset import NamespaceId
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import MAX_BODY_NBYTES, PRELUDE_NBYTES, PROTOCOL, Op, parse_prelude
from mmcache.transport.shm import ArenaMap, Ring
from mmcache.transport.tcp import Channel, close_fds, connect_tcp, connect_unix, resolve

T = TypeVar("T")
FAREWELL_S: Final = 0.1
LEASE_PER_DEADLINE: Final = 4  # a lease should outlive the call that took it by far
log = logging.getLogger("mmcache.client")
Dial = Callable[[float], Channel]


class Link:
    """A channel after Join: limits, and with shared memory the arena's map and a write ring."""

    def __init__(self, channel: Channel, joined: pb.JoinReply, arena: ArenaMap | None, ring: Ring | None) -> None:
        self.channel, self.joined, self.arena, self.ring = channel, joined, arena, ring
        self.conversation = Conversation()
        self.declared: set[NamespaceId] = set()
        self.kept = False  # used before: the server may have gone away since

    def run(self, flow: Flow[T], deadline: float) -> T:
        """Perform a flow to its end. Raises TransportError; the link is unusable then, unless it is RequestRefused."""
        channel = self.channel
        try:
            effect: Effect = next(flow)
            while True:
                answer = None
                if isinstance(effect, Send):
                    channel.send(effect.buffers, deadline)
                elif isinstance(effect, Recv):
                    answer = channel.recv(effect.nbytes, deadline)
                else:
                    channel.recv_into(effect.views, deadline)
                effect = flow.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def release(self, acquired: Acquired, deadline: float) -> None:
        """Give a lease back whose answer nobody needs: now, or, if it pins little, with the next Acquire.

        Should none come, it ends when it expires.
        """
        conversation = self.conversation
        if not conversation.rider and sum(found.nbytes for found in acquired.entries if found) <= RIDER_NBYTES:
            conversation.rider = acquired.lease_id
        else:
            self.run(conversation.release_quietly(acquired.lease_id), deadline)

    @property
    def path(self) -> str:
        """How the bytes travel: shm, unix or tcp."""
        if self.arena is not None:
            return "shm"
        return "unix" if self.channel.is_unix else "tcp"

    def close(self) -> None:
        """Close this process's end."""
        self.channel.close()

    def say_goodbye(self) -> None:
        """Give back what is still held, as far as that goes, before a close."""
        if self.conversation.rider:
            with contextlib.suppress(TransportError):
                flow = self.conversation.release_quietly(self.conversation.rider)
                self.run(flow, time.monotonic() + FAREWELL_S)


def join(channel: Channel, deadline: float, *, shared: bool, known: tuple[bytes, ArenaMap] | None = None) -> Link:
    """Join over a fresh channel; with `shared` (unix sockets only), map the arena and offer a ring.

    `known` is a server id with the map of its arena, so that a process maps each arena once. Raises TransportError
    and closes the channel.
    """
    ring: Ring | None = None
    fds: list[int] = []
    try:
        request = pb.JoinRequest(protocol=PROTOCOL, client=f"mmcache-python/{__version__}")
        if shared:
            ring = Ring()
            request.want_arena = True
            request.ring_slots, request.ring_slot_nbytes = ring.slots, ring.slot_nbytes
        message = Conversation().request(Op.JOIN, request)
        with contextlib.suppress(TransportError):  # a server that refuses at once may have hung up already: hear why
            if ring is not None:
                channel.send_with_fds(message, [ring.fd], deadline)
            else:
                channel.send([message], deadline)
        if ring is not None:
            head, fds = channel.recv_with_fds(PRELUDE_NBYTES, deadline)
        else:
            head = channel.recv(PRELUDE_NBYTES, deadline)
        reply = _read_join(channel, head, deadline)
        arena = None
        if reply.arena_nbytes and fds:
            if known is not None and known[0] == reply.server_id:
                arena = known[1]
            else:
                arena = ArenaMap(fds.pop(), reply.arena_nbytes, populate=reply.arena_prefaulted)
        if shared and arena is None:
            raise TransportError("the server offered no shared memory on its unix socket; use transport=tcp")
        return Link(channel, reply, arena, ring)
    except BaseException:
        channel.close()
        raise
    finally:
        close_fds(fds)
        if ring is not None:
            ring.close_fd()


def _read_join(channel: Channel, head: bytes, deadline: float) -> pb.JoinReply:
    prelude = parse_prelude(head, MAX_BODY_NBYTES)
    body = channel.recv(prelude.body_nbytes, deadline) if prelude.body_nbytes else b""
    try:
        if prelude.op == Op.ERROR:
            raise RequestRefused(pb.ErrorReply.FromString(body).message)
        if prelude.op != Op.JOIN:
            raise ProtocolError(f"the server answered {prelude.op.name} to JOIN")
        reply = pb.JoinReply.FromString(body)
        layout_of([], reply.alignment)
        if reply.protocol != PROTOCOL or not reply.limits.batch_keys or not reply.limits.inline_nbytes:
            raise ProtocolError(f"the server's Join reply makes no sense: protocol {reply.protocol}, {reply.limits}")
        return reply
    except TransportError:
        raise
    except Exception as error:
        raise ProtocolError(f"the server's Join reply cannot be read: {error}") from None


class Dialer:
    """Opens links for one server by the best path the settings allow, and remembers what it learnt."""

    def __init__(self, config: ClientConfig, attach: Callable[[], Channel] | None = None) -> None:
        self.config = config
        self._attach = attach
        self._arena: tuple[bytes, ArenaMap] | None = None
        self._unix_path = ""
        self._addresses: list[tuple[int, tuple[Any, ...]]] = []
        self._warned = False

    @property
    def arena(self) -> ArenaMap | None:
        """The map of the server's memory that its links use, None where they have none."""
        return self._arena[1] if self._arena is not None else None

    def forget_arena(self) -> None:
        """Hold the map no longer: it goes with the last link or view that uses it, not when this is collected."""
        self._arena = None

    def open(self, deadline: float) -> Link:
        """A joined link. Raises TransportError when no path works."""
        config = self.config
        shared = config.transport != "tcp"
        if self._attach is not None:
            return self._join(self._attach(), deadline, shared=shared)
        if config.scheme == "mmcache+unix":
            return self._join(connect_unix(config.path, config.connect_s, deadline), deadline, shared=shared)
        if shared and self._unix_path:
            link = self._try_unix(self._unix_path, deadline, None)
            if link is not None:
                return link
        link = self._join(self._connect_tcp(deadline), deadline, shared=False)
        if not shared:
            return link
        path = link.joined.unix_path if link.channel.is_loopback else ""
        faster = self._try_unix(path, deadline, link.joined.server_id) if path else None
        if faster is None:
            if config.transport == "shm":
                link.close()
                trouble = f"unix socket {path} cannot be used from here" if path else "unix socket is off or elsewhere"
                raise TransportError(f"the server's {trouble}; use transport=tcp")
            return link
        link.close()
        return faster

    def _connect_tcp(self, deadline: float) -> Channel:
        """Connect to the addresses found last time; after a failure the name is resolved anew."""
        config = self.config
        addresses = self._addresses or resolve(config.host, config.port, deadline)
        self._addresses = []
        channel = connect_tcp(addresses, config.connect_s, deadline)
        self._addresses = addresses
        return channel

    def _try_unix(self, path: str, deadline: float, server_id: bytes | None) -> Link | None:
        """A shared-memory link by a path the server named, or None. The server there must be the same one."""
        try:
            if not os.access(path, os.R_OK | os.W_OK):
                raise TransportError(f"{path} is not reachable")
            link = self._join(connect_unix(path, self.config.connect_s, deadline), deadline, shared=True)
        except TransportError:
            self._unix_path = ""
            return None
        if server_id is not None and link.joined.server_id != server_id:
            link.close()
            return None
        self._unix_path = path
        return link

    def _join(self, channel: Channel, deadline: float, *, shared: bool) -> Link:
        link = join(channel, deadline, shared=shared, known=self._arena)
        if link.joined.lease_s < LEASE_PER_DEADLINE * self.config.deadline_s and not self._warned:
            self._warned = True
            log.warning(
                "the server's leases last %g s, less than %d calls of deadline_s=%g: slow reads may lose theirs and "
                "count as misses; raise serve --lease-s or lower deadline_s",
                link.joined.lease_s,
                LEASE_PER_DEADLINE,
                self.config.deadline_s,
            )
        if link.arena is not None:
            self._arena = (link.joined.server_id, link.arena)
        return link
