"""Media items of vLLM's requests: how much of each there is, and which of them an encoder has nothing to do with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcache.media import Media
from mmcache_connectors.vllm.ec_items import Form, is_bare, media_of, passes_through
from mmcache_connectors.vllm.items import ItemIdentities


class Data(dict[str, Any]):
    """As MultiModalKwargsItem: weak references to it must work."""


def feature(modality: str, identifier: str = "i", **fields: Any) -> Any:
    data = Data({name: SimpleNamespace(data=one) for name, one in fields.items()})
    return SimpleNamespace(modality=modality, identifier=identifier, data=data)


@pytest.mark.parametrize(
    ("modality", "fields", "media"),
    [
        ("image", {"image_grid_thw": torch.tensor([1, 8, 12])}, Media("image", pixels=8 * 12 * 196)),
        ("image", {"image_grid_thw": torch.tensor([[1, 8, 12]])}, Media("image", pixels=8 * 12 * 196)),
        ("image", {"pixel_values": torch.zeros(3, 20, 30)}, Media("image", pixels=600)),
        ("image", {"pixel_values": torch.zeros(5, 3, 20, 30)}, Media("image", pixels=3000)),
        ("image", {"pixel_values": torch.zeros(96, 1176)}, Media("image")),
        ("image", {"image_grid_thw": "odd"}, Media("image")),
        ("video", {"video_grid_thw": torch.tensor([4, 6, 8])}, Media("video", frames=8)),
        ("video", {"pixel_values_videos": torch.zeros(7, 3, 20, 30)}, Media("video", frames=7)),
        ("audio", {"feature_attention_mask": torch.ones(130)}, Media("audio", audio_s=1.3)),
        ("audio", {}, Media("audio")),
    ],
)
def test_how_much_there_is_where_the_features_tell(modality: str, fields: dict[str, Any], media: Media) -> None:
    found = media_of(modality, fields, 14)
    assert (found.modality, found.units) == (media.modality, media.units)


def test_what_an_encoder_does_not_run_for() -> None:
    pixels = feature("image", pixel_values=torch.zeros(3, 4, 4), image_grid_thw=torch.tensor([1, 2, 2]))
    given = feature("image", image_embeds=torch.zeros(4, 8), image_grid_thw=torch.tensor([1, 2, 2]))
    bare = feature("image", image_grid_thw=torch.tensor([1, 2, 2]))
    absent = SimpleNamespace(modality="image", identifier="i", data=None)
    prompt = feature("prompt_embeds", embedding=torch.zeros(4, 8))
    size = {"image_grid_thw"}
    assert [passes_through(one) for one in (pixels, given, bare, absent, prompt)] == [False, True, False, False, True]
    assert [is_bare(one, size) for one in (pixels, given, bare, absent)] == [False, False, True, True]
    assert not is_bare(bare, ()), "a model that says nothing of its placeholders is believed"


def test_an_embedding_is_named_by_what_is_shown() -> None:
    items = ItemIdentities(trust_uuids=False)
    one = items.shown(feature("image", "a", pixel_values=torch.zeros(3, 4, 4)))
    assert one is not None
    assert one == items.shown(feature("image", "b", pixel_values=torch.zeros(3, 4, 4)))
    assert one != items.shown(feature("image", "a", pixel_values=torch.ones(3, 4, 4)))
    assert one != items.shown(feature("video", "a", pixel_values=torch.zeros(3, 4, 4)))
    assert items.shown(SimpleNamespace(modality="image", identifier="a", data=None)) is None
    trusting = ItemIdentities(trust_uuids=True)
    assert trusting.shown(feature("image", "a", x=torch.zeros(1))) == trusting.shown(
        feature("image", "a", x=torch.ones(1))
    )


def test_a_form_knows_its_size() -> None:
    assert Form(24, 128, "bfloat16", measured=True).nbytes == 24 * 128 * 2
