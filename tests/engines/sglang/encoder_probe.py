"""Prints, as JSON, what the installed SGLang says of its embedding store, and what its encoder and ours name items."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from sglang.srt.disaggregation.encoder.preprocessor import EncoderPreprocessor
from sglang.srt.disaggregation.encoder.server import MMEncoder
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.mem_cache.embedding_store import EmbeddingStore

from mmcache_connectors.sglang.embeddings import MMCacheEmbeddingStore
from mmcache_connectors.sglang.encoder_items import item_names


def parameters(store: type) -> dict[str, list[str]]:
    """Each public method's parameters, in order."""
    methods = inspect.getmembers(store, inspect.isfunction)
    return {name: list(inspect.signature(one).parameters) for name, one in methods if not name.startswith("_")}


def named(encoder: Any, modality: Modality, feature: torch.Tensor, **inputs: Any) -> list[list[str]]:
    """What items are named by SGLang, and by us."""
    grids = next(value for name, value in inputs.items() if name in ("image_grid_thw", "audio_feature_lens_raw"))
    theirs = MMEncoder._calculate_hashes_from_features(encoder, feature, grids, modality, inputs)
    return [[str(one) for one in theirs], item_names(encoder, feature, grids, modality, inputs)]


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

    def sound(first: int, second: int) -> list[list[str]]:
        lengths = torch.tensor([30, 30])
        return named(encoder, Modality.AUDIO, sounds[[first, second]], audio_feature_lens_raw=lengths)

    sizes = torch.tensor([[1, 2], [3, 4]])
    found = {
        "methods": [parameters(EmbeddingStore), parameters(MMCacheEmbeddingStore)],
        "abstract": sorted(EmbeddingStore.__abstractmethods__),
        "row": picture([1, 2, 4]),
        "row again": picture([1, 2, 4]),
        "column": picture([1, 4, 2]),
        "halves": picture([1, 2, 2], [1, 2, 2]),
        "first half": picture([1, 2, 2], feature=patches[:4]),
        "other dtype": picture([1, 2, 4], feature=patches.view(torch.int32)),
        "twice": picture([1, 2, 2], [1, 2, 2], feature=torch.cat([patches[:4], patches[:4]])),
        "twice, of two sizes": picture(
            [1, 2, 2], [1, 2, 2], feature=torch.cat([patches[:4], patches[:4]]), image_sizes=sizes
        ),
        "sounds": sound(0, 1),
        "other sounds": sound(2, 3),
        "unknown": picture([1, 2, 4], what=object()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
