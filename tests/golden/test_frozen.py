"""What is frozen stays: the golden files of keys v1 and frame v1, digest by digest.

A golden test notices code that left its vectors; this one notices vectors that were changed with the code. Stored
values and other people's clients depend on them: a change is version 2, with an ADR, a new file, and a new line here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from blake3 import blake3

HERE = Path(__file__).parent
FROZEN = {
    "keys_v1.json": "83e9ea9358e4910b1dd20ab589836a3dce54061f96ef049a954b0320cf52aaa7",
    "frame_v1.json": "d62cd23b0159127ffda20827ab0fcbee0af774165e5561a9d57fdf232c7bb83f",
}


def frozen_digest(text: str) -> str:
    """Of the vectors alone, in order, so that the words around them may be improved."""
    return blake3(json.dumps(json.loads(text)["vectors"], sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_vectors_are_untouched(name: str) -> None:
    assert frozen_digest((HERE / name).read_text()) == FROZEN[name], (
        f"{name} was changed: version 1 is frozen. Undo it, or make it a new version with an ADR"
    )


def test_a_changed_vector_is_noticed() -> None:
    document = json.loads((HERE / "keys_v1.json").read_text())
    document["vectors"][0]["expected"] = "ff"
    assert frozen_digest(json.dumps(document)) != FROZEN["keys_v1.json"]
