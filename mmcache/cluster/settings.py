"""A cluster's URL taken apart: what its client is to do, how each shard is to be reached, and who the members are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from mmcache.cluster.routes import RAMP_S, Replicas
from mmcache.config import ClientConfig, parse_url, split_url
from mmcache.errors import ConfigError

ABSENT_S: Final = 0.05
LONGEST_ABSENT_S: Final = 60.0
LONGEST_RAMP_S: Final = 86400.0
MEMBERSHIPS: Final = ("mmcache+redis", "mmcache+rediss", "mmcache+k8s")  # what a scheme that names one begins with
_CLIENT_OPTIONS: Final = frozenset(one.name for one in fields(ClientConfig)) - {
    "scheme", "host", "port", "path", "memory_nbytes"
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How a client uses a cluster. `members` is the URL that says who is in it; `settings` are those of ClientConfig
    that hold for every shard, by name, and `client` is what they come to."""

    members: str
    client: ClientConfig = field(default_factory=ClientConfig)
    settings: Mapping[str, Any] = field(default_factory=dict)
    replicas: Replicas = field(default_factory=Replicas)
    absent_s: float = ABSENT_S  # for so long a shard is not asked again for what it has just not had
    ramp_s: float = RAMP_S  # for so long those are asked, too, who owned a run before the view changed

    def __post_init__(self) -> None:
        for name, longest_s in (("absent_s", LONGEST_ABSENT_S), ("ramp_s", LONGEST_RAMP_S)):
            if not 0 <= getattr(self, name) <= longest_s:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 to {longest_s:.0f} seconds")

    @property
    def scheme(self) -> str:
        """Of the URL."""
        return urlsplit(self.members).scheme


def is_cluster(url: str) -> bool:
    """Whether a URL names a cluster: several hosts, or a membership."""
    scheme, _, rest = url.partition("://")
    if scheme in ("mmcache", "mmcaches"):
        return "," in rest.partition("?")[0]
    return scheme.partition("+")[2] != "unix" and scheme.startswith(MEMBERSHIPS)


def parse_cluster_url(url: str, **overrides: Any) -> ClusterConfig:
    """What a cluster's URL and keywords say; options that are neither the client's nor ours are left to the membership.

    Raises ConfigError.
    """
    parts = split_url(url)
    ours: dict[str, Any] = {}
    client: dict[str, str] = {}
    others: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "replicas":
            ours[name] = Replicas.parse(value)
        elif name in ("absent_s", "ramp_s"):
            ours[name] = _seconds(name, value)
        elif name in _CLIENT_OPTIONS:
            client[name] = value
        else:
            others.append((name, value))
    tls = parts.scheme != "mmcache"  # what a membership's members are is not known yet: options for TLS may be meant
    base = f"{'mmcaches' if tls else 'mmcache'}://127.0.0.1:7600"
    config = parse_url(f"{base}?{urlencode(client)}" if client else base, **overrides)
    given = client.keys() | {name for name, value in overrides.items() if value is not None}
    return ClusterConfig(
        members=parts._replace(query=urlencode(others)).geturl(),
        client=config,
        settings={name: getattr(config, name) for name in sorted(given)},
        **ours,
    )


def parse_any_url(url: str, **overrides: Any) -> ClientConfig | ClusterConfig:
    """The settings of a client of one server, or of a cluster. Raises ConfigError."""
    return parse_cluster_url(url, **overrides) if is_cluster(url) else parse_url(url, **overrides)


def _seconds(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"the URL's {name} is {value!r}; give seconds") from None
