"""Tiny models with random weights that a real vLLM loads in seconds, made from nothing: no download.

The weights are real ones, drawn with a standard deviation of 1.5/sqrt(fan in): with the near-zero weights of
`load_format="dummy"` a model's answer hardly depends on its context, and damaged KV would go unseen. One byte is one
token. Folders are made once, under a name that contains a digest of this file, so they change when it does.
Run in the engine's environment: `python -m tests.engines.vllm.models`, or through `model_path`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".engines" / "models" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
VOCABULARY = 512
SPECIALS = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SOUND_WORDS = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
SOUND = "".join(SOUND_WORDS)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}" + IMAGE + "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
HALF_BILLION: dict[str, Any] = SIZES | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "max_position_embeddings": 8192,
}


def model_path(name: str) -> Path:
    """The folder of one of MODELS, made now if it is not there yet. Complete or absent: it is renamed into place."""
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f".{name}-"))
        try:
            MODELS[name](scratch)
            os.replace(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return path


def _tokenizer(folder: Path, more: Sequence[str] = (), **settings: str) -> dict[str, int]:
    """Save a byte-level tokenizer without merges; the ids of the special tokens, which follow the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found,unused-ignore]
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIALS, *more],
        chat_template=CHAT,
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return {word: tokenizer.convert_tokens_to_ids(word) for word in [*SPECIALS, *more]}


def _weights(folder: Path, model_class: Any, config: Any, seed: int) -> None:
    """Save `model_class(config)` in float32 with random weights that follow from the seed."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
            elif "bias" in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)


def _rename(folder: Path, before: str, after: str) -> None:
    """Give the weights whose names begin with `before` names that begin with `after`."""
    from safetensors.torch import load_file, save_file  # type: ignore[import-not-found,unused-ignore]

    path = folder / "model.safetensors"
    weights = {re.sub(f"^{re.escape(before)}", after, name): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def _text(folder: Path, seed: int = 0) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = _tokenizer(folder)
    config = Qwen2Config(**SIZES, tie_word_embeddings=True, eos_token_id=ids["<|im_end|>"], dtype="float32")
    _weights(folder, Qwen2ForCausalLM, config, seed)


def _hybrid(folder: Path) -> None:
    """Sliding-window and full attention in turns: two KV groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    ids = _tokenizer(folder)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": len(kinds)},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=128,
        layer_types=kinds,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        dtype="float32",
    )
    _weights(folder, Gemma3ForCausalLM, config, 0)


def _vision(folder: Path, seed: int = 0) -> None:
    """Images and videos; patches of 14, merged 2 by 2: one token for 28 x 28 pixels."""
    from transformers import Qwen2VLForConditionalGeneration

    tower = {"depth": 2, "embed_dim": 128, "num_heads": 4, "hidden_size": 128, "mlp_ratio": 2}
    config = _qwen2_vl(folder, SIZES, tower, mrope=[4, 6, 6], most_tokens=64, dtype="float32")
    _weights(folder, Qwen2VLForConditionalGeneration, config, seed)


def _qwen2_vl(
    folder: Path, sizes: dict[str, Any], tower: dict[str, Any], mrope: list[int], most_tokens: int, dtype: str
) -> Any:
    """The tokenizer and the processors, of up to `most_tokens` a picture, and the config, which is not saved yet."""
    from transformers import Qwen2VLConfig

    words = {f"{what}_token": f"<|{what}|>" for what in ("vision_start", "vision_end")}
    words |= {f"{what}_token": f"<|{what}_pad|>" for what in ("image", "video")}
    ids = _tokenizer(folder, processor_class="Qwen2VLProcessor", **words)
    pixels = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * most_tokens}
    shared = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    for kind, file in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        settings = shared | {f"{kind}_processor_type": f"Qwen2VL{kind.capitalize()}Processor"}
        (folder / file).write_text(json.dumps(settings | {"processor_class": "Qwen2VLProcessor"}))
    rope = {"type": "mrope", "mrope_section": mrope}
    text = sizes | {"rope_theta": 1e6, "rope_scaling": rope, "eos_token_id": ids["<|im_end|>"]}
    return Qwen2VLConfig(
        text_config=text | {"model_type": "qwen2_vl_text"},
        vision_config=tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype=dtype,
    )


