"""What runs a download again: until it works, three times at most, and then it ends as the last one did."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.support import ROOT

COUNTED = 'echo >> "$0"; tries=$(wc -l < "$0"); [ "$tries" -ge "$1" ] || exit "$tries"'


@pytest.mark.parametrize(("works_at", "tries", "ended"), [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 3, 3)])
def test_what_fails_is_tried_again(works_at: int, tries: int, ended: int, tmp_path: Path) -> None:
    counted = tmp_path / "two words"
    command = ["bash", str(ROOT / "scripts" / "again.sh"), "bash", "-c", COUNTED, str(counted), str(works_at)]
    environment = os.environ | {"AGAIN_PAUSES_S": "0 0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ended
    assert counted.read_text().count("\n") == tries
    assert done.stderr.count("tried again") == tries - 1


def test_what_is_interrupted_is_not_tried_again(tmp_path: Path) -> None:
    counted, script = tmp_path / "counted", ROOT / "scripts" / "again.sh"
    command = ["bash", str(script), "bash", "-c", 'echo >> "$0"; kill -INT $PPID; exit 1', str(counted)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored from the start, no shell traps
    try:
        done = subprocess.run(command, env=os.environ | {"AGAIN_PAUSES_S": "0 0"}, timeout=60, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert counted.read_text() == "\n"
