"""The SGLang-diffusion suite runs in the engine's own environment (`make test-engines-full`), all of it `full`."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Where mmcache's own test settings are not read."""
    config.addinivalue_line("markers", "full: takes long; not part of the quick suite")
