"""`mmcache bench serve` against live vLLM servers: one restarted before a filled cache, and one without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmcache.testing.process import ServerProcess
from tests.engines.vllm.api_server import ApiServer
from tests.engines.vllm.models import ROOT

pytestmark = pytest.mark.full
FLAGS = ("--max-model-len", "2048")
ASKED = ["--requests", "24", "--image-size", "168x112", "--text-tokens", "300", "--max-tokens", "6", "--warm-up", "1"]
ASKED += ["--extra-body", '{"ignore_eos": true}']


def serve(*words: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON, and what it said beside it."""
    command = [sys.executable, "-m", "mmcache", "bench", "serve", "--json", "-", *ASKED, *words]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else {}, ended.stderr


@pytest.mark.parametrize("workload", ["captioning", "chat"])
def test_after_a_restart_the_prompts_are_cached_and_the_answers_the_same(workload: str, tmp_path: Path) -> None:
    page = tmp_path / "serve.html"
    with ServerProcess("512MiB") as cache, ApiServer("", *FLAGS) as plain:
        with ApiServer(cache.url, *FLAGS, PYTHONHASHSEED="1") as first:
            status, cold, said = serve("--url", first.url, "--workload", workload)
            assert status == 0, said
            time.sleep(1.0)  # what is left of its blocks is stored
        with ApiServer(cache.url, *FLAGS, PYTHONHASHSEED="2") as again:
            both = ["--url", plain.url, "--url", again.url, "--name", "plain", "--name", "mmcache"]
            status, found, said = serve(*both, "--workload", workload, "--html", str(page))
            assert status == 0, said
            status, other, said = serve("--url", again.url, "--workload", workload, "--seed", "1", "--rate", "20")
            assert status == 0, said
    without, cached = found["servers"]
    assert (without["answered"], cached["answered"], found["complaints"]) == (24, 24, [])
    assert without["cached_share"] == 0
    assert cached["cached_share"] > 0.9 > cold["servers"][0]["cached_share"]
    assert cached["prompt_tokens"] == without["prompt_tokens"] > 24 * 500
    assert cached["completion_tokens"] == 24 * 6
    assert (found["pairs"]["same_answers"], found["pairs"]["compared_answers"]) == (24, 24)
    assert 0 < found["pairs"]["ttft_s"]["of_medians"] < 1.5
    first_asked = [request["samples"][0] for request in other["requests"] if request["place"] == 0]
    assert first_asked[0]["cached_tokens"] == 0
    assert all(sample["cached_tokens"] < 0.3 * sample["prompt_tokens"] for sample in first_asked)  # the system text
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert text.count('<svg class="plot"') >= 7
