"""Settings where SGLang has no argument for a plugin's: variables of the environment that begin with a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache_connectors.sglang.settings import Settings

_TRUTHS: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def environment_values(environ: Mapping[str, str], prefix: str, kind: type[Settings]) -> dict[str, Any]:
    """The fields of `kind` that are given: PREFIX + URL, and its like.

    Raises ConfigError, with what to change, for any it cannot take, and for no URL.
    """
    kinds = {field.name: str(field.type) for field in fields(kind)}
    given: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(prefix).lower()
        if not variable.startswith(prefix):
            continue
        if name not in kinds:
            known = ", ".join(prefix + name.upper() for name in kinds)
            raise ConfigError(f"{variable} is no setting of mmcache's; the known ones are {known}")
        given[name] = _value(variable, text, kinds[name])
    if not given.get("url"):
        raise ConfigError(f'{prefix}URL is not set; name a server, such as "mmcache://127.0.0.1:7600"')
    return given


def _value(variable: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return _TRUTHS[text.lower()]
        return float(text) if kind == "float" else text
    except (KeyError, ValueError):
        raise ConfigError(f"{variable} is {text!r}, which is no {kind}; see the table in docs/sglang.md") from None
