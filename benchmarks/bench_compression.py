"""What zstd saves on bfloat16 KV blocks and embeddings, as they are and split into byte planes, and how fast.

    .engines/vllm/bin/python -m pip install scikit-image zstandard
    .engines/vllm/bin/python -m benchmarks.bench_compression [--json FILE]

Values come from models of real architecture run here, Qwen2-0.5B on text and CLIP ViT-L/14 on scikit-image's photos,
with random weights as transformers draws them: no trained ones can be had here, so take the ratios as an indication.
One thread; ratios are stored / original, rates in MB/s of original bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcache_kernels import reference

LEVELS = (1, 3, 9, 19)
TOKENS = 1024
BLOCK_TOKENS = 32
REPEAT = 5
ROOT = Path(__file__).resolve().parents[1]


def kv_blocks() -> torch.Tensor:
    """bfloat16 `[blocks, layers, heads, tokens, keys and values]` of a prompt of English text, a byte a token."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    text = (ROOT / "LICENSE").read_bytes()[:TOKENS]
    with torch.inference_mode():
        cache = model(torch.tensor([list(text)]), use_cache=True).past_key_values
    layers = [torch.cat([layer.keys[0], layer.values[0]], -1) for layer in cache.layers]
    whole = torch.stack(layers).unflatten(2, (-1, BLOCK_TOKENS)).permute(2, 0, 1, 3, 4)
    return whole.to(torch.bfloat16).contiguous()


def embeddings() -> torch.Tensor:
    """bfloat16 `[photos, patches, width]` of the last hidden state."""
    from PIL import Image
    from skimage import data  # type: ignore[import-untyped,unused-ignore]
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    model = CLIPVisionModel(config).eval()
    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    pixels = [np.asarray(Image.fromarray(photo).resize((224, 224))) / 127.5 - 1 for photo in photos]
    with torch.inference_mode():
        states = model(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float()).last_hidden_state
    return states.to(torch.bfloat16).contiguous()


def measure(pieces: list[bytes], level: int) -> dict[str, float]:
    """Ratio and rates of one codec setting over the pieces, each compressed by itself; what comes back is compared."""
    import zstandard

    pack, unpack = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
    nbytes, there, back = sum(map(len, pieces)), [], []
    packed: list[bytes] = []
    for _ in range(REPEAT if level < 19 else 1):
        begin = time.perf_counter()
        packed = [pack.compress(piece) for piece in pieces]
        middle = time.perf_counter()
        restored = [unpack.decompress(piece) for piece in packed]
        there.append(middle - begin)
        back.append(time.perf_counter() - middle)
        assert restored == pieces
    return {
        "ratio": sum(map(len, packed)) / nbytes,
        "compress_mbps": nbytes / statistics.median(there) / 1e6,
        "decompress_mbps": nbytes / statistics.median(back) / 1e6,
    }


def rows(name: str, values: torch.Tensor) -> list[dict[str, Any]]:
    """One row for each way of laying out and level."""
    exponents, rest = reference.split_planes(values)
    assert torch.equal(reference.join_planes(exponents, rest).view(torch.int16), values.view(torch.int16))
    ways = {
        "as it is": [value.view(torch.uint8).numpy().tobytes() for value in values],
        "both planes": [np.stack(pair).tobytes() for pair in zip(exponents.numpy(), rest.numpy(), strict=True)],
        "exponents alone": [value.numpy().tobytes() for value in exponents],
        "signs and mantissas alone": [value.numpy().tobytes() for value in rest],
    }
    return [
        {"values": name, "way": way, "level": level, **measure(pieces, level)}
        for way, pieces in ways.items()
        for level in LEVELS
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows there")
    arguments = parser.parse_args()
    found = rows("KV blocks", kv_blocks()) + rows("embeddings", embeddings())
    print("| values | laid out | zstd level | stored / original | compress MB/s | decompress MB/s |")
    print("|---" * 6 + "|")
    for row in found:
        rates = f"{row['compress_mbps']:.0f} | {row['decompress_mbps']:.0f}"
        print(f"| {row['values']} | {row['way']} | {row['level']} | {row['ratio']:.3f} | {rates} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
