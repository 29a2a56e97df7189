"""Writes tiny models with real random weights into a folder: `python models.py FOLDER` makes FOLDER/text, vl, window.

Text: Qwen2, 2 layers, 4 heads, 2 kv heads of 16. VL: Qwen2-VL around the same decoder, patches of 14, 2 x 2 merged.
Window: Mellum, 4 such layers, every second of which sees the last WINDOW tokens alone, so there are two pools. The
vocabulary is t0 .. t1999 and what the processor needs. Weights are drawn wide enough, and heads are not tied, so that
another prompt or picture gives other tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SPECIAL = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
WINDOW = 33
SPREAD = 0.12  # of the weights: small ones answer every prompt alike
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
}


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of whole words; returns the special tokens' ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(2000)} | {"<unk>": 2000}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
    )
    tokenizer.save_pretrained(folder)
    # Else transformers takes the model type's own tokenizer, which makes nothing of these words.
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}


def _amend(file: Path, **settings: object) -> None:
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(held | settings))


def write_text_model(folder: Path, seed: int = 1) -> None:
    """A Qwen2 of two layers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(**DECODER, eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|im_end|>"])
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_window_model(folder: Path, seed: int = 3) -> None:
    """A Mellum of four layers without experts."""
    import torch
    from transformers import MellumConfig, MellumForCausalLM

    ids = write_tokenizer(folder)
    torch.manual_seed(seed)
    more = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense"] * 4,
        "pad_token_id": None,
    }
    end = ids["<|im_end|>"]
    config = MellumConfig(**(DECODER | more), eos_token_id=end, bos_token_id=end)
    MellumForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_vl_model(folder: Path, seed: int = 2) -> None:
    """A Qwen2-VL of two layers with a vision tower of two."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    ids = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config=DECODER
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "in_chans": 3,  # the name SGLang reads
            "initializer_range": SPREAD,
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=False,
    )
    Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256).save_pretrained(folder)
    _amend(folder / "preprocessor_config.json", processor_class="Qwen2VLProcessor")
    _amend(folder / "chat_template.json", chat_template="{% for m in messages %}{{m.content}}{% endfor %}")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_text_model(target / "text")
    write_vl_model(target / "vl")
    write_window_model(target / "window")
