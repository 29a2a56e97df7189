"""`mmcache bench serve` against live vLLM servers: one restarted before a filled cache, and one without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.cache import Cache
from tests.engines.vllm.api_server import ApiServer
from tests.engines.vllm.models import ROOT

pytestmark = pytest.mark.full
WORKLOADS = ("captioning", "chat")
FLAGS = ("--max-model-len", "2048")
ASKED = ["--requests", "24", "--image-size", "168x112", "--text-tokens", "300", "--max-tokens", "6", "--warm-up", "1"]
ASKED += ["--extra-body", '{"ignore_eos": true}']


def serve(*words: str) -> dict[str, Any]:
    """The JSON of a run that must succeed."""
    command = [sys.executable, "-m", "mmcache", "bench", "serve", "--json", "-", *ASKED, *words]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_after_a_restart_the_prompts_are_cached_and_the_answers_the_same(tmp_path: Path) -> None:
    cold, found = {}, {}
    with Cache("512MiB") as cache, ApiServer("", *FLAGS) as plain:
        with ApiServer(cache.url, *FLAGS, PYTHONHASHSEED="1") as first:
            for workload in WORKLOADS:
                cold[workload] = serve("--url", first.url, "--workload", workload)
            cache.settle()
        with ApiServer(cache.url, *FLAGS, PYTHONHASHSEED="2") as again:
            both = ["--url", plain.url, "--url", again.url, "--name", "plain", "--name", "mmcache"]
            for workload in WORKLOADS:
                page = str(tmp_path / f"{workload}.html")
                found[workload] = serve(*both, "--workload", workload, "--html", page)
            other = serve("--url", again.url, "--seed", "1")
            crowd = serve("--url", again.url, "--seed", "2", "--rate", "20")
    for workload in WORKLOADS:
        check(cold[workload], found[workload])
        text = (tmp_path / f"{workload}.html").read_text()
        assert text.startswith("<!DOCTYPE html>")
        assert text.count('<svg class="plot"') >= 7
    asked = [request["samples"][0] for request in other["requests"] if request["place"] == 0]
    assert asked[0]["cached_tokens"] == 0
    assert all(sample["cached_tokens"] < 0.3 * sample["prompt_tokens"] for sample in asked)  # the system text
    assert crowd["servers"][0]["answered"] == 24
    assert crowd["workload"]["rate"] == 20


def check(cold: dict[str, Any], found: dict[str, Any]) -> None:
    without, cached = found["servers"]
    assert (without["answered"], cached["answered"], found["complaints"]) == (24, 24, [])
    assert without["cached_share"] == 0
    assert cached["cached_share"] > 0.9 > cold["servers"][0]["cached_share"]
    assert cached["prompt_tokens"] == without["prompt_tokens"] > 24 * 500
    assert cached["completion_tokens"] == 24 * 6
    assert (found["pairs"]["same_answers"], found["pairs"]["compared_answers"]) == (24, 24)
    assert found["pairs"]["ttft_s"]["pairs"] == 24  # of a model so small, their ratio says nothing
    assert [request["samples"][0]["error"] for request in found["requests"]] == [""] * 24
