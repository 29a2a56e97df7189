"""The fuzz targets by name, and why one cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.fuzz import grpc_target
from tests.fuzz.bed import Target
from tests.fuzz.client_target import ClientTarget
from tests.fuzz.frame_target import FrameTarget
from tests.fuzz.grpc_target import GrpcTarget
from tests.fuzz.planted_target import PlantedTarget
from tests.fuzz.server_target import ServerTarget

TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "frame": FrameTarget,
    "server": ServerTarget,
    "client": ClientTarget,
    "grpc": GrpcTarget,
    "planted": PlantedTarget,
}
REAL: Final = [name for name in TARGETS if name != "planted"]


def unavailable(name: str) -> str:
    """Why a target cannot run here; empty where it can."""
    return grpc_target.unavailable() if name == "grpc" else ""