def _levels(folder: Path) -> None:
    """Images whose embeddings carry a level of DeepStack in further columns; one token for 32 x 32 pixels."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    words = {f"{what}_token": f"<|{what}|>" for what in ("vision_start", "vision_end")}
    words |= {f"{what}_token": f"<|{what}_pad|>" for what in ("image", "video")}
    ids = _tokenizer(folder, processor_class="Qwen3VLProcessor", **words)
    tower = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": SIZES["hidden_size"],
        "deepstack_visual_indexes": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = SIZES | {"head_dim": 32, "rope_parameters": rope, "eos_token_id": ids["<|im_end|>"]}
    config = Qwen3VLConfig(
        text_config=text | {"model_type": "qwen3_vl_text"},
        vision_config=tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    _weights(folder, Qwen3VLForConditionalGeneration, config, 0)
    pixels = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}
    shared = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    for file, processor in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        (folder / file).write_text(json.dumps(shared | processor | {"processor_class": "Qwen3VLProcessor"}))


def _audio(folder: Path) -> None:
    """Sounds of at most 30 seconds; one token for 40 ms."""
    from transformers import (
        AutoTokenizer,
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    ids = _tokenizer(folder, SOUND_WORDS)
    extractor = WhisperFeatureExtractor(feature_size=80)
    Qwen2AudioProcessor(extractor, AutoTokenizer.from_pretrained(folder), CHAT).save_pretrained(folder)
    tower = {
        "d_model": 128,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    }
    config = Qwen2AudioConfig(
        audio_config=tower | {"model_type": "qwen2_audio_encoder"},
        text_config=SIZES | {"model_type": "qwen2", "eos_token_id": ids["<|im_end|>"]},
        audio_token_index=ids["<|AUDIO|>"],
        dtype="float32",
    )
    _weights(folder, Qwen2AudioForConditionalGeneration, config, 0)
    _rename(folder, "language_model.model.model.", "language_model.model.")  # transformers 5 writes one too many


def _timing(folder: Path) -> None:
    """A config of 0.5B parameters for `load_format="dummy"`: it takes real time, its answers mean nothing."""
    from transformers import Qwen2Config

    ids = _tokenizer(folder)
    config = Qwen2Config(**HALF_BILLION, tie_word_embeddings=True, eos_token_id=ids["<|im_end|>"], dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)


def _timing_vision(folder: Path) -> None:
    """The same size behind a vision tower of ViT-B's, for `load_format="dummy"`."""
    tower = {"depth": 12, "embed_dim": 768, "num_heads": 12, "hidden_size": HALF_BILLION["hidden_size"], "mlp_ratio": 4}
    config = _qwen2_vl(folder, HALF_BILLION, tower, mrope=[8, 12, 12], most_tokens=1024, dtype="bfloat16")
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(folder)


def _adapter(folder: Path, layers: str, seed: int) -> None:
    """A LoRA adapter of rank 4 for the layers' query and value projections, strong enough to change every answer."""
    import torch
    from safetensors.torch import save_file  # type: ignore[import-not-found,unused-ignore]

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, rows in (("q_proj", 128), ("v_proj", 64)):
            stem = f"base_model.model.{layers}.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, 128, generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


_VISION_LAYERS = "model.language_model.layers"
MODELS: dict[str, Callable[[Path], None]] = {
    "text": _text,
    "text-retrained": lambda folder: _text(folder, seed=1),
    "hybrid": _hybrid,
    "vision": _vision,
    "vision-retrained": lambda folder: _vision(folder, seed=1),
    "audio": _audio,
    "levels": _levels,
    "timing": _timing,
    "timing-vision": _timing_vision,
    "adapter": lambda folder: _adapter(folder, _VISION_LAYERS, seed=0),
    "adapter-retrained": lambda folder: _adapter(folder, _VISION_LAYERS, seed=1),
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or MODELS:
        print(model_path(wanted))
