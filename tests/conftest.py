"""For all tests: Triton's interpreter runs the kernels (set before Triton is imported); Hypothesis times nothing."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
with contextlib.suppress(ImportError):  # an engine's environment has none
    from hypothesis import settings

    settings.register_profile("mmcache", deadline=None)  # a busy machine is no failure
    settings.load_profile("mmcache")
