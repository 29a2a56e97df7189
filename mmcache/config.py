"""Settings: one frozen dataclass for a server, one for a client, one reader of the environment, one URL parser.

Every setting can be given by the command line, then by an environment variable MMCACHE_<NAME> (in capitals), then its
default here. An unknown MMCACHE_ variable or a value that does not parse is an error, never ignored; those of an
engine's connector are that connector's to look at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, urlsplit

from mmcache.errors import ConfigError
from mmcache.units import GiB as GiB
from mmcache.units import KiB as KiB
from mmcache.units import MiB as MiB
from mmcache.units import parse_nbytes as parse_nbytes
from mmcache.units import place_text as place_text

DEFAULT_PORT: Final = 7600
BODY_NBYTES_PER_KEY: Final = 128  # a Reserve's key, parent, namespace, size, kind and media, with room to spare
POLICY_NAMES: Final = ("value", "lru", "s3-fifo")
ENV_PREFIX: Final = "MMCACHE_"
CONNECTOR_PREFIXES: Final = ("MMCACHE_SGLANG_",)  # meant for an engine that shares its environment with a server
MAX_SHARDS: Final = 256
_LONGEST_S: Final = 86400.0  # the kernel's timers take no infinity, and what waits longer than a day is not waiting


def parse_host_port(text: str) -> tuple[str, int]:
    """('127.0.0.1', 7600) from 'HOST:PORT', 'HOST' or '[::1]:PORT'. Raises ConfigError."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{text!r} is not HOST:PORT ({error}); for example 127.0.0.1:{DEFAULT_PORT}") from None
    if not host or parts.path or parts.query or parts.username:
        raise ConfigError(f"{text!r} is not HOST:PORT; for example 127.0.0.1:{DEFAULT_PORT}")
    return host, DEFAULT_PORT if port is None else port


