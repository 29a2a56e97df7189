"""What an engine is, on the installed vLLM: the table against its classes, real configurations in real processes.

Each configuration is built as an engine builds it, in child processes with other hash seeds; one starts an engine.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import mmcache
from mmcache import Namespace
from mmcache_connectors.vllm.facts import config_facts, worker_facts
from mmcache_connectors.vllm.fields import ENVIRONMENT, NoCanonicalForm, canonical_text, config_texts, read_table
from mmcache_connectors.vllm.weights import ModelSource, hub_snapshot, model_identity
from tests.engines.vllm.models import model_path

ROOT = Path(__file__).resolve().parents[3]
# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONNECTOR = {
    "kv_connector": "MMCacheKVConnector",
    "kv_connector_module_path": "mmcache_connectors.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"url": "mmcache://127.0.0.1:1"},
}
BASE: dict[str, Any] = {"dtype": "float32", "block_size": 32, "max_model_len": 1024, "max_num_seqs": 8}
# name -> settings of two engines: those of "base", or of the case named in "of", and these.
OTHER_BLOCKS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8_e4m3"},
    "rope parameters": {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    "an attribute no configuration class declares": {"hf_overrides": {"rope_theta": 5e5}},
    "sliding window": {"hf_overrides": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}},
    "quantization": {"of": "dtype", "dtype": "bfloat16", "quantization": "fp8_per_tensor"},
    "attention backend": {"attention_backend": "CPU_ATTN"},
    "eager": {"enforce_eager": True},
    "max_model_len": {"max_model_len": 512},
    "a file's contents": {"model_loader_extra_config": {"scales": __file__}},
    "a draft model": {"speculative_config": {"model": "DRAFT", "num_speculative_tokens": 2}},
    "engine-wide processor settings": {"of": "vision", "model": "vision", "mm_processor_kwargs": {"max_pixels": 9999}},
}
SAME_BLOCKS: dict[str, dict[str, Any]] = {
    "max_num_seqs": {"max_num_seqs": 4},
    "gpu_memory_utilization": {"gpu_memory_utilization": 0.5},
    "max_num_batched_tokens": {"max_num_batched_tokens": 512},
    "seed": {"seed": 3},
    "tensor parallel": {"tensor_parallel_size": 2},
    "engine_id and port": {"kv_transfer_config": {**CONNECTOR, "engine_id": "mine", "kv_port": 1234}},
    "hash algorithm": {"prefix_caching_hash_algo": "sha256_cbor"},
    "no local prefix cache": {"enable_prefix_caching": False},
    "served model name": {"served_model_name": "another"},
    "model path": {"model": "text-retrained"},  # which weights these are is not in the configuration: weights.py
}
CASES = {"base": {}, "vision": {"model": "vision"}, **OTHER_BLOCKS, **SAME_BLOCKS}
TABLE = read_table()

Facts = dict[str, str]


def build(case: Mapping[str, Any]) -> Any:
    """The configuration an engine with these settings would start with."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {**BASE, "model": "text", "kv_transfer_config": CONNECTOR, **case}
    settings.pop("of", None)
    settings["model"] = str(model_path(settings["model"]))
    if "speculative_config" in settings:
        settings["speculative_config"] = {**settings["speculative_config"], "model": str(model_path("text-retrained"))}
    return EngineArgs(**settings).create_engine_config()


def run_engine() -> dict[str, Facts]:
    """A hybrid engine's facts before it starts, while it runs, and in its worker."""
    from vllm import LLM

    settings = {**BASE, "enforce_eager": True}
    fresh = config_facts(build({**settings, "model": "hybrid", "kv_transfer_config": None}))
    llm = LLM(model=str(model_path("hybrid")), **settings)
    config = llm.llm_engine.vllm_config
    layers = [name for name in config.compilation_config.static_forward_context if "attn" in name]
    return {"fresh": fresh, "running": config_facts(config), "worker": worker_facts(config, layers)}


def child(what: str, **environment: str) -> dict[str, Facts]:
    """The facts printed by a process of its own: `what` is "configurations" or "engine"."""
    fixed = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "connectors")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, what],
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Facts] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def first() -> dict[str, Facts]:
    return child("configurations", PYTHONHASHSEED="1")


