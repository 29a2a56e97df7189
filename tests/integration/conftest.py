"""For all tests here: Triton's interpreter runs the kernels, and Redis may take longer to answer."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


@pytest.fixture
def patient_with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stands still for a while Redis is late, and not lost."""
    for module in ("redis_link", "registration"):
        monkeypatch.setattr(f"mmcache.cluster.{module}.WAIT_S", 10.0)
