"""What `mmcache size` says of a model against vLLM: its reading of published configs, and what an engine stored."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from mmcache.size.fields import Fields
from mmcache.size.kv import DEFAULTS, FULL, MLA, kv_of
from mmcache.size.media import Picture, items_of
from tests.engines.vllm.harness import VISION, WRITTEN, FirstRun, ask, made, words, written
from tests.engines.vllm.models import IMAGE, VIDEO
from tests.engines.vllm.sizes import fields_of, kv_frames_said
from tests.unit.size_configs import CONFIGS

# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")
PICTURE = written(ask(IMAGE + words(700, 40), 20))
CLIP = written(ask(VIDEO + words(701, 40), videos=[{"kind": "frames", "seed": 20}]))


def configs_of(name: str) -> tuple[Any, Any]:
    """(the config as transformers has it, the convertor with which vLLM reads it)."""
    importlib.import_module("vllm.config")  # first: the convertors and it import each other
    transformers = importlib.import_module("transformers")
    convertors = importlib.import_module("vllm.transformers_utils.model_arch_config_convertor")
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    table = convertors.MODEL_ARCH_CONFIG_CONVERTORS
    convertor = table.get(config.model_type, convertors.ModelArchConfigConvertorBase)
    return config, convertor(config, config.get_text_config())


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_reads_the_same_heads_and_layers(name: str) -> None:
    config, convertor = configs_of(name)
    kv = kv_of(Fields(CONFIGS[name]))
    latent = convertor.is_deepseek_mla()
    assert sum(group.layers for group in kv.groups) == convertor.get_num_hidden_layers()
    for group in kv.groups:
        assert group.heads == (1 if latent else convertor.get_total_num_kv_heads())
        assert group.content == convertor.get_head_size() * (1 if latent else 2)
    kinds = getattr(config.get_text_config(), "layer_types", None)
    if kinds is not None:
        slide = sum(group.layers for group in kv.groups if group.kind != FULL)
        assert slide == kinds.count("sliding_attention")


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_leaves_out_is_its_classs_default(kind: str) -> None:
    config = importlib.import_module("transformers").AutoConfig.for_model(kind)
    assert {name: getattr(config, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


@pytest.mark.parametrize("kind", sorted(MLA))
def test_vllm_keeps_the_latent_of_these_models(kind: str) -> None:
    convertors = importlib.import_module("vllm.transformers_utils.model_arch_config_convertor")
    config = importlib.import_module("transformers").PretrainedConfig(kv_lora_rank=512)
    config.model_type = kind
    assert convertors.ModelArchConfigConvertorBase(config, config).is_deepseek_mla()


@pytest.mark.parametrize(("full", "sliding"), [(5, 29), (12, 12), (13, 12), (8, 24), (1, 6), (10, 14), (3, 4)])
def test_vllm_makes_the_same_groups(full: int, sliding: int) -> None:
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    torch = importlib.import_module("torch")
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    kinds = ["sliding_attention"] * sliding + ["full_attention"] * full
    specs = {
        f"layer.{number}": interface.FullAttentionSpec(**shape)
        if kind == "full_attention"
        else interface.SlidingWindowSpec(**shape, sliding_window=128)
        for number, kind in enumerate(kinds)
    }
    theirs = utils._get_kv_cache_groups_uniform_page_size(specs)
    config = {"model_type": "x", "num_hidden_layers": len(kinds), "num_attention_heads": 4, "num_key_value_heads": 2}
    ours = kv_of(Fields({**config, "head_dim": 64, "sliding_window": 128, "layer_types": kinds})).groups
    assert [len(group.layer_names) for group in theirs] == [group.layers for group in ours]
    for group, mine in zip(theirs, ours, strict=True):
        assert group.kv_cache_spec.page_size_bytes == 16 * mine.heads * mine.content * 2


# --------------------------------------------------------------------------------------------- what an engine stored
def test_blocks_are_as_large_as_is_said(first_run: FirstRun) -> None:
    """Of other models: tests/engines/vllm/test_configurations.py."""
    assert first_run.cache.kv_frames() == kv_frames_said(VISION) == {32_768 + 448}


def test_embeddings_have_as_many_tokens_as_is_said(first_run: FirstRun) -> None:
    """One row for each placeholder: the prompt's length tells how many the real processor made."""
    model = made("vision")
    config, processor = fields_of(model / "config.json"), fields_of(model / "preprocessor_config.json")
    image = items_of(config, processor, Picture(168, 112))[0][0]
    (pair,) = (item for item in items_of(config, processor, Picture(112, 84))[0] if "2 video frames" in item.what)
    lengths = [len(first_run.answers[WRITTEN.index(wanted)].prompt) for wanted in (PICTURE, CLIP)]
    assert lengths == [image.tokens + 2 + 40, 4 * pair.tokens + 2 + 40]
    assert image.width == pair.width == 128
