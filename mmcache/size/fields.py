"""A model's config, read with its types: a number in range, a word, a list, a section, or an error that names it.

Configs come from strangers, so nothing of one is used before it was looked at. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mmcache.errors import ConfigError

MAX_NUMBER: Final = 1 << 24  # heads, layers, sizes and windows are below; products of a few of them are no trouble
MAX_LAYERS: Final = 1 << 12


class Fields:
    """One object of a config. `place` names it in errors: '' for the outermost, else 'text_config.' and the like."""

    def __init__(self, values: Mapping[str, object], place: str = "") -> None:
        self._values, self._place = values, place

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def says(self, name: str) -> bool:
        """Whether it is there at all, null included."""
        return name in self._values

    def number(self, *names: str, least: int = 0, most: int = MAX_NUMBER) -> int | None:
        """The first of these that is there, a whole number in range; None if none is. Raises ConfigError."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ConfigError(
                    f"{self._place}{name} is {_shown(value)}; it must be a whole number, {least} to {most}"
                )
            return value
        return None

    def need(self, *names: str, default: int | None = None, most: int = MAX_NUMBER) -> int:
        """As `number`, at least 1, or the default. Raises ConfigError if there is neither."""
        found = self.number(*names, least=1, most=most)
        if found is None:
            found = default
        if found is None:
            raise ConfigError(f"the config has no {self._place}{names[0]}; give the model's own config.json, complete")
        return found

    def ratio(self, name: str, default: float) -> float:
        """A number above 0, at most 16. Raises ConfigError."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 16:
            raise ConfigError(f"{self._place}{name} is {_shown(value)}; it must be a number above 0, at most 16")
        return float(value)

    def text(self, *names: str) -> str:
        """The first of these that is there, a string; '' if none is. Raises ConfigError."""
        for name in names:
            value = self._values.get(name)
            if value is not None:
                if not isinstance(value, str) or len(value) > 256:
                    raise ConfigError(f"{self._place}{name} is {_shown(value)}; it must be a short string")
                return value
        return ""

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Raises ConfigError."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self._place}{name} is {_shown(value)}; it must be true or false")
        return value

    def items(self, name: str) -> list[object] | None:
        """A list, at most as long as a model has layers; None if it is not there. Raises ConfigError."""
        value = self._values.get(name)
        if value is not None and (not isinstance(value, list) or len(value) > MAX_LAYERS):
            raise ConfigError(f"{self._place}{name} is {_shown(value)}; it must be a list of at most {MAX_LAYERS}")
        return value

    def section(self, *names: str) -> Fields | None:
        """The first of these objects that is there; None if none is. Raises ConfigError."""
        for name in names:
            value = self._values.get(name)
            if value is not None:
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{self._place}{name} is {_shown(value)}; it must be an object")
                return Fields(value, f"{self._place}{name}.")
        return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
