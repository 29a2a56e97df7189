"""On the installed vLLM: with which options an engine's embeddings are those that other kinds of engines share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcache_connectors.shared_embeddings import Normalisation, shared_item
from mmcache_connectors.vllm.ec_facts import EncoderFacts
from mmcache_connectors.vllm.ec_shared import SharedNames, unshared
from mmcache_connectors.vllm.settings import EncoderSettings
from tests.engines.vllm.models import model_path
from tests.engines.vllm.test_encoder_facts import BASE, SAME, URL
from tests.engines.vllm.test_facts import build

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
STEPS = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
NUMBERS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.5]}
ALIKE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "compiled": {"enforce_eager": False},
    "the encoder's attention": {"mm_encoder_attn_backend": "TORCH_SDPA"},
    "an encoder on whole items a rank": {"mm_encoder_tp_mode": "data"},
    "engine-wide processor settings": {"mm_processor_kwargs": {"max_pixels": 9999}},
    "dtype": {"dtype": "bfloat16"},
}
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "quantization": ({"dtype": "bfloat16", "quantization": "fp8_per_tensor"}, "model_config.quantization"),
    "configuration": ({"hf_overrides": {"vision_config": {"depth": 1}}}, "hf_overrides"),
    "adapters": ({"enable_lora": True, "max_lora_rank": 8, "enable_tower_connector_lora": True}, "adapters"),
    "weights": ({"load_format": "dummy"}, "load_config.load_format"),
    "normalised by the processor": ({"mm_device_do_normalize": False}, "mm_device_do_normalize"),
    "pruned": ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
    "the encoder's attention in fp8": ({"mm_encoder_attn_dtype": "fp8"}, "mm_encoder_attn_dtype"),
    "another architecture": ({"model": "audio"}, "Qwen2Audio"),
    "a worker's extension": ({"worker_extension_cls": "mine.Extension"}, "worker_extension_cls"),
}


def made(case: dict[str, Any], **settings: Any) -> tuple[Any, EncoderFacts]:
    config = build(BASE | case)
    return config, EncoderFacts(config, EncoderSettings(url=URL, model_identity="named", **settings))


def why(case: dict[str, Any]) -> str | None:
    config, facts = made(case)
    return unshared(config, facts.settings_facts, adapters=facts.adapters_count)


@pytest.mark.parametrize("name", ALIKE | SAME)
def test_what_changes_rounding_or_features_alone_shares(name: str) -> None:
    assert why((ALIKE | SAME)[name]) is None


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_may_change_more_does_not(name: str) -> None:
    case, word = OTHERWISE[name]
    assert word in str(why(case))


def test_an_option_that_is_not_known_does_not() -> None:
    config, facts = made({})
    for fact in ("model_config.of_the_next_release", "of_the_next_release"):
        assert f"{fact} is not known" in str(unshared(config, facts.settings_facts | {fact: "7"}, adapters=False))


class Element:
    """What vLLM has of a feature's field."""

    def __init__(self, data: Any) -> None:
        self.data = data


class Feature:
    """An item as vLLM has it."""

    def __init__(self, modality: str = "image", **fields: Any) -> None:
        self.modality = modality
        self.data = {name: Element(value) for name, value in fields.items()} or None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that says how pictures are normalised."""
    folder = tmp_path_factory.mktemp("shared") / "vision"
    shutil.copytree(model_path("vision"), folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | STEPS | NUMBERS))
    return str(folder)


@pytest.fixture(scope="module")
def names(model: str) -> SharedNames:
    """Of an engine with that model."""
    return SharedNames(*made({"model": model}))


def test_a_picture_is_what_the_tower_is_shown(names: SharedNames) -> None:
    pixels, grid = torch.randint(0, 256, (24, 1176), dtype=torch.uint8), torch.tensor([1, 4, 6])
    norm = Normalisation.of(NUMBERS["image_mean"], NUMBERS["image_std"], 1 / 255)
    expected = shared_item(pixels, [1, 4, 6], norm)
    assert names.item(Feature(pixel_values=pixels, image_grid_thw=grid), b"one") == expected is not None
    assert names.item(Feature(), b"one") == expected, "it was not remembered"
    for place, other in enumerate(
        (
            Feature("video", pixel_values=pixels, image_grid_thw=grid),
            Feature(pixel_values=pixels),
            Feature(pixel_values=pixels, image_grid_thw=grid, more=grid),
            Feature(pixel_values=pixels.float(), image_grid_thw=grid),
            Feature(pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 6]])),
            Feature(pixel_values=None, image_grid_thw=grid),
            Feature(),
        )
    ):
        assert names.item(other, bytes([place])) is None


def test_the_namespace_says_nothing_of_vllm(names: SharedNames) -> None:
    namespace = names.namespaces.get("", "")
    salted = names.namespaces.get("", "a tenant")
    assert namespace is not None
    assert salted is not None
    assert salted.id != namespace.id
    facts = namespace.facts
    assert facts["model"] == "named"
    assert facts["device"] == "cpu"
    assert not [name for name, text in facts.items() if "vllm" in name or "vllm" in text]


def test_the_operators_facts_and_epoch_keep_engines_apart(model: str) -> None:
    namespace = SharedNames(*made({"model": model}, weights_epoch="7", extra_facts={"cluster": "a"})).namespaces.get(
        "", ""
    )
    assert namespace is not None
    assert (namespace.facts["weights_epoch"], namespace.facts["user.cluster"]) == ("7", "a")


def test_nothing_is_shared_of_a_model_whose_pixels_are_not_normalised() -> None:
    assert "image_mean" not in json.loads((Path(model_path("vision")) / "preprocessor_config.json").read_text())
    names = SharedNames(*made({}))
    pixels = torch.zeros(4, 1176, dtype=torch.uint8)
    assert names.item(Feature(pixel_values=pixels, image_grid_thw=torch.tensor([1, 2, 2])), b"one") is None
    assert names.namespaces.get("", "") is None
