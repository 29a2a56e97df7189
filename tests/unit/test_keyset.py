"""Parts of a block, and keys as a sequence."""

from __future__ import annotations

from typing import Any

import pytest

from mmcache.errors import KeyInputError
from mmcache.keys import Namespace
from mmcache.keyset import NO_PARENT, Key, Keys, Part

ITEM = bytes(range(32))
OTHER = ITEM[::-1]
FACTS: dict[str, Any] = {"model": "org/model", "dtype": "bfloat16", "layout": "LBHNC"}


def kv(block_size: int = 4, **facts: object) -> Namespace:
    return Namespace(kind="kv", block_size=block_size, **{**FACTS, **facts})


def test_a_range_that_covers_everything_is_all_of_it() -> None:
    everything = Part(kv_group=(0, 1), layers=(0, 28, 28), kv_heads=(0, 4, 4), context=(0, 1))
    assert everything == Part()
    keys = kv().block_keys(range(8))
    assert keys.for_part(everything) == keys


def test_every_part_of_a_block_has_its_own_key_and_shares_the_rest() -> None:
    keys = kv().block_keys(range(8))
    parts = [
        Part(),
        Part(layers=(0, 14, 28)),
        Part(layers=(14, 28, 28)),
        Part(kv_heads=(0, 14, 28)),
        Part(kv_group=(0, 2)),
        Part(kv_group=(1, 2)),
        Part(context=(0, 2)),
        Part(kv_group=(0, 2), context=(0, 2)),
    ]
    views = [keys.for_part(part) for part in parts]
    assert len({view.digests[1] for view in views}) == len(parts)
    for view in views:
        assert (view.chains, view.homes, list(view.indices)) == (keys.chains, keys.homes, list(keys.indices))
        assert view.parents == [NO_PARENT, view.digests[0]]


def test_a_slice_for_a_part_is_the_part_of_the_slice() -> None:
    keys, part = kv().block_keys(range(24)), Part(kv_heads=(2, 4, 8))
    assert keys[3:].for_part(part) == keys.for_part(part)[3:]
    assert keys.for_part(part).for_part(Part()) == keys
    assert Keys.of(keys[4]).for_part(part)[0] == keys.for_part(part)[4]
    shuffled = Keys.of([keys[4], keys[2], keys[3]])
    assert shuffled.for_part(part).digests == [keys.for_part(part).digests[place] for place in (4, 2, 3)]
    assert shuffled.for_part(part).parents == [keys.for_part(part).parents[place] for place in (4, 2, 3)]


def test_a_part_needs_the_parents_chain_key() -> None:
    orphan = Key(ITEM, ITEM, ITEM, ITEM, parent=OTHER)
    with pytest.raises(KeyInputError, match=r"keys\[0\]: its parent's chain key is missing"):
        Keys.of(orphan).for_part(Part(layers=(0, 1, 2)))


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": (3, 3, 4)},
        {"layers": (3, 5, 4)},
        {"layers": (0, 4)},
        {"layers": [0, 2, 4]},
        {"kv_heads": (-1, 2, 4)},
        {"kv_heads": (0, 2.0, 4)},
        {"kv_group": (2, 2)},
        {"context": (0, 0)},
        {"context": 1},
    ],
)
def test_impossible_parts_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(KeyInputError, match=rf"Part\.{name}"):
        Part(**fields)


def test_keys_are_a_sequence_and_slices_are_keys() -> None:
    keys = kv().block_keys(range(20))
    rows = list(keys)
    assert len(keys) == len(rows) == 5
    assert rows == [keys[place] for place in range(5)]
    assert keys[-1] == rows[-1]
    assert rows[2] in keys
    assert isinstance(keys[1:4], Keys)
    assert list(keys[1:4]) == rows[1:4]
    assert list(keys[::-1]) == rows[::-1]
    assert keys[:2] + keys[2:] == keys
    assert keys[:0] + keys == keys
    assert Keys.of(rows) == keys
    assert Keys.of(rows[0]) == keys[:1]
    assert Keys.of(keys) is keys
    assert keys != rows
    assert keys[:2] != keys[1:3]
    assert keys[0].hex() == keys.digests[0].hex()
    assert keys.digests[0].hex()[:16] in repr(keys)
    assert repr(keys[:0]) == "Keys(0 keys)"
    with pytest.raises(IndexError):
        keys[5]
    with pytest.raises(TypeError):
        keys + rows  # type: ignore[operator]


def test_keys_of_refuses_what_is_no_key() -> None:
    with pytest.raises(KeyInputError, match="object of type bytes is no Key"):
        Keys.of([ITEM])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["digest", "chain", "home", "namespace", "parent", "parent_chain"])
@pytest.mark.parametrize("bad", [ITEM[:31], ITEM + b"x", ITEM[:8], b"", ITEM.hex(), bytearray(ITEM)])
def test_a_key_holds_nothing_but_whole_digests(name: str, bad: Any) -> None:
    fields: dict[str, Any] = {"digest": ITEM, "chain": ITEM, "home": ITEM, "namespace": ITEM}
    with pytest.raises(KeyInputError, match=rf"Key\.{name}: a digest is exactly 32 bytes"):
        Key(**{**fields, name: bad})
