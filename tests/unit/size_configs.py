"""Fields of published models' config.json, as far as sizes depend on them, and what is known of their KV cache.

Each name is the model's on Hugging Face. `TOKEN_NBYTES` are the published figures, or follow from the published shape
(in the comment); tests/engines/vllm/test_size.py holds the same configs against vLLM's own reading of them.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None, "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "torch_dtype": "float16",
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "torch_dtype": "bfloat16",
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": 4096, "torch_dtype": "bfloat16",
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {  # null: no window, though the class has one as its default
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": None, "torch_dtype": "bfloat16",
    },
    "databricks/dbrx-instruct": {
        "model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48, "attn_config": {"kv_n_heads": 8},
        "torch_dtype": "bfloat16",
    },
    "tiiuae/falcon-7b": {
        "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
        "multi_query": True, "new_decoder_architecture": False, "torch_dtype": "bfloat16",
    },
    "deepseek-ai/DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "q_lora_rank": 1536, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "deepseek-ai/DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "q_lora_rank": None, "torch_dtype": "bfloat16",
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "torch_dtype": "bfloat16",
    },
    "google/gemma-3-4b-it": {  # as published: the text model's heads are its class's defaults
        "model_type": "gemma3", "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896,
                          "patch_size": 14},
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "torch_dtype": "bfloat16",
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "llava-hf/llava-1.5-7b-hf": {  # as published: the text model is its class's default
        "model_type": "llava", "torch_dtype": "float16", "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "torch_dtype": "float16"},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    },
    "Qwen/Qwen2-VL-7B-Instruct": {
        "model_type": "qwen2_vl", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 32768, "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 3584, "embed_dim": 1280, "spatial_patch_size": 14, "patch_size": 14},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "max_window_layers": 28, "sliding_window": 32768, "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                          "spatial_patch_size": 14, "temporal_patch_size": 2},
    },
    "Qwen/Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16",
        },
        "vision_config": {"model_type": "qwen3_vl", "hidden_size": 1152, "out_hidden_size": 4096, "patch_size": 16,
                          "spatial_merge_size": 2, "temporal_patch_size": 2,
                          "deepstack_visual_indexes": [8, 16, 24]},
    },
    "OpenGVLab/InternVL3-1B-hf": {
        "model_type": "internvl", "downsample_ratio": 0.5, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "use_sliding_window": False,
        },
        "vision_config": {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]},
    },
    "mistral-community/pixtral-12b": {
        "model_type": "llava", "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None,
        },
        "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16},
    },
    "Qwen/Qwen2-Audio-7B": {
        "model_type": "qwen2_audio", "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "use_sliding_window": False,
        },
        "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 1280, "max_source_positions": 1500},
    },
}  # fmt: skip

TOKEN_NBYTES = {
    "Qwen/Qwen2-0.5B": 12_288,
    "Qwen/Qwen3-0.6B": 114_688,  # 28 x 8 x (128 + 128) x 2: head_dim is not hidden_size / heads
    "meta-llama/Llama-2-7b-hf": 524_288,  # "0.5 MB a token"
    "meta-llama/Meta-Llama-3-8B": 131_072,
    "mistralai/Mistral-7B-v0.1": 131_072,
    "mistralai/Mistral-7B-Instruct-v0.3": 131_072,
    "databricks/dbrx-instruct": 163_840,  # 40 x 8 x (128 + 128) x 2
    "tiiuae/falcon-7b": 8_192,  # multi-query: one head of 64
    "deepseek-ai/DeepSeek-V3": 70_272,  # DeepSeek-V3 report's "70 KB": 61 x (512 + 64) x 2
    "deepseek-ai/DeepSeek-V2-Lite": 31_104,
    "google/gemma-2-2b": 106_496,
    "google/gemma-3-4b-it": 139_264,  # 34 x 4 x (256 + 256) x 2
    "openai/gpt-oss-20b": 49_152,
    "llava-hf/llava-1.5-7b-hf": 524_288,
    "Qwen/Qwen2-VL-7B-Instruct": 57_344,
    "Qwen/Qwen2.5-VL-7B-Instruct": 57_344,
    "Qwen/Qwen3-VL-8B-Instruct": 147_456,
    "OpenGVLab/InternVL3-1B-hf": 12_288,
    "mistral-community/pixtral-12b": 163_840,
    "Qwen/Qwen2-Audio-7B": 524_288,
}
