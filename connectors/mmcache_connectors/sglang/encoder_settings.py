"""What can be set for the encoder cache: variables of the environment, as SGLang has no argument for a plugin's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from mmcache.errors import ConfigError
from mmcache_connectors.sglang.plugin import PREFIX
from mmcache_connectors.sglang.settings import Settings, parse_settings

_TRUTHS: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class EncoderSettings(Settings):
    """Those of the HiCache backend, and whether pictures' embeddings are shared with other kinds of engines."""

    shared_embeddings: bool = False


def environment_settings(environ: Mapping[str, str]) -> EncoderSettings:
    """MMCACHE_SGLANG_EMBEDDINGS_URL and its like, named and meant as the HiCache backend's settings are.

    Raises ConfigError, with what to change, for any it cannot take, and for none.
    """
    kinds = {field.name: str(field.type) for field in fields(EncoderSettings)}
    given: dict[str, Any] = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX):
            continue
        if name not in kinds:
            known = ", ".join(PREFIX + name.upper() for name in kinds)
            raise ConfigError(f"{variable} is no setting of mmcache's; the known ones are {known}")
        given[name] = _value(variable, text, kinds[name])
    if not given.get("url"):
        raise ConfigError(f'{PREFIX}URL is not set; name a server, such as "mmcache://127.0.0.1:7600"')
    shared = given.pop("shared_embeddings", False)
    return EncoderSettings(**asdict(parse_settings(given)), shared_embeddings=shared)


def _value(variable: str, text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return _TRUTHS[text.lower()]
        return float(text) if kind == "float" else text
    except (KeyError, ValueError):
        raise ConfigError(f"{variable} is {text!r}, which is no {kind}; see the table in docs/sglang.md") from None
