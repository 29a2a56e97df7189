"""Namespaces: facts as text, the id they give, and what is refused as no identity."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from mmcache.errors import KeyInputError
from mmcache.keys import Namespace, namespace_id
from mmcache.keyset import NamespaceId

FACTS: dict[str, Any] = {"model": "org/model", "dtype": "bfloat16", "layout": "LBHNC"}


def kv(block_size: int = 4, **facts: object) -> Namespace:
    return Namespace(kind="kv", block_size=block_size, **{**FACTS, **facts})


class Foo:
    """A type nobody can encode."""


def test_namespace_facts_are_text_sorted_and_complete() -> None:
    namespace = kv(zeta=True, alpha=7, dropped=None, rope={"factor": 4.0})
    assert list(namespace.facts) == ["alpha", "block_size", "dtype", "layout", "model", "rope", "zeta"]
    assert namespace.facts["alpha"] == "7"
    assert namespace.facts["zeta"] == "true"
    assert namespace.facts["block_size"] == "4"
    assert namespace.facts["rope"].startswith("b3:")
    assert (namespace.kind, namespace.block_size) == ("kv", 4)
    assert namespace.id == namespace_id(namespace.kind, namespace.facts)
    assert len(namespace.id) == 32
    with pytest.raises(TypeError):
        namespace.facts["alpha"] = "8"  # type: ignore[index]


def test_namespace_does_not_depend_on_the_order_of_facts_or_on_facts_that_are_not_set() -> None:
    one = Namespace(kind="kv", block_size=4, a="1", b="2", **FACTS)
    two = Namespace(kind="kv", b="2", c=None, **FACTS, a="1", block_size=4)
    assert one == two
    assert hash(one) == hash(two)
    assert one != kv()
    assert one != "namespace"


def test_namespace_takes_any_fact_name() -> None:
    namespace = Namespace(kind="embedding", model="m", dtype="float32", **{"self": 1, "name with space": 2})
    assert namespace.facts["self"] == "1"


def test_namespaces_and_keys_travel_between_processes() -> None:
    namespace = kv(rope={"factor": 4.0})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        keys = pool.submit(Namespace.block_keys, namespace, range(8)).result()
    assert keys == namespace.block_keys(range(8))
    assert keys[0].namespace == namespace.id
    assert isinstance(keys[0].namespace, NamespaceId)
    assert (keys[0].namespace.kind, keys[0].namespace.facts) == ("kv", dict(namespace.facts))


@pytest.mark.parametrize("missing", ["model", "dtype", "layout", "block_size"])
@pytest.mark.parametrize("empty", [True, False])
def test_kv_namespace_says_which_fact_is_missing_and_why(missing: str, empty: bool) -> None:
    facts: dict[str, Any] = {**FACTS, "block_size": 16}
    del facts[missing]
    if empty and missing != "block_size":
        facts[missing] = ""
    with pytest.raises(KeyInputError, match=rf'{missing} is missing: a kind="kv" namespace needs it, \w+'):
        Namespace(kind="kv", **facts)


@pytest.mark.parametrize("kind", ["embedding", "prompt", "latent"])
def test_other_namespaces_need_model_and_dtype_and_have_no_blocks(kind: str) -> None:
    with pytest.raises(KeyInputError, match="model is missing"):
        Namespace(kind=kind, dtype="float32")
    with pytest.raises(KeyInputError, match="dtype is missing"):
        Namespace(kind=kind, model="m")
    with pytest.raises(KeyInputError, match="block_size: only"):
        Namespace(kind=kind, model="m", dtype="float32", block_size=16)
    with pytest.raises(KeyInputError, match='block keys need a kind="kv" namespace'):
        Namespace(kind=kind, model="m", dtype="float32").block_keys([1])


@pytest.mark.parametrize("path", ["/models/x", "./x", "../x", "~/x", "~", ".", "..", "C:\\models", "file:///models/x"])
def test_a_local_path_is_no_model(path: str) -> None:
    with pytest.raises(KeyInputError, match=r"looks like a local path.*directory_digest"):
        kv(model=path)
    with pytest.raises(KeyInputError, match=r"looks like a local path.*file_digest"):
        kv(adapter=path)


@pytest.mark.parametrize("path", ["FILE:///x", "c:/x", ".\\x", "..\\x", "~user/x"])
def test_a_path_of_any_spelling_is_no_fact(path: str) -> None:
    with pytest.raises(KeyInputError, match=r"processor=.*looks like a local path"):
        kv(processor=path)
    assert kv(processor=[path]).facts["processor"].startswith("b3:")


def test_declared_facts_are_held_to_the_limits_of_a_namespace() -> None:
    for facts, complaint in (
        ({"text": "x" * 70_000}, "text: text of more than"),
        ({"text": "é" * 40_000}, "text: text of more than"),  # 80 000 bytes
        ({f"fact{number}": "é" * 30_000 for number in range(5)}, "bytes together; pass one structure"),
        ({f"{number:0>300}": "" for number in range(1000)}, "bytes together; pass one structure"),
        ({str(number): "" for number in range(1025)}, "1025 facts are more than 1024"),
    ):
        with pytest.raises(KeyInputError, match=complaint):
            namespace_id("kv", facts)
    assert len(namespace_id("kv", {f"fact{number}": "é" * 20_000 for number in range(5)})) == 32


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"rope": {"factor": float("nan")}}, "rope.factor: nan"),
        ({"processor": {"size": Foo()}}, "processor.size: object of type Foo"),
        ({"big": 1 << 64}, "big: integer outside"),
        ({"text": "\ud800"}, "text: text holds a lone surrogate"),
        ({"text": "x" * 70_000}, "text: text of more than"),
        ({f"fact{number}": 1 for number in range(1100)}, "facts are more than"),
        ({"block_size": 0}, "block_size: 0 is outside"),
        ({"block_size": True}, "block_size: expected an integer"),
        ({"block_size": 16.0}, "block_size: expected an integer, got object of type float"),
        ({"block_size": 10**5000}, "block_size: an integer of 16610 bits is outside"),
        ({"kind": ["kv"]}, r"kind=\['kv'\] is unknown"),
        ({"kind": "kvs"}, "kind='kvs' is unknown; pass one of kv, embedding, prompt, latent"),
    ],
)
def test_namespace_refuses_what_it_cannot_encode(facts: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        Namespace(**{"kind": "kv", "block_size": 4, **FACTS, **facts})


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from mmcache.keys import *\n"
        "n = Namespace(kind='kv', block_size=4, model='org/model', dtype='bfloat16', layout='LBHNC',"
        " x={'b': 1, 'a': 2})\n"
        "print(n.block_keys(range(8))[-1].hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert runs == [kv(x={"a": 2, "b": 1}).block_keys(range(8))[-1].hex()] * 2
