"""The kernels compile for GPUs that are not here, with 16-byte accesses: Triton's compiler needs none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
WIDE = re.compile(r"\.v2\.b64|\.v4\.b32|\.v2\.u64|\.v4\.u32")


@pytest.mark.timeout(300)
def test_every_kernel_compiles_and_moves_16_bytes_at_once(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, "-m", "tests.unit.compile_kernels"]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert len(found) == 4 * 2 * 3
    for kernel, accesses in found.items():
        assert any(WIDE.search(one) for one in accesses if one.startswith("ld")), (kernel, accesses)
        assert any(WIDE.search(one) for one in accesses if one.startswith("st")), (kernel, accesses)
        assert not any(re.search(r"\.b8$|\.u8$|\.b16$|\.u16$", one) for one in accesses), (kernel, accesses)