# ------------------------------------------------------------------------------------------------------- the table
def config_classes() -> dict[str, type]:
    """Every data class defined in a module of vllm.config."""
    package = importlib.import_module("vllm.config")
    found: dict[str, type] = {}
    for module in (
        importlib.import_module(f"vllm.config.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ):
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls):
                assert name not in found, f"two classes are called {name}"
                found[name] = cls
    return found


def complaints(table: Mapping[str, Mapping[str, str]], classes: Mapping[str, type]) -> list[str]:
    listed = {f"{name}.{field}" for name, fields in table.items() if name != ENVIRONMENT for field in fields}
    there = {f"{name}.{field.name}" for name, cls in classes.items() for field in dataclasses.fields(cls)}
    unlisted = [f"{name} is not listed" for name in there - listed]
    return sorted(unlisted + [f"{name} does not exist" for name in listed - there])


def test_every_field_of_the_installed_vllm_is_listed_and_nothing_else() -> None:
    classes = config_classes()
    assert {"VllmConfig", "ModelConfig", "CacheConfig", "AttentionConfig", "KernelConfig"} <= set(classes)
    assert complaints(TABLE, classes) == []


def test_the_table_check_can_fail() -> None:
    classes = config_classes()
    doctored = {name: dict(fields) for name, fields in TABLE.items()}
    del doctored["CacheConfig"]["cache_dtype"]
    doctored["ModelConfig"]["colour"] = "in: not a field"
    doctored["NoConfig"] = {"x": "out: not a class"}
    assert complaints(doctored, classes) == [
        "CacheConfig.cache_dtype is not listed",
        "ModelConfig.colour does not exist",
        "NoConfig.x does not exist",
    ]


def test_every_environment_variable_that_is_out_exists() -> None:
    """Declared in vllm.envs, or read or set somewhere in the package."""
    package = Path(str(importlib.import_module("vllm").__file__)).parent
    named = {name for file in package.rglob("*.py") for name in re.findall(r"\bVLLM_\w+", file.read_text("utf-8"))}
    assert set(TABLE[ENVIRONMENT]) - named == set()
    assert {verdict[:5] for verdict in TABLE[ENVIRONMENT].values()} == {"out: "}


# ------------------------------------------------------------------------------------------- real configurations
def test_another_process_with_another_hash_seed_gives_the_same_facts(first: dict[str, Facts], tmp_path: Path) -> None:
    second = child("configurations", PYTHONHASHSEED="2", VLLM_CACHE_ROOT=str(tmp_path), VLLM_PORT="45123")
    assert set(first) == set(CASES)
    assert second == first
    assert not [text for facts in first.values() for text in facts.values() if text.startswith("unknown")]


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_what_changes_a_block_changes_the_facts(first: dict[str, Facts], name: str) -> None:
    assert first[name] != first[OTHER_BLOCKS[name].get("of", "base")]


@pytest.mark.parametrize("name", SAME_BLOCKS)
def test_what_does_not_change_a_block_changes_nothing(first: dict[str, Facts], name: str) -> None:
    assert first[name] == first["base"]


def test_facts_fit_a_namespace_and_name_no_place(first: dict[str, Facts]) -> None:
    for facts in first.values():
        Namespace(kind="kv", model="m", dtype="d", layout="l", block_size=32, **facts)
        assert 100 < len(facts) < 300
        assert str(ROOT) not in json.dumps(facts)


def test_an_engine_that_runs_is_what_its_settings_said_and_its_worker_says_the_rest() -> None:
    found = child("engine")
    assert found["running"] == found["fresh"]
    worker = found["worker"]
    attention = {name for name in worker if name.startswith("attention.")}
    assert attention == {"attention.Attention.full", "attention.Attention.128"}
    for name in attention:
        assert "CPUAttentionBackend" in worker[name]
        assert " isa=" in worker[name]
    assert worker["device"].startswith("cpu ")
    assert worker["vllm_version"].startswith("0.32")
    assert worker["torch_version"].count(".") == 1
    assert not set(worker) & set(found["running"])
    Namespace(kind="kv", model="m", dtype="d", layout="l", block_size=32, **worker, **found["running"])


# -------------------------------------------------------------------------------------------- values and failures
class Colour(str, enum.Enum):  # noqa: UP042 - vLLM has such enumerations
    RED = "red"


@dataclasses.dataclass
class Inner:
    size: int = 1


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    names: Any = None
    port: int = 0


OUTER = {"Outer": {"inner": "in: x", "names": "in: x", "port": "out: x"}, "Inner": {"size": "in: x"}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ("null", '"null"'),
        ("auto", "auto"),
        (True, "true"),
        (1, "1"),
        ("1", '"1"'),
        (1.0, "1.0"),
        (float("inf"), "Infinity"),
        ("", '""'),
        ("b3:00", '"b3:00"'),
        ({3, 1, 2}, '{"set": [1, 2, 3]}'),
        ({"b": 1, "a": (1, 2)}, '{"map": {"a": [1, 2], "b": 1}}'),
        ({2: "x", 1: "y"}, '{"pairs": [[1, "y"], [2, "x"]]}'),
        (Colour.RED, '{"enum": "Colour.RED"}'),
        (Inner(2), '{"class": "Inner", "state": {"size": 2}}'),
        (b"\x00\xff", '{"bytes": "00ff"}'),
        (dataclasses.dataclass, '{"code": "dataclasses.dataclass"}'),
    ],
)
def test_canonical_texts(value: object, text: str) -> None:
    assert canonical_text(value) == text


