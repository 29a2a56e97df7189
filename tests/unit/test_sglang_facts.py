"""Which of SGLang's arguments name a page, and what stands for weights and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmcache.errors import ConfigError
from mmcache.identity import directory_digest, file_digest
from mmcache_connectors.sglang.facts import check_adapters, counts, engine_settings, model_identity

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
    assert engine_settings(VALUES, 7) == {
        "kv_cache_dtype": "auto",
        "load_format": "auto",
        "attn_cp_size": 1,
        "attention_backend": "fa3",
        "brand_new": {"a": [1, 2.5, None]},
    }


def test_the_seed_counts_where_it_makes_the_weights() -> None:
    assert engine_settings(VALUES | {"load_format": ("model", "dummy")}, 7)["random_seed"] == 7


def test_a_file_is_what_it_holds(tmp_path: Path) -> None:
    @dataclass
    class Adapter:
        name: str
        path: str

    scales = tmp_path / "scales.json"
    scales.write_text("1")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter.safetensors").write_text("2")
    values = {
        "quantization_param_path": ("model", str(scales)),
        "lora_paths": ("lora", [Adapter("a", str(tmp_path / "lora"))]),
        "gone": ("model", str(tmp_path / "gone")),
    }
    made = engine_settings(values, None)
    assert made["quantization_param_path"] == file_digest(scales)
    assert made["lora_paths"] == [{"name": "a", "path": directory_digest(tmp_path / "lora")}]
    scales.write_text("3")
    assert engine_settings(values, None) != made


def test_an_adapter_known_by_name_is_refused(tmp_path: Path) -> None:
    check_adapters([str(tmp_path), None])
    with pytest.raises(ConfigError, match="someone/adapter"):
        check_adapters(["someone/adapter"])


def test_a_model_is_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_identity(str(tmp_path), None, "") == directory_digest(tmp_path)
    assert model_identity(str(tmp_path), None, "given@1") == "given@1"


@pytest.mark.parametrize(("cached", "expected"), [("a/snapshots/c0ffee/config.json", "org/m@c0ffee"), (None, None)])
def test_a_repository_is_the_commit_that_was_downloaded(
    monkeypatch: pytest.MonkeyPatch, cached: str | None, expected: str | None
) -> None:
    class Hub:
        @staticmethod
        def try_to_load_from_cache(repository: str, file: str, revision: str | None) -> str | None:
            assert (repository, file, revision) == ("org/m", "config.json", "main")
            return cached

    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", Hub)
    if expected:
        assert model_identity("org/m", "main", "") == expected
    else:
        with pytest.raises(ConfigError, match='give "model_identity"'):
            model_identity("org/m", "main", "")
