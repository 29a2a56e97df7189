"""Tiny models that vLLM and SGLang both load, and pictures. Made in vLLM's environment.

Random weights, wide enough that every token of a picture has its own embedding. As in published checkpoints, and unlike
what transformers writes, the vision config has `in_chans` (SGLang reads it) and the processor's config its mean and
deviation (vLLM 0.32 shows its tower pixels as they are where that file names none). `qwen2-vl-bare` is without these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines.sglang import pictures
from tests.engines.vllm import models

MOST_TOKENS = 64  # of a picture; a larger one is made smaller
STEPS = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # what Qwen3-VL has
WIDTH = models.SIZES["hidden_size"]


def _qwen2_vl(folder: Path, seed: int = 0, depth: int = 2, normalising: dict[str, Any] = STEPS | CLIP) -> None:
    """Full attention over a picture."""
    from transformers import Qwen2VLForConditionalGeneration

    tower = {"depth": depth, "embed_dim": 128, "num_heads": 4, "hidden_size": WIDTH, "mlp_ratio": 2}
    config = models._qwen2_vl(folder, models.SIZES, tower, [4, 6, 6], MOST_TOKENS, "float32")
    models._weights(folder, Qwen2VLForConditionalGeneration, config, seed)
    _finish(folder, normalising)


def _qwen2_5_vl(folder: Path) -> None:
    """Attention inside windows: patches go through the tower in another order than they come, and are put back."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "window_size": 56,
        "fullatt_block_indexes": [2],
    }
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "rope_theta": 1e6}
    config = _config(folder, Qwen2_5_VLConfig, "qwen2_5_vl_text", rope, tower)
    models._weights(folder, Qwen2_5_VLForConditionalGeneration, config, 0)
    _finish(folder, STEPS | CLIP, processor_class="Qwen2_5_VLProcessor")


def _qwen3_vl(folder: Path) -> None:
    """Positions that are interpolated, and two levels of DeepStack, which stand in further columns."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tower = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0, 1],
    }
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    rope = {"head_dim": 32, "rope_parameters": parameters}
    config = _config(folder, Qwen3VLConfig, "qwen3_vl_text", rope, tower)
    models._weights(folder, Qwen3VLForConditionalGeneration, config, 0)
    sizes = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * MOST_TOKENS}
    _finish(folder, STEPS | HALVES, processor_class="Qwen3VLProcessor", patch_size=16, size=sizes)
    video = folder / "video_preprocessor_config.json"
    _amend(video, video_processor_type="Qwen3VLVideoProcessor")


def _config(folder: Path, config_class: Any, text: str, more: dict[str, Any], tower: dict[str, Any]) -> Any:
    """The config, beside the tokenizer and the processors of a Qwen2-VL."""
    like = models._qwen2_vl(folder, models.SIZES, {}, [4, 6, 6], MOST_TOKENS, "float32")
    words = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return config_class(
        text_config=models.SIZES | {"model_type": text, "eos_token_id": like.text_config.eos_token_id} | more,
        vision_config=tower,
        tie_word_embeddings=True,
        dtype="float32",
        **{word: getattr(like, word) for word in words},
    )


def _finish(folder: Path, normalising: dict[str, Any], **more: Any) -> None:
    config = folder / "config.json"
    _amend(config, vision_config=json.loads(config.read_text())["vision_config"] | {"in_chans": 3})
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        _amend(folder / name, **normalising, **more)
    if "processor_class" in more:
        _amend(folder / "tokenizer_config.json", processor_class=more["processor_class"])


def _amend(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MODELS: dict[str, Callable[[Path], None]] = {
    "qwen2-vl": _qwen2_vl,
    "qwen2-vl-deep": lambda folder: _qwen2_vl(folder, depth=32),
    "qwen2-vl-retrained": lambda folder: _qwen2_vl(folder, seed=1),
    "qwen2-vl-bare": lambda folder: _qwen2_vl(folder, normalising={}),
    "qwen2.5-vl": _qwen2_5_vl,
    "qwen3-vl": _qwen3_vl,
}


def write_model(root: Path, name: str) -> Path:
    """Write one of MODELS into a folder of its name, which is returned."""
    folder = root / name
    folder.mkdir(parents=True)
    MODELS[name](folder)
    return folder


def write_pictures(folder: Path) -> list[Path]:
    """The SGLang suite's, and `photo`, which is too large and has sides of odd lengths."""
    from PIL import Image

    files = pictures.write_pictures(folder)
    high, wide = np.mgrid[0:333, 0:517]
    waves = [128 + 100 * np.sin(wide / 23 + high / 31), 128 + 90 * np.cos(wide / 17 - high / 11), wide * high % 256]
    noise = np.random.default_rng(9).normal(0, 8, (333, 517, 3))
    Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)).save(folder / "photo.png")
    return [*files, folder / "photo.png"]


def truths(model: Path, files: list[Path]) -> dict[str, Any]:
    """What transformers makes of the pictures, by their names: its own processor, and its tower in float32."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    processor = AutoImageProcessor.from_pretrained(model)
    tower = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval().model.visual
    found = {}
    for path in files:
        given = processor(Image.open(path).convert("RGB"), return_tensors="pt")
        with torch.inference_mode():
            made = tower(given["pixel_values"], grid_thw=given["image_grid_thw"])
        found[path.stem] = torch.cat([made.pooler_output, *(getattr(made, "deepstack_features", None) or ())], dim=1)
    return found
