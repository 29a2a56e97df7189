"""Fixtures of the suite that runs both engines. It runs in vLLM's environment; SGLang's interpreter is SGLANG_PYTHON.

What one engine stores the other reads: one process of each is up, before one cache.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.engines.cross.models import truths, write_model, write_pictures

TIMEOUT_S = 600  # two engines start in a fixture


class Made:
    """A folder with pictures, and with models from when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pictures = {file.stem: file for file in write_pictures(folder / "pictures")}
        self.model = cache(lambda name: write_model(folder, name))
        self.truth = cache(lambda name: truths(self.model(name), list(self._pictures.values())))

    def pictures(self, *names: str) -> list[Path]:
        """The files of these pictures."""
        return [self._pictures[name] for name in names]


def pytest_configure(config: pytest.Config) -> None:
    """`-m "not full"` is the quick suite."""
    config.addinivalue_line("markers", "full: takes long; not part of the quick suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines start slowly: give every test of this folder more time than the project's default."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Models and pictures."""
    return Made(tmp_path_factory.mktemp("cross"))
