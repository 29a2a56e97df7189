"""The KV cache of a decoder, from its config: which layers keep what of a token, and in which groups vLLM keeps them.

What is counted is what is stored: `layers x heads x (K + V)` of every token, or one latent with its rotary part under
MLA. Rules after vLLM 0.32.0: transformers_utils/model_arch_config_convertor.py for head counts and sizes,
v1/core/kv_cache_utils.py for the groups of models that mix kinds of attention. PURE: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mmcache.errors import ConfigError
from mmcache.frame import DTYPES
from mmcache.size.fields import MAX_LAYERS, Fields

FULL: Final = "full"
WINDOW: Final = "window"
CHUNK: Final = "chunk"
STATE: Final = "state"
_KIND_OF_LAYER: Final = {
    "full_attention": FULL,
    "attention": FULL,
    "global_attention": FULL,
    "sliding_attention": WINDOW,
    "sliding_window_attention": WINDOW,
    "local_attention": WINDOW,
    "chunked_attention": CHUNK,
    "linear_attention": STATE,
    "mamba": STATE,
    "conv": STATE,
    "recurrent": STATE,
}
# A config that has one of these keeps state beside, or instead of, blocks of tokens; vLLM caches it otherwise.
_STATE_FIELDS: Final = ("ssm_cfg", "state_size", "ssm_state_size", "mamba_d_state", "linear_num_key_heads",
                        "hybrid_override_pattern", "linear_attn_config", "attn_layer_period", "block_types",
                        "conv_L_cache")  # fmt: skip
# A config that has one of these gives layers heads of their own (Nemotron-NAS, Gemma 4, MiMo-V2, Step-3.5).
_UNEVEN_FIELDS: Final = ("block_configs", "global_head_dim", "num_global_key_value_heads", "swa_head_dim",
                         "swa_num_key_value_heads", "hybrid_layer_pattern", "attention_other_setting",
                         "num_key_value_heads_per_layer")  # fmt: skip
# model_type of the text model -> it keeps the latent, if the config has kv_lora_rank.
MLA: Final = frozenset(
    ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "kimi_k2", "pangu_ultra_moe")
)
# Published configs that leave out what their class has as a default. Source: transformers, configuration_*.py.
_LLAMA: Final = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_GEMMA: Final = {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
        "gemma2": {**_GEMMA, "head_dim": 256, "sliding_window": 4096},
        "gemma3_text": {**_GEMMA, "head_dim": 256, "sliding_window": 4096},
    }
)
# Without `layer_types`: every so-manieth layer is full attention, the others slide (or are cut into chunks).
_PATTERN: Final = {"gemma2": 2, "gemma3_text": 6, "llama4_text": 4}
_DTYPES: Final = {"half": "float16", "float": "float32", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
                  "fp8_e5m2": "float8_e5m2"}  # fmt: skip
_TEXT_SECTIONS: Final = ("text_config", "llm_config", "language_config", "thinker_config")


class NotCached(ConfigError):
    """A model whose KV the vLLM connector does not cache, or whose KV is not known here."""


@dataclass(frozen=True, slots=True)
class Group:
    """One KV group: layers whose blocks vLLM keeps under one block table, and mmcache stores under one key.

    `content`: elements of K and V together, of one head and token. `max_shards`: how many parts tensor parallelism
    can cut the heads into. `reach_tokens`: of the window or chunk, 0 under full attention.
    """

    kind: str
    reach_tokens: int
    layers: int
    heads: int
    content: int
    max_shards: int

    def token_nbytes(self, itemsize: int) -> int:
        """Bytes of one token in all of the group's layers and heads."""
        return self.layers * self.heads * self.content * itemsize


