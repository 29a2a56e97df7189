"""Writes tiny models with real random weights into a folder: `python models.py FOLDER` makes FOLDER/text, vl, window,
`python models.py FOLDER NAME...` those of WRITERS.

Text: Qwen2, 2 layers, 4 heads, 2 kv heads of 16. VL: Qwen2-VL around the same decoder, patches of 14, 2 x 2 merged.
Window: Mellum, 4 such layers, every second of which sees the last WINDOW tokens alone, so there are two pools. The
vocabulary is t0 .. t1999 and what the processor needs. Weights are drawn wide enough, and heads are not tied, so that
another prompt or picture gives other tokens. Chat: as VL, for OpenAI's chat API: a byte is a token, and a template.
Timing: of 0.5B parameters behind a tower of ViT-B's size, without weights (--load-format dummy), to measure times with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
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
HALF_BILLION: dict[str, Any] = DECODER | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "max_position_embeddings": 8192,
}
TOWER: dict[str, Any] = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2}
VIT_B: dict[str, Any] = {"depth": 12, "embed_dim": 768, "num_heads": 12, "mlp_ratio": 4}


def words() -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(
        models.WordLevel({f"t{number}": number for number in range(2000)} | {"<unk>": 2000}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def letters() -> Any:
    """A tokenizer of bytes, for text of any kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def write_tokenizer(folder: Path, inner: Any, **settings: str) -> dict[str, int]:
    """Save it with the special tokens behind its own; returns their ids."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        **settings,
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

    ids = write_tokenizer(folder, words(), unk_token="<unk>")
    torch.manual_seed(seed)
    config = Qwen2Config(**DECODER, eos_token_id=ids["<|im_end|>"], bos_token_id=ids["<|im_end|>"])
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_window_model(folder: Path, seed: int = 3) -> None:
    """A Mellum of four layers without experts."""
    import torch
    from transformers import MellumConfig, MellumForCausalLM

    ids = write_tokenizer(folder, words(), unk_token="<unk>")
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
    """A Qwen2-VL of words, of two layers and a vision tower of two."""
    ids = write_tokenizer(folder, words(), unk_token="<unk>")
    _write_weights(folder, _qwen2_vl(folder, ids, DECODER, [2, 3, 3], TOWER), seed)
    _amend(folder / "chat_template.json", chat_template="{% for m in messages %}{{m.content}}{% endfor %}")


def write_chat_model(folder: Path, seed: int = 3) -> None:
    """A Qwen2-VL of bytes that chats, as small."""
    ids = write_tokenizer(folder, letters(), chat_template=CHAT)
    _write_weights(folder, _qwen2_vl(folder, ids, DECODER, [2, 3, 3], TOWER), seed)


def write_timing_model(folder: Path) -> None:
    """A Qwen2-VL of bytes, of 0.5B parameters, without weights."""
    ids = write_tokenizer(folder, letters(), chat_template=CHAT)
    _qwen2_vl(folder, ids, HALF_BILLION, [8, 12, 12], VIT_B).save_pretrained(folder)


def _qwen2_vl(
    folder: Path, ids: dict[str, int], decoder: dict[str, Any], mrope: list[int], tower: dict[str, Any]
) -> Any:
    """Its config; saves its processor."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor

    Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256).save_pretrained(folder)
    _amend(folder / "preprocessor_config.json", processor_class="Qwen2VLProcessor")
    return Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config=decoder
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": mrope},
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|im_end|>"],
        },
        vision_config=tower
        | {
            "hidden_size": decoder["hidden_size"],
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


def _write_weights(folder: Path, config: Any, seed: int) -> None:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": write_text_model,
    "vl": write_vl_model,
    "window": write_window_model,
    "chat": write_chat_model,
    "timing": write_timing_model,
}

if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in sys.argv[2:] or ("text", "vl", "window"):
        WRITERS[name](target / name)
