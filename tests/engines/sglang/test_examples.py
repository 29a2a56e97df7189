"""The commands in examples/sglang: every flag and every setting in them is one that exists.

`mmcache` commands go through our command line's parser, `sglang serve` through the installed SGLang's, what stands in
their JSON through SGLang's reader of it and our settings. The compose file cannot run here (Docker, GPUs), so it is
read: what its services run is held to the same, and its parts must fit each other. offline.py runs as it stands.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mmcache_connectors.sglang.settings import Settings, parse_settings
from tests.engines.examples import ROOT, Complaints, commands, complaints, compose_complaints
from tests.engines.sglang.harness import HERE, Cache, shim_environment

EXAMPLES = ROOT / "examples" / "sglang"
README = EXAMPLES / "README.md"
# Reads the arguments of `sglang serve`, a JSON list a line; says what SGLang makes of them. SGLang writes to stdout.
PARSE = """
import argparse, json, os, sys
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(exit_on_error=False)
ServerArgs.add_cli_args(parser)
for line in sys.stdin:
    try:
        parsed, unknown = parser.parse_known_args(json.loads(line))
        taken = HybridCacheController.parse_storage_backend_extra_config(parsed.hicache_storage_backend_extra_config)
        said = {"unknown": unknown, "backend": parsed.hicache_storage_backend, "extra": taken[0], "passes": taken[-1]}
    except (Exception, SystemExit) as error:
        said = {"error": str(error)}
    print(json.dumps(said), file=out)
"""


@pytest.fixture(scope="module")
def wrong() -> Iterator[Complaints]:
    """What is wrong with one command."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        env=shim_environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parser:

        def of_sglang(arguments: list[str]) -> list[str]:
            assert parser.stdin is not None
            assert parser.stdout is not None
            print(json.dumps(arguments), file=parser.stdin, flush=True)
            return _of_sglang(json.loads(parser.stdout.readline()))

        yield lambda words: complaints(words, "sglang", of_sglang)


def _of_sglang(said: dict[str, Any]) -> list[str]:
    if "error" in said:
        return [f"sglang serve: {said['error']}"]
    found = [f"sglang serve has no {' '.join(said['unknown'])}"] if said["unknown"] else []
    if said["backend"] is None:
        return found
    extra = said["extra"]
    if (extra["module_path"], extra["class_name"]) != ("mmcache_connectors.sglang.hicache", "MMCacheHiCacheStorage"):
        found.append(f"there is no {extra['class_name']} in {extra['module_path']}")
    if not said["passes"]:
        found.append("SGLang does not say which pages come before")
    try:
        parse_settings(extra)
    except ValueError as error:
        found.append(str(error))
    return found


def test_every_command_is_one_that_exists(wrong: Complaints) -> None:
    found = commands(README.read_text())
    assert {words[0] for words in found} >= {"mmcache", "sglang", "python"}
    assert {" ".join(words): wrong(words) for words in found if wrong(words)} == {}


def test_every_variable_is_a_setting() -> None:
    named = re.findall(r"MMCACHE_SGLANG_EMBEDDINGS_(\w+)=", README.read_text())
    assert {name.lower() for name in named} == {"url"} <= {field.name for field in fields(Settings)}


def test_the_check_of_commands_can_fail(wrong: Complaints) -> None:
    text = """```sh
A=1 mmcache serve --memory 1GiB &
sglang serve --model-path m --prot 8000
sglang serve --model-path m --hicache-mem-layout page_last
sglang serve --model-path m --hicache-storage-backend dynamic --hicache-storage-backend-extra-config @examples/none.json
sglang serve --model-path m --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
  "backend_name": "mmcache", "module_path": "x", "class_name": "Y", "ulr": "mmcache://127.0.0.1"}'
sglang launch --model-path m
```
"""
    found = [wrong(words) for words in commands(text)]
    assert [len(one) for one in found] == [0, 1, 1, 1, 3, 1]
    said = [" ".join(one) for one in found]
    wanted = ["", "--prot", "page_last", "none.json", "'ulr'", "launch"]
    assert [word for word, one in zip(wanted, said, strict=True) if word not in one] == []


def test_the_compose_file_fits_together(wrong: Complaints) -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    assert compose_complaints(text, EXAMPLES, ["sglang", "serve"], wrong) == []
    assert "unix:///run/mmcache/shard.sock" in text


@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        ("--memory", "--memry", "No such option"),
        ("--enable-cache-report", "--enable-cash-report", "--enable-cash-report"),
        ('"url"', '"ulr"', "'ulr'"),
        ("127.0.0.1:30002:", "30002:", "is open to others"),
        ("- socket:/run/mmcache\n  ", "- socket:/run/other\n  ", "is on no volume"),
    ],
)
def test_the_check_of_the_compose_file_can_fail(wrong: Complaints, part: str, other: str, said: str) -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    assert part in text
    found = compose_complaints(text.replace(part, other), EXAMPLES, ["sglang", "serve"], wrong)
    assert said in "\n".join(found)


@pytest.mark.full
def test_the_offline_example_runs(tmp_path: Path) -> None:
    """Twice: in the second process mmcache has all of the prompts the first time."""
    script = [sys.executable, "-W", "ignore", str(HERE / "models.py"), str(tmp_path), "chat"]
    subprocess.run(script, env=shim_environment(), check=True, capture_output=True)
    engine = {"device": "cpu", "attention_backend": "torch_native", "mm_attention_backend": "sdpa", "page_size": 16}
    engine |= {"mem_fraction_static": 0.1, "max_total_tokens": 16384, "disable_overlap_schedule": True}
    engine |= {"grammar_backend": "none", "skip_server_warmup": True, "host": "127.0.0.1", "hicache_ratio": 2}
    told = []
    with Cache("256MiB") as cache:
        for _ in range(2):
            script = [sys.executable, str(EXAMPLES / "offline.py"), str(tmp_path / "chat"), "--url", cache.url]
            script += ["--engine", json.dumps(engine)]
            done = subprocess.run(
                script, env=shim_environment(), cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            pattern = r": (\d+) of (\d+) prompt tokens cached, (\d+) from mmcache"
            told.append([[int(number) for number in line] for line in re.findall(pattern, done.stdout)])
            cache.settle()
    (first, again, emptied), (anew, *_) = told
    assert (first[2], again[2]) == (0, 0)
    assert 0 < first[0] < again[0]  # the prompts begin alike: the second and third find the first's pages
    assert again[0] >= emptied[0] == anew[0] > 0.9 * again[1]
    assert emptied[2] == anew[2] > 0.3 * again[1]  # the first prompt's; too little of the others is missing then
