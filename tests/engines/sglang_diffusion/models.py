"""Writes a tiny Stable Diffusion 3 with random weights: `python models.py FOLDER [SEED]`. Run with diffusers.

Three text encoders (two CLIP of one form, a T5), so that one taken for another would show; a byte is a token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

WIDTH = 32


def tokenizer(length: int) -> Any:
    """Bytes, an end, blanks behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = alphabet | {"<s>": 256, "</s>": 257, "<pad>": 258}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    ends = [("<s>", 256), ("</s>", 257)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=length
    )


def clip() -> Any:
    """A text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=259,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    return CLIPTextModelWithProjection(config)


def main() -> None:
    """Draw the weights and write the pipeline."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    t5 = T5Config(
        vocab_size=259, d_model=2 * WIDTH, d_kv=16, d_ff=4 * WIDTH, num_layers=2, num_heads=4, pad_token_id=258
    )
    transformer = SD3Transformer2DModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * WIDTH,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer(256),
    )
    pipeline.save_pretrained(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
