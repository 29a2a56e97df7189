"""What can be set for the HiCache backend: the keys of --hicache-storage-backend-extra-config that are mmcache's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from mmcache.cluster.settings import parse_any_url
from mmcache.errors import ConfigError

# SGLang's own keys in the same object; those it has not taken out by the time a backend sees them.
SGLANG_KEYS: Final = ("allocator", "backend_name", "class_name", "interface_v1", "module_path")


@dataclass(frozen=True, slots=True)
class Settings:
    """`url` must be given; docs/sglang.md has the table."""

    url: str
    deadline_s: float = 1.0
    model_identity: str = ""
    verify: bool = True


def parse_settings(extra_config: Mapping[str, Any]) -> Settings:
    """The settings in SGLang's extra config. Raises ConfigError, with what to change, for any it cannot take."""
    given = {name: value for name, value in extra_config.items() if name not in SGLANG_KEYS}
    known = {field.name: field for field in fields(Settings)}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} for mmcache; the known ones are {', '.join(known)}")
        wanted = {"str": (str,), "float": (float, int), "bool": (bool,)}[str(known[name].type)]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{name}={value!r} is no {known[name].type}; see the table in docs/sglang.md")
    if not given.get("url"):
        raise ConfigError('"url" is missing from the extra config; name a server, such as "mmcache://127.0.0.1:7600"')
    settings = Settings(**given)
    if not settings.deadline_s > 0:
        raise ConfigError(f"deadline_s={settings.deadline_s!r} must be above 0: seconds a call may take at most")
    if parse_any_url(settings.url).scheme == "embedded":
        raise ConfigError(
            f"url={settings.url!r}: every scheduler process would hold a cache of its own, lost when it ends; "
            "start `mmcache serve` and name it: mmcache://HOST:PORT"
        )
    return settings
