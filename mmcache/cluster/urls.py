"""From a URL to a membership."""

from __future__ import annotations

from urllib.parse import urlsplit

from mmcache.cluster.membership import Membership, Static
from mmcache.cluster.placement import Member, View
from mmcache.config import parse_host_port
from mmcache.errors import ConfigError


def open_membership(url: str) -> Membership:
    """For `mmcache://HOST:PORT,HOST:PORT`, or mmcaches: a list that stays as it is. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme not in ("mmcache", "mmcaches") or parts.query or parts.path not in ("", "/") or "@" in parts.netloc:
        raise ConfigError(f"{url!r} names no cluster; use mmcache://HOST:PORT,HOST:PORT")
    members = []
    for text in parts.netloc.split(","):
        host, port = parse_host_port(text)
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        members.append(Member(name, f"{parts.scheme}://{name}"))
    return Static(View(tuple(members)))
