"""Configuration objects as text facts: which fields are in, and one text for each value.

Knows no vLLM: the table (config_fields.toml) names classes and fields, the objects are read by what they are (data
classes, enumerations, mappings). facts.py says where an engine's facts come from.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any, Final

from mmcache.encoding import digest
from mmcache.errors import KeyInputError
from mmcache.identity import file_digest

Table = Mapping[str, Mapping[str, str]]  # class -> field -> "in: why" or "out: why"

ENVIRONMENT: Final = "environment"  # the one table that is no class
MAX_TEXT_CHARS: Final = 256
MAX_DEPTH: Final = 32
MAX_FILE_NBYTES: Final = 64 << 20
_LOCAL: Final = re.compile(r"/|~|file:|\\\\|[a-z]:[/\\]|\.\.?([/\\]|$)", re.IGNORECASE)
# What a Hugging Face configuration says about where it came from and who wrote it, not about the model.
_PROVENANCE: Final = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"})


class NoCanonicalForm(Exception):
    """A value that has no one text: another process would write the same value differently, or another one alike."""


def read_table() -> dict[str, dict[str, str]]:
    """config_fields.toml. A verdict that does not begin with "in: " or "out: " raises ValueError: mend the file."""
    table = tomllib.loads(files(__package__).joinpath("config_fields.toml").read_text("utf-8"))
    for name, fields in table.items():
        for field, verdict in fields.items():
            if not re.match(r"(in|out): \S", verdict):
                raise ValueError(f"config_fields.toml: {name}.{field} is {verdict!r}; begin it with 'in: ' or 'out: '")
    return table


def read_encoder_table() -> dict[str, dict[str, str]]:
    """The same for an encoder's output: what encoder_fields.toml names is out as well."""
    table = read_table()
    for name, fields in tomllib.loads(files(__package__).joinpath("encoder_fields.toml").read_text("utf-8")).items():
        for field, why in fields.items():
            table.setdefault(name, {})[field] = f"out: {why}"
    return table


def config_texts(
    config: object, table: Table, *, unlisted: Callable[[str], None], unknown: Callable[[str, str], str]
) -> dict[str, str]:
    """Every IN field of `config`, and of the listed configurations inside it, as "place.field" -> canonical text.

    `unlisted(place)` is called for a field the table lacks, which is then in; `unknown(place, why)` gives the text of a
    value without a canonical form. Raises nothing for any value of any field.
    """
    return dict(_walk(config, "", table, unlisted, unknown, 0))


def _walk(
    config: Any,
    prefix: str,
    table: Table,
    unlisted: Callable[[str], None],
    unknown: Callable[[str, str], str],
    depth: int,
) -> Iterator[tuple[str, str]]:
    verdicts = table.get(type(config).__name__, {})
    for field in dataclasses.fields(config):
        place = prefix + field.name
        if field.name not in verdicts:
            unlisted(f"{type(config).__name__}.{field.name}")
        elif verdicts[field.name].startswith("out:"):
            continue
        value = getattr(config, field.name, None)
        if type(value).__name__ in table and dataclasses.is_dataclass(value) and depth < MAX_DEPTH:
            yield from _walk(value, f"{place}.", table, unlisted, unknown, depth + 1)
        else:
            yield place, text_or(unknown, value, place)


def text_or(unknown: Callable[[str, str], str], value: object, place: str) -> str:
    """`canonical_text(value)`, or what `unknown(place, why)` gives when there is none."""
    try:
        return canonical_text(value)
    except NoCanonicalForm as error:
        return unknown(place, str(error))
    except Exception as error:  # a value's own code ran (a property): whatever it does, the engine starts
        return unknown(place, f"{type(error).__name__}: {error}")


