"""Triton's interpreter runs the kernels in the tests here: it must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
