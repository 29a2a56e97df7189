"""What README.md and docs/python.md show runs as it stands, with the base install alone, and what they tell is so."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import mmcache
from mmcache import errors
from mmcache.config import ClientConfig, parse_nbytes
from mmcache.transport.base import Outcome
from tests.integration.support import ROOT

PYTHON_MD = (ROOT / "docs" / "python.md").read_text()
WITHOUT_EXTRAS = "import sys\nfor name in ('PIL', 'av', 'skimage', 'torch'):\n    sys.modules[name] = None\n"


def run_samples(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Every Python block of a page, from top to bottom in one process."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join([WITHOUT_EXTRAS, *blocks])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_samples_run(page: str, tmp_path: Path) -> None:
    ended = run_samples((ROOT / page).read_text(), tmp_path)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    warnings = ended.stderr.splitlines()
    assert len(warnings) == ("nobody" in (ROOT / page).read_text())  # one sample's server is not there
    assert all("<Client mmcache://127.0.0.1:1> does not answer" in line for line in warnings)


def test_a_sample_that_does_not_run_is_noticed(tmp_path: Path) -> None:
    assert run_samples("```python\nimport mmcache\n```\n```python\nassert mmcache.nothing\n```\n", tmp_path).returncode


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "none"


def test_the_url_options_and_their_defaults_are_those_told() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PYTHON_MD, re.MULTILINE))
    defaults = ClientConfig()
    assert parse_nbytes(told.pop("memory")) == defaults.memory_nbytes
    names = {field.name for field in fields(ClientConfig)} - {
        "scheme",
        "host",
        "port",
        "path",
        "memory_nbytes",
        "token",
    }
    assert told == {name: _shown(getattr(defaults, name)) for name in names}


def test_every_counter_outcome_and_error_is_told() -> None:
    with mmcache.connect("embedded://?memory=1MiB") as cache:
        counters = set(cache.stat()["counters"])
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"MMCacheError"}
    named = set(re.findall(r"`(\w+)`", PYTHON_MD))
    assert counters | classes | {outcome.value for outcome in Outcome} <= named
