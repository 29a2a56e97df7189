"""The fuzz targets by name, and why one cannot run here."""

from __future__ import annotations

import importlib
from typing import Final

from tests.fuzz.bed import Target

_CLASSES: Final = {
    "frame": "FrameTarget",
    "server": "ServerTarget",
    "client": "ClientTarget",
    "grpc": "GrpcTarget",
    "planted": "PlantedTarget",
}
TARGETS: Final = frozenset(_CLASSES)
REAL: Final = [name for name in _CLASSES if name != "planted"]


def start(name: str) -> Target:
    """A target, ready to be fed. What it tests is imported only now."""
    target: Target = getattr(importlib.import_module(f"tests.fuzz.{name}_target"), _CLASSES[name])()
    return target


def unavailable(name: str) -> str:
    """Why a target cannot run here; empty where it can."""
    if name != "grpc":
        return ""
    why: str = importlib.import_module("tests.fuzz.grpc_target").unavailable()
    return why
