"""What runs both engines' suites at the same time: a failure of either is one, and nothing outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support import ROOT, eventually

SCRIPT = [sys.executable, str(ROOT / "tests" / "engines" / "side_by_side.py")]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 0), (0, 3), (1, 2)])
def test_it_fails_if_any_does_and_says_which(first: int, second: int) -> None:
    words = ["one", f"echo a; exit {first}", "other", f"echo b >&2; exit {second}"]
    ended = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == (1 if first or second else 0)
    lines = ended.stdout.splitlines()
    assert sorted(lines[:2]) == ["one   | a", "other | b"]
    names = [f"{name} (exit status {code})" for name, code in (("one", first), ("other", second)) if code]
    assert lines[2:] == ([f"failed: {', '.join(names)}"] if names else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_was_begun(number: signal.Signals, tmp_path: Path) -> None:
    begun = [tmp_path / "one", tmp_path / "other"]
    words = [word for path in begun for word in (path.name, f": > {path}; sleep 100; echo went on")]
    with subprocess.Popen([*SCRIPT, *words], stdout=subprocess.PIPE, text=True) as process:
        eventually(lambda: all(path.exists() for path in begun), "both have begun")
        process.send_signal(number)
        said, _ = process.communicate(timeout=50)  # whoever lives can still say something, and is waited for
    assert process.returncode == 1
    assert said == f"failed: one (exit status {-number}), other (exit status {-number})\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_they_begin_ends_those_that_begin_later_too(number: signal.Signals) -> None:
    words = ["first", f"kill -{number} $PPID; sleep 100"]
    words += [word for name in ("one", "other") for word in (name, "sleep 100")]
    ended = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    statuses = [f"{name} (exit status {-number})" for name in words[::2]]
    assert ended.stdout == f"failed: {', '.join(statuses)}\n"
