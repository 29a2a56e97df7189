"""Item digests, and the keys of everything that is no block: opaque, embedding, prompt and latent keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmcache.errors import KeyInputError
from mmcache.keys import Namespace, embedding_key, item_digest, latent_key, opaque_key
from mmcache.keyset import NO_PARENT

ITEM = bytes(range(32))
OTHER = ITEM[::-1]
FACTS: dict[str, Any] = {"model": "org/model", "dtype": "bfloat16", "layout": "LBHNC"}


def kv(block_size: int = 4, **facts: object) -> Namespace:
    return Namespace(kind="kv", block_size=block_size, **{**FACTS, **facts})


class Foo:
    """A type nobody can encode."""


EMBEDDING = Namespace(kind="embedding", model="org/encoder", dtype="float32")
PROMPT = Namespace(kind="prompt", model="org/encoder", dtype="float32")
LATENT = Namespace(kind="latent", model="org/transformer", dtype="float16")
PROVENANCE: dict[str, Any] = {
    "prompt": ITEM,
    "conditioning": {},
    "scheduler": "EulerDiscreteScheduler",
    "scheduler_config": {"beta_start": 0.00085},
    "timesteps": [999.0, 500.0],
    "sigmas": None,
    "mu": None,
    "step": 1,
    "steps": 2,
    "guidance": 7.0,
    "eta": None,
    "size": (1024, 1024, 1),
    "initial_state": OTHER,
    "batch": (1, 0),
    "step_cache": None,
    "parallelism": {},
    "cpu_threads": None,
}


def test_opaque_keys_depend_on_data_and_namespace_and_carry_their_place() -> None:
    key = opaque_key(kv(), b"hash")
    assert (key.home, key.parent, key.index) == (key.chain, NO_PARENT, 0)
    assert key.namespace == kv().id
    placed = opaque_key(kv(), b"hash", home=ITEM, index=9)
    assert (placed.digest, placed.home, placed.index) == (key.digest, ITEM, 9)
    others = [opaque_key(kv(), b"hash2"), opaque_key(kv(layout="LBNHC"), b"hash"), opaque_key(EMBEDDING, b"hash")]
    assert len({key.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize(
    ("given_", "complaint"),
    [
        ({"data": b""}, "data: "),
        ({"data": "text"}, "data: "),
        ({"data": b"x", "home": ITEM[:31]}, "home: a digest is exactly 32 bytes"),
        ({"data": b"x", "index": -1}, "index: -1 is outside"),
    ],
)
def test_opaque_key_refuses(given_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        opaque_key(kv(), **given_)


def test_kinds_of_key_never_meet() -> None:
    keys = [
        embedding_key(EMBEDDING, ITEM),
        embedding_key(PROMPT, ITEM),
        opaque_key(EMBEDDING, ITEM),
        embedding_key(EMBEDDING, OTHER),
        latent_key(LATENT, **PROVENANCE),
        *kv().block_keys(range(4)),
    ]
    assert len({key.digest for key in keys}) == len({key.chain for key in keys}) == len(keys)
    assert not {key.digest for key in keys} & {key.chain for key in keys}


def test_each_kind_of_key_wants_its_kind_of_namespace() -> None:
    with pytest.raises(KeyInputError, match='embedding_key needs kind="embedding" or "prompt", this namespace is "kv"'):
        embedding_key(kv(), ITEM)
    with pytest.raises(KeyInputError, match='latent_key needs kind="latent", this namespace is "embedding"'):
        latent_key(EMBEDDING, **PROVENANCE)
    with pytest.raises(KeyInputError, match="item: a digest is exactly 32 bytes"):
        embedding_key(EMBEDDING, ITEM[:8])


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"grid": 5}, "grid: object of type int is no flat sequence"),
        ({"grid": (1.0, 2)}, r"grid\[0\]: expected an integer, got object of type float"),
        ({"grid": (1, -2)}, r"grid\[1\]: -2 is outside"),
        ({"grid": np.zeros((2, 2))}, r"grid\[0\]: expected an integer, got object of type ndarray"),
        ({"timestamps": ["1"]}, "timestamps: object of type str is no number"),
        ({"timestamps": [[0.0], [1.0]]}, "timestamps: object of type list is no number"),
        ({"timestamps": [10**5000]}, "timestamps: the number does not fit a 64-bit float"),
        ({"timestamps": np.array([(1 << 53) + 1])}, "timestamps: the number does not fit a 64-bit float"),
        ({"timestamps": [float("nan")]}, r"timestamps\[0\]: nan is not finite"),
        ({"is_embed": [1, 0]}, "is_embed: expected a flat sequence of bool"),
        ({"processor_kwargs": {"size": {"x": Foo()}}}, "processor_kwargs.size.x: object of type Foo"),
        ({"processor_kwargs": [1]}, "processor_kwargs: object of type list is no mapping"),
    ],
)
def test_item_digest_refuses_and_names_the_place(facts: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        item_digest(ITEM, **facts)
    with pytest.raises(KeyInputError, match="content: a digest is exactly 32 bytes, got 31 bytes"):
        item_digest(ITEM[:31])


def test_item_digest_takes_arrays_for_what_arrays_hold() -> None:
    plain = item_digest(ITEM, grid=(1, 2, 3), timestamps=(0, 0.5), is_embed=[True, False])
    arrays = item_digest(
        ITEM, grid=np.array([1, 2, 3]), timestamps=np.array([0, 0.5]), is_embed=np.array([True, False])
    )
    assert plain == arrays


@pytest.mark.parametrize("name", sorted(PROVENANCE))
def test_a_latent_key_cannot_leave_out_its_provenance(name: str) -> None:
    rest = {other: value for other, value in PROVENANCE.items() if other != name}
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
        latent_key(LATENT, **rest)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("prompt", OTHER),
        ("conditioning", {"image": ITEM}),
        ("conditioning", {"mask": ITEM}),
        ("scheduler", "EulerAncestralDiscreteScheduler"),
        ("scheduler_config", {"beta_start": 0.001}),
        ("timesteps", [999.0, 501.0]),
        ("sigmas", [14.6, 0.0]),
        ("mu", 1.15),
        ("step", 2),
        ("steps", 3),
        ("guidance", 7.5),
        ("eta", 0.0),
        ("size", (1024, 768, 1)),
        ("size", (1024, 1024, 2)),
        ("initial_state", ITEM),
        ("batch", (2, 0)),
        ("batch", (2, 1)),
        ("step_cache", {"method": "first_block", "threshold": 0.1}),
        ("parallelism", {"cfg": 2}),
        ("cpu_threads", 2),
        ("an_unknown_fact", 1),
        ("facts", {"an_unknown_fact": 1}),
    ],
)
def test_every_piece_of_provenance_is_in_a_latent_key(name: str, other: Any) -> None:
    changed = latent_key(LATENT, **{**PROVENANCE, name: other})
    assert changed.digest != latent_key(LATENT, **PROVENANCE).digest
    assert changed.digest != latent_key(LATENT, **PROVENANCE, another_unknown_fact=1).digest


@pytest.mark.parametrize(
    ("name", "bad", "complaint"),
    [
        ("prompt", "a cat", "prompt: a digest is exactly"),
        ("prompt", None, "prompt: a digest is exactly"),
        ("initial_state", 42, "initial_state: a digest is exactly 32 bytes, got object of type int"),
        ("conditioning", {"image": b"jpeg"}, "conditioning.image: a digest is exactly"),
        ("conditioning", None, "conditioning: object of type NoneType is no mapping"),
        ("scheduler", None, "scheduler: expected a non-empty str"),
        ("scheduler_config", {"solver": Foo()}, "latent_key.scheduler_config.solver: object of type Foo"),
        ("scheduler_config", None, "scheduler_config: object of type NoneType"),
        ("timesteps", None, "timesteps: object of type NoneType"),
        ("guidance", Foo(), "latent_key.guidance: object of type Foo"),
        ("step", 3, "step=3 is beyond steps=2"),
        ("steps", 0, "steps: 0 is outside 1"),
        ("size", (1024, 1024), "size: expected 3 integers, got 2"),
        ("batch", 1, "batch: object of type int is no flat sequence"),
        ("parallelism", None, "parallelism: object of type NoneType"),
        ("new_fact", Foo(), "latent_key.facts.new_fact: object of type Foo"),
    ],
)
def test_a_latent_key_refuses_what_it_cannot_know(name: str, bad: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        latent_key(LATENT, **{**PROVENANCE, name: bad})
