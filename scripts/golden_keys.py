"""Checks tests/golden/keys_v1.json against mmcache, and fills in the digests of vectors that have none yet.

    python scripts/golden_keys.py            compare; exit 1 and say what differs
    python scripts/golden_keys.py --write    also fill in vectors whose "expected" is null

A digest that is there is never overwritten: stored values are found by these digests, so a difference is a broken key
schema, not an outdated file. A new schema is a new file and a new domain prefix (docs/keys.md). To add a vector, append
{"name", "function", "input", "expected": null} and run with --write.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmcache.encoding import canonical
from mmcache.identity import directory_digest, file_digest
from mmcache.keys import Key, Keys, Namespace, Part, PlaceholderSpan, embedding_key, item_digest, latent_key, opaque_key
from mmcache.media import media_digest, samples_digest
from mmcache.testing import golden

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "keys_v1.json"
TAGS: dict[str, Callable[[Any], Any]] = {
    "$hex": bytes.fromhex,
    "$float": float,
    "$int": int,
    "$range": lambda bounds: list(range(*bounds)),
}


def plain(value: Any) -> Any:
    """The Python value of a JSON input: $hex, $float and $int are bytes, float and int, $range the ints between."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, body),) = value.items()
        if tag in TAGS:
            return TAGS[tag](body)
    return {name: plain(item) for name, item in value.items()}


def namespace_of(given: Mapping[str, Any]) -> Namespace:
    return Namespace(kind=given["kind"], block_size=given.get("block_size"), **given["facts"])


def part_of(given: Mapping[str, Any]) -> Part:
    return Part(**{name: tuple(numbers) for name, numbers in given.items()})


def row(key: Key) -> dict[str, Any]:
    names = ("chain", "digest", "home", "parent")
    return {**{name: getattr(key, name).hex() for name in names}, "index": key.index}


def eval_canonical(value: Any) -> Any:
    return canonical(value, "value").hex()


def eval_namespace(**given: Any) -> Any:
    namespace = namespace_of(given)
    return {"facts": dict(namespace.facts), "id": namespace.id.hex()}


def eval_samples(data: bytes, dtype: str, shape: list[int], **given: Any) -> Any:
    samples = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return samples_digest(samples, **given).hex()


def eval_part(chain: bytes, **part: Any) -> Any:
    key = Key(bytes(32), chain, chain, bytes(32))
    return Keys.of(key).for_part(part_of(part)).digests[0].hex()


def eval_block_keys(namespace: Any, tokens: list[int], spans: Any = (), part: Any = None) -> Any:
    keys = namespace_of(namespace).block_keys(tokens, [PlaceholderSpan(**span) for span in spans])
    return [row(key) for key in (keys.for_part(part_of(part)) if part else keys)]


def eval_directory(files: Mapping[str, bytes]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return directory_digest(folder)


def eval_file(data: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        path.write_bytes(data)
        return file_digest(path)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "block_keys": eval_block_keys,
    "canonical": eval_canonical,
    "directory_digest": eval_directory,
    "embedding_key": lambda namespace, item: row(embedding_key(namespace_of(namespace), item)),
    "file_digest": eval_file,
    "item_digest": lambda **given: item_digest(**given).hex(),
    "latent_key": lambda namespace, **given: row(latent_key(namespace_of(namespace), **given)),
    "media_digest": lambda **given: media_digest(**given).hex(),
    "namespace": eval_namespace,
    "opaque_key": lambda namespace, **given: row(opaque_key(namespace_of(namespace), **given)),
    "part": eval_part,
    "samples_digest": eval_samples,
}


def evaluate(vector: Mapping[str, Any]) -> Any:
    """What mmcache makes of one vector's input, in the form of its "expected"."""
    return FUNCTIONS[vector["function"]](**plain(vector["input"]))


def main(arguments: list[str] | None = None) -> int:
    return golden.run(__doc__ or "", GOLDEN, evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main())
