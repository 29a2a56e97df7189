"""TLS 1.3 on the framed TCP: contexts from files, the handshake with a deadline, and a Channel that encrypts.

The socket does not block: OpenSSL is asked, and where it wants the network first, the wait is a poll with what is left
of the deadline, as everywhere. A context is made once and shared; a channel belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from mmcache.errors import ConfigError, DeadlineExceeded, TransportError
from mmcache.private_file import check_private
from mmcache.transport.base import Buffer
from mmcache.transport.tcp import Channel

T = TypeVar("T")
HANDSHAKE_START: Final = b"\x16"  # the first byte of a TLS connection
_GONE = "the peer closed the connection"


class PeerCertificate(NamedTuple):
    """The verified certificate a peer showed: its one common name (empty: none, or several), and when it ends."""

    common_name: str
    expires_s: float  # Unix seconds


def server_context(cert: str, key: str, client_ca: str, *, certificate_needed: bool) -> ssl.SSLContext:
    """For `serve`: its chain and private key, and the CA of client certificates (empty: none are asked for).

    Raises ConfigError; also for a private key that others can read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_chain(context, cert, key)
    if client_ca:
        _load_ca(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED if certificate_needed else ssl.CERT_OPTIONAL
    context.num_tickets = 0  # sessions are not resumed: every connection shows its certificate anew
    return context


def client_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    """For a client: whom to trust (empty: the system's CAs), and its own certificate, if any. Host names are checked.

    Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca:
        _load_ca(context, ca)
    else:
        context.load_default_certs()
    if cert:
        _load_chain(context, cert, key)
    return context


def _load_chain(context: ssl.SSLContext, cert: str, key: str) -> None:
    check_private(key, "private key")
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")  # without this, OpenSSL would ask on the terminal
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"certificate {cert} and key {key} cannot be used: {_words(error)}; give two PEM files that belong "
            "together, the key without a password"
        ) from None


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ConfigError(f"CA certificates {ca} cannot be used: {_words(error)}; give a PEM file") from None


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


def first_bytes(channel: Channel, nbytes: int, deadline: float) -> bytes:
    """1 to `nbytes` of what a peer says first on a fresh channel, left where they are. Raises TransportError."""
    channel.wait_readable(deadline)
    try:
        start = channel.sock.recv(nbytes, socket.MSG_PEEK)
    except OSError as error:
        raise as_tls_error(error) from error
    if not start:
        raise TransportError(_GONE)
    return start


class TlsChannel(Channel):
    """As Channel, encrypted. Takes the socket of a connected TCP channel over; `handshake` comes first."""

    __slots__ = ("_tls",)

    def __init__(self, channel: Channel, context: ssl.SSLContext, server_name: str | None) -> None:
        """`server_name` is whom a client expects; None: this end is the server. Raises TransportError."""
        sock = channel.sock
        sock.setblocking(False)
        server_side = server_name is None
        try:
            tls = context.wrap_socket(
                sock, server_side=server_side, do_handshake_on_connect=False, server_hostname=server_name
            )
        except OSError as error:  # the peer has gone already
            raise as_tls_error(error) from error
        super().__init__(tls)
        tls.setblocking(False)
        self._tls = tls

    def handshake(self, deadline: float) -> None:
        """Agree on keys, each verifying the other. Raises TransportError: nothing was sent that needed protection."""
        self._until(self._tls.do_handshake, deadline)

    @property
    def is_tls(self) -> bool:
        """True."""
        return True

    @property
    def certificate(self) -> PeerCertificate | None:
        """What the peer showed, verified; None if it showed none."""
        found = self._tls.getpeercert()
        if not found:
            return None
        subject = found.get("subject", ())
        names = [value for part in subject for name, value in part if name == "commonName"]  # type: ignore[str-unpack]
        return PeerCertificate(
            str(names[0]) if len(names) == 1 else "", float(ssl.cert_time_to_seconds(str(found["notAfter"])))
        )

    def _until(self, call: Callable[[], T], deadline: float | None) -> T:
        """The answer of an OpenSSL call, asked again whenever the network is ready for it."""
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except OSError as error:
                raise as_tls_error(error) from error
            self._wait(event, deadline)

    def _wait(self, event: int, deadline: float | None) -> None:
        left_s = None if deadline is None else deadline - time.monotonic()
        self._poll.modify(self.sock, event)
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the deadline passed; raise deadline_s or look at the server's load")
        if not self._poll.poll(None if left_s is None else left_s * 1000):
            raise DeadlineExceeded("the peer was silent, or took nothing, until the deadline")

    def _try_send(self, data: Buffer) -> int:
        return 0

    def _send_all(self, data: Buffer, deadline: float | None, sent: int = 0) -> None:
        view = memoryview(data)[sent:]
        while len(view):
            rest = view
            view = view[self._until(lambda rest=rest: self._tls.send(rest), deadline) :]  # type: ignore[misc]

    def _read(self, view: memoryview) -> int:
        count = self._tls.recv_into(view)
        if not count and len(view):
            raise TransportError(_GONE)
        return count

    def _recv_some(self, views: Sequence[memoryview], deadline: float | None, flags: int = 0) -> int:
        return self._until(lambda: self._read(views[0]), deadline)

    def _sleep_for_message(self) -> None:
        if self._start == self._end:
            self._start, self._end = 0, self._until(lambda: self._read(self._ahead), None)

    def recv_available_into(self, view: memoryview) -> int:
        """See Channel. What OpenSSL holds decrypted already counts as arrived."""
        if self._start < self._end:
            return self._take(view)
        try:
            return self._read(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise as_tls_error(error) from error

    def wait_readable(self, deadline: float) -> None:
        """See Channel."""
        if self._start == self._end and not self._tls.pending():
            self._wait(select.POLLIN, deadline)

    def want(self, nbytes: int) -> None:
        """See Channel. How many bytes of ciphertext there must be is not known."""

    def _try_recv(self, view: memoryview) -> int:
        try:
            return self._tls.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except OSError as error:
            raise as_tls_error(error) from error

    def hang_up(self) -> None:
        """See Channel. Below TLS: SSLSocket.shutdown would make what another thread still sends plain."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def linger(self, deadline: float) -> None:
        """See Channel."""
        with contextlib.suppress(OSError):
            self._tls.unwrap()  # says goodbye; what the peer says is dropped below, so it need not be decrypted
        scratch = bytearray(4096)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_WR)
            while True:
                self._wait(select.POLLIN, deadline)
                with contextlib.suppress(BlockingIOError):
                    if not socket.socket.recv_into(self._tls, scratch):
                        return


def as_tls_error(error: OSError) -> TransportError:
    if isinstance(error, TransportError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransportError(
            f"the peer's certificate was refused: {error.verify_message}; check ca= and server_name= (of a server), "
            "--tls-client-ca (of a client), and the clocks of both"
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").lower()
        if "wrong_version_number" in reason:
            return TransportError("the peer does not speak TLS; use mmcache://, or give the server --tls-cert")
        if "alert" in reason:
            remedy = "give cert= and key= of a certificate that is valid now, from the CA the server trusts"
            return TransportError(f"the peer refused the TLS connection ({_words(error)}); {remedy}")
        return TransportError(f"TLS failed: {_words(error)}")
    return TransportError(f"the connection broke: {error}")
