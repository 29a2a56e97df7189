"""The encoder cache's two sides against a real server, without an engine: what is found, promised and stored."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmcache_connectors.vllm.ec_items import Save
from tests.integration.toy_encoder import WIDTH, Data, request, toys_of_one_server


@pytest.fixture
def toys() -> Iterator[Any]:
    with toys_of_one_server() as make:
        yield make


def test_one_engine_encodes_and_another_loads(toys: Any) -> None:
    first, second = toys(), toys()
    first.run(request("a", 1, 2))
    assert first.worker.flush(10)
    second.run(request("b", 2, 3))
    assert (first.encoded, second.encoded) == (2, 1)
    assert first.worker.snapshot()["items_saved"] == 2
    assert second.scheduler.snapshot()["items_hit"] == 1


def test_a_tenant_finds_only_its_own(toys: Any) -> None:
    toy = toys()
    for salt, encoded in (("x", 1), ("y", 2), ("", 3), ("x", 3)):
        toy.run(request("a", 1, salt=salt))
        assert toy.worker.flush(10)
        assert toy.encoded == encoded


def test_a_name_is_not_what_an_embedding_is_found_by(toys: Any) -> None:
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    forged = request("b", 2)
    forged.mm_features[0].identifier = "i1"
    toy.wait(forged)
    assert not toy.scheduler.has("i1")


def test_one_name_for_two_things_in_a_request_names_neither(toys: Any) -> None:
    """A client that gives a picture and an embedding of its own one uuid would have that stored as the picture's."""
    toy = toys()
    for given in ({"image_embeds": torch.zeros(8, WIDTH)}, {"pixel_values": torch.zeros(4, 4)}):
        forged = request("a", 2, 1)
        forged.mm_features[0].identifier = "i1"
        grid = {"image_grid_thw": torch.tensor([1, 2, 4])}
        forged.mm_features[0].data = Data({name: SimpleNamespace(data=data) for name, data in (given | grid).items()})
        toy.wait(forged)
        toy.scheduler.allocated(forged, 0)
        assert toy.scheduler.take_step()[1:] == ([], {})
        toy.scheduler.finished("a")
    twice = request("b", 1, 1)
    toy.run(twice)
    assert toy.worker.flush(10)
    assert toy.worker.snapshot()["items_saved"] == 1, "the same thing twice is one thing"


def test_with_trusted_names_an_embedding_may_be_left_out_of_a_request(toys: Any) -> None:
    toy = toys(trust_media_uuids=True)
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    toy.run(request("b", 1, bare=True))
    assert toy.encoded == 1
    with pytest.raises(LookupError):
        toy.run(request("c", 2, bare=True))
    careful = toys()
    with pytest.raises(LookupError):
        careful.run(request("d", 1, bare=True))


def test_an_output_of_another_form_is_not_stored(toys: Any) -> None:
    toy = toys()
    toy.wait(request("a", 1))
    (item,) = toy.scheduler._asked["a"].items.values()
    toy.worker.save(Save(item.name), torch.zeros(9, WIDTH))
    toy.worker.save(Save(item.name), torch.zeros(8, WIDTH, dtype=torch.float16))
    assert toy.worker.flush(10)
    assert toy.worker.snapshot() == {"saves_odd": 2}


def test_an_encoder_instance_does_not_encode_what_is_stored(toys: Any) -> None:
    producer = toys(reads=False, encodes_only=True)
    producer.run(request("a", 1))
    assert producer.worker.flush(10)
    again = request("b", 1)
    producer.wait(again)
    assert producer.scheduler.has("i1")
    producer.scheduler.allocated(again, 0)
    assert producer.scheduler.take_step()[1:] == ([], {})


def test_an_engine_whose_workers_are_elsewhere_encodes_everything_and_stores_it(toys: Any) -> None:
    """Of what is stored nothing may be promised to it: vLLM ends if it is not there in the step."""
    first, elsewhere = toys(), toys(reads=False)
    first.run(request("a", 1))
    assert first.worker.flush(10)
    elsewhere.run(request("b", 1, 2))
    assert elsewhere.worker.flush(10)
    assert elsewhere.encoded == 2
    assert {name: elsewhere.worker.snapshot()[name] for name in ("items_saved", "items_present")} == {
        "items_saved": 1, "items_present": 1,
    }  # fmt: skip


def test_a_request_that_begins_anew_is_looked_up_anew(toys: Any) -> None:
    """vLLM drops an embedding it loaded when it needs the room; one that came without could not be encoded then."""
    toy = toys(trust_media_uuids=True)
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    bare = request("b", 1, bare=True)
    for preemptions in range(3):
        bare.num_preemptions = preemptions
        toy.wait(bare)
        assert toy.scheduler.has("i1")
        toy.scheduler.allocated(bare, 0)
        _, (load,), _ = toy.scheduler.take_step()
        assert load.name.identifier == "i1"
    bare.num_preemptions += 1
    toy.client.delete([load.name.key])
    toy.shelf._items.clear()
    with pytest.raises(LookupError):
        toy.wait(bare)


def test_an_embedding_left_out_twice_is_there_both_times(toys: Any) -> None:
    toy = toys(trust_media_uuids=True)
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    bare = request("b", 1, 1, bare=True)
    first, second = (feature.mm_position.offset for feature in bare.mm_features)
    for index, computed_tokens in enumerate((first, second)):
        while not toy.scheduler.available(bare, computed_tokens):
            toy.step()
        assert toy.scheduler.has("i1")
        toy.scheduler.allocated(bare, index)
        assert len(toy.scheduler.take_step()[1]) == 1
        toy.scheduler.freed(bare, index)


def test_a_session_that_is_given_another_picture_has_it_looked_up(toys: Any) -> None:
    toy = toys()
    toy.run(request("a", 1, 2))
    assert toy.worker.flush(10)
    session = request("b", 1)
    toy.wait(session)
    session.mm_features.append(request("c", 1, 2).mm_features[1])
    toy.wait(session)
    assert toy.scheduler.has("i2")


def test_new_weights_make_what_is_known_of_a_waiting_request_void(toys: Any) -> None:
    toy = toys()
    toy.run(request("a", 1))
    assert toy.worker.flush(10)
    waits = request("b", 1)
    toy.wait(waits)
    assert toy.scheduler.has("i1")
    toy.facts.epoch = "new"
    toy.wait(waits)
    assert not toy.scheduler.has("i1")
    toy.scheduler.allocated(waits, 0)
    _, loads, saves = toy.scheduler.take_step()
    assert loads == []
    assert saves["i1"].name.key.namespace.facts["weights_epoch"] == "new"
    assert [item.users for item in toy.shelf._items.values()] == [0]


def test_nothing_is_cached_while_the_weights_are_unknown(toys: Any) -> None:
    toy = toys()
    toy.facts.known = False
    toy.run(request("a", 1))
    assert toy.worker.snapshot() == {}
    toy.facts.known = True
    toy.run(request("b", 1))
    assert toy.worker.flush(10)
    assert toy.worker.snapshot()["items_saved"] == 1
