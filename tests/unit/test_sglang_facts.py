"""Which of SGLang's arguments name a page, and what stands for the files they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmcache.errors import ConfigError
from mmcache.identity import directory_digest, file_digest
from mmcache_connectors.sglang.facts import check_adapters, counts, engine_settings
from mmcache_connectors.sglang.weights import Contents

ANY_TIME = 1e11  # a start long after any file was made
VALUES: dict[str, tuple[str, Any]] = {
    "kv_cache_dtype": ("model", "auto"),
    "model_path": ("model", "somewhere"),
    "load_format": ("model", "auto"),
    "port": ("serving", 30000),
    "tp_size": ("parallel", 2),
    "attn_cp_size": ("parallel", 1),
    "mem_fraction_static": ("schedule", 0.8),
    "attention_backend": ("exec.kernel", "fa3"),
    "brand_new": ("brand.new", {"a": [1, 2.5, None]}),
}


@pytest.mark.parametrize(
    ("group", "name", "expected"),
    [
        ("model", "quantization", True),
        ("model", "a new one", True),
        ("model", "download_dir", False),
        ("model", "modelopt_export_path", False),
        ("a new group", "anything", True),
        ("serving", "api_key", False),
        ("parallel", "tp_size", False),
        ("parallel", "enable_prefill_cp", True),
        ("device", "random_seed", False),
        ("device", "device", True),
        ("observability", "forward_hooks", True),
    ],
)
def test_what_counts(group: str, name: str, expected: bool) -> None:
    assert counts(group, name) is expected


def test_only_what_counts_is_in() -> None:
    assert engine_settings(VALUES, 7, Contents(ANY_TIME)) == {
        "kv_cache_dtype": "auto",
        "load_format": "auto",
        "attn_cp_size": 1,
        "attention_backend": "fa3",
        "brand_new": {"a": [1, 2.5, None]},
    }


def test_the_seed_counts_where_it_makes_the_weights() -> None:
    assert engine_settings(VALUES | {"load_format": ("model", "dummy")}, 7, Contents(ANY_TIME))["random_seed"] == 7


@pytest.mark.parametrize("relative", [False, True])
def test_a_file_is_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    @dataclass
    class Adapter:
        name: str
        path: str

    scales = tmp_path / "scales.json"
    scales.write_text("1")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter.safetensors").write_text("2")
    monkeypatch.chdir(tmp_path)
    values = {
        "quantization_param_path": ("model", "scales.json" if relative else str(scales)),
        "lora_paths": ("lora", [Adapter("a", "lora" if relative else str(tmp_path / "lora"))]),
        "gone": ("model", str(tmp_path / "gone")),
    }
    made = engine_settings(values, None, Contents(ANY_TIME))
    assert made["quantization_param_path"] == file_digest(scales)
    assert made["lora_paths"] == [{"name": "a", "path": directory_digest(tmp_path / "lora")}]
    scales.write_text("3")
    assert engine_settings(values, None, Contents(ANY_TIME)) != made


def test_an_adapter_known_by_name_is_refused(tmp_path: Path) -> None:
    check_adapters([str(tmp_path), None])
    with pytest.raises(ConfigError, match="someone/adapter"):
        check_adapters(["someone/adapter"])


def test_a_value_that_is_another_one_in_each_process_is_refused() -> None:
    assert engine_settings({"kind": ("model", {Path}), "other": ("model", 1j)}, None, Contents(ANY_TIME)) == {
        "kind": ["<class 'pathlib.Path'>"],
        "other": "1j",
    }
    for held in (object(), {"hook": [object()]}, {object()}, test_what_counts):
        with pytest.raises(ConfigError, match=r"argument brand_new\S* is .* at 0x"):
            engine_settings({"brand_new": ("brand.new", held)}, None, Contents(ANY_TIME))
