"""A media item's identity: every field of it counts, and nothing else; and how the scheduler's hook applies it."""

from __future__ import annotations

import enum
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmcache_connectors.sglang import hooks
from mmcache_connectors.sglang.media import Unidentified, item_identity
from mmcache_connectors.sglang.trust import Trust
from tests.unit.heard import heard


class Modality(enum.Enum):
    IMAGE = 1
    VIDEO = 2


class Format(enum.Enum):
    NORMAL = 1
    PRECOMPUTED_EMBEDDING = 2


class Item(SimpleNamespace):
    """The fields of SGLang's MultimodalDataItem that are read, and what the hook calls."""

    identity: bytes = b""

    def is_valid(self) -> bool:
        return True

    def set_identity(self, identity: bytes) -> None:
        self.identity = identity


class CudaIpcTensorTransportProxy:
    """Named as SGLang's."""


def item(**changed: Any) -> Item:
    fields: dict[str, Any] = {
        "modality": Modality.IMAGE,
        "format": Format.NORMAL,
        "feature": torch.arange(24, dtype=torch.float32).reshape(4, 6),
        "precomputed_embeddings": None,
        "model_specific_data": {"image_grid_thw": torch.tensor([[1, 2, 2]])},
        "offsets": [(5, 8)],
        "hash": 7,
    }
    return Item(**fields | changed)


VARIANTS: dict[str, dict[str, Any]] = {
    "modality": {"modality": Modality.VIDEO},
    "format": {"format": Format.PRECOMPUTED_EMBEDDING},
    "one number": {"feature": item().feature + torch.eye(4, 6)},
    "shape": {"feature": item().feature.reshape(6, 4)},
    "flat": {"feature": item().feature.reshape(-1)},
    "dtype": {"feature": item().feature.view(torch.int32)},
    "list": {"feature": [item().feature]},
    "list of rows": {"feature": list(item().feature)},
    "array": {"feature": item().feature.numpy()},
    "none": {"feature": None},
    "as embeddings": {"feature": None, "precomputed_embeddings": item().feature},
    "grid": {"model_specific_data": {"image_grid_thw": torch.tensor([[1, 4, 1]])}},
    "no grid": {"model_specific_data": {}},
    "other name": {"model_specific_data": {"video_grid_thw": torch.tensor([[1, 2, 2]])}},
    "more": {"model_specific_data": {**item().model_specific_data, "second_per_grid_ts": [0.5]}},
    "empty": {"feature": torch.empty(0, 6)},
    "nan": {"feature": [float("nan"), 1.0]},
    "infinity": {"feature": [float("inf"), 1.0]},
    "numbers": {"feature": [0.0, 1.0]},
    "minus zero": {"feature": [-0.0, 1.0]},
    "whole numbers": {"feature": [0, 1]},
    "mixed": {"feature": [0.0, 1]},
    "nested": {"feature": [[0.0, 1.0]]},
    "text": {"feature": "0"},
    "bytes": {"feature": b"0"},
    "large number": {"feature": 1 << 70},
    "no list": {"feature": []},
    "many": {"feature": [0.5] * 700_000},
    "one more": {"feature": [0.5] * 700_001},
    "many words": {"feature": "0" * (5 << 20)},
    "half a surrogate": {"feature": "\ud800"},
    "bfloat16": {"feature": item().feature.to(torch.bfloat16)},
}


def test_every_difference_is_another_item() -> None:
    made = {name: item_identity(item(**changed)) for name, changed in VARIANTS.items()} | {"": item_identity(item())}
    assert len(set(made.values())) == len(made)
    assert {len(identity) for identity in made.values()} == {32}


def test_what_does_not_reach_the_model_does_not_count() -> None:
    same = [
        item(hash=8),
        item(offsets=[(50, 53)]),
        item(feature=item().feature.t().contiguous().t()),
        item(model_specific_data={"image_grid_thw": torch.tensor([[1, 2, 2]])}),
        item(model_specific_data=item().model_specific_data | {"_sglang_defer_cuda_ipc_feature_reconstruction": True}),
    ]
    assert {item_identity(other) for other in same} == {item_identity(item())}


