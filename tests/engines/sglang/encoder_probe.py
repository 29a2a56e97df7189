"""Prints, as JSON, what the installed SGLang says of its embedding store, and what its encoder and ours name items.

`python encoder_probe.py MODEL`: a model of which an encoder could be made.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import torch
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.disaggregation.encoder.preprocessor import EncoderPreprocessor
from sglang.srt.disaggregation.encoder.server import MMEncoder
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.mem_cache.embedding_store import EmbeddingStore
from sglang.srt.runtime_context import get_parallel, publish
from sglang.srt.server_args import ServerArgs

from mmcache_connectors.sglang.embeddings import MMCacheEmbeddingStore
from mmcache_connectors.sglang.encoder_facts import PROCESSING
from mmcache_connectors.sglang.encoder_items import item_names

GRIDS = ("image_grid_thw", "video_grid_thw", "audio_feature_lens_raw")


def parameters(store: type) -> dict[str, list[str]]:
    """Each public method's parameters, in order."""
    methods = inspect.getmembers(store, inspect.isfunction)
    return {name: list(inspect.signature(one).parameters) for name, one in methods if not name.startswith("_")}


def named(encoder: Any, modality: Modality, feature: torch.Tensor, **inputs: Any) -> list[list[str]]:
    """What items are named by SGLang, and by us."""
    grids = next(value for name, value in inputs.items() if name in GRIDS)
    theirs = MMEncoder._calculate_hashes_from_features(encoder, feature, grids, modality, inputs)
    return [[str(one) for one in theirs], item_names(encoder, feature, grids, modality, inputs)]


def film_by(ranks: int, encoder: Any, patches: torch.Tensor) -> list[list[str]]:
    """What a film is named by the first of so many tensor-parallel ranks, which may share out its frames."""
    arguments = ServerArgs(model_path=sys.argv[1], device="cpu", tp_size=ranks, mm_enable_dp_encoder=True)
    publish(arguments, role="encoder")
    with get_parallel().override(attn_tp_size=ranks):
        return named(encoder, Modality.VIDEO, patches, video_grid_thw=torch.tensor([[2, 2, 2]]))


def main() -> None:
    """Print it."""
    encoder = object.__new__(MMEncoder)
    encoder.model_type = "qwen2_5_omni"
    encoder.preprocessor = object.__new__(EncoderPreprocessor)
    encoder.preprocessor.model_type = encoder.model_type
    numbers = torch.Generator().manual_seed(4)
    patches = torch.rand(8, 6, generator=numbers)
    sounds = torch.rand(4, 5, 30, generator=numbers)

    def picture(*grids: list[int], feature: torch.Tensor = patches, **more: Any) -> list[list[str]]:
        return named(encoder, Modality.IMAGE, feature, image_grid_thw=torch.tensor(grids), **more)

    def sound(*which: int, **more: Any) -> list[list[str]]:
        lengths = torch.full((len(which),), 30)
        return named(encoder, Modality.AUDIO, sounds[list(which)], audio_feature_lens_raw=lengths, **more)

    halves = [1, 2, 2], [1, 2, 2]
    same = torch.cat([patches[:4], patches[:4]])
    found = {
        "methods": [parameters(EmbeddingStore), parameters(MMCacheEmbeddingStore)],
        "processing": sorted(set(PROCESSING) - set(namespace_of(ServerArgs))),
        "abstract": sorted(EmbeddingStore.__abstractmethods__),
        "row": picture([1, 2, 4]),
        "row again": picture([1, 2, 4]),
        "column": picture([1, 4, 2]),
        "halves": picture(*halves),
        "first half": picture(halves[0], feature=patches[:4]),
        "other dtype": picture([1, 2, 4], feature=patches.view(torch.int32)),
        "twice": picture(*halves, feature=same),
        "twice, with times": picture(*halves, feature=same, video_timestamps=[[0.5], [1.5]]),
        "twice, with sizes": picture(*halves, feature=same, image_sizes=torch.ones(2, 2)),
        "row with a size": picture([1, 2, 4], image_sizes=torch.ones(1, 2)),
        "sounds": sound(0, 1),
        "other sounds": sound(2, 3),
        "masked sounds": sound(0, 1, feature_attention_mask=torch.ones(2, 30)),
        "masked sound": sound(0, feature_attention_mask=torch.ones(1, 30)),
        "film": film_by(1, encoder, patches),
        "film of two ranks": film_by(2, encoder, patches),
        "unknown": picture([1, 2, 4], what=object()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
