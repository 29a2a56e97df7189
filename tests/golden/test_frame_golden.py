"""The golden frames: mmcache packs and reads them, and so does a second implementation of docs/wire-format.md.

The second one below shares no code with mmcache: plain bytes, and XXH3 from its package.
"""

from __future__ import annotations

import json
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mmcache.frame_view import Frame

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "golden_frame.py"
VECTORS: list[dict[str, Any]] = json.loads((ROOT / "tests" / "golden" / "frame_v1.json").read_text())["vectors"]
TOOL = runpy.run_path(str(SCRIPT))

by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])


# ------------------------------------------------------------------ a second implementation, from docs/wire-format.md
KINDS = {"kv": 1, "embedding": 2, "prompt": 3, "latent": 4}
CODES = {
    "bool": 1, "uint8": 2, "int8": 3, "int16": 4, "int32": 5, "int64": 6,
    "float16": 7, "bfloat16": 8, "float32": 9, "float64": 10, "float8_e4m3fn": 11, "float8_e5m2": 12,
}  # fmt: skip
ITEMSIZE = [0, 1, 1, 1, 2, 4, 8, 2, 2, 4, 8, 1, 1]
DIGESTS = ("key", "namespace", "parent", "home")


def u16(number: int) -> bytes:
    return struct.pack("<H", number)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def pack(given: dict[str, Any]) -> bytes:
    meta, alignment, tensors = given["meta"], given["alignment"], given["tensors"]
    table, body = b"", b""
    header_nbytes = -(-(256 + 160 * len(tensors)) // alignment) * alignment
    for tensor in tensors:
        code, shape, name = CODES[tensor["dtype"]], tensor["shape"], tensor["name"].encode()
        nbytes = ITEMSIZE[code]
        for size in shape:
            nbytes *= size
        pattern = bytes.fromhex(tensor["data"])
        data = (pattern * (nbytes // len(pattern) + 1))[:nbytes]
        body += bytes(-len(body) % alignment)
        table += bytes([code, len(shape)]) + u16(len(name)) + u32(0) + u64(header_nbytes + len(body), nbytes)
        table += xxhash.xxh3_128(data).digest() + u64(*shape) + bytes(8 * (8 - len(shape))) + name.ljust(56, b"\0")
        body += data
    start = b"MMCFRAME" + u16(1) + bytes([KINDS[meta["kind"]], 0]) + u32(header_nbytes)
    start += u64(header_nbytes + len(body)) + u32(alignment) + u16(len(tensors)) + u16(0)
    rest = u64(meta["chain_index"], meta["created_ms"], meta["expires_ms"]) + meta["writer"].encode().ljust(24, b"\0")
    rest += b"".join(bytes.fromhex(meta[name]) for name in DIGESTS) + bytes(32) + table
    rest += bytes(header_nbytes - len(start) - 16 - len(rest))
    frame: bytes = start + xxhash.xxh3_128(start + bytes(16) + rest).digest() + rest + body
    return frame


def read(frame: bytes) -> dict[str, Any]:
    """What a frame holds, in the form of a vector's input; data are the whole payloads."""
    header_nbytes, frame_nbytes, alignment, count = struct.unpack_from("<IQIH", frame, 12)
    assert (frame[:10], len(frame)) == (b"MMCFRAME\1\0", frame_nbytes)
    assert xxhash.xxh3_128(frame[:32] + bytes(16) + frame[48:header_nbytes]).digest() == frame[32:48]
    tensors = []
    for start in range(256, 256 + 160 * count, 160):
        code, ndim, name_nbytes, _, offset, nbytes = struct.unpack_from("<BBHIQQ", frame, start)
        data = frame[offset : offset + nbytes]
        assert xxhash.xxh3_128(data).digest() == frame[start + 24 : start + 40]
        name = frame[start + 104 : start + 104 + name_nbytes].decode()
        shape = list(struct.unpack_from(f"<{ndim}Q", frame, start + 40))
        dtype = next(name for name, number in CODES.items() if number == code)
        tensors.append({"name": name, "dtype": dtype, "shape": shape, "data": data.hex()})
    index, created_ms, expires_ms = struct.unpack_from("<QQQ", frame, 48)
    meta: dict[str, Any] = {"kind": next(name for name, number in KINDS.items() if number == frame[10])}
    meta |= {name: frame[96 + 32 * i : 128 + 32 * i].hex() for i, name in enumerate(DIGESTS)}
    meta |= {"chain_index": index, "created_ms": created_ms, "expires_ms": expires_ms}
    return {
        "meta": meta | {"writer": frame[72:96].rstrip(b"\0").decode()},
        "alignment": alignment,
        "tensors": tensors,
    }


# ------------------------------------------------------------------------------------------------------- tests
def filled(given: dict[str, Any]) -> dict[str, Any]:
    """A vector's input with its data as long as its shapes say."""
    tensors = [{**tensor, "data": TOOL["payload_of"](tensor).hex()} for tensor in given["tensors"]]
    return {**given, "tensors": tensors}


@by_name
def test_mmcache_packs_the_golden_frame(vector: dict[str, Any]) -> None:
    assert TOOL["evaluate"](vector) == vector["expected"]


@by_name
def test_mmcache_reads_the_golden_frame(vector: dict[str, Any]) -> None:
    given = filled(vector["input"])
    frame = Frame.parse(bytes.fromhex(vector["expected"]))
    frame.verify()
    assert frame.header.meta == TOOL["meta_of"](given["meta"])
    assert frame.header.alignment == given["alignment"]
    found = [(stored.spec, frame.payload(stored).hex()) for stored in frame.header.tensors]
    assert found == [((t["name"], t["dtype"], tuple(t["shape"])), t["data"]) for t in given["tensors"]]


@by_name
def test_an_implementation_from_the_document_packs_and_reads_it(vector: dict[str, Any]) -> None:
    assert pack(vector["input"]).hex() == vector["expected"]
    assert read(bytes.fromhex(vector["expected"])) == filled(vector["input"])


def test_names_are_unique_and_every_dtype_and_kind_has_a_vector() -> None:
    names = [vector["name"] for vector in VECTORS]
    assert len(set(names)) == len(names)
    assert {vector["input"]["meta"]["kind"] for vector in VECTORS} == set(KINDS)
    assert {tensor["dtype"] for vector in VECTORS for tensor in vector["input"]["tensors"]} == set(CODES)


def run_tool(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--file", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_a_changed_frame_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    wrong = {**VECTORS[0], "expected": VECTORS[0]["expected"][:-2] + "ff"}
    missing = {**VECTORS[1], "expected": None}
    file = tmp_path / "frames.json"
    file.write_text(json.dumps({"vectors": [wrong, missing]}))
    before = file.read_bytes()
    result = run_tool(file, "--write")
    assert result.returncode == 1
    assert "differ from byte" in result.stderr
    assert "mend the code" in result.stderr
    assert file.read_bytes() == before


def test_a_new_frame_is_filled_in_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "frames.json"
    file.write_text(json.dumps({"schema": "x", "vectors": [{**VECTORS[0], "expected": None}]}))
    assert run_tool(file).returncode == 1
    assert run_tool(file, "--write").returncode == 0
    assert json.loads(file.read_text()) == {"schema": "x", "vectors": [VECTORS[0]]}
    assert run_tool(file).returncode == 0
