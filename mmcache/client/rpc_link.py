"""A link over gRPC, and what opens it: for networks where only HTTP/2 passes. Chosen by `transport=grpc` alone.

Every call stands for itself, so a load balancer may send each to another server: who asks goes with every one, and
the link keeps nothing of a server but its limits. A link has a channel, and so a connection, of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from mmcache.client.credentials import Credentials
from mmcache.client.link import Link
from mmcache.client.protocol import Effect, Flow, Work
from mmcache.client.rpc import RpcConversation, limits_of
from mmcache.client.session import Joined, drive
from mmcache.config import ClientConfig
from mmcache.errors import ConfigError, ProtocolError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.transport.shm import ArenaMap

if TYPE_CHECKING:
    from mmcache.transport.rpc import RpcChannel

T = TypeVar("T")


class RpcLink(Link):
    """A session over a gRPC channel; `token` says who asks, call by call. Limits are unknown before `join`."""

    channel: RpcChannel

    def __init__(self, channel: RpcChannel, token: Callable[[], str]) -> None:
        super().__init__(channel, Joined(pb.JoinReply(), None, None))
        self._token = token
        self.rpc = self._ask
        self.conversation = RpcConversation(self._ask)
        self.why = "the URL asks for it (transport=grpc)"

    def _ask(self, method: str, body: bytes) -> bytes:
        return self.channel.call(method, body, self._token(), self.deadline)

    @property
    def path(self) -> str:
        """How bytes travel: grpc or grpc-tls."""
        return "grpc-tls" if self.channel.is_tls else "grpc"

    def join(self, deadline: float) -> None:
        """Ask for the limits that calls must keep. Raises TransportError."""
        self.joined = limits_of(self.run(self.conversation.call(Op.STAT, pb.StatRequest(), pb.StatReply()), deadline))

    def run(self, flow: Flow[T], deadline: float) -> T:
        """As `Link.run`."""
        self.deadline = deadline
        return drive(flow, _perform)


def _perform(effect: Effect) -> object:
    if not isinstance(effect, Work):
        raise ProtocolError(f"{type(effect).__name__} is of the framed protocol; gRPC has calls only")
    return effect.call()


class RpcDialer:
    """Opens links to the settings' host and port. Raises ConfigError where gRPC is not installed."""

    arena: ArenaMap | None = None

    def __init__(self, config: ClientConfig) -> None:
        try:
            from mmcache.transport import rpc
        except ImportError as error:
            raise ConfigError(f"transport=grpc needs grpcio ({error}): pip install 'mmcache[grpc]'") from None
        self._rpc, self._config = rpc, config
        self._credentials = Credentials(config)

    def forget_arena(self) -> None:
        """There is none."""

    def open(self, deadline: float) -> RpcLink:
        """A link to a server that has answered. Raises TransportError."""
        config, credentials = self._config, self._credentials
        pem = self._rpc.Pem(*credentials.pem()) if credentials.encrypts else None
        channel = self._rpc.RpcChannel(config.host, config.port, config.connect_s, pem, credentials.server_name)
        link = RpcLink(channel, self._token)
        try:
            link.join(deadline)
            return link
        except BaseException:
            link.close()
            raise

    def _token(self) -> str:
        credentials = self._credentials
        return credentials.token(exposed=not credentials.encrypts and not _is_loopback(self._config.host))


def _is_loopback(host: str) -> bool:
    """Whether a host can only be this one; of a name other than localhost that is not known before it is resolved."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