def test_a_torch_dtype_goes_by_its_name() -> None:
    torch = importlib.import_module("torch")
    assert canonical_text(torch.bfloat16) == "bfloat16"
    assert canonical_text(["x" * 300]).startswith("b3:")
    assert canonical_text(["x" * 300]) != canonical_text(["x" * 301])


def nested() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [object(), lambda: 0, {"f": lambda: 0}, "/no/such/file", Path("/"), "~", nested()])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(NoCanonicalForm):
        canonical_text(value)


def test_a_path_stands_for_the_contents_of_its_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text("scales")
    other.write_text("scales")
    assert canonical_text(str(one)) == canonical_text(other)
    assert str(tmp_path) not in canonical_text(str(one))
    other.write_text("scalez")
    assert canonical_text(str(one)) != canonical_text(other)


def test_unlisted_fields_are_in_and_unknown_values_are_random(caplog: pytest.LogCaptureFixture) -> None:
    strangers: list[str] = []
    config = Outer(names=object())
    texts = config_texts(config, OUTER, unlisted=strangers.append, unknown=lambda place, why: f"? {place}")
    assert texts == {"inner.size": "1", "names": "? names"}
    assert strangers == []
    less = {"Outer": {"inner": "in: x"}, "Inner": {}}
    texts = config_texts(config, less, unlisted=strangers.append, unknown=lambda place, why: f"? {place}")
    assert texts == {"inner.size": "1", "names": "? names", "port": "0"}
    assert sorted(strangers) == ["Inner.size", "Outer.names", "Outer.port"]
    facts = [config_facts(config, {}), config_facts(config, {})]
    assert facts[0]["names"] != facts[1]["names"]
    assert facts[0]["port"] == facts[1]["port"] == "0"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4  # one warning of each kind for each call
    assert "Outer.port" in said[0]
    assert "names (" in said[1]


def test_variables_that_choose_kernels_are_in() -> None:
    others = {
        "VLLM_PORT": "1",
        "HOME": "/x",
        "VLLM_QWEN_SERVICE_HOST": "10.0.0.7",
        "VLLM_PORT_8000_TCP_ADDR": "10.0.0.7",
    }
    facts = config_facts(Inner(), {"VLLM_DISABLED_KERNELS": "a,b", "VLLM_NEW": "1", **others})
    assert {name for name in facts if name.startswith(ENVIRONMENT)} == {
        "environment.VLLM_DISABLED_KERNELS",
        "environment.VLLM_NEW",
    }


def test_engines_of_two_releases_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({})
    facts: list[dict[str, Any]] = []
    for version in ("0.32.0", "0.32.1", "0.32.0"):
        monkeypatch.setattr("vllm.__version__", version)
        facts.append({**config_facts(config), **worker_facts(config, [])})
    assert {name for name, text in facts[0].items() if facts[1][name] != text} == {"vllm_version"}
    shape: dict[str, Any] = {"kind": "kv", "model": "m", "dtype": "d", "layout": "l", "block_size": 32}
    first, other, again = (Namespace(**shape, **one).block_keys(range(96)) for one in facts)
    with mmcache.connect("embedded://?memory=1MiB") as cache:
        assert all(cache.put(first, [b"a block"] * 3))
        assert cache.match_prefix(other) == 0
        assert cache.match_prefix(again) == 3


def test_layers_of_another_kind_than_expected_are_random_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    config = build({})
    found = [worker_facts(config, ["no.such.layer"]) for _ in range(2)]
    assert found[0]["attention.unknown"] != found[1]["attention.unknown"]
    assert "no.such.layer" in caplog.text


# ------------------------------------------------------------------------------------------- the Hugging Face cache
@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the hub with one repository, and nothing that could be asked."""
    repository = tmp_path / "models--acme--tiny"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "1234").write_text("{}")
    (repository / "snapshots" / COMMIT / "config.json").symlink_to("../../blobs/1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repository


def test_a_repository_is_the_commit_of_its_snapshot(hub: Path) -> None:
    assert model_identity(ModelSource("acme/tiny")) == f"acme/tiny@{COMMIT}"
    assert model_identity(ModelSource("acme/tiny", revision=COMMIT)) == f"acme/tiny@{COMMIT}"
    assert hub_snapshot("acme/tiny", "v2", "config.json") is None
    assert hub_snapshot("acme/tiny", None, "adapter_config.json") is None
    assert hub_snapshot("acme/other", None, "config.json") is None


def main() -> None:
    facts = run_engine() if sys.argv[1] == "engine" else {name: config_facts(build(CASES[name])) for name in CASES}
    print("\n" + json.dumps(facts))


if __name__ == "__main__":
    main()