@dataclass(frozen=True, slots=True)
class KV:
    """What a model keeps of each token. `notes` say what was not counted, or assumed."""

    dtype: str
    groups: tuple[Group, ...]
    notes: tuple[str, ...]

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype][1]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token, all layers."""
        return sum(group.token_nbytes(self.itemsize) for group in self.groups)


def dtype_name(text: str) -> str:
    """A frame's name for a dtype as vLLM's flags and model configs write it. Raises ConfigError."""
    name = text.removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name not in DTYPES or name in ("bool", "int64", "float64"):
        known = "bfloat16, float16, float32, fp8, fp8_e4m3, fp8_e5m2"
        raise ConfigError(f"dtype {text!r} is not one a KV cache has; use auto, {known}")
    return name


def text_fields(config: Fields) -> Fields:
    """The section that describes the decoder: the outermost, or one inside. Raises ConfigError."""
    found = config
    for _ in range(3):
        inner = found.section(*_TEXT_SECTIONS)
        if inner is None:
            break
        found = inner
    return found


def model_dtype(config: Fields, wanted: str = "auto") -> tuple[str, str | None]:
    """(the dtype an engine computes in, a note on it): what was asked for, or what the config says. vLLM takes 16 bits
    for a model of float32 unless it is told. Raises ConfigError."""
    if wanted != "auto":
        return dtype_name(wanted), None
    said = config.text("dtype", "torch_dtype") or text_fields(config).text("dtype", "torch_dtype")
    if said and dtype_name(said) != "float32":
        return dtype_name(said), None
    why = "says float32" if said else "names no dtype"
    return "bfloat16", f"the config {why}: counted as bfloat16, as vLLM does with --dtype auto; else give --dtype"


def kv_of(config: Fields, dtype: str = "auto", kv_dtype: str = "auto") -> KV:
    """The KV of the decoder that this config describes. Raises ConfigError for one it does not understand,
    NotCached for a model whose KV is not cached."""
    if config.flag("is_encoder_decoder", False):
        raise NotCached("an encoder-decoder model: its cross-attention is not cached by the vLLM connector")
    text = text_fields(config)
    for name in _STATE_FIELDS:
        if name in text:
            raise NotCached(
                f"{name}: this model keeps state (Mamba, linear attention) that is not a block of tokens; the vLLM "
                "connector does not cache it"
            )
    for name in _UNEVEN_FIELDS:
        if name in text:
            raise NotCached(f"{name}: this model's layers have heads of several sizes, which are not counted here")
    computed, note = model_dtype(config, dtype)
    stored = computed if kv_dtype == "auto" else dtype_name(kv_dtype)
    heads, content, shards = _heads(text)
    groups = tuple(
        Group(kind, reach, layers, heads, content, shards) for kind, reach, layers in _grouped(_layers(text))
    )
    notes = [note] if note and kv_dtype == "auto" else []
    if "index_topk" in text:
        notes.append("sparse attention: the indexer's own cache is not counted")
    quantised = config.section("quantization_config") or Fields({})
    if kv_dtype == "auto" and ("kv_cache_scheme" in quantised or "kv_cache_quant_algo" in quantised):
        notes.append("the checkpoint says how its KV cache is quantised: where that is fp8, give --kv-cache-dtype fp8")
    if any(group.kind != FULL for group in groups):
        notes.append("layers that slide store every block too: a hit needs the last ones, wherever a prompt ends")
    return KV(stored, groups, tuple(notes))


def _heads(text: Fields) -> tuple[int, int, int]:
    """(KV heads, elements of K and V of one head and token, into how many parts TP can cut them)."""
    kind = text.text("model_type")
    defaults = DEFAULTS.get(kind, {})
    if "kv_lora_rank" in text and kind in MLA:
        return 1, text.need("kv_lora_rank") + (text.number("qk_rope_head_dim") or 0), 1
    if "compress_ratios" in text or ("kv_lora_rank" in text and kind != "minicpm3"):
        raise NotCached(f"how {kind or 'this model'} compresses its KV is not known to this release of mmcache")
    attention = text.need("num_attention_heads", "n_head", "n_heads", default=defaults.get("num_attention_heads"))
    heads = text.number("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num",
                        "num_attention_groups", least=1)  # fmt: skip
    if heads is None and (inner := text.section("attn_config")) is not None:
        heads = inner.number("kv_n_heads", least=1)
    if heads is None and text.flag("multi_query", False) and not text.flag("new_decoder_architecture", False):
        heads = 1
    heads = heads or defaults.get("num_key_value_heads") or attention
    size = text.number("head_dim", "hidden_size_per_head", "kv_channels") or defaults.get("head_dim")
    if not size and "qk_nope_head_dim" in text:
        size = text.need("qk_nope_head_dim") + text.need("qk_rope_head_dim")
    if not size:
        hidden = text.need("hidden_size", "n_embd", "n_embed", "d_model", default=defaults.get("hidden_size"))
        size = hidden // attention
        if not size:
            raise ConfigError(f"hidden_size {hidden} over {attention} heads is less than a head of one element")
    if "kv_lora_rank" not in text and text.number("v_head_dim") not in (None, size):
        raise NotCached("v_head_dim: heads of values are not as wide as heads of keys, which is not counted here")
    return heads, 2 * size, heads


def _layers(text: Fields) -> list[tuple[str, int]]:
    """(kind, reach in tokens) of every layer that keeps KV of its own."""
    kind = text.text("model_type")
    defaults = DEFAULTS.get(kind, {})
    count = text.need("num_hidden_layers", "n_layer", "num_layers", "n_layers", most=MAX_LAYERS,
                      default=defaults.get("num_hidden_layers"))  # fmt: skip
    window = text.number("sliding_window", least=0) or 0
    if not text.says("sliding_window"):  # null says that there is none
        window = defaults.get("sliding_window", 0)
    if not text.flag("use_sliding_window", not kind.startswith("qwen")):
        window = 0
    chunk = text.number("attention_chunk_size") or 0
    kinds = _kinds(text, kind, count, window, chunk)
    if STATE in kinds or 0 in (text.items("attn_type_list") or []):
        raise NotCached(
            "some of its layers keep state (Mamba, linear attention, convolution), not blocks of tokens; "
            "the vLLM connector does not cache such models"
        )
    kinds = kinds[: count - (text.number("num_kv_shared_layers", most=count - 1) or 0)]
    reach = {FULL: 0, WINDOW: window, CHUNK: chunk}
    for one in set(kinds) - {FULL}:
        if not reach[one]:
            raise ConfigError(f"layer_types has {one} layers, but the config does not say how far they reach")
    return [(one, reach[one]) for one in kinds]


def _kinds(text: Fields, kind: str, count: int, window: int, chunk: int) -> list[str]:
    named = text.items("layer_types")
    if named is not None:
        unknown = sorted({str(one) for one in named} - set(_KIND_OF_LAYER))
        if unknown or len(named) != count:
            what = f"a layer called {unknown[0][:60]!r}" if unknown else f"{len(named)} entries for {count} layers"
            raise ConfigError(f"layer_types has {what}; this release of mmcache does not know how to count it")
        return [_KIND_OF_LAYER[str(one)] for one in named]
    local = WINDOW if window else CHUNK if chunk else FULL
    every = text.number("sliding_window_pattern", "_sliding_window_pattern", least=1) or _PATTERN.get(kind)
    if every:
        return [local if (layer + 1) % every else FULL for layer in range(count)]
    first = text.number("max_window_layers") or 0 if kind.startswith("qwen") else 0
    return [FULL if layer < first else local for layer in range(count)]


def _grouped(layers: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """(kind, reach, layers) of each group. vLLM makes groups of one size where kinds are mixed: as many layers as the
    rarest kind has, or as the commonest if that is less than half as many again."""
    counts: dict[tuple[str, int], int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    groups = []
    for (kind, reach), count in counts.items():
        number = -(-count // size)
        groups += [(kind, reach, len(range(first, count, number))) for first in range(number)]
    return groups
