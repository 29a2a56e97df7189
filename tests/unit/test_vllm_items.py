"""Media items of vLLM requests as spans: what makes two items differ, and which items have no identity.

Where vLLM is installed its own feature classes are used, elsewhere stand-ins of the same form.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

torch: Any = pytest.importorskip("torch")

import mmcache  # noqa: E402
from mmcache.encoding import canonical, digest  # noqa: E402
from mmcache_connectors.vllm import items  # noqa: E402
from mmcache_connectors.vllm.items import ItemIdentities, embed_spans  # noqa: E402
from tests.unit.heard import heard  # noqa: E402

try:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    Fields: Any = MultiModalKwargsItem
    Feature: Any = MultiModalFeatureSpec
    Position: Any = PlaceholderRange

    def element(data: Any) -> Any:
        return MultiModalFieldElem(data=data, field=MultiModalBatchedField())

except ImportError:

    @dataclass
    class element:  # type: ignore[no-redef]
        data: Any

    class Fields(UserDict[str, Any]):  # type: ignore[no-redef]
        pass

    @dataclass
    class Position:  # type: ignore[no-redef]
        offset: int
        length: int
        is_embed: Any = None

    @dataclass
    class Feature:  # type: ignore[no-redef]
        data: Any
        modality: str
        identifier: str
        mm_position: Any
        mm_hash: str | None = None


def fields(**values: Any) -> Any:
    return Fields({name: element(value) for name, value in values.items()})


def picture(shade: float = 0.5, **more: Any) -> Any:
    return fields(pixel_values=torch.full((8, 6), shade), image_grid_thw=torch.tensor([1, 4, 2]), **more)


def feature(
    data: Any, name: str = "u1", offset: int = 4, length: int = 6, mask: Any = None, kind: str = "image"
) -> Any:
    return Feature(data=data, modality=kind, identifier=name, mm_position=Position(offset, length, mask), mm_hash=name)


def item_of(data: Any, **how: Any) -> bytes:
    """The item digest of one feature in an engine of its own."""
    spans, limit = ItemIdentities(trust_uuids=False).spans([feature(data, **how)])
    assert limit is None
    (span,) = spans
    return span.item


# ------------------------------------------------------------------------------------------ what an item is
def test_the_same_item_is_the_same_in_every_engine_and_at_every_place() -> None:
    assert item_of(picture()) == item_of(picture()) == item_of(picture(), offset=99)
    strided = torch.full((8, 12), 0.5)[:, ::2]
    assert item_of(fields(image_grid_thw=torch.tensor([1, 4, 2]), pixel_values=strided)) == item_of(picture())
    lone = torch.arange(6).reshape(2, 3)[1:, 2]  # one element with a stride
    assert item_of(fields(x=lone)) == item_of(fields(x=torch.tensor([5])))


def test_the_digest_is_made_of_the_functions_in_the_key_specification() -> None:
    pixels = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    words = np.array([0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0], "<u2").tobytes()
    tensor = ["tensor", "torch.bfloat16", [2, 3], digest("k1.media", b"tensor", words)]
    structure = {"fps": ["value", 2.0], "frames": ["list", [["value", 1], tensor]]}
    features = digest("k1.media", b"vllm_features", canonical(structure, ""))
    content = digest("k1.media", b"vllm_item", canonical(["video", "u", features], ""))
    found = item_of(
        fields(frames=(1, pixels), fps=2.0), name="u", kind="video", length=2, mask=torch.tensor([True, False])
    )
    assert found == mmcache.item_digest(content, is_embed=[True, False])


BASE = torch.arange(12, dtype=torch.float32).view(3, 4)
OTHERS: dict[str, Callable[[], Any]] = {
    "one element": lambda: fields(x=BASE + torch.eye(3, 4)),
    "negative zero": lambda: fields(x=torch.where(BASE == 0, -0.0, BASE)),
    "shape": lambda: fields(x=BASE.view(4, 3)),
    "one dimension more": lambda: fields(x=BASE[None]),
    "dtype of the same bytes": lambda: fields(x=BASE.view(torch.int32)),
    "dtype of the same numbers": lambda: fields(x=BASE.bfloat16()),
    "name": lambda: fields(y=BASE),
    "a field more": lambda: fields(x=BASE, y=torch.tensor(1)),
    "an empty field more": lambda: fields(x=BASE, y=torch.empty(0)),
    "in a list": lambda: fields(x=[BASE]),
    "cut in a list": lambda: fields(x=list(BASE)),
    "cut in a nested list": lambda: fields(x=[[BASE[0]], [BASE[1], BASE[2]]]),
    "nested otherwise": lambda: fields(x=[[BASE[0], BASE[1]], [BASE[2]]]),
    "number": lambda: fields(x=1),
    "float": lambda: fields(x=1.0),
    "bool": lambda: fields(x=True),
    "tensor of one number": lambda: fields(x=torch.tensor(1)),
    "text": lambda: fields(x="1"),
}


def test_whatever_differs_in_the_features_is_another_item() -> None:
    digests = {name: item_of(make()) for name, make in OTHERS.items()} | {"itself": item_of(fields(x=BASE))}
    assert len(set(digests.values())) == len(digests)


def test_position_dependent_facts_are_in_the_item() -> None:
    masks = [None, [True] * 6, [False] * 6, [True, False] * 3]
    made = [item_of(picture(), mask=None if mask is None else torch.tensor(mask)) for mask in masks]
    made += [item_of(picture(), name="u2"), item_of(picture(), kind="video"), item_of(picture(0.25))]
    assert len(set(made)) == len(made)


def test_keys_agree_up_to_the_first_item_that_differs() -> None:
    space = mmcache.Namespace(kind="kv", model="m", dtype="float16", layout="x", block_size=4)

    def keys(*shades: float) -> list[bytes]:
        features = [feature(picture(shade), f"u{place}", 5 + 8 * place) for place, shade in enumerate(shades)]
        spans, _ = ItemIdentities(trust_uuids=False).spans(features)
        return space.block_keys([7] * 24, spans).digests

    assert keys(0.1, 0.2) == keys(0.1, 0.2)
    agree = [a == b for a, b in zip(keys(0.1, 0.2), keys(0.1, 0.3), strict=True)]
    assert agree == [True, True, True, False, False, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "bool", "complex64"])
def test_every_dtype_has_bytes(dtype: str) -> None:
    ones = torch.ones(5).to(getattr(torch, dtype))
    assert item_of(fields(x=ones)) == item_of(fields(x=ones.clone()))
    assert item_of(fields(x=ones)) != item_of(fields(x=torch.zeros_like(ones)))


# ------------------------------------------------------------------------------------------ items without identity
def test_features_that_were_not_sent_again_are_remembered() -> None:
    engine = ItemIdentities(trust_uuids=False)
    assert engine.spans([feature(None)]) == ([], 4)
    first = engine.spans([feature(picture())])
    assert engine.spans([feature(None)]) == first
    assert engine.spans([feature(None, "u2")]) == ([], 4)
    assert engine.spans([feature(fields(pixel_values=None))]) == first  # the engine holds them: not sent again
    assert engine.spans([feature(Fields())]) == first


def test_the_limit_is_where_the_first_unknown_item_begins() -> None:
    engine = ItemIdentities(trust_uuids=False)
    assert engine.spans([]) == ([], None)
    known = feature(picture(), "a", 2, 3)
    spans, limit = engine.spans([feature(None, "c", 40), feature(None, "b", 20, 5), known, feature(picture(), "d", 60)])
    assert (limit, [(span.offset, span.length) for span in spans]) == (20, [(2, 3)])


def test_an_item_at_no_position_ends_what_may_be_cached() -> None:
    engine = ItemIdentities(trust_uuids=False)
    assert engine.spans([feature(picture(), "a", 8, 0), feature(picture(), "b", 8, 4)]) == ([], 8)


def test_a_place_in_shared_memory_is_not_a_picture() -> None:
    handle = fields(address=4096, monotonic_id=1, signature=[1, 2, 3])
    engine = ItemIdentities(trust_uuids=False)
    assert engine.spans([feature(handle)]) == ([], 4)
    seen = engine.spans([feature(picture())])
    assert engine.spans([feature(handle)]) == seen


@pytest.mark.parametrize(
    "value", [object(), torch.empty(2, device="meta"), torch.eye(2).to_sparse(), float("nan"), {1: 2}, 1 << 70]
)
def test_features_without_canonical_form_are_not_cached_and_said_once(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ItemIdentities(trust_uuids=False)
    with caplog.at_level(logging.WARNING, "mmcache.vllm"):
        for _ in range(3):
            assert engine.spans([feature(picture(), "a", 0, 2), feature(fields(x=value), "b")])[1] == 4
    assert [record.getMessage()[:40] for record in heard(caplog)] == ["image items like this one are not cached"]


def test_the_log_is_not_for_clients_to_fill(caplog: pytest.LogCaptureFixture) -> None:
    engine = ItemIdentities(trust_uuids=False)
    with caplog.at_level(logging.WARNING, "mmcache.vllm"):
        for place in range(2 * items.MAX_WARNINGS):
            engine.spans([feature(fields(**{f"field{place}": object()}))])
    assert len(heard(caplog)) == items.MAX_WARNINGS


def test_an_identifier_of_two_pictures_is_never_trusted_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = ItemIdentities(trust_uuids=False)
    first, second = picture(0.1), picture(0.2)
    assert engine.spans([feature(first)])[1] is None
    with caplog.at_level(logging.WARNING, "mmcache.vllm"):
        for data in (second, first, picture(0.1), None, picture(0.2)):
            assert engine.spans([feature(data)]) == ([], 4)
    assert len(heard(caplog)) == 1
    assert "one identifier" in caplog.text
    assert engine.spans([feature(picture(0.2), "other")])[1] is None


def test_two_pictures_under_one_identifier_in_one_request() -> None:
    engine = ItemIdentities(trust_uuids=False)
    both = [feature(picture(0.1), "u", 0, 2), feature(picture(0.2), "u", 10, 2)]
    assert engine.spans(both)[1] == 10
    assert engine.spans(both) == ([], 0)  # as asked again before saving


def test_a_request_that_runs_unidentified_costs_its_identifiers_their_trust() -> None:
    engine = ItemIdentities(trust_uuids=False)
    seen = picture()
    expected = engine.spans([feature(seen, "a")])
    engine.distrust([feature(seen, "a"), feature(None, "a")])  # identified; the engine has what it had before
    assert engine.spans([feature(None, "a")]) == expected
    engine.distrust([feature(picture(), "a"), feature(picture(), "b"), feature(None, "c")])
    for name in "abc":
        assert engine.spans([feature(picture(), name)]) == ([], 4)
    believing = ItemIdentities(trust_uuids=True)
    believing.distrust([feature(None, "a")])
    assert believing.spans([feature(None, "a")])[1] is None


def test_the_memory_of_identifiers_is_bounded_by_recency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "REMEMBERED", 3)
    engine = ItemIdentities(trust_uuids=False)
    for name in "abcad":
        engine.spans([feature(picture(), name)])
    remembered = [name for name in "abcd" if engine.spans([feature(None, name)])[1] is None]
    assert remembered == ["a", "c", "d"]


def test_uuids_are_believed_on_request_only() -> None:
    engine = ItemIdentities(trust_uuids=True)
    (span,), limit = engine.spans([feature(None)])
    assert limit is None
    for data in (picture(0.1), picture(0.2)):
        assert engine.spans([feature(data)])[0] == [span]
    others = [
        feature(None, "u2"),
        feature(None, kind="video"),
        feature(None, mask=torch.tensor([True] * 6)),
        feature(None, length=7),
    ]
    made = [engine.spans([other])[0][0] for other in others]
    assert span not in made
    assert len({(other.item, other.length) for other in made}) == 4
    assert span.item != item_of(picture(), name="u1")


def test_a_video_and_its_sound_at_the_same_positions_are_one_span() -> None:
    mask = torch.tensor([True, False, True, False, False, True])

    def spans(sound: float, order: int = 1, lead: int = 0) -> Any:
        video = feature(picture(), "v", kind="video", mask=mask)
        pair = [video, feature(fields(x=BASE * sound), "s", 4 + lead, 6 - lead, mask=~mask)]
        return ItemIdentities(trust_uuids=False).spans([*pair[::order], feature(picture(), "z", 10, 2)])

    (both, last), limit = spans(1)
    assert limit is None
    assert (both.offset, both.length, last.offset) == (4, 6, 10)
    assert spans(1, -1)[0] == [both, last]
    assert spans(2)[0][0] != both
    assert spans(2)[0][1] == last
    assert spans(1, lead=1)[0][0].item != both.item  # the sound one position later, the whole as long as before
    engine = ItemIdentities(trust_uuids=False)
    inside = [feature(picture(), "v", 4, 6), feature(None, "s", 8, 6)]
    assert engine.spans(inside) == ([], 4)  # blocks before the unknown sound also hold the video


# ------------------------------------------------------------------------------------------ cost
def test_an_object_is_hashed_once_and_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    described = items._described

    def counted(value: Any, path: str) -> list[Any]:
        hashed.append(path)
        return described(value, path)

    monkeypatch.setattr(items, "_described", counted)
    engine = ItemIdentities(trust_uuids=False)
    data = picture()
    first = engine.spans([feature(data)])
    assert engine.spans([feature(data)]) == first
    assert sorted(hashed) == ["image_grid_thw", "pixel_values"]
    assert engine.spans([feature(picture())]) == first  # another object: looked at
    assert len(hashed) == 4
    del data
    gc.collect()
    assert engine._digests == {}


def test_large_pictures_are_hashed_without_copies_and_near_the_speed_of_blake3() -> None:
    pixels = torch.rand(6 << 20)
    alone: list[float] = []
    ours: list[float] = []
    while len(ours) < 5 or (len(ours) < 50 and min(ours) > 2 * min(alone) + 0.01):  # others may have the CPU for long
        started = time.perf_counter()
        blake3(pixels.view(torch.uint8).numpy().data).digest()
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        item_of(fields(pixel_values=pixels))
        ours.append(time.perf_counter() - started)
    assert min(ours) < 2 * min(alone) + 0.01


def test_many_threads_agree() -> None:
    engine = ItemIdentities(trust_uuids=False)
    shared = [picture(shade / 8) for shade in range(8)]
    expected = [item_of(data, name=f"u{place}") for place, data in enumerate(shared)]
    found: list[list[bytes]] = []

    def work() -> None:
        for _ in range(30):
            features = [feature(data, f"u{place}", 8 * place) for place, data in enumerate(shared)]
            features += [feature(picture(0.9), "own", 100)]
            spans, limit = engine.spans(features)
            assert limit is None
            found.append([span.item for span in spans[:-1]])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 120
    assert len(engine._digests) <= 8 + 1


# ------------------------------------------------------------------------------------------ prompt embeddings
def cuts(spans: list[Any]) -> list[tuple[int, int]]:
    return [(span.offset, span.length) for span in spans]


def test_embeddings_are_cut_at_block_borders() -> None:
    rows = torch.rand(10, 3)
    assert cuts(embed_spans(rows, None, 4)) == [(0, 4), (4, 4), (8, 2)]
    marks = [True, True, False, False, False, True, False, True, True, False]
    assert cuts(embed_spans(rows, marks, 4)) == [(2, 2), (4, 1), (6, 1), (9, 1)]
    assert embed_spans(rows, [True] * 10, 4) == []
    assert embed_spans(rows[:0], None, 4) == []
    with pytest.raises(ValueError, match="10 rows"):
        embed_spans(rows, [False] * 9, 4)


def test_prompts_of_embeddings_that_begin_alike_share_blocks() -> None:
    space = mmcache.Namespace(kind="kv", model="m", dtype="float16", layout="x", block_size=4)
    rows = torch.rand(17, 3)

    def keys(rows: Any, marks: Any = None) -> list[bytes]:
        return space.block_keys([0] * len(rows), embed_spans(rows, marks, 4)).digests

    whole = keys(rows)
    assert keys(rows[:13]) == whole[:3]
    changed = rows.clone()
    changed[9, 2] += 1
    assert [a == b for a, b in zip(keys(changed), whole, strict=True)] == [True, True, False, False]
    assert keys(rows.double())[0] != whole[0]
    assert keys(rows, [True] + [False] * 16)[0] != whole[0]
    assert keys(rows, [True] * 17)[0] not in {whole[0], keys(rows, [True] + [False] * 16)[0]}
    assert keys(rows.T.contiguous().T) == whole
