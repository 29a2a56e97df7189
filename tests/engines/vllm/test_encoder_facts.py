"""What an encoder is, on the installed vLLM: which options keep embeddings apart, and the interface that is served."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

import pytest

from mmcache import Namespace
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.fields import read_encoder_table, read_table
from mmcache_connectors.vllm.settings import EncoderSettings
from tests.engines.vllm.test_facts import CONNECTOR, ROOT, build

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
URL = "mmcache://127.0.0.1:1"


def ec(role: str) -> dict[str, Any]:
    return {"ec_connector": "X", "ec_connector_module_path": "y", "ec_role": role}


BASE: dict[str, Any] = {
    "model": "vision",
    "kv_transfer_config": None,
    "ec_transfer_config": ec("ec_both"),
    "enforce_eager": True,
}
LORA = {"enable_lora": True, "max_lora_rank": 8}
OTHER: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "engine-wide processor settings": {"mm_processor_kwargs": {"max_pixels": 9999}},
    "media settings": {"media_io_kwargs": {"video": {"num_frames": 4}}},
    "the encoder's attention": {"mm_encoder_attn_backend": "TORCH_SDPA"},
    "an encoder on whole items a rank": {"mm_encoder_tp_mode": "data"},
    "quantization": {"dtype": "bfloat16", "quantization": "fp8_per_tensor"},
    "the model's configuration": {"hf_overrides": {"vision_config": {"depth": 1}}},
    "compiled": {"enforce_eager": False},
    "adapters of the encoder": LORA | {"enable_tower_connector_lora": True},
}
SAME: dict[str, dict[str, Any]] = {
    "another process": {},
    "an encoder instance": {"ec_transfer_config": ec("ec_producer")},
    "a prefill instance": {"ec_transfer_config": ec("ec_consumer")},
    "both connectors": {"kv_transfer_config": CONNECTOR},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8_e4m3"},
    "block size": {"block_size": 64},
    "max_model_len": {"max_model_len": 512},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 512, "disable_chunked_mm_input": True},
    "no prefix cache": {"enable_prefix_caching": False},
    "adapters of the language model": LORA,
    "tensor parallel": {"tensor_parallel_size": 2},
    "processor cache": {"mm_processor_cache_gb": 0},
    "model path": {"model": "vision-retrained"},  # the weights have an identity of their own
}


def facts(case: dict[str, Any], **settings: Any) -> dict[str, Any]:
    given = EncoderSettings(url=URL, model_identity="named", **settings)
    found = EncoderFacts(build(BASE | case), given).get()
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return facts({})


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_an_embedding_changes_the_facts(base: dict[str, Any], name: str) -> None:
    assert facts(OTHER[name]) != base


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_an_embedding_changes_nothing(base: dict[str, Any], name: str) -> None:
    found = facts(SAME[name])
    assert {fact: text for fact, text in found.items() if base.get(fact) != text} == {}
    assert found == base


def test_facts_fit_a_namespace_and_name_no_place(base: dict[str, Any]) -> None:
    Namespace(kind="embedding", **base)
    assert str(ROOT) not in json.dumps(base)
    assert {"device", "vllm_version", "torch_version", "model"} <= base.keys()
    assert not [name for name in base if name.startswith(("cache_config", "scheduler_config", "lora_config"))]


def test_the_operators_facts_and_epoch_are_in() -> None:
    found = facts({}, weights_epoch="7", extra_facts={"cluster": "a"})
    assert (found["weights_epoch"], found["user.cluster"]) == ("7", "a")


def test_the_encoders_table_only_takes_out_what_is_in_for_kv() -> None:
    table, encoder = read_table(), read_encoder_table()
    taken = {(cls, field) for cls in encoder for field in encoder[cls] if encoder[cls][field] != table[cls].get(field)}
    assert len(taken) >= 40
    assert all(table[cls][field].startswith("in: ") for cls, field in taken)
    assert all(encoder[cls][field].startswith("out: ") for cls, field in taken)
    assert all(encoder[cls].keys() == table[cls].keys() for cls in table)


def test_the_width_is_measured_or_reckoned() -> None:
    config = build(BASE)
    made = EncoderFacts(config, EncoderSettings(url=URL, model_identity="named"))
    assert made.form("image", 24).shape == (24, 128)
    assert not made.form("image", 24).measured
    config.ec_transfer_config.mm_encoder_output_widths = {"image": 512}
    assert made.form("image", 24).shape == (24, 512)
    assert made.form("image", 24).measured
    config.model_config.hf_config.vision_config.deepstack_visual_indexes = [0, 1]
    assert made.form("video", 24).shape == (24, 128 * 3)


def test_every_method_takes_what_vllm_gives() -> None:
    """An upgrade of vLLM that adds or renames an argument is noticed here."""
    connector = importlib.import_module("mmcache_connectors.vllm").MMCacheECConnector
    (base,) = connector.__bases__
    ours = {name for name in vars(connector) if not name.startswith("_") and hasattr(base, name)}
    assert base.__abstractmethods__ <= ours
    assert {"ensure_cache_available", "take_unavailable_requests", "build_connector_worker_meta"} <= ours
    for name in ours - {"build_prom_metrics"}:
        mine = inspect.signature(getattr(connector, name)).parameters
        theirs = inspect.signature(getattr(base, name)).parameters
        assert list(mine) == list(theirs), name
    assert len(inspect.signature(base.build_prom_metrics).parameters) == 4
