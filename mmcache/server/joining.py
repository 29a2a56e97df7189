"""A server joins a cluster: what it is called there, where others find it, and how much of the keys it takes."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mmcache.cluster.seen import check_address
from mmcache.cluster.settings import parse_cluster_url
from mmcache.cluster.urls import MembersUrl, parse_members_url
from mmcache.config import GiB, ServerConfig, parse_host_port, place_text
from mmcache.errors import ConfigError

if TYPE_CHECKING:
    from mmcache.cluster.registration import Registration


def joined_url(join: str) -> MembersUrl:
    """The URL of --join. Raises ConfigError for one where a server has nothing to say."""
    parsed = parse_members_url(parse_cluster_url(join).members)  # clients' options mean nothing here, and are no harm
    if parsed.kind == "static":
        raise ConfigError(f"--join {join}: a list of servers is joined by standing in it; leave --join out")
    if parsed.kind == "k8s":
        raise ConfigError(f"--join {join}: Kubernetes knows its pods without being told; leave --join out")
    return parsed


def advertised(config: ServerConfig, port: int) -> str:
    """The address by which clients on other hosts reach a server that listens on `port`. Raises ConfigError."""
    if not config.listen:
        raise ConfigError("--join needs an address to give to clients; give --listen HOST:PORT")
    own = "mmcaches" if config.tls_cert else "mmcache"
    if config.advertise:
        parts = urlsplit(config.advertise)
        if not parts.netloc:
            return check_address(config.advertise)  # which says what an address is
        host, given = parse_host_port(parts.netloc)
        own_port = given if urlsplit(f"//{parts.netloc}").port else port
        return check_address(f"{parts.scheme}://{place_text(host, own_port)}{parts.path}")
    host, _ = parse_host_port(config.listen)
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    if everywhere:
        raise ConfigError(
            f"--listen {config.listen} does not say where others find this server; give --advertise {own}://HOST:PORT"
        )
    return check_address(f"{own}://{place_text(host, port)}")


def check_join(config: ServerConfig) -> None:
    """Raises ConfigError now for what `registration_for` would raise later, when memory has been taken."""
    if config.join:
        url = joined_url(config.join)
        advertised(config, 1)
        from mmcache.cluster.redis_link import RedisLink  # only where it is wanted: it needs an extra

        RedisLink(url)


def registration_for(config: ServerConfig, port: int) -> Registration:
    """What says that this server is there. Its id is its address. Raises ConfigError."""
    from mmcache.cluster.registration import Registration  # only where it is wanted: it needs an extra

    url, address = joined_url(config.join), advertised(config, port)
    weight = config.weight or config.memory_nbytes / GiB
    return Registration(url, id=address.partition("://")[2], address=address, weight=weight)
