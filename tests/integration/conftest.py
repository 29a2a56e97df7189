"""For the tests here: the Triton kernels are run by Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