def test_positions_count_relative_to_the_span() -> None:
    near = torch.arange(30).repeat(3, 1)
    slow = near.clone()
    slow[0, 7:] += 3
    here = item_identity(item(), near)
    assert item_identity(item(offsets=[(11, 14)]), near) == here  # the same picture further on
    assert item_identity(item(), slow) != here
    assert item_identity(item(), None) != here
    assert item_identity(item(offsets=[(5, 8), (9, 9)]), near) != here


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"feature": object()}, "item.feature: an object of type object"),
        ({"feature": np.array([None])}, "item.feature: an array of Python objects"),
        ({"model_specific_data": {"a": {1: 2}}}, "item.specific.a: a key of type int"),
        ({"feature": [{1}]}, "item.feature[0]: an object of type set"),
        ({"feature": CudaIpcTensorTransportProxy()}, "start SGLang with --mm-feature-transport cpu"),
    ],
)
def test_what_cannot_be_identified_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(Unidentified, match=re.escape(named)):
        item_identity(item(**changed))


class Output(SimpleNamespace):
    """What the hook reads of SGLang's MultimodalProcessorOutput."""

    @staticmethod
    def build_padded_input_ids(input_ids: list[int], items: list[Item]) -> list[object]:
        return [*input_ids, *(held.identity for held in items)]


def outputs(items: list[Item], padded: list[int] | None) -> tuple[SimpleNamespace, Output]:
    """What SGLang made, and what it was made from."""
    made = SimpleNamespace(mm_items=items, mrope_positions=None, padded_input_ids=padded)
    return made, Output(mm_items=items, input_ids=[7])


def test_the_hook_identifies_every_item_and_has_the_prompt_padded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "TRUST", trust := Trust())
    items = [item(), item(feature=None)]
    made, output = outputs(items, [1])
    hooks.identify(made, output, requires_mm_token_modalities=False)
    identities = [item_identity(held) for held in items]
    assert [held.identity for held in items] == identities
    assert made.padded_input_ids == [7, *identities]
    made, output = outputs(items, None)  # SGLang's model pads it later
    hooks.identify(made, output)
    assert made.padded_input_ids is None
    assert trust.reason is None


def test_an_item_nobody_can_identify_ends_the_trust(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "TRUST", trust := Trust())
    items = [item(), item(feature=object())]
    made, output = outputs(items, [1])
    for other in (made, made, SimpleNamespace()):
        hooks.identify(other, output)
    assert (items[0].identity, made.padded_input_ids) == (b"", [1])  # all or nothing: they go together
    assert trust.reason == "a media item cannot be identified (item.feature: an object of type object)"
    assert len(heard(caplog)) == 1


class Owner:
    """A class of SGLang's, with methods that are hooked."""

    @staticmethod
    def make(value: int, *, more: int = 0) -> int:
        return value + more

    def update(self, value: int) -> int:
        return -value


def test_a_method_does_as_before_with_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "TRUST", trust := Trust())
    monkeypatch.setattr(Owner, "make", staticmethod(Owner.make))
    monkeypatch.setattr(Owner, "update", Owner.update)
    seen: list[tuple[Any, ...]] = []

    def hook(*args: Any, **kwargs: Any) -> None:
        seen.append((*args, kwargs))
        if args[-1] == 9:
            raise TypeError("unknown")

    for _ in range(2):
        hooks.wrap(Owner, "make", hook, after=True)
        hooks.wrap(Owner, "update", hook)
    owner = Owner()
    assert (Owner.make(1, more=2), owner.update(value=3), trust.reason) == (3, -3, None)
    assert seen == [(3, 1, {"more": 2}), (owner, {"value": 3})]
    assert owner.update(9) == -9
    assert "Owner.update was called in a way that is not known" in str(trust.reason)
    with pytest.raises(RuntimeError, match="has no other"):
        hooks.wrap(Owner, "other", hook)


def test_replaced_weights_end_the_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "TRUST", trust := Trust())
    hooks.weights_replaced("updater", recv_req="request")
    assert trust.reason == "the weights of this engine are replaced or tested while it runs"
