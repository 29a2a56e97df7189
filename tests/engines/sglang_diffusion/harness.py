"""SGLang-diffusion as tests use it: start it in a process of its own, ask it for pictures, end it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mmcache_connectors.sglang.diffusion_plugin import PREFIX
from tests.engines.sglang.harness import START_S, Driven, shim_environment
from tests.engines.sglang_diffusion.counting import LINE

HERE = Path(__file__).resolve().parent
ANSWER_S = 120.0


class Made(NamedTuple):
    """A picture's digest, and how often a text encoder ran for it."""

    picture: str
    passes: int


class Diffusion(Driven):
    """An engine process. `settings`: of mmcache, as variables of its environment without their prefix."""

    def __init__(self, model: Path, plugins: Path, settings: Mapping[str, str] | None) -> None:
        environment = shim_environment() | {PREFIX + name: text for name, text in (settings or {}).items()}
        environment["PYTHONPATH"] += f"{os.pathsep}{plugins}"
        super().__init__([str(HERE / "driver.py"), "{answers}", str(model)], environment)

    def wait_ready(self) -> Diffusion:
        """Wait until it takes prompts; AssertionError, with its log, if it ends or takes too long."""
        assert self.read(START_S) == {"ready": True}
        return self

    def ask(self, prompt: str) -> Made:
        """Have it make a picture; AssertionError if it fails or takes too long."""
        before = len(self.lines(LINE))
        self.tell(json.dumps(prompt))
        picture: str = self.read(ANSWER_S)["picture"]
        return Made(picture, len(self.lines(LINE)) - before)


@contextlib.contextmanager
def diffusing(model: Path, plugins: Path, settings: Mapping[str, str] | None) -> Iterator[Diffusion]:
    """An engine that is ready; killed on leaving, as a crash would end it."""
    engine = Diffusion(model, plugins, settings)
    try:
        yield engine.wait_ready()
    finally:
        engine.stop()
