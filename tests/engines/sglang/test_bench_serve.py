"""`mmcache bench serve` against live SGLang servers: one that empties its own caches, one restarted, a plain one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.sglang.api_server import ApiServer
from tests.engines.sglang.harness import HERE, Cache, shim_environment

ROOT = HERE.parents[2]
ASKED = ["--requests", "16", "--image-size", "168x112", "--text-tokens", "300", "--max-tokens", "6", "--warm-up", "1"]
ASKED += ["--extra-body", '{"ignore_eos": true}']


def serve(*words: str) -> dict[str, Any]:
    """The JSON of a run that must succeed."""
    command = [sys.executable, "-m", "mmcache", "bench", "serve", "--json", "-", *ASKED, *words]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def samples(found: dict[str, Any], place: int | None = None) -> list[dict[str, Any]]:
    """The last server's, of all requests or of those of one place."""
    return [one["samples"][-1] for one in found["requests"] if place in (None, one["place"])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, "-W", "ignore", str(HERE / "models.py"), str(folder), "chat"]
    done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "chat"


@pytest.fixture(scope="module")
def filled(model: Path) -> Iterator[tuple[Cache, dict[str, Any]]]:
    """A cache with the pages of a server that was killed since, and what the server answered: from nothing, and again
    with nothing in its own caches."""
    with Cache("256MiB") as cache:
        with ApiServer(model, cache.url, "--enable-cache-report") as server:
            found = {"cold": serve("--url", server.url)}
            cache.settle()
            server.flush()
            found["again"] = serve("--url", server.url)
            found["other"] = serve("--url", server.url, "--seed", "1", "--rate", "20")
        yield cache, found


def test_what_was_asked_before_is_cached_and_answered_the_same(filled: tuple[Cache, dict[str, Any]]) -> None:
    """Questions about pictures and text: what is cached of the first is the text before its picture at most."""
    cold, again = filled[1]["cold"], filled[1]["again"]
    assert again["servers"][0]["cached_share"] > 0.95 > 0.75 > cold["servers"][0]["cached_share"]
    assert samples(cold)[0]["cached_tokens"] == 0
    assert samples(again)[0]["cached_tokens"] > 0.9 * samples(again)[0]["prompt_tokens"]
    assert [one["answer"] for one in samples(again)] == [one["answer"] for one in samples(cold)]
    for server in (cold["servers"][0], again["servers"][0]):
        assert (server["answered"], server["completion_tokens"]) == (16, 16 * 6)
        assert 0 < server["ttft_s"]["median"] < server["total_s"]["median"]


@pytest.mark.full
def test_another_seed_finds_nothing_of_it(filled: tuple[Cache, dict[str, Any]]) -> None:
    other = filled[1]["other"]
    assert other["servers"][0]["answered"] == 16
    shares = [one["cached_tokens"] / one["prompt_tokens"] for one in samples(other, place=0)]
    assert max(shares) < 0.3, shares  # the system text


@pytest.mark.full
def test_a_restarted_server_beside_one_that_reports_nothing(model: Path, filled: tuple[Cache, dict[str, Any]]) -> None:
    """Without --enable-cache-report SGLang says 0 of prompts with pictures, which is not what it found."""
    with ApiServer(model, "") as plain, ApiServer(model, filled[0].url, "--enable-cache-report") as restarted:
        found = serve("--url", plain.url, "--url", restarted.url, "--name", "plain", "--name", "mmcache")
    without, cached = found["servers"]
    assert (without["answered"], cached["answered"], found["complaints"]) == (16, 16, [])
    assert (without["cached_tokens"], without["cached_share"]) == (None, None)
    assert [note for note in found["notes"] if "plain" in note and "does not report cached tokens" in note]
    assert cached["cached_share"] > 0.95
    assert cached["prompt_tokens"] == without["prompt_tokens"] > 16 * 300
    assert (found["pairs"]["same_answers"], found["pairs"]["ttft_s"]["pairs"]) == (16, 16)
    assert samples(found)[0]["cached_tokens"] > 0.9 * samples(found)[0]["prompt_tokens"]
