"""Checks tests/golden/frame_v1.json against mmcache, and fills in the bytes of frames that have none yet.

    python scripts/golden_frame.py            compare; exit 1 and say what differs
    python scripts/golden_frame.py --write    also fill in vectors whose "expected" is null

Bytes that are there are never overwritten: frames rest on disks and in other processes, so a difference is a broken
format, not an outdated file (docs/wire-format.md). To add a vector, append {"name", "input", "expected": null} and run
with --write.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mmcache.frame import FrameMeta, Kind, TensorSpec, frame_segments, pack_header
from mmcache.testing import golden

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "frame_v1.json"
DIGESTS = ("key", "namespace", "parent", "home")


def payload_of(tensor: Mapping[str, Any]) -> bytes:
    """A tensor's bytes: those of "data", again and again, until its shape is filled."""
    nbytes = TensorSpec("", tensor["dtype"], tuple(tensor["shape"])).nbytes
    data = bytes.fromhex(tensor["data"])
    return (data * (nbytes // len(data) + 1))[:nbytes] if nbytes else b""


def meta_of(given: Mapping[str, Any]) -> FrameMeta:
    """The identity a vector gives, digests as hex and the kind by name."""
    values: dict[str, Any] = {**given, "kind": Kind[given["kind"].upper()]}
    return FrameMeta(**values | {name: bytes.fromhex(given[name]) for name in DIGESTS})


def evaluate(vector: Mapping[str, Any]) -> str:
    """The frame that mmcache packs from one vector's input, in hex."""
    given = vector["input"]
    specs = [TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in given["tensors"]]
    payloads = [payload_of(tensor) for tensor in given["tensors"]]
    sums = [xxhash.xxh3_128_digest(payload) for payload in payloads]
    header = pack_header(meta_of(given["meta"]), specs, sums, given["alignment"])
    return b"".join(frame_segments(header, [memoryview(payload) for payload in payloads], given["alignment"])).hex()


def difference(expected: str | None, found: str) -> str:
    """Where two frames begin to differ."""
    if expected is None:
        return "has no bytes yet; fill them in with --write"
    pairs = zip(bytes.fromhex(expected), bytes.fromhex(found), strict=False)
    first = next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(expected), len(found)) // 2)
    return f"expected {len(expected) // 2} bytes, got {len(found) // 2}; they differ from byte {first} on"


def main(arguments: list[str] | None = None) -> int:
    return golden.run(__doc__ or "", GOLDEN, evaluate, arguments, difference)


if __name__ == "__main__":
    sys.exit(main())
