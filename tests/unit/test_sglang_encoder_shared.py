"""When SGLang's encoder shares names of pictures with other engines, from plain values: SGLang is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcache_connectors.sglang.encoder_items import digest_of, modality_of, shared_digest_of
from mmcache_connectors.sglang.encoder_shared import shared_picture, unshared
from mmcache_connectors.shared_embeddings import Normalisation, shared_item

ARCHITECTURE = "Qwen2VLForConditionalGeneration"
OWN: dict[str, Any] = {
    "attention_backend": None,
    "custom_weight_loader": None,
    "dtype": "auto",
    "enable_lora": None,
    "enable_precise_embedding_interpolation": False,
    "json_model_override_args": "{}",
    "load_format": "auto",
    "lora_paths": None,
    "mm_process_config": None,
    "model_impl": "auto",
    "model_path": "",
    "quantization": None,
    "tp_size": 1,
}
GROUPS = {
    "attention_backend": "exec.kernel",
    "an_argument_of_a_new_group": "exec.vision",
    "enable_lora": "lora",
    "enable_precise_embedding_interpolation": "exec.kernel",
    "lora_paths": "lora",
    "mm_process_config": "mm",
    "tp_size": "parallel",
}


def why(changes: dict[str, Any], **more: Any) -> str | None:
    values = {name: (GROUPS.get(name, "model"), held) for name, held in (OWN | changes).items()}
    fixed: dict[str, Any] = {"version": "0.5.23", "architecture": ARCHITECTURE, "quantized": False}
    return unshared(values=values, own=OWN, **(fixed | more))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_path": "/models/one", "dtype": "bfloat16", "custom_weight_loader": []},
        {"attention_backend": "torch_native", "tp_size": 2, "mm_process_config": {"image": {"max_pixels": 9}}},
        {"load_format": "safetensors"},
    ],
)
def test_what_changes_rounding_or_features_alone_shares(changes: dict[str, Any]) -> None:
    assert why(changes) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "fp8"},
        {"load_format": "dummy"},
        {"model_impl": "transformers"},
        {"json_model_override_args": '{"vision_config": {"depth": 1}}'},
        {"enable_lora": True},
        {"lora_paths": ["/adapters/one"]},
        {"custom_weight_loader": ["mine.load"]},
        {"enable_precise_embedding_interpolation": True},
        {"an_argument_of_the_next_release": 7},
        {"an_argument_of_a_new_group": 7},
    ],
)
def test_what_may_change_more_does_not(changes: dict[str, Any]) -> None:
    (name,) = changes
    assert name in str(why(changes))


def test_nor_a_quantised_model_another_version_or_architecture() -> None:
    assert "quantised" in str(why({}, quantized=True))
    assert "not measured" in str(why({}, version="0.5.24"))
    assert "nobody has measured" in str(why({}, architecture="KimiVLForConditionalGeneration"))


# ----------------------------------------------------------------------------------------------------------- the names
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.5, 0.5]
NORM = Normalisation.of(MEAN, STD, 1 / 255)
PIXELS = torch.randint(0, 256, (8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
FEATURE = (PIXELS.reshape(8, 3, 4) * torch.tensor(NORM.weight)[:, None] + torch.tensor(NORM.bias)[:, None]).reshape(
    8, 12
)


def encoder(**changes: Any) -> Any:
    steps = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    processor = SimpleNamespace(**(steps | {"image_mean": MEAN, "image_std": STD} | changes))
    return SimpleNamespace(preprocessor=SimpleNamespace(image_processor=processor))


def item(feature: Any = FEATURE, modality: str = "IMAGE", embeddings: Any = None, **more: Any) -> Any:
    data = {"image_grid_thw": torch.tensor([[1, 2, 4]])} | more
    return SimpleNamespace(
        modality=SimpleNamespace(name=modality),
        feature=feature,
        precomputed_embeddings=embeddings,
        model_specific_data={name: held for name, held in data.items() if held is not None},
    )


def test_a_picture_has_the_name_its_bytes_have() -> None:
    assert shared_picture(encoder(), [item()]) == shared_item(PIXELS, (1, 2, 4), NORM) is not None


@pytest.mark.parametrize(
    "items",
    [
        [],
        [item(), item()],
        [item(modality="VIDEO")],
        [item(embeddings=torch.ones(2, 2))],
        [item(second_per_grid_ts=torch.ones(1))],
        [item(image_grid_thw=None)],
        [item(image_grid_thw=torch.tensor([[1, 2, 4], [1, 2, 4]]))],
        [item(image_grid_thw=[[1, 2, 4]])],
        [item(FEATURE + 0.01)],
        [item([FEATURE])],
        [item(PIXELS)],
    ],
)
def test_everything_else_has_none(items: list[Any]) -> None:
    assert shared_picture(encoder(), items) is None


def test_nor_has_one_whose_processor_normalises_otherwise() -> None:
    for changes in ({"do_normalize": False}, {"image_mean": None}, {"image_std": [0.5, 0.5, 0.5]}):
        assert shared_picture(encoder(**changes), [item()]) is None
    assert shared_picture(SimpleNamespace(preprocessor=SimpleNamespace(image_processor=None)), [item()]) is None


def test_shared_names_and_others_are_never_taken_for_each_other() -> None:
    digest = bytes(range(32))
    shared, own = f"image-shared-{digest.hex()}", f"image-{digest.hex()}"
    assert (shared_digest_of(shared), digest_of(shared), modality_of(shared)) == (digest, None, "image")
    assert (shared_digest_of(own), digest_of(own)) == (None, digest)
    for name in ("", "image-shared-", "image-shared-7", f"video-shared-{digest.hex()}", f"{shared}0", digest.hex()):
        assert shared_digest_of(name) is None
