"""Writes the pictures the tests show, and what the model's processor makes of them: `python pictures.py FOLDER MODEL`.

FOLDER/features.json: for each picture the SHA-256 of its features' bytes and its grid. Two pairs are alike in the first
and differ in the second: `row` and `column`, of the same ten tiles; `wide` and `tall`, of one colour.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

TILE = 28  # one merged patch: 2 x 2 patches of 14


def write_pictures(folder: Path) -> list[Path]:
    """PNG files, which lose nothing."""
    from PIL import Image

    random = np.random.default_rng(5)
    tiles = random.integers(0, 256, (10, TILE, TILE, 3), np.uint8)
    first, second = random.integers(0, 256, (2, 4 * TILE, 4 * TILE, 3), np.uint8)
    touched = first.copy()
    touched[TILE, TILE] ^= 255
    pixels = {
        "first": first,
        "second": second,
        "touched": touched,
        "row": np.concatenate(list(tiles), axis=1),
        "column": np.concatenate(list(tiles), axis=0),
        "wide": np.full((30, 150, 3), (200, 30, 90), np.uint8),
        "tall": np.full((150, 30, 3), (200, 30, 90), np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in pixels.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in pixels]


def main() -> None:
    """Write them, process them, write down what came out."""
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    folder, model = map(Path, sys.argv[1:3])
    processor = Qwen2VLImageProcessor.from_pretrained(model)
    features = {}
    for file in write_pictures(folder):
        made = processor(Image.open(file), return_tensors="np")
        values = made["pixel_values"]
        features[file.stem] = [hashlib.sha256(values.tobytes()).hexdigest(), made["image_grid_thw"].tolist()]
    (folder / "features.json").write_text(json.dumps(features))


if __name__ == "__main__":
    main()
