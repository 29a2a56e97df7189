"""URLs that name a cluster: a list of servers, Redis or Valkey (also by Sentinel, or a Redis Cluster), Kubernetes.

    mmcache://a:7600,b:7600                                   these servers; their ids are HOST:PORT
    mmcache+redis://[USER@]HOST[:6379][/DB]?cluster=NAME      mmcache+rediss:// with TLS
    mmcache+redis+sentinel://H1[:26379],H2/MASTER[/DB]?cluster=NAME
    mmcache+redis+cluster://H1[:6379],H2?cluster=NAME
    mmcache+k8s://NAMESPACE/SERVICE?port=NAME

Options that say how a client uses the servers have been taken off before (settings.parse_cluster_url). A password does
not belong in a URL: `password_file` names a file of mode 0600.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit

from mmcache.cluster.membership import NOBODY, Source, Static, Watched
from mmcache.cluster.placement import Member, View
from mmcache.cluster.seen import Seen
from mmcache.config import parse_host_port, place_text, split_url
from mmcache.errors import ConfigError

_HELP: Final = (
    "use mmcache://HOST:PORT,HOST:PORT, mmcache+redis://HOST:PORT/DB?cluster=NAME, "
    "mmcache+redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB?cluster=NAME, "
    "mmcache+redis+cluster://HOST:PORT,HOST:PORT?cluster=NAME (rediss: TLS) or mmcache+k8s://NAMESPACE/SERVICE?port=NAME"
)
_REDIS: Final = re.compile(r"mmcache\+(redis|rediss)(?:\+(sentinel|cluster))?")
_REDIS_OPTIONS: Final = (
    "cluster", "password_file", "sentinel_password_file", "redis_ca", "redis_cert", "redis_key", "tls", "fallback",
)  # fmt: skip
_K8S_OPTIONS: Final = ("port", "kubeconfig", "context", "tls", "fallback")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
MAX_HOSTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MembersUrl:
    """What such a URL says. `kind`: static, redis, sentinel, cluster (of Redis) or k8s."""

    kind: str
    hosts: tuple[tuple[str, int], ...] = ()
    tls: bool = False  # to the hosts
    user: str = ""
    db: int = 0
    master: str = ""  # what Sentinel calls it
    namespace: str = ""  # of Kubernetes
    service: str = ""
    options: Mapping[str, str] = field(default_factory=dict)  # of the cluster
    fallback: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The cluster's name in Redis, where several may share one."""
        return self.options.get("cluster", "mmcache")

    @property
    def scheme(self) -> str:
        """How servers are spoken to where nobody but the URL says it."""
        return "mmcaches" if self.options.get("tls") == "true" or (self.kind == "static" and self.tls) else "mmcache"

    @property
    def what(self) -> str:
        """For people: never with a secret, as the URL has none."""
        places = ", ".join(place_text(*place) for place in self.hosts)
        if self.kind == "static":
            return places
        if self.kind == "k8s":
            return f"Kubernetes service {self.namespace}/{self.service}"
        form = {"redis": "Redis", "sentinel": f"Redis master {self.master} of Sentinel", "cluster": "Redis Cluster"}
        return f"cluster {self.name!r} of {form[self.kind]} at {places}"


def parse_members_url(url: str) -> MembersUrl:
    """What the URL says. Raises ConfigError, which never shows what may be a secret."""
    shown = re.sub(r"//[^/?#]*@", "//", url)
    parts = split_url(url)
    userinfo, _, places = parts.netloc.rpartition("@")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    cut = "@" in parts.path + parts.fragment + "".join(options)  # by a mark that stands in a password
    if cut or ":" in userinfo or {"password", "redis_password"} & options.keys():
        raise ConfigError(
            "a password does not belong in a URL: URLs end up in logs and process lists; write it to a file of mode "
            "0600 and give password_file=PATH"
        )
    segments = [part for part in parts.path.split("/") if part]
    if parts.fragment:
        raise ConfigError(f"{shown!r} holds a fragment, which means nothing here; {_HELP}")
    if redis := _REDIS.fullmatch(parts.scheme):
        found = _redis(redis, userinfo, places, segments, options, shown)
    elif userinfo:
        raise ConfigError(f"{shown!r} holds a user, which means nothing here; {_HELP}")
    elif parts.scheme == "mmcache+k8s":
        found = _k8s(places, segments, options, shown)
    elif parts.scheme in ("mmcache", "mmcaches") and not segments:
        found = {"kind": "static", "hosts": _hosts(places, None), "tls": parts.scheme == "mmcaches"}
    else:
        raise ConfigError(f"{shown!r} names no cluster; {_HELP}")
    mine = {"static": (), "k8s": _K8S_OPTIONS}.get(found["kind"], _REDIS_OPTIONS)
    if options.get("tls", "false") not in ("true", "false") and "tls" in mine:
        raise ConfigError(f"tls={options['tls']!r} is neither true nor false")
    if "fallback" in options and "fallback" in mine:
        found["fallback"] = _hosts(options["fallback"], None)
    if unknown := next((name for name in options if name not in mine), ""):
        raise ConfigError(f"{shown!r} has an unknown option {unknown!r}; {_HELP}")
    return MembersUrl(options=options, **found)