def _check_times(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) <= _LONGEST_S:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at most {_LONGEST_S:.0f} seconds, a day")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a shard server is built from. Sizes in bytes, times in seconds. Limits bound everything a peer can ask."""

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"  # HOST:PORT; port 0 picks a free one; empty: no TCP
    unix_path: str = "auto"  # auto: a private directory; empty: no unix socket, so no shared memory
    shards: int = 1  # processes of `mmcache serve`, which share out memory and count up ports; one server has one
    memory_nbytes: int = GiB
    max_entries: int = 0  # 0: one per 16 KiB of memory
    alignment: int = 64
    prefault: bool = False
    huge_pages: bool = False  # for the memory, of those set aside by vm.nr_hugepages
    hold: bool = False  # by a process that survives the server, so that it comes back with what it stored
    lease_s: float = 30.0
    pinned_share: float = 0.5  # the most of the memory one tenant's leases may hold
    max_connections: int = 256
    max_batch_keys: int = 4096
    max_body_nbytes: int = 2 * MiB
    max_inline_nbytes: int = 256 * MiB  # pinned by one Acquire or reserved by one Reserve; memory / 4 if that is less
    max_inflight_nbytes: int = GiB
    io_timeout_s: float = 10.0
    drain_s: float = 5.0
    insecure_network: bool = False
    policy: str = "value"  # which entry leaves when memory is short; docs/policies.md
    metrics: str = ""  # HOST:PORT of a page for Prometheus; empty: none
    log: str = "text"  # or json
    mode: str = "both"  # what is allowed at the start: both, read, write or off
    grpc: str = ""  # HOST:PORT of the public carrier; empty: none
    max_grpc_nbytes: int = 64 * MiB  # the largest message, either way
    access_file: str = ""  # who may come in, as whom (docs/access.md); empty: anybody, as one tenant
    tls_cert: str = ""  # PEM chain; empty: no TLS
    tls_key: str = ""
    tls_client_ca: str = ""  # PEM; who signs client certificates; empty: none are asked for
    nixl: str = ""  # network devices, as UCX names them, by which trusted clients read the memory; empty: none
    join: str = ""  # URL of the cluster to join (docs/membership.md); empty: none
    advertise: str = ""  # mmcache://HOST:PORT by which its clients find this server; empty: as it listens
    weight: float = 0.0  # its share of the keys, beside those of others; 0: its memory in GiB

    def __post_init__(self) -> None:
        positive = ("memory_nbytes", "lease_s", "max_connections", "max_batch_keys", "max_body_nbytes",
                    "max_inline_nbytes", "max_inflight_nbytes", "max_grpc_nbytes", "io_timeout_s")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        if not 0 <= self.weight < 1e15:
            raise ConfigError(f"weight is {self.weight}; it must be above 0, such as GiB of memory, or 0 for just that")
        if (self.advertise or self.weight) and not self.join:
            raise ConfigError("advertise and weight are told to a cluster; give join, its URL, too")
        for name in ("max_entries", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.max_body_nbytes < BODY_NBYTES_PER_KEY * self.max_batch_keys:
            raise ConfigError(
                f"max_body_nbytes {self.max_body_nbytes} is too small for {self.max_batch_keys} keys a batch; "
                f"allow {BODY_NBYTES_PER_KEY} bytes a key, or lower max_batch_keys"
            )
        _check_times(self, "lease_s", "io_timeout_s", "drain_s")
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigError(f"shards is {self.shards}; it must be 1 to {MAX_SHARDS}")
        if self.mode not in ("both", "read", "write", "off"):
            raise ConfigError(f"mode is {self.mode!r}; it must be both, read, write or off")
        if self.log not in ("text", "json"):
            raise ConfigError(f"log is {self.log!r}; it must be text or json")
        if self.max_grpc_nbytes > GiB:
            raise ConfigError(f"max_grpc_nbytes is {self.max_grpc_nbytes}; a gRPC message has at most 1GiB")
        if not 0 < self.pinned_share <= 1:
            raise ConfigError(f"pinned_share is {self.pinned_share}; it must be above 0 and at most 1")
        if self.alignment < 64 or self.alignment > 65536 or self.alignment & (self.alignment - 1):
            raise ConfigError(f"alignment is {self.alignment}; it must be a power of two from 64 to 65536")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key belong together; give both, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca needs tls_cert and tls_key: client certificates are part of TLS")
        if self.policy not in POLICY_NAMES:
            raise ConfigError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICY_NAMES)}")
        if self.memory_nbytes < 64 * KiB:
            raise ConfigError(f"memory is {self.memory_nbytes} bytes; the least is 64KiB, and 1GiB or more is usual")

    @property
    def max_batch_nbytes(self) -> int:
        """The most bytes one request may pin or reserve: a batch must not push the rest of the cache out."""
        return min(self.max_inline_nbytes, self.memory_nbytes // 4)

    @property
    def entries(self) -> int:
        """How many entries the index has room for."""
        return self.max_entries or max(1024, self.memory_nbytes // (16 * KiB))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client reaches a server. `transport`: auto (shared memory on the same host, else TCP), shm, tcp, nixl
    (reads by NIXL, everything else by TCP), or grpc (the port is that of serve --grpc)."""

    scheme: str = "mmcache"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    path: str = ""
    memory_nbytes: int = GiB
    transport: str = "auto"
    deadline_s: float = 5.0
    connect_s: float = 2.0
    verify: bool = True
    max_connections: int = 8
    copy_threads: int = 2  # for large batches read from shared memory
    streams: int = 1  # connections that share out a large batch; of a Client, not of an AsyncClient
    native: bool = True  # use mmcache-native where it is installed
    token_file: str = ""  # holds the token that says who we are; read again for every connection
    token: str = field(default="", repr=False)  # the token itself, from `connect`; never from a URL
    ca: str = ""  # mmcaches: PEM of the CAs to trust; empty: the system's
    cert: str = ""  # mmcaches: our certificate and its key, PEM
    key: str = ""
    server_name: str = ""  # mmcaches: the name in the server's certificate, where it is not the host
    insecure_network: bool = False  # let a token travel unencrypted to another host

    def __post_init__(self) -> None:
        if self.transport not in ("auto", "shm", "tcp", "nixl", "grpc"):
            raise ConfigError(f"transport={self.transport!r} is unknown; use auto, shm, tcp, nixl or grpc")
        if self.transport == "grpc" and not self.is_network:
            raise ConfigError("transport=grpc needs a host and the port of serve --grpc: mmcache://HOST:PORT")
        if self.transport == "nixl" and self.scheme == "embedded":
            raise ConfigError("transport=nixl needs a server in a process of its own, not embedded://; use auto")
        if self.transport == "shm" and self.is_network and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(f"transport=shm needs a server on this host, not {self.host}; use auto or tcp")
        if self.token and self.token_file:
            raise ConfigError("a token and a token_file were given; give one of them")
        if self.scheme != "mmcaches" and (self.ca or self.cert or self.key or self.server_name):
            raise ConfigError("ca, cert, key and server_name are for TLS; use mmcaches://HOST:PORT")
        if bool(self.cert) != bool(self.key):
            raise ConfigError("cert and key belong together; give both, or neither")
        if not (self.deadline_s > 0 and self.connect_s > 0 and self.max_connections > 0 and self.copy_threads > 0):
            raise ConfigError("deadline_s, connect_s, max_connections and copy_threads must be greater than 0")
        if not 1 <= self.streams <= self.max_connections:
            raise ConfigError(f"streams is {self.streams}; it must be 1 to max_connections, {self.max_connections}")
        _check_times(self, "deadline_s", "connect_s")

    @property
    def is_network(self) -> bool:
        """True where the URL names a host and a port."""
        return self.scheme in ("mmcache", "mmcaches")


_URL_HELP: Final = (
    "use mmcache://HOST:PORT, mmcaches://HOST:PORT (TLS), mmcache+unix:///path/to.sock or embedded://?memory=1GiB, "
    "with options such as ?transport=tcp&deadline_s=1"
)


_NETWORK_OPTIONS: Final = ("token_file", "ca", "cert", "key", "server_name", "insecure_network")
_URL_OPTIONS: Final = (
    "transport", "deadline_s", "connect_s", "verify", "max_connections", "copy_threads", "streams", "native",
    *_NETWORK_OPTIONS,
)  # fmt: skip


def split_url(url: str) -> SplitResult:
    """The parts of a URL. Raises ConfigError, which does not show it: it may hold a secret in the wrong place."""
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the URL cannot be read ({error}); an IPv6 address stands in brackets: [::1]:7600") from None


def parse_url(url: str, **overrides: Any) -> ClientConfig:
    """The client settings a URL and keyword overrides name. Raises ConfigError for anything it does not know."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL ({error}); {_URL_HELP}") from None
    options = parse_qsl(parts.query, keep_blank_values=True)
    if any(name == "token" for name, _ in options):
        raise ConfigError(
            "a token does not belong in a URL: URLs end up in logs and process lists; write it to a file of mode 0600 "
            "and give token_file=PATH, or connect(url, token=...)"
        )
    if parts.scheme not in ("mmcache", "mmcaches", "mmcache+unix", "embedded"):
        raise ConfigError(f"{url!r} has scheme {parts.scheme!r}; {_URL_HELP}")
    if parts.username or parts.password or parts.fragment:
        raise ConfigError(f"{url!r} holds a user, password or fragment, which mean nothing here; {_URL_HELP}")
    settings: dict[str, Any] = {"scheme": parts.scheme}
    if parts.scheme in ("mmcache", "mmcaches"):
        if not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError(f"{url!r} is not mmcache://HOST:PORT; {_URL_HELP}")
        if port is None and ("transport", "grpc") in options:
            raise ConfigError(f"{url!r} names no port; transport=grpc needs that of serve --grpc")
        settings |= {"host": parts.hostname, "port": DEFAULT_PORT if port is None else port}
    elif parts.netloc or (parts.scheme == "embedded" and parts.path):
        raise ConfigError(f"{url!r} names a host where none belongs; {_URL_HELP}")
    elif parts.scheme == "mmcache+unix":
        if not parts.path.startswith("/"):
            raise ConfigError(f"{url!r} has no absolute path; {_URL_HELP}")
        settings["path"] = parts.path
    for name, value in options:
        if name == "memory" and parts.scheme == "embedded":
            settings["memory_nbytes"] = parse_nbytes(value)
        elif name in _URL_OPTIONS and not (parts.scheme == "embedded" and name in _NETWORK_OPTIONS):
            settings[name] = _convert(ClientConfig, name, value, f"the URL's {name}")
        else:
            raise ConfigError(f"{url!r} has an unknown option {name!r}; {_URL_HELP}")
    return ClientConfig(**(settings | {name: value for name, value in overrides.items() if value is not None}))


def _convert(cls: type, name: str, value: str, where: str) -> Any:
    kind = {field.name: field.type for field in fields(cls)}[name]
    try:
        if kind == "bool":
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        if name.endswith("_nbytes"):
            return parse_nbytes(value)
        return {"int": int, "float": float, "str": str}[str(kind)](value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (KeyError, ValueError):
        raise ConfigError(f"{where} is {value!r}, which is not a valid {kind}") from None


def server_config(environ: Mapping[str, str] | None = None, **overrides: Any) -> ServerConfig:
    """Server settings from the environment, then `overrides` (None means not given). Raises ConfigError."""
    environ = os.environ if environ is None else environ
    known = {field.name for field in fields(ServerConfig)}
    settings: dict[str, Any] = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable.startswith(CONNECTOR_PREFIXES):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        name = "memory_nbytes" if name == "memory" else name
        if name not in known:
            names = sorted(name.upper() for name in (known - {"memory_nbytes"}) | {"memory"})
            raise ConfigError(f"{variable} is not a setting; {ENV_PREFIX} goes before {', '.join(names)}")
        settings[name] = _convert(ServerConfig, name, value, variable)
    return ServerConfig(**(settings | {name: value for name, value in overrides.items() if value is not None}))
