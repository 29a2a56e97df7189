"""A client in another language, from the schema and docs/keys.md alone: Node stores what Python reads, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.keys import Key, Namespace, embedding_key, item_digest
from mmcache.keyset import Keys
from mmcache.media import media_digest
from mmcache.pb import cache_pb2 as pb
from mmcache.tensors import as_dtype
from mmcache.testing.process import ServerProcess
from tests.integration.rpc_support import ones, put_of, put_request, rpc_to, tensor
from tests.integration.support import ROOT, eventually, keys_of

NODE = shutil.which("node")
MODULES = ROOT / "clients" / "node" / "node_modules"
MISSING = "tests/clients/install-node.sh installs Node and the client's packages; `make test` runs it"
if os.environ.get("CI"):  # there, a client that is not tested is a failure
    assert NODE, MISSING
    assert MODULES.is_dir(), MISSING
pytestmark = pytest.mark.skipif(NODE is None or not MODULES.is_dir(), reason=MISSING)

NAMESPACE = Namespace(
    kind="embedding",
    model="test/vision",
    revision="abc123",
    dtype="float32",
    processor={"max_pixels": 200_704, "rescale": 0.5},
)
EMBEDDING = ((np.arange(3 * 64, dtype=np.float64) - 40) / 7).astype(np.float32).reshape(3, 64)
DEEPSTACK = (0x3F80 + np.arange(64, dtype=np.uint16)).reshape(2, 32)


def run_node(script: str, *words: str, said: str = "") -> Any:
    assert NODE
    command = [NODE, str(ROOT / "tests" / "clients" / script), *words]
    ended = subprocess.run(command, input=said, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


def node(address: str, act: str, label: str, **rest: Any) -> Any:
    return run_node("roundtrip.mjs", said=json.dumps({"address": address, "act": act, "label": label, **rest}))


def key_of(label: str) -> Key:
    content = media_digest(f"picture of {label}".encode(), "image")
    return embedding_key(NAMESPACE, item_digest(content, grid=(1, 16, 16), processor_kwargs={"max_pixels": 200_704}))


def destination() -> dict[str, Any]:
    """Room for what roundtrip.mjs stores."""
    return {
        "embedding": np.zeros((3, 64), np.float32),
        "deepstack": as_dtype(np.zeros((2, 32), np.uint16), "bfloat16"),
        "nothing": np.zeros((0, 5), np.int8),
        "scale": np.zeros((), np.float64),
    }


def check_node_stored(found: dict[str, Any]) -> None:
    """These are its bits, computed here anew."""
    assert found["embedding"].tobytes() == EMBEDDING.tobytes()
    assert found["deepstack"].array.tobytes() == DEEPSTACK.tobytes()
    assert found["scale"] == 0.1


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("64MiB", "--grpc", "127.0.0.1:0") as running:
        yield running


def test_node_makes_every_golden_key() -> None:
    file = ROOT / "tests" / "golden" / "keys_v1.json"
    vectors = json.loads(file.read_text())["vectors"]
    found = run_node("keys.mjs", str(file))
    assert {vector["name"]: one for vector, one in zip(vectors, found, strict=True)} == {
        vector["name"]: vector["expected"] for vector in vectors
    }


def test_node_refuses_what_the_page_refuses(tmp_path: Path) -> None:
    space: dict[str, Any] = {
        "kind": "kv",
        "block_size": 4,
        "facts": {"model": "m/m", "dtype": "float16", "layout": "LHNC"},
    }
    item = {"$hex": "ab" * 32}
    nested: Any = None
    for _ in range(34):
        nested = [nested]
    refused = {
        "lone surrogate": ("canonical", {"value": "\ud800"}),
        "too deep": ("canonical", {"value": nested}),
        "integer out of range": ("canonical", {"value": {"$int": str(1 << 64)}}),
        "inexact number": ("canonical", {"value": 1 << 60}),
        "not finite": ("canonical", {"value": {"$float": "Infinity"}}),
        "local path": ("namespace", {**space, "facts": {**space["facts"], "model": "/models/m"}}),
        "no model": ("namespace", {**space, "facts": {}}),
        "unknown kind": ("namespace", {**space, "kind": "toString"}),
        "block size of an embedding": ("namespace", {**space, "kind": "embedding"}),
        "large fact": ("namespace", {**space, "facts": {**space["facts"], "x": "x" * 65_537}}),
        "short digest": ("item_digest", {"content": {"$hex": "ab"}}),
        "negative grid": ("item_digest", {"content": item, "grid": [-1]}),
        "inexact time": ("item_digest", {"content": item, "timestamps": [{"$int": str((1 << 53) + 1)}]}),
        "no rate": ("samples_digest", {"data": item, "dtype": "int8", "shape": [32], "modality": "audio", "mode": "m"}),
        "modality": ("media_digest", {"data": item, "modality": "Image"}),
        "negative token": ("block_keys", {"namespace": space, "tokens": [0, 1, 2, -1]}),
        "overlap": ("block_keys", {"namespace": space, "tokens": {"$range": [0, 8]},
                                   "spans": [{"offset": 0, "length": 2, "item": item}] * 2}),
        "span beyond the tokens": ("block_keys", {"namespace": space, "tokens": {"$range": [0, 8]},
                                                  "spans": [{"offset": 7, "length": 2, "item": item}]}),
        "empty part": ("part", {"chain": item, "layers": [1, 1, 4]}),
        "no hash": ("opaque_key", {"namespace": space, "data": {"$hex": ""}}),
        "embedding in kv": ("embedding_key", {"namespace": space, "item": item}),
    }  # fmt: skip
    file = tmp_path / "refused.json"
    file.write_text(json.dumps({"vectors": [{"function": name, "input": given} for name, given in refused.values()]}))
    found = dict(zip(refused, run_node("keys.mjs", str(file)), strict=True))
    assert {name: one for name, one in found.items() if "refused" not in one} == {}


def test_python_reads_what_node_stored_bit_for_bit(server: ServerProcess) -> None:
    key = key_of("node")
    assert node(server.grpc_address, "put", "node") == {"key": key.hex(), "came": ["stored"]}
    assert node(server.grpc_address, "put", "node")["came"] == ["present"]
    back = destination()
    with mmcache.connect(server.url, deadline_s=20) as client:
        assert client.get_into(Keys.of(key), [back])[0]
        told = client.inspect(key.digest)
    check_node_stored(back)
    assert (told.kind, dict(told.facts)) == ("embedding", dict(NAMESPACE.facts))
    with rpc_to(server.grpc_address) as rpc:
        (entry,) = rpc("Get", pb.GetRequest(keys=key.digest)).entries
    assert {found.name: found.data for found in entry.tensors}["embedding"] == EMBEDDING.tobytes()
    assert entry.home == key.home


def test_node_reads_what_python_stored_bit_for_bit(server: ServerProcess) -> None:
    key = key_of("python")
    assert node(server.grpc_address, "get", "python") == {"key": key.hex(), "came": None}
    with mmcache.connect(server.url, deadline_s=20) as client:
        value = {"embedding": EMBEDDING, "deepstack": as_dtype(DEEPSTACK, "bfloat16")}
        assert client.put(Keys.of(key), [value])[0]
    assert node(server.grpc_address, "get", "python")["came"] == {
        "kind": "embedding",
        "tensors": {
            "embedding": {"dtype": "float32", "shape": [3, 64], "hex": EMBEDDING.tobytes().hex()},
            "deepstack": {"dtype": "bfloat16", "shape": [2, 32], "hex": DEEPSTACK.tobytes().hex()},
        },
    }
    assert node(server.grpc_address, "delete", "python")["came"] == [True]
    assert node(server.grpc_address, "get", "python")["came"] is None


def test_node_asks_again_for_what_did_not_fit(server: ServerProcess) -> None:
    keys = keys_of(5, "node/many")
    with mmcache.connect(server.url, deadline_s=20) as client:
        assert all(client.put(keys[:4], [np.ones(100_000, np.uint8) for _ in keys[:4]]))
    digests = [digest.hex() for digest in keys.digests]
    rest = {"digests": digests, "options": {"maxNbytes": 250_000}}
    assert node(server.grpc_address, "many", "", **rest)["came"] == [[100_000]] * 4 + [None]
    refused = node(server.grpc_address, "many", "", **rest | {"options": {"maxNbytes": 50_000}})
    assert refused["code"] == 8  # RESOURCE_EXHAUSTED


def test_the_sample_of_the_page_runs(server: ServerProcess, tmp_path: Path) -> None:
    (sample,) = re.findall(
        r"^```js\n(.*?)^```", (ROOT / "clients/node/README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert '"./index.js"' in sample
    assert "127.0.0.1:7601" in sample
    script = tmp_path / "sample.mjs"
    moved = sample.replace('"./index.js"', json.dumps((ROOT / "clients" / "node" / "index.js").as_uri()))
    script.write_text(moved.replace("127.0.0.1:7601", server.grpc_address))
    assert NODE
    for said in ("stored\n[ 257, 1024 ]\n", "[ 257, 1024 ]\n"):
        ended = subprocess.run([NODE, str(script)], capture_output=True, text=True, timeout=60, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, said, "")


def test_a_peer_that_takes_no_answer_is_let_go_and_its_memory_comes_back() -> None:
    """Answers wait for HTTP/2's flow control, which only a client other than gRPC's can leave shut."""
    with (
        ServerProcess("32MiB", "--grpc", "127.0.0.1:0", environment={"MMCACHE_IO_TIMEOUT_S": "5"}) as server,
        rpc_to(server.grpc_address) as rpc,
    ):
        key = keys_of(1, "silent")[0]
        assert rpc("Put", put_request(put_of(key, tensor("x", ones(4 << 20))))).status == bytes([pb.STORED])

        def inflight_nbytes() -> int:
            return int(rpc("Stat", pb.StatRequest()).counters["inflight_bytes"])

        assert NODE
        command = [NODE, str(ROOT / "tests" / "clients" / "silent.mjs"), server.grpc_address, key.digest.hex()]
        silent = subprocess.Popen(command)
        try:
            eventually(lambda: inflight_nbytes() > 4 * (4 << 20), "four answers were on their way")
            eventually(lambda: inflight_nbytes() < 1 << 20, "their memory came back")
            assert silent.poll() is None
        finally:
            silent.kill()
            silent.wait()
        assert rpc("Get", pb.GetRequest(keys=key.digest)).entries[0].status == pb.FOUND
