"""For all tests: Triton's interpreter runs the kernels (set before Triton is imported); Hypothesis times nothing."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("mmcache", deadline=None)  # a busy machine is no failure
settings.load_profile("mmcache")
