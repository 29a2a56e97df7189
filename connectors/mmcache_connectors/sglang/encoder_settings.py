"""What can be set for the encoder cache, by variables of the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mmcache_connectors.sglang.environment import environment_values
from mmcache_connectors.sglang.plugin import PREFIX
from mmcache_connectors.sglang.settings import Settings, parse_settings


@dataclass(frozen=True, slots=True)
class EncoderSettings(Settings):
    """Those of the HiCache backend, and whether pictures' embeddings are shared with other kinds of engines."""

    shared_embeddings: bool = False


def environment_settings(environ: Mapping[str, str]) -> EncoderSettings:
    """MMCACHE_SGLANG_EMBEDDINGS_URL and its like, named and meant as the HiCache backend's settings are.

    Raises ConfigError, with what to change, for any it cannot take, and for none.
    """
    given = environment_values(environ, PREFIX, EncoderSettings)
    shared = given.pop("shared_embeddings", False)
    return EncoderSettings(**asdict(parse_settings(given)), shared_embeddings=shared)
