"""One joined connection to a shard, over a blocking socket: it drives the protocol's flows, with a deadline.

A link belongs to one process and one thread at a time. When anything goes wrong in it, it is closed and never used
again; the next call opens another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from mmcache.client.credentials import Credentials
from mmcache.client.dial import Dial, Route
from mmcache.client.protocol import Effect, Flow, Recv, RecvInto, Send, SendWithFds, Work
from mmcache.client.session import FAREWELL_S, Joined, Session, drive, join
from mmcache.config import ClientConfig
from mmcache.errors import TransportError
from mmcache.transport.resolve import resolve
from mmcache.transport.shm import ArenaMap
from mmcache.transport.tcp import Channel, connect_tcp, connect_unix

T = TypeVar("T")


def run(channel: Channel, flow: Flow[T], deadline: float) -> T:
    """Perform a flow to its end; what goes wrong is the flow's to hear first. Raises TransportError: the channel is
    unusable then, unless it is RequestRefused."""
    try:
        effect: Effect = next(flow)
        while True:
            answer: Any = None
            try:
                if isinstance(effect, Send):
                    channel.send(effect.buffers, deadline)
                elif isinstance(effect, Recv):
                    answer = channel.recv(effect.nbytes, deadline)
                elif isinstance(effect, RecvInto):
                    channel.recv_into(effect.views, deadline)
                elif isinstance(effect, Work):
                    answer = effect.call()
                elif isinstance(effect, SendWithFds):
                    channel.send_with_fds(effect.data, effect.fds, deadline)
                else:
                    answer = channel.recv_with_fds(effect.nbytes, deadline)
            except BaseException as error:
                effect = flow.throw(error)
            else:
                effect = flow.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


class Link(Session):
    """A session that a thread waits for."""

    def run(self, flow: Flow[T], deadline: float) -> T:
        """Perform a flow to its end. Raises TransportError; the link is unusable then, unless it is RequestRefused."""
        raise NotImplementedError

    def say_goodbye(self) -> None:
        """Give back what is still held, as far as that goes, before a close."""


class SocketLink(Link):
    """A session over a blocking channel."""

    channel: Channel

    def __init__(self, channel: Channel, joined: Joined) -> None:
        super().__init__(channel, joined)

    def run(self, flow: Flow[T], deadline: float) -> T:
        """As `Link.run`."""
        self.deadline = deadline
        return run(self.channel, flow, deadline)

    def say_goodbye(self) -> None:
        """As `Link.say_goodbye`."""
        if self.conversation.rider:
            with contextlib.suppress(TransportError):
                flow = self.conversation.release_quietly(self.conversation.rider)
                self.run(flow, time.monotonic() + FAREWELL_S)


class Dials(Protocol):
    """What a client asks of what opens its links."""

    @property
    def arena(self) -> ArenaMap | None:
        """The map of the server's memory that its links use, None where they have none."""

    def forget_arena(self) -> None:
        """Hold the map no longer."""

    def open(self, deadline: float) -> Link:
        """A joined link. Raises TransportError."""


class Dialer:
    """Opens links for one server by the best path the settings allow, and remembers what it learnt."""

    def __init__(self, config: ClientConfig, attach: Callable[[], Channel] | None = None) -> None:
        self.config = config
        self._credentials = Credentials(config)
        self._attach = attach
        self._route: Route[SocketLink] = Route(config, attached=attach is not None)
        self._addresses: list[tuple[int, tuple[Any, ...]]] = []

    @property
    def arena(self) -> ArenaMap | None:
        """The map of the server's memory that its links use, None where they have none."""
        return self._route.known

    def forget_arena(self) -> None:
        """Hold the map no longer: it goes with the last link or view that uses it, not when this is collected."""
        self._route.known = None

    def open(self, deadline: float) -> SocketLink:
        """A joined link. Raises TransportError when no path works."""

        def dial(effect: Dial) -> SocketLink:
            channel = self._connect(effect.path, deadline)
            try:
                token = self._credentials.token_for(channel)
                nixl_by = deadline if effect.nixl else None
                joining = join(shared=effect.shared, nixl_by=nixl_by, known=self._route.known, token=token)
                return SocketLink(channel, run(channel, joining, deadline))
            except BaseException:
                channel.close()
                raise

        return drive(self._route.open(), dial)

    def _connect(self, path: str, deadline: float) -> Channel:
        """Where every connection of the blocking client begins. Addresses found last time are used again; after a
        failure the name is resolved anew."""
        config = self.config
        if self._attach is not None:
            return self._attach()
        if path:
            channel = connect_unix(path, config.connect_s, deadline)
            if path != config.path:
                self._credentials.check_same_user(channel)
            return channel
        addresses = self._addresses or resolve(config.host, config.port, deadline)
        self._addresses = []
        channel = connect_tcp(addresses, config.connect_s, deadline)
        self._addresses = addresses
        return self._credentials.secure(channel, deadline)
