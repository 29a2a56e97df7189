"""How a client shows who it is, and whom it takes for its server: tokens and certificates, read when they are needed.

Files are looked at for every new connection, so rotating them needs no restart. What cannot be used at the start is a
ConfigError; later it is a TransportError, and so a miss.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from pathlib import Path
from typing import Final, Protocol

from mmcache.client.session import Wire
from mmcache.config import ClientConfig
from mmcache.errors import ConfigError, TransportError
from mmcache.private_file import Signature, read_private, signature
from mmcache.transport.tcp import Channel
from mmcache.transport.tls import TlsChannel, client_context

_FRIENDS: Final = (0,)  # users that could read our files anyway
_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class OverSocket(Wire, Protocol):
    """A wire whose socket can be asked who is at its other end."""

    sock: socket.socket


class Credentials:
    """Of one client. Thread-safe. Raises ConfigError for a token file or certificate that cannot be used."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._files = tuple(path for path in (config.ca, config.cert, config.key) if path)
        self._made: tuple[Signature, ssl.SSLContext] | None = None  # no lock: a forked child could inherit it held
        self._token()
        if self.encrypts:
            try:
                self.server_name.encode("idna")
            except UnicodeError as error:
                raise ConfigError(f"{self.server_name!r} cannot name a server: {error}") from None
            self._make(signature(self._files))

    def _make(self, now: Signature) -> ssl.SSLContext:
        context = client_context(self._config.ca, self._config.cert, self._config.key)
        self._made = now, context
        return context

    def _token(self) -> str:
        config = self._config
        if not config.token_file:
            return config.token
        token = read_private(config.token_file, "token file").decode(errors="replace").strip()
        if not token or not token.isprintable() or " " in token:
            raise ConfigError(f"the token file {config.token_file} does not hold one token; see `mmcache token new`")
        return token

    def context(self) -> ssl.SSLContext:
        """The TLS settings of an mmcaches URL, made anew when its files change. Raises TransportError."""
        now, made = signature(self._files), self._made
        if made is not None and made[0] == now:
            return made[1]
        try:
            return self._make(now)
        except ConfigError as error:
            raise TransportError(str(error)) from None

    @property
    def encrypts(self) -> bool:
        """Whether the URL wants TLS."""
        return self._config.scheme == "mmcaches"

    @property
    def server_name(self) -> str:
        """Whom the server's certificate must name."""
        return self._config.server_name or self._config.host

    def secure(self, channel: Channel, deadline: float) -> Channel:
        """A TCP channel as the URL wants it: as it is, or, for mmcaches, encrypted, with the server verified.

        Raises TransportError; the channel is closed then.
        """
        if not self.encrypts:
            return channel
        try:
            secured = TlsChannel(channel, self.context(), self.server_name)
            channel = secured
            secured.handshake(deadline)
            return secured
        except ValueError as error:  # a name that OpenSSL does not take
            channel.close()
            raise TransportError(f"server_name cannot be checked: {error}") from None
        except BaseException:
            channel.close()
            raise

    def token_for(self, channel: Wire) -> str:
        """The token to send over this channel; empty: none. Raises TransportError, and closes the channel, where it
        cannot be had or would travel readable to another host."""
        try:
            return self.token(exposed=not channel.is_unix and not channel.is_tls and not channel.is_loopback)
        except BaseException:
            channel.close()
            raise

    def token(self, *, exposed: bool) -> str:
        """The token to send, which would be `exposed`: readable on its way to another host; empty: none. Raises
        TransportError."""
        try:
            token = self._token()
        except ConfigError as error:
            raise TransportError(str(error)) from None
        if token and exposed and not self._config.insecure_network:
            raise TransportError(
                "the token would travel unencrypted to another host and was not sent; use mmcaches://, or add "
                "insecure_network=true to the URL if nobody else can see this network"
            )
        return token

    def pem(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The CAs to trust, our key and our certificate, as their files say now; None: not given, or, for the CAs, no
        file of the system's either. Raises TransportError."""
        self.context()  # its words are better than those of whoever uses the bytes
        config = self._config
        paths = (config.ca or ssl.get_default_verify_paths().cafile, config.key, config.cert)
        try:
            ca, key, cert = (Path(path).read_bytes() if path else None for path in paths)
        except OSError as error:
            raise TransportError(f"{error.filename} cannot be read: {error.strerror}") from None
        return ca, key, cert

    def check_same_user(self, channel: OverSocket) -> None:
        """Before a token goes to a unix socket the server only named: whoever listens there must be this user or root,
        as the server may be gone and its path somebody else's. Raises TransportError and closes the channel."""
        if not (self._config.token or self._config.token_file):
            return
        _, uid, _ = _PEER.unpack(channel.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != os.geteuid() and uid not in _FRIENDS:
            channel.close()
            raise TransportError(f"user {uid} listens on the server's unix socket; the token was not sent there")
