"""Lets SGLang start on a machine without a GPU: run when Python starts with this folder on PYTHONPATH.

torchvision's wheel registers operators that a CPU build of torch lacks; it imports once two of them are declared. The
kernels SGLang expects are the package beside this file.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class _DeclareOperators(MetaPathFinder):
    """Declares torchvision's operators just before torchvision is first imported, and steps aside."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.kept = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.kept.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
            sys.modules["_torchvision_operators"] = self  # type: ignore[assignment]  # else they go with this object


sys.meta_path.insert(0, _DeclareOperators())
