"""`mmcache size` as people run it: configs in files and folders, the table, JSON, and files that are no config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import ROOT, run_cli
from tests.unit.size_configs import CONFIGS, TOKEN_NBYTES

QWEN_VL = "Qwen/Qwen2.5-VL-7B-Instruct"
LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}  # its preprocessor_config.json


def folder(path: Path, name: str, **beside: dict[str, Any]) -> Path:
    """A model's folder as it is downloaded, as far as sizes depend on it."""
    path.mkdir(exist_ok=True)
    for file, values in {"config": CONFIGS[name], **beside}.items():
        (path / f"{file}.json").write_text(json.dumps(values))
    return path


def test_a_file_and_its_folder_say_the_same(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", QWEN_VL, preprocessor_config=LIMITS)
    ended = run_cli("size", str(model), "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run_cli("size", str(model / "config.json"), "--json").stdout == ended.stdout
    found = json.loads(ended.stdout)
    assert found["kv"]["token_nbytes"] == TOKEN_NBYTES[QWEN_VL]
    assert found["kv"]["block_nbytes"] == 16 * TOKEN_NBYTES[QWEN_VL]
    assert [row["tp"] for row in found["tensor_parallel"]] == [1, 2, 4, 8]
    assert [row["memory_nbytes"] >> 30 for row in found["memory"]] == [16, 64, 256]
    assert found["notes"] == []
    assert {name: sorted(found[name][0]) for name in ("tensor_parallel", "items", "memory")} == {
        "tensor_parallel": ["parts", "stored_nbytes", "tp", "worker_nbytes"],
        "items": ["nbytes", "stored_nbytes", "tokens", "what", "width"],
        "memory": ["entries", "index_full", "index_nbytes", "items", "memory_nbytes", "prompts", "tokens"],
    }


def test_options_are_the_engines(tmp_path: Path) -> None:
    model = str(folder(tmp_path / "m", QWEN_VL, preprocessor_config=LIMITS))
    options = ("--memory", "1GiB", "--block-size", "64", "--tp", "2", "--kv-cache-dtype", "fp8", "--prompt", "640")
    found = json.loads(run_cli("size", model, *options, "--image", "280x140", "--json").stdout)
    assert found["kv"]["block_nbytes"] == 64 * TOKEN_NBYTES[QWEN_VL] // 2
    assert found["kv"]["dtype"] == "float8_e4m3fn"
    assert [item["tokens"] for item in found["items"]] == [50, 50]
    (room,) = found["memory"]
    stored = next(row for row in found["tensor_parallel"] if row["tp"] == 2)["stored_nbytes"]
    assert room["tokens"] == (1 << 30) // stored * 64
    assert room["prompts"] == room["tokens"] // 640


def test_a_pipelines_latents(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    found = json.loads(run_cli("size", str(tmp_path), "--json").stdout)
    assert [item["nbytes"] for item in found["items"]] == [4 * 128 * 128 * 2]
    assert found["kv"] is None
    assert "AutoencoderKL: no KV" in run_cli("size", str(tmp_path)).stdout


def test_a_model_whose_kv_is_not_cached_may_have_embeddings(tmp_path: Path) -> None:
    config = {"model_type": "whisper", "d_model": 1280, "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = run_cli("size", str(tmp_path))
    assert ended.returncode == 0
    assert "30 s of audio: [1,500, 1,280], 3,840,000 B" in ended.stdout
    assert "cross-attention" in ended.stdout


NO_CONFIG: dict[str, tuple[bytes | None, str]] = {
    "no file": (None, "holds no config.json"),
    "an empty file": (b"", "is not JSON"),
    "bytes": (bytes(range(256)), "is not JSON"),
    "a list": (b"[1, 2]", "is not a JSON object"),
    "brackets": (b"[" * 200_000, "is not JSON"),
    "too much": (b" " * ((4 << 20) + 1), "is over 4 MiB"),
    "an object of nothing": (b"{}", "no num_attention_heads"),
}


@pytest.mark.parametrize("name", NO_CONFIG)
def test_what_is_no_config_ends_with_2_and_says_so(name: str, tmp_path: Path) -> None:
    data, said = NO_CONFIG[name]
    if data is not None:
        (tmp_path / "config.json").write_bytes(data)
    ended = run_cli("size", str(tmp_path))
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_models_name_is_no_folder_and_nothing_is_downloaded() -> None:
    ended = run_cli("size", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert ended.returncode == 2
    assert "nothing is downloaded" in " ".join(ended.stderr.split())


BAD_OPTIONS = {
    "--tp=3": "cannot be cut over 3 ranks",
    "--tp=0": "ranks",
    "--block-size=0": "1 to 65536",
    "--kv-cache-dtype=int3": "dtype 'int3'",
    "--dtype=x": "dtype 'x'",
    "--image=1024": "WIDTHxHEIGHT",
    "--image=0x5": "pixels",
    "--memory=much": "is not a size",
    "--memory=1KiB": "64KiB",
    "--alignment=100": "power of two",
    "--prompt=0": "prompt",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_an_option_that_makes_no_sense_ends_with_2(option: str, tmp_path: Path) -> None:
    ended = run_cli("size", str(folder(tmp_path / "m", QWEN_VL)), option)
    assert ended.returncode == 2
    assert BAD_OPTIONS[option] in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_the_tables_in_the_documentation_are_what_is_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    shown = re.findall(r"^\$ mmcache size (\S+)(.*)\n((?:.*\n)*?)```", page, re.MULTILINE)
    assert len(shown) == 2
    for name, options, text in shown:
        model = folder(tmp_path / name, next(one for one in CONFIGS if one.endswith(f"/{name}")))
        if name in QWEN_VL:
            (model / "preprocessor_config.json").write_text(json.dumps(LIMITS))
        assert run_cli("size", str(model), *options.split()).stdout == text
