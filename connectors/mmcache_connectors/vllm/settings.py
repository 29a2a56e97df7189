"""The connectors' settings: a table each, one parser of vLLM's extra configs. docs/vllm.md explains them.

A dict in, a frozen Settings or EncoderSettings out, or a ConfigError that names the setting and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, TypeVar

from mmcache.cluster.settings import parse_any_url
from mmcache.errors import ConfigError

S = TypeVar("S", bound="CacheSettings")
MAX_BUFFER_MIB: Final = 1 << 20
LOOKUP_SHARE: Final = 0.25  # of deadline_s, for finding out what is stored; the rest is for loading it


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """What both connectors take. Times in seconds, unless the name says otherwise."""

    PLACE: ClassVar[str]  # what vLLM calls the object these come in

    url: str = field(metadata={"help": "the cache: mmcache://HOST:PORT or mmcache+unix:///PATH, with client options"})
    deadline_s: float = field(
        default=1.0,
        metadata={"help": "the most that a cache which does not answer may delay a request; then it is computed"},
    )
    lookup_wait_ms: float = field(
        default=0.5,
        metadata={"help": "the most the scheduler waits for lookups in one step, before it asks again next step"},
    )
    save_buffer_mib: int = field(
        default=256, metadata={"help": "host memory a worker may fill with what is on its way out; more is dropped"}
    )
    trust_media_uuids: bool = field(
        default=False,
        metadata={
            "help": "true: a media item is what its uuid (or vLLM's hash) says. false: also a digest of its processed "
            "features, so a forged uuid cannot reach what another item left"
        },
    )
    audit_share: float = field(
        default=0.0,
        metadata={
            "help": "the share of hits, 0 to 1, that are computed all the same, to compare what is stored with what "
            "was computed; entries that differ are dropped and counted"
        },
    )
    model_identity: str = field(
        default="",
        metadata={"help": "names all files of the model; empty: a digest of its directory, or repository@commit"},
    )
    weights_epoch: str = field(
        default="", metadata={"help": "names in-place weight updates; empty: reset_cache() picks a random one"}
    )
    extra_facts: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "further facts for the namespace; each only narrows what is shared"}
    )

    def __post_init__(self) -> None:
        if not 0.01 <= self.deadline_s <= 600:
            raise ConfigError(f"deadline_s is {self.deadline_s}; use seconds from 0.01 to 600")
        if not 0 <= self.lookup_wait_ms <= 100:
            raise ConfigError(f"lookup_wait_ms is {self.lookup_wait_ms}; use milliseconds from 0 to 100")
        if not 1 <= self.save_buffer_mib <= MAX_BUFFER_MIB:
            raise ConfigError(f"save_buffer_mib is {self.save_buffer_mib}; use MiB from 1 to {MAX_BUFFER_MIB}")
        if not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share is {self.audit_share}; use a share from 0 to 1")
        for name, value in self.extra_facts.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise ConfigError(f"extra_facts: {name!r} is not text; write names and values as strings")
        if parse_any_url(self.url).scheme == "embedded":
            raise ConfigError(
                f"url is {self.url!r}: vLLM's scheduler and workers would each hold a cache of their own and never "
                "find each other's blocks; start `mmcache serve` and use its mmcache:// URL"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(CacheSettings):
    """What `kv_connector_extra_config` may hold."""

    PLACE: ClassVar[str] = "kv_connector_extra_config"

    load_mode: str = field(
        default="async",
        metadata={
            "help": "async: the engine runs on while blocks load. sync: the step waits for them; for one worker, one "
            "KV group and no asynchronous scheduling, elsewhere loads are async all the same"
        },
    )
    save_decode_blocks: bool = field(
        default=True, metadata={"help": "also store blocks that hold generated tokens, for the next turn of a chat"}
    )
    explain_misses: bool = field(
        default=True, metadata={"help": "have responses say why blocks were missing, which asks the server, later"}
    )
    record_misses: str = field(
        default="",
        metadata={
            "help": "a folder for the last requests that missed, for `mmcache explain --request`; their prompts are in "
            "it. Empty: none"
        },
    )

    def __post_init__(self) -> None:
        CacheSettings.__post_init__(self)
        if self.load_mode not in ("async", "sync"):
            raise ConfigError(f"load_mode is {self.load_mode!r}; use async or sync")

    @property
    def lookup_s(self) -> float:
        """How long a request may wait to learn what is stored."""
        return self.deadline_s * LOOKUP_SHARE

    @property
    def load_s(self) -> float:
        """How long a request may wait for blocks from a cache that stopped answering."""
        return self.deadline_s * (1 - LOOKUP_SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings(CacheSettings):
    """What `ec_connector_extra_config` may hold."""

    PLACE: ClassVar[str] = "ec_connector_extra_config"

    load_buffer_mib: int = field(
        default=1024,
        metadata={"help": "host memory for fetched embeddings that are not used yet; what finds no room is a miss"},
    )
    shared_embeddings: bool = field(
        default=False,
        metadata={"help": "true: pictures' embeddings are shared with other kinds of engines, where that was measured"},
    )

    def __post_init__(self) -> None:
        CacheSettings.__post_init__(self)
        if not 1 <= self.load_buffer_mib <= MAX_BUFFER_MIB:
            raise ConfigError(f"load_buffer_mib is {self.load_buffer_mib}; use MiB from 1 to {MAX_BUFFER_MIB}")
        if self.shared_embeddings and self.trust_media_uuids:
            raise ConfigError(
                "shared_embeddings goes by what a picture is, trust_media_uuids by its name; set one only"
            )


def parse_settings(extra: Mapping[str, Any], kind: type[S]) -> S:
    """Settings from an extra config. Raises ConfigError for an unknown name, a wrong type or no url."""
    known = {one.name: one for one in fields(kind)}
    unknown = sorted(set(extra) - set(known))
    if unknown:
        raise ConfigError(f"{kind.PLACE} has no setting {', '.join(map(repr, unknown))}; it takes {', '.join(known)}")
    if not extra.get("url"):
        raise ConfigError(f'{kind.PLACE} needs "url", for example "mmcache://127.0.0.1:7600"')
    return kind(**{name: _typed(name, str(known[name].type), value) for name, value in extra.items()})


def _typed(name: str, kind: str, value: Any) -> Any:
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("Mapping") and isinstance(value, Mapping):
        return dict(value)
    wanted = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a string"}
    raise ConfigError(f"{name} is {value!r}; write {wanted.get(kind, 'an object of strings')}")
