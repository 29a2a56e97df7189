"""What each of several shards is given, and how long one that died is left alone. Decisions only: nothing is started.

Shard N listens N ports above the first, on a unix socket of its own, and has an even share of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Final
from urllib.parse import urlsplit

from mmcache.config import ENV_PREFIX, ServerConfig, parse_host_port, place_text
from mmcache.errors import ConfigError

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
STEADY_S: Final = 60.0  # a shard that ran so long has recovered: the next pause is the first one again
_PORTS: Final = ("listen", "metrics", "grpc")


def shard_configs(config: ServerConfig) -> list[ServerConfig]:
    """The settings of each of `config.shards` processes. Raises ConfigError if ports would not do."""
    count = config.shards
    owners: dict[tuple[str, int], str] = {}
    found = []
    for number in range(count):
        changed: dict[str, Any] = {name: _moved(getattr(config, name), number) for name in _PORTS}
        for name in filter(changed.get, _PORTS):
            place = parse_host_port(changed[name])
            owner = owners.setdefault(place, name) if place[1] else name
            if owner != name:
                both = " and ".join(f"{one} {getattr(config, one)}" for one in _PORTS if one in (owner, name))
                raise ConfigError(
                    f"{both} would want the same port with {count} shards; leave {count} from each on, or use port 0"
                )
        if config.unix_path not in ("", "auto"):
            changed["unix_path"] = f"{config.unix_path}.{number}"
        memory_nbytes, max_entries = config.memory_nbytes // count, config.max_entries // count
        if config.advertise:
            scheme, marks, told = config.advertise.partition("://")
            if urlsplit(f"//{told}").port:  # else it is the port of each
                changed["advertise"] = f"{scheme}{marks}{_moved(told, number)}"
        found.append(
            replace(
                config, **changed, shards=1, memory_nbytes=memory_nbytes, max_entries=max_entries,
                weight=config.weight / count,
            )
        )  # fmt: skip
    return found


def _moved(place: str, number: int) -> str:
    """HOST:PORT so many ports on; port 0, and no place, stay."""
    if not place:
        return ""
    host, port = parse_host_port(place)
    if port + number > 65535:
        raise ConfigError(f"there is no port for shard {number} from {place} on; choose a lower one, or port 0")
    return place_text(host, port + number if port else 0)


def where_it_is(config: ServerConfig, ready: Mapping[str, Any]) -> ServerConfig:
    """The settings with which a shard comes back to the ports that its ready line told."""
    told = {
        "listen": ready["url"].partition("://")[2] if config.listen else "",
        "metrics": ready.get("metrics_url", "").removeprefix("http://").removesuffix("/metrics"),
        "grpc": ready.get("grpc_address", ""),
    }
    return replace(config, **told)


def environment_of(config: ServerConfig) -> dict[str, str]:
    """The MMCACHE_ variables that give a server exactly these settings."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values["memory"] = values.pop("memory_nbytes")  # the one with a name of its own
    return {f"{ENV_PREFIX}{name.upper()}": _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def pause_s(deaths: int) -> float:
    """Seconds before a shard is started again that has died `deaths` times, 1 or more, without running STEADY_S."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(deaths - 1, 16))
