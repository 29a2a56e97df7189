"""The golden key vectors: mmcache gives them, and so does a second implementation written from docs/keys.md alone.

The second one below shares no code with mmcache: plain bytes, and BLAKE3 from its package.
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
from blake3 import blake3

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "golden_keys.py"
FILES = [ROOT / "tests" / "golden" / name for name in ("keys_v1.json", "keys_latent_v0.json")]
VECTORS: list[dict[str, Any]] = [vector for file in FILES for vector in json.loads(file.read_text())["vectors"]]
TOOL = runpy.run_path(str(SCRIPT))

by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])


# ------------------------------------------------------------------ a second implementation, from docs/keys.md
def u64(*numbers: int) -> bytes:
    return b"".join(struct.pack("<Q", number) for number in numbers)


def frame(data: bytes) -> bytes:
    return u64(len(data)) + data


def digest(domain: str, *fields: bytes) -> bytes:
    return blake3(b"".join(map(frame, (domain.encode(), *fields)))).digest()


def encode(value: Any) -> bytes:
    if value is None or value is False or value is True:
        return {None: b"\x00", False: b"\x01", True: b"\x02"}[value]
    if isinstance(value, int):
        return b"\x03" + frame(str(value).encode())
    if isinstance(value, float):
        return b"\x04" + struct.pack("<d", value)
    if isinstance(value, str):
        return b"\x05" + frame(value.encode())
    if isinstance(value, bytes):
        return b"\x06" + frame(value)
    if isinstance(value, list):
        return b"\x07" + u64(len(value)) + b"".join(map(encode, value))
    entries = sorted((name.encode(), item) for name, item in value.items())
    return b"\x08" + u64(len(value)) + b"".join(frame(name) + encode(item) for name, item in entries)


def fact(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else "b3:" + digest("k1.value", encode(value)).hex()


def namespace(kind: str, facts: dict[str, Any], block_size: int | None = None) -> tuple[bytes, dict[str, str]]:
    texts = {name: fact(value) for name, value in {**facts, "block_size": block_size}.items() if value is not None}
    fields = [text.encode() for name in sorted(texts, key=str.encode) for text in (name, texts[name])]
    return digest("k1.namespace", kind.encode(), *fields), texts


def stored(chain: bytes, part: dict[str, list[int]]) -> bytes:
    flags, numbers = 0, b""
    for bit, name in enumerate(("kv_group", "layers", "kv_heads", "context")):
        given = part.get(name)
        if given and (given[1] - given[0] != given[2] if len(given) == 3 else given[1] != 1):
            flags, numbers = flags | 1 << bit, numbers + u64(*given)
    return digest("k1.part", chain, bytes([flags]) + numbers)


def run_of(token: int) -> int:
    return max(start for start in (0, 512, 1024, 2048, token // 4096 * 4096) if start <= token)


def blocks(space: dict[str, Any], tokens: list[int], spans: list[dict[str, Any]], part: dict[str, Any]) -> Any:
    size, space_id = space["block_size"], namespace(**space)[0]
    rows: list[dict[str, Any]] = []
    chain = parent = home = bytes(32)
    for index in range(len(tokens) // size):
        first = index * size
        segments = b""
        count = 0
        for span in sorted(spans, key=lambda span: int(span["offset"])):
            inside = [place for place in range(size) if 0 <= first + place - span["offset"] < span["length"]]
            if inside:
                count += 1
                segments += struct.pack("<II", inside[0], len(inside)) + span["item"]
                segments += u64(span["length"], first + inside[0] - span["offset"])
        head = frame(b"k1.block") + space_id + struct.pack("<I", size) + chain
        chain = blake3(head + u64(*tokens[first : first + size]) + struct.pack("<I", count) + segments).digest()
        if index == 0 or run_of(first) != run_of(first - size):
            home = chain
        key = stored(chain, part)
        rows.append(
            {"chain": chain.hex(), "digest": key.hex(), "home": home.hex(), "parent": parent.hex(), "index": index}
        )
        parent = key
    return rows


def single(chain: bytes, home: bytes | None = None, index: int = 0) -> dict[str, Any]:
    texts = {"chain": chain, "digest": stored(chain, {}), "home": home or chain, "parent": bytes(32)}
    return {**{name: value.hex() for name, value in texts.items()}, "index": index}


def reference(function: str, given: dict[str, Any]) -> Any:
    def space_id() -> bytes:
        return namespace(**given.pop("namespace"))[0]

    def model_file(name: str) -> bool:
        *folders, file = name.lower().split("/")
        documents = ("changelog", "copying", "licence", "license", "notice", "readme", "use_policy")
        pictures = (".gif", ".jpeg", ".jpg", ".lock", ".md", ".pdf", ".png", ".rst", ".svg", ".webp")
        hidden = any(part.startswith(".") for part in [*folders, file]) or "__pycache__" in folders
        return not hidden and not file.endswith(pictures) and file.removesuffix(".txt") not in documents

    match function:
        case "canonical":
            return encode(given["value"]).hex()
        case "namespace":
            found, texts = namespace(**given)
            return {"facts": texts, "id": found.hex()}
        case "media_digest":
            return digest("k1.media", given["modality"].encode(), given["data"]).hex()
        case "samples_digest":
            words = [given[name].encode() for name in ("modality", "mode", "dtype")]
            rate = None if given["sample_rate"] is None else float(given["sample_rate"])
            return digest("k1.samples", *words, u64(*given["shape"]), encode(rate), given["data"]).hex()
        case "item_digest":
            mask, times = given.get("is_embed"), given.get("timestamps")
            values = [
                given.get("grid"),
                None if mask is None else bytes(mask),
                given.get("processor_kwargs"),
                None if times is None else [float(time) for time in times],
            ]
            return digest("k1.item", given["content"], *map(encode, values)).hex()
        case "part":
            return stored(given.pop("chain"), given).hex()
        case "block_keys":
            return blocks(given["namespace"], given["tokens"], given.get("spans", []), given.get("part", {}))
        case "opaque_key":
            return single(digest("k1.opaque", space_id(), given["data"]), given.get("home"), given.get("index", 0))
        case "embedding_key":
            return single(digest("k1.embedding", space_id(), given["item"]))
        case "latent_key":
            space, extra = space_id(), given.pop("tiling", None)
            facts = {} if extra is None else {"tiling": extra}
            return single(digest("k0.latent", space, encode({**given, "facts": facts})))
        case "file_digest":
            return "b3:" + digest("k1.file", blake3(given["data"]).digest()).hex()
        case "directory_digest":
            files = sorted((name.encode(), data) for name, data in given["files"].items() if model_file(name))
            fields = [field for name, data in files for field in (name, blake3(data).digest())]
            return "b3:" + digest("k1.directory", *fields).hex()
    raise AssertionError(f"docs/keys.md knows no {function}")


# ------------------------------------------------------------------------------------------------------- tests
@by_name
def test_mmcache_gives_the_golden_vector(vector: dict[str, Any]) -> None:
    assert TOOL["evaluate"](vector) == vector["expected"]


@by_name
def test_an_implementation_from_the_document_gives_the_golden_vector(vector: dict[str, Any]) -> None:
    assert reference(vector["function"], TOOL["plain"](vector["input"])) == vector["expected"]


def test_names_are_unique_and_every_function_has_a_vector() -> None:
    names = [vector["name"] for vector in VECTORS]
    assert len(set(names)) == len(names)
    assert {vector["function"] for vector in VECTORS} == set(TOOL["FUNCTIONS"])


def run_tool(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--file", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_a_changed_digest_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    wrong = {"name": "wrong", "function": "canonical", "input": {"value": None}, "expected": "ff"}
    missing = {"name": "missing", "function": "canonical", "input": {"value": True}, "expected": None}
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"vectors": [wrong, missing]}))
    before = file.read_bytes()
    result = run_tool(file, "--write")
    assert result.returncode == 1
    assert "mend the code" in result.stderr
    assert file.read_bytes() == before


def test_a_new_vector_is_filled_in_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    new = {"name": "new", "function": "canonical", "input": {"value": True}, "expected": None}
    file.write_text(json.dumps({"schema": "x", "vectors": [new]}))
    assert run_tool(file).returncode == 1
    assert run_tool(file, "--write").returncode == 0
    assert json.loads(file.read_text()) == {"schema": "x", "vectors": [{**new, "expected": "02"}]}
    assert run_tool(file).returncode == 0