def _redis(
    form: re.Match[str], user: str, places: str, segments: list[str], options: Mapping[str, str], shown: str
) -> dict[str, Any]:
    kind = form[2] or "redis"
    if not _NAME.fullmatch(options.get("cluster", "mmcache")):
        raise ConfigError(f"cluster={options['cluster']!r} is no name; use letters, digits, '.', '_' and '-'")
    found: dict[str, Any] = {"kind": kind, "tls": form[1] == "rediss", "user": user}
    found["hosts"] = _hosts(places, SENTINEL_PORT if kind == "sentinel" else REDIS_PORT)
    if kind == "sentinel":
        if not segments:
            raise ConfigError(f"{shown!r} does not say which master; {_HELP}")
        found["master"] = segments.pop(0)
    if kind == "redis" and len(found["hosts"]) > 1:
        raise ConfigError(f"{shown!r} names several hosts; say mmcache+redis+sentinel or mmcache+redis+cluster")
    if kind == "cluster" and segments:
        raise ConfigError(f"{shown!r} names a database; a Redis Cluster has only one")
    if len(segments) > 1 or not all(re.fullmatch(r"[0-9]{1,4}", part) for part in segments):
        raise ConfigError(f"{shown!r} has a path that is no database number; {_HELP}")
    found["db"] = int(segments[0]) if segments else 0
    return found


def _k8s(namespace: str, segments: list[str], options: Mapping[str, str], shown: str) -> dict[str, Any]:
    if len(segments) != 1 or not _NAME.fullmatch(namespace) or not _NAME.fullmatch(segments[0]):
        raise ConfigError(f"{shown!r} is not mmcache+k8s://NAMESPACE/SERVICE")
    return {"kind": "k8s", "namespace": namespace, "service": segments[0]}


def _hosts(text: str, port: int | None) -> tuple[tuple[str, int], ...]:
    """HOST:PORT by commas. Without a port of its own, `port`; None: mmcache's."""
    places = text.split(",")
    if len(places) > MAX_HOSTS:
        raise ConfigError(f"{len(places)} hosts are named; {MAX_HOSTS} is the most")
    found = []
    for place in places:
        host, given = parse_host_port(place)
        bare = urlsplit(f"//{place}").port is None
        found.append((host, port if port is not None and bare else given))
    if len(set(found)) != len(found):
        raise ConfigError(f"{text!r} names one server twice; name each once")
    if any(not port_ > 0 for _, port_ in found):
        raise ConfigError(f"{text!r} has port 0, where nobody can be reached")
    return tuple(found)


def _static_view(places: tuple[tuple[str, int], ...], scheme: str) -> View:
    texts = [place_text(*place) for place in places]
    return View(tuple(Member(text, f"{scheme}://{text}") for text in texts))


def open_membership(url: str, *, lazy: bool = False) -> Watched | Static:
    """Who is in the cluster that the URL names, followed from now on.

    Raises ConfigError for the URL, a file it names or an extra that is not installed; TransportError if who knows the
    cluster does not answer, or nobody has joined, unless the URL names a `fallback`. With `lazy` nobody is in then.
    """
    parsed = parse_members_url(url)
    source = source_of(parsed)
    if source is None:
        return Static(_static_view(parsed.hosts, parsed.scheme))
    fallback = _static_view(parsed.fallback, parsed.scheme) if parsed.fallback else NOBODY if lazy else None
    return Watched(source, parsed.what, fallback)


def source_of(parsed: MembersUrl) -> Source | None:
    """Who knows the cluster; None where the URL itself does. Raises ConfigError."""
    if parsed.kind == "static":
        return None
    if parsed.kind == "k8s":
        from mmcache.cluster.kubernetes_members import KubernetesSource  # only where it is wanted: it needs an extra

        return KubernetesSource(parsed)
    from mmcache.cluster.redis_members import RedisSource

    return RedisSource(parsed)


def look(parsed: MembersUrl) -> Seen:
    """Who is in now, asked once. Raises ConfigError, TransportError."""
    source = source_of(parsed)
    return source.look() if source is not None else Seen(_static_view(parsed.hosts, parsed.scheme).members)


def redis_url(text: str, name: str) -> str:
    """mmcache+redis://... from redis://..., as `mmcache up --redis` takes it."""
    url = text if text.startswith("mmcache+") else f"mmcache+{text}"
    if not _REDIS.fullmatch(url.partition("://")[0]):
        raise ConfigError(f"{text!r} is no Redis URL; give redis://HOST:PORT/DB or rediss://HOST:PORT/DB")
    if name and "cluster=" not in url:
        url += ("&" if "?" in url else "?") + f"cluster={quote(name)}"
    return url
