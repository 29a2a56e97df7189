"""The server process: listeners, one thread per connection, a ready line, and a graceful drain.

`Server` can also be used without listeners: `attach` serves one end of a socket pair (that is `embedded://`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import ssl
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmcache.config import ServerConfig, parse_host_port
from mmcache.errors import ConfigError, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.server.access import Access
from mmcache.server.connection import Connection, pack_error
from mmcache.server.nixl import NixlAgent
from mmcache.server.service import Service
from mmcache.server.tenants import Tenants
from mmcache.server.watched import Watched
from mmcache.store.arena import Arena, Progress
from mmcache.store.kept import Kept
from mmcache.store.shard import Shard
from mmcache.transport.native import NATIVE
from mmcache.transport.tcp import Channel, connect_unix
from mmcache.transport.tls import server_context

if TYPE_CHECKING:
    from mmcache.metrics import MetricsPage
    from mmcache.server.rpc import RpcServer

log = logging.getLogger("mmcache.server")
TICK_S: Final = 1.0
BACKLOG: Final = 128
MANY_TENANTS: Final = "shows every client the whole memory, and the access file has more than one tenant"
LEAST_STRANGERS: Final = 16  # connections that may be about to say who they are: so many, or a quarter of all
_PREFIX: Final = "mmcache-"
_SOCKET: Final = "shard.sock"


class Server:
    """A shard and its connections. `start` accepts; `stop` drains: running requests end, idle connections close.

    `progress` hears how far a prefault has come, in bytes done and in all. `arena` and `kept`: memory that was there
    before this process, and will be after it; what a server before left in it goes on, where that can be.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        progress: Progress | None = None,
        arena: Arena | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.config = config
        self.address: tuple[str, int] | None = None
        self.unix_path = ""
        self._listeners: list[socket.socket] = []
        self._connections: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._private_dir: tempfile.TemporaryDirectory[str] | None = None
        addresses = _resolve(config, config.listen, "--listen") if config.listen else []
        self._metrics_at = _resolve(config, config.metrics, "--metrics")[0][1] if config.metrics else None
        self._metrics: MetricsPage | None = None
        self._grpc_at = _resolve(config, config.grpc, "--grpc")[0][1] if config.grpc else None
        self._rpc: RpcServer | None = None
        self.tenants = Tenants(kept.notes.tenants, kept.notes.tenant) if kept is not None else Tenants()
        self.access = Access(config.access_file, self.tenants) if config.access_file else None
        if config.nixl and self._many_tenants:
            raise ConfigError(f"--nixl {MANY_TENANTS}; give each a server of its own, or leave --nixl out")
        self._tls = _watch_tls(config)
        self.shard = Shard(config, progress=progress, hasher=NATIVE.hasher, arena=arena, kept=kept)
        if why := self.shard.arena.why_not_shared:
            log.warning("clients on this host go by sockets: no shared memory (%s)", why)
        self.service = Service(self.shard, config, self.access, self.tenants)
        self._set_quotas()
        try:
            for family, address in addresses[:1]:
                self._listen_tcp(family, address)
        except OSError as error:
            self.shard.close()
            raise TransportError(f"cannot listen on {config.listen}: {error}; choose another --listen") from error

    def _listen_tcp(self, family: int, address: tuple[str, int]) -> None:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        host, port = listener.getsockname()[:2]
        self.address = (host, port)
        self._listeners.append(listener)

    def _listen_unix(self) -> None:
        path = self.config.unix_path
        if path == "auto":
            _remove_leftovers(Path(tempfile.gettempdir()))
            self._private_dir = tempfile.TemporaryDirectory(prefix=_PREFIX)
            path = str(Path(self._private_dir.name) / _SOCKET)
        else:
            path = os.path.abspath(path)  # clients elsewhere are told it
            _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old_mask = os.umask(0o177)
        try:
            listener.bind(f"{path}.new")
            listener.listen(BACKLOG)
            os.rename(f"{path}.new", path)  # at `path` itself nobody ever sees a socket that does not answer yet
        except OSError as error:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.new")
            raise TransportError(f"cannot listen on unix socket {path}: {error}; choose another --unix") from error
        finally:
            os.umask(old_mask)
        self.unix_path = self.service.unix_path = path
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to accept, on threads of this process.

        Raises TransportError if an address cannot be had: the server is stopped then, and everything given back.
        """
        try:
            self._open()
        except BaseException:
            self.stop()
            raise
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="mmcache-accept", daemon=True).start()
        threading.Thread(target=self._tick, name="mmcache-tick", daemon=True).start()

    def _open(self) -> None:
        if self.config.nixl:
            self.service.nixl = NixlAgent(self.shard.arena, self.config.nixl)
        if self.config.unix_path:
            self._listen_unix()
        if self._metrics_at is not None:
            from mmcache.metrics import MetricsPage  # only where it is wanted: engines embed servers too

            self._metrics = MetricsPage(*self._metrics_at, self.service.counters)
        if self._grpc_at is not None:
            self._rpc = _rpc_server(self.service, self._grpc_at)
            self._rpc.start()

    @property
    def metrics_url(self) -> str:
        """Where Prometheus finds the metrics; empty: nowhere."""
        return self._metrics.url if self._metrics is not None else ""

    @property
    def grpc_address(self) -> tuple[str, int] | None:
        """Where the public carrier listens; None: nowhere."""
        return self._rpc.address if self._rpc is not None else None

    @property
    def _many_tenants(self) -> bool:
        return self.access is not None and len(self.access.quotas) > 1

    def attach(self, sock: socket.socket) -> None:
        """Serve one already connected unix socket as a client on this host."""
        self._serve(Channel(sock), same_host=True)

    def stop(self) -> None:
        """Stop accepting, let running requests end within `drain_s`, close every connection and free the memory."""
        self._stopping.set()
        if self._rpc is not None:
            self._rpc.drain()
        if self._metrics is not None:
            self._metrics.close()
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        deadline = time.monotonic() + self.config.drain_s
        while True:
            with self._lock:
                connections = dict(self._connections)
            for connection in connections:
                if connection.idle or time.monotonic() >= deadline:
                    connection.channel.hang_up()
            if not connections or time.monotonic() >= deadline + 1:
                break
            next(iter(connections.values())).join(0.02)
        if self._rpc is not None:
            self._rpc.stop(deadline)
        self._stop_nixl()
        if self._private_dir:
            self._private_dir.cleanup()
        elif self.unix_path:
            with contextlib.suppress(OSError):
                os.unlink(self.unix_path)
        self.shard.close()

    def _accept(self, listener: socket.socket) -> None:
        same_host = listener.family == socket.AF_UNIX
        while not self._stopping.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                if self._stopping.is_set():
                    return
                time.sleep(0.05)  # out of descriptors: leave some time for connections to close
                continue
            try:
                self._serve(Channel(sock), same_host=same_host)
            except Exception:
                log.exception("a connection could not be served")
                sock.close()

    def _serve(self, channel: Channel, *, same_host: bool) -> None:
        tls = self._tls.value if self._tls is not None and not same_host else None
        connection = Connection(channel, self.service, same_host=same_host, tls=tls)
        most_strangers = max(LEAST_STRANGERS, self.config.max_connections // 4)
        with self._lock:
            strangers = sum(other.is_stranger for other in self._connections) >= most_strangers
            full = strangers or len(self._connections) >= self.config.max_connections
            if not full:
                thread = threading.Thread(target=self._run, args=(connection,), name="mmcache-connection", daemon=True)
                thread.start()  # it cannot end before it is listed, as it needs the lock for that
                self._connections[connection] = thread
                self.service.connections = len(self._connections)
        if full:
            self._turn_away(channel, f"{most_strangers} connections that have not joined yet" if strangers else "", tls)

    def _turn_away(self, channel: Channel, many: str, tls: ssl.SSLContext | None) -> None:
        many = many or f"{self.config.max_connections} connections"
        if tls is None:  # else whatever is said would not be understood
            message = f"{many} are open, the limit; raise --max-connections"
            with contextlib.suppress(TransportError):
                channel.send([pack_error(0, pb.ErrorReply.LIMIT, message)], time.monotonic() + 1)
        channel.close()

    def _run(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            with self._lock:
                self._connections.pop(connection, None)
                self.service.connections = len(self._connections)

    def _tick(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self.shard.tick()
                self._look_at_files()
            except Exception:
                log.exception("a second's work was not done (claims, access file, certificates); it is tried again")

    def _stop_nixl(self) -> None:
        agent, self.service.nixl = self.service.nixl, None
        if agent is not None:
            agent.stop()

    def _set_quotas(self) -> None:
        if self.access is not None:
            self.shard.index.usage.quotas = self.access.quotas

    def _look_at_files(self) -> None:
        """Use what has changed in them, and end the connections of whoever may not be here any more."""
        if self._tls is not None:
            self._tls.refresh()
        changed = self.access is not None and self.access.refresh()
        self._set_quotas()
        if self.service.nixl is not None and self._many_tenants:
            log.warning("NIXL is off from now on: it %s", MANY_TENANTS)
            self._stop_nixl()
        with self._lock:
            connections = list(self._connections)
        now_s = time.time()
        for connection in connections:
            certificate, admitted = connection.certificate, connection.admitted
            expired = certificate is not None and certificate.expires_s <= now_s
            revoked = changed and admitted is not None and not self.service.still(admitted)
            if expired or revoked:
                connection.channel.hang_up()


def _watch_tls(config: ServerConfig) -> Watched[ssl.SSLContext] | None:
    """The TLS settings for new connections; None without TLS. Raises ConfigError."""
    if not config.tls_cert:
        return None

    def load() -> ssl.SSLContext:
        needed = not config.access_file  # else a token may say who it is
        return server_context(config.tls_cert, config.tls_key, config.tls_client_ca, certificate_needed=needed)

    files = [path for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path]
    return Watched(files, load, "TLS certificate")


def _rpc_server(service: Service, place: tuple[str, int]) -> RpcServer:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else strangers write to stderr, in a form of their own
    try:
        from mmcache.server.rpc import RpcServer  # only where it is wanted: it needs an extra
    except ImportError as error:
        raise ConfigError(f"--grpc needs the extra grpc ({error}); pip install 'mmcache[grpc]'") from None
    return RpcServer(service, place)


def _resolve(config: ServerConfig, place: str, option: str) -> list[tuple[int, tuple[str, int]]]:
    """The addresses to bind. Raises ConfigError for a bad name, or for an address that other hosts can reach."""
    host, port = parse_host_port(place)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{option} {place}: {error}") from None
    addresses = [(info[0], (str(info[4][0]), int(info[4][1]))) for info in infos]
    exposed = [address for _, (address, _) in addresses if not ipaddress.ip_address(address.split("%")[0]).is_loopback]
    if exposed:
        _check_exposure(config, f"{option} {place} reaches beyond this host ({exposed[0]})", option)
    return [(int(family), address) for family, address in addresses]


def _check_exposure(config: ServerConfig, where: str, option: str) -> None:
    """Raise ConfigError unless whoever comes from other hosts is known, or the operator wants them unknown."""
    if config.insecure_network:
        return
    if option == "--metrics":
        raise ConfigError(
            f"{where}, where anyone could read what is counted: the page has no access control; use 127.0.0.1, or pass "
            "--insecure-network"
        )
    if config.tls_cert and (config.access_file or config.tls_client_ca):
        return
    missing = (
        "--tls-cert and --tls-key, as tokens and values would travel readable"
        if config.access_file
        else ("--access FILE or --tls-client-ca FILE" + ("" if config.tls_cert else ", with --tls-cert and --tls-key"))
    )
    raise ConfigError(
        f"{where}, where anyone could read and write the cache; give {missing} (docs/access.md), use 127.0.0.1, or "
        "pass --insecure-network to go without authentication"
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove the private directories of servers of this user that were killed: those whose socket nobody serves."""
    for path in folder.glob(f"{_PREFIX}*/{_SOCKET}"):
        with contextlib.suppress(OSError, TransportError, ConfigError):
            if path.parent.stat().st_uid == os.getuid():
                _remove_stale(str(path))
                path.parent.rmdir()


def _remove_stale(path: str) -> None:
    """Remove a socket file nobody listens on; anything else at `path` is left, and an error."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise TransportError(f"unix socket {path}: {error}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is not a socket; choose another --unix")
    try:
        connect_unix(path, 1.0, time.monotonic() + 1.0).close()
    except TransportError as error:
        if isinstance(error.__cause__, ConnectionRefusedError):  # anything else may be a server that is only busy
            os.unlink(path)
            return
    raise TransportError(f"another server listens on {path}; stop it or choose another --unix")
