"""What a failed check compared is told as for any test."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(*(f"mmcache.testing.{name}" for name in ("contract", "leaks", "trouble", "way")))
