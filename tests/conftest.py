"""For all tests: Hypothesis times nothing, as a busy machine is no failure."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):  # an engine's environment has none
    from hypothesis import settings

    settings.register_profile("mmcache", deadline=None)
    settings.load_profile("mmcache")
