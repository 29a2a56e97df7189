"""Sizes and counts, and what people write for them. PURE."""

from __future__ import annotations

import re
from typing import Final

from mmcache.errors import ConfigError

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
_UNITS: Final = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
                 "kib": KiB, "mib": MiB, "gib": GiB, "tib": 1 << 40}  # fmt: skip


def parse_nbytes(text: str | int) -> int:
    """Bytes from '1GiB', '512 MiB', '64kb' or a plain number. Raises ConfigError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", text)
    unit = match and _UNITS.get(match[2].lower())
    if not match or not unit:
        raise ConfigError(f"{text!r} is not a size; write a number with a unit, for example 512MiB or 4GiB")
    return int(float(match[1]) * unit)


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: '1 photo', '2,000 photos'."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def place_text(host: str, port: int) -> str:
    """HOST:PORT, with brackets where HOST is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