def canonical_text(value: object) -> str:
    """The one text of a value: the same in every process for equal values, another for any other.

    A str is itself, unless it reads as something else (then quoted); other values are JSON with sorted keys; a text of
    more than 256 characters is "b3:" and its digest. Text that is the path of a readable file of at most 64 MiB stands
    for the file's contents. Raises NoCanonicalForm: any other path, a function without a name, an unknown object.
    """
    plain = _plain(value, 0)
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True)
    if isinstance(plain, str) and not _reads_as_other(plain):
        text = plain
    if len(text) > MAX_TEXT_CHARS:
        return "b3:" + digest("vllm.fact", text.encode("utf-8", "surrogatepass")).hex()
    return text


def _reads_as_other(text: str) -> bool:
    """True for text that is also the form of a value that is no str, or of a digest, or that no namespace takes."""
    try:
        json.loads(text)
    except ValueError:
        return text.startswith(("b3:", "{", "[", '"')) or not text.isprintable() or not text
    return True


def _plain(value: Any, depth: int) -> Any:
    """The value in what JSON knows; what is no list, mapping or scalar gets a mapping that names its kind."""
    if depth > MAX_DEPTH:
        raise NoCanonicalForm(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, enum.Enum):  # before str and int, which an enumeration may also be
        return {"enum": f"{type(value).__qualname__}.{value.name}"} if value.name else _plain(value.value, depth + 1)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, PurePath):
        return _contents(str(value))
    if isinstance(value, Mapping):
        return _mapping(value, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((_plain(item, depth + 1) for item in value), key=_sort_key)}
    return _object(value, depth)


def _object(value: Any, depth: int) -> Any:
    cls = type(value)
    if cls.__module__ == "torch" and cls.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        if "<" in value.__qualname__:
            raise NoCanonicalForm(f"{value.__qualname__} has no name another process could find it by")
        return {"code": f"{value.__module__}.{value.__qualname__}"}
    if _is_hub_config(value) or dataclasses.is_dataclass(value):
        state = {name: _plain(item, depth + 1) for name, item in _state(value).items()}
        return {"class": cls.__qualname__, "state": state}
    raise NoCanonicalForm(f"object of type {cls.__module__}.{cls.__qualname__}")


def _mapping(value: Mapping[Any, Any], depth: int) -> Any:
    if all(isinstance(key, str) and not isinstance(key, enum.Enum) for key in value):
        return {"map": {str(key): _plain(item, depth + 1) for key, item in value.items()}}
    pairs = [[_plain(key, depth + 1), _plain(item, depth + 1)] for key, item in value.items()]
    return {"pairs": sorted(pairs, key=_sort_key)}


def _sort_key(plain: object) -> str:
    return json.dumps(plain, sort_keys=True)


def _is_hub_config(value: object) -> bool:
    return any(base.__name__ in ("PretrainedConfig", "PreTrainedConfig") for base in type(value).__mro__)


def _state(value: Any) -> dict[str, Any]:
    """All that code can read from it: declared fields, and the attributes set beside them.

    The configurations of transformers 5 are data classes to which overrides may add any attribute, and their own
    to_dict() drops some. What begins with "_" beside the fields is bookkeeping, set while a model is loaded.
    """
    declared = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    state = {field.name: getattr(value, field.name) for field in declared}
    state |= {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if _is_hub_config(value):
        state["model_type"] = getattr(value, "model_type", None)
        state = {name: item for name, item in state.items() if name not in _PROVENANCE}
    return state


def _text(text: str) -> Any:
    if _LOCAL.match(text) or ("/" in text and os.path.exists(text)):
        return _contents(text)
    return str.__str__(text)


def _contents(path: str) -> dict[str, str]:
    """A file's digest: other bytes can be put under one path. Only what a start can afford to read."""
    file = Path(path).expanduser()
    try:
        if file.is_file() and file.stat().st_size <= MAX_FILE_NBYTES:
            return {"file": file_digest(file)}
    except (OSError, KeyInputError):
        pass
    raise NoCanonicalForm(f"{path!r} looks like a path, and names no readable file of at most {MAX_FILE_NBYTES} bytes")
