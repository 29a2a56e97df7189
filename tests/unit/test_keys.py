"""mmcache.keys and what it stands on: canonical encoding, namespaces, chains, parts, sequences of keys."""

from __future__ import annotations

import copy
import pickle
import struct
import subprocess
import sys
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcache.encoding import MAX_DEPTH, canonical, digest
from mmcache.errors import KeyInputError
from mmcache.keys import (
    NO_PARENT,
    Key,
    Keys,
    Namespace,
    Part,
    PlaceholderSpan,
    embedding_key,
    item_digest,
    latent_key,
    namespace_id,
    opaque_key,
    run_bounds,
)

ITEM = bytes(range(32))
OTHER = ITEM[::-1]
FACTS: dict[str, Any] = {"model": "org/model", "dtype": "bfloat16", "layout": "LBHNC"}


def kv(block_size: int = 4, **facts: object) -> Namespace:
    return Namespace(kind="kv", block_size=block_size, **{**FACTS, **facts})


# ------------------------------------------------------------------------------------------- canonical encoding
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def decode(data: bytes) -> Any:
    """The value of a canonical encoding; asserts that nothing is left over."""
    value, rest = decode_one(data)
    assert not rest
    return value


def decode_one(data: bytes) -> tuple[Any, bytes]:
    tag, rest = data[0], data[1:]
    if tag < 3:
        return (None, False, True)[tag], rest
    if tag == 4:
        return struct.unpack("<d", rest[:8])[0], rest[8:]
    (length,) = struct.unpack("<Q", rest[:8])
    rest = rest[8:]
    if tag < 7:
        body = rest[:length]
        return {3: lambda: int(body), 5: body.decode, 6: lambda: body}[tag](), rest[length:]
    items: list[Any] = []
    for _ in range(length):
        name = ""
        if tag == 8:
            (size,) = struct.unpack("<Q", rest[:8])
            name, rest = rest[8 : 8 + size].decode(), rest[8 + size :]
        item, rest = decode_one(rest)
        items.append((name, item))
    return (dict(items) if tag == 8 else [item for _, item in items]), rest


@given(plain_values)
def test_canonical_encoding_decodes_to_the_value_so_no_two_values_share_one(value: Any) -> None:
    decoded = decode(canonical(value, "value"))
    assert decoded == value
    assert repr(decoded) == repr(value) or isinstance(value, dict | list)  # 1, 1.0 and True are told apart


@given(st.dictionaries(st.text(max_size=4), plain_values, max_size=6))
def test_canonical_encoding_ignores_the_order_of_a_mapping(value: dict[str, Any]) -> None:
    assert canonical(dict(reversed(value.items())), "value") == canonical(value, "value")


class Foo:
    """A type nobody can encode."""


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"size": {"x": Foo()}}, "value.size.x: object of type Foo cannot be part of a key"),
        ([1, {"a": [object]}], r"value\[1\].a\[0\]: object of type type"),
        ({"a": float("nan")}, "value.a: nan is not finite"),
        ([float("-inf")], r"value\[0\]: -inf is not finite"),
        ({1: 2}, "value: key of type int"),
        ({"a": {1, 2}}, "value.a: object of type set"),
        ({"a": np.zeros(2)}, "value.a: object of type ndarray .*tolist"),
        (np.int64(1), "value: object of type int64"),
        (1 << 64, "value: integer outside"),
        (-(1 << 63) - 1, "value: integer outside"),
        (10**5000, "value: integer outside"),
        ("\ud800", "value: text holds a lone surrogate"),
        ({"\ud800": 1}, "value: text holds a lone surrogate"),
        (bytearray(b"x"), "value: object of type bytearray"),
        (bytes(5 << 20), "value: encodes to more than"),
    ],
)
def test_canonical_encoding_refuses_and_names_the_place(value: Any, complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        canonical(value, "value")


def test_canonical_encoding_is_bounded_in_depth_and_in_work() -> None:
    nested: list[Any] = []
    for _ in range(MAX_DEPTH):
        nested = [nested]
    canonical(nested, "value")
    with pytest.raises(KeyInputError, match="levels deep"):
        canonical([nested], "value")
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(KeyInputError, match="levels deep"):
        canonical(loop, "value")
    wide: list[Any] = ["leaf"]
    for _ in range(30):
        wide = [wide, wide]  # 2^30 leaves
    with pytest.raises(KeyInputError, match="more than"):
        canonical(wide, "value")


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_digest_fields_never_run_into_each_other(left: list[bytes], right: list[bytes]) -> None:
    assert (digest("d", *left) == digest("d", *right)) == (left == right)
    assert digest("d", *left) != digest("e", *left)


# --------------------------------------------------------------------------------------------------- namespaces
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


def test_namespace_survives_copy_and_pickle() -> None:
    namespace = kv(rope={"factor": 4.0})
    for twin in (copy.deepcopy(namespace), pickle.loads(pickle.dumps(namespace))):
        assert twin == namespace
        assert twin.block_keys(range(8)) == namespace.block_keys(range(8))


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
        ({"kind": "kvs"}, "kind='kvs' is unknown; pass one of kv, embedding, prompt, latent"),
    ],
)
def test_namespace_refuses_what_it_cannot_encode(facts: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        Namespace(**{"kind": "kv", "block_size": 4, **FACTS, **facts})


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "from mmcache.keys import *\n"
        "n = Namespace(kind='kv', block_size=4, model='org/model', dtype='bfloat16', layout='LBHNC', x={'b': 1, 'a': 2})\n"
        "print(n.block_keys(range(8))[-1].hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert runs == [kv(x={"a": 2, "b": 1}).block_keys(range(8))[-1].hex()] * 2


# -------------------------------------------------------------------------------------------------- block chains
@pytest.mark.parametrize(
    "tokens",
    [
        (5, 6, 7, 8),
        range(5, 9),
        np.array([5, 6, 7, 8], np.int32),
        np.array([5, 6, 7, 8], ">u8"),
        np.arange(5, 13)[::2] // 2 + np.arange(5, 9) - np.arange(5, 13)[::2] // 2,
        array("i", [5, 6, 7, 8]),
        [np.int64(5), 6, np.uint8(7), 8],
    ],
)
def test_token_ids_may_come_in_any_integer_form(tokens: Any) -> None:
    assert kv().block_keys(tokens) == kv().block_keys([5, 6, 7, 8])


def test_a_cpu_tensor_gives_the_keys_of_the_list() -> None:
    torch = pytest.importorskip("torch")
    assert kv().block_keys(torch.tensor([5, 6, 7, 8])) == kv().block_keys([5, 6, 7, 8])


@pytest.mark.parametrize(
    "tokens",
    [
        [1.0, 2, 3, 4],
        [True, 2, 3, 4],
        [1, 0, False, 4],
        [np.bool_(True), 2, 3, 4],
        [-1, 2, 3, 4],
        [1 << 64, 2, 3, 4],
        ["1", 2, 3, 4],
        [None, 2, 3, 4],
        [[1, 2], [3, 4]],
        "1234",
        b"1234",
        bytearray(b"1234"),
        5,
        None,
        {1, 2, 3, 4},
        np.array([1.0, 2.0]),
        np.array([True, False]),
        np.array([-1, 2]),
        np.array([[1, 2], [3, 4]]),
        np.array([1, None]),
        memoryview(np.array([1.0, 2.0])),
    ],
)
def test_what_is_no_token_id_is_refused(tokens: Any) -> None:
    with pytest.raises(KeyInputError, match="token_ids: .*0 <= id < 2\\^64"):
        kv().block_keys(tokens)


def test_only_full_blocks_have_keys() -> None:
    assert [len(kv().block_keys(range(count))) for count in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert kv().block_keys(range(7)) == kv().block_keys(range(4))


def test_a_chain_shares_its_prefix_and_differs_from_the_first_difference_on() -> None:
    one, two = kv().block_keys(range(16)), kv().block_keys([*range(8), 99, *range(9, 16)])
    assert one[:2] == two[:2]
    assert not set(one.digests[2:]) & set(two.digests[2:])
    assert len(set(one.digests + two.digests)) == 6


def test_parents_and_indices_follow_the_chain() -> None:
    keys = kv().block_keys(range(12))
    assert keys.parents == [NO_PARENT, *keys.digests[:-1]]
    assert keys.parent_chains == [NO_PARENT, *keys.chains[:-1]]
    assert list(keys.indices) == [0, 1, 2]
    assert set(keys.namespaces) == {kv().id}


def test_run_bounds_are_the_schedule() -> None:
    starts = sorted({run_bounds(token)[0] for token in range(0, 16_400, 16)})
    assert starts == [0, 512, 1024, 2048, 4096, 8192, 12288, 16384]
    assert [run_bounds(token) for token in (0, 511, 512, 2047, 2048, 4095, 4096)] == [
        (0, 512),
        (0, 512),
        (512, 1024),
        (1024, 2048),
        (2048, 4096),
        (2048, 4096),
        (4096, 8192),
    ]


@pytest.mark.parametrize("size", [1, 16, 48, 300, 512, 1000, 5000])
def test_a_block_has_the_home_of_the_run_that_holds_its_first_token(size: int) -> None:
    keys = kv(size).block_keys(np.arange(20_000))
    first_of_run: dict[int, bytes] = {}
    for index, chain in enumerate(keys.chains):
        home = first_of_run.setdefault(run_bounds(index * size)[0], chain)
        assert keys.homes[index] == home


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[int], list[PlaceholderSpan]]:
    size = draw(st.integers(1, 9))
    tokens = draw(st.lists(st.integers(0, (1 << 64) - 1), max_size=60))
    spans, at = [], 0
    while at < len(tokens) and draw(st.booleans()):
        offset = draw(st.integers(at, len(tokens) - 1))
        length = draw(st.integers(1, len(tokens) - offset))
        spans.append(PlaceholderSpan(offset, length, draw(st.sampled_from([ITEM, OTHER]))))
        at = offset + length
    return size, tokens, draw(st.permutations(spans))


@given(prompts(), st.data())
@settings(deadline=None)
def test_incremental_keys_are_the_keys_however_the_tokens_are_cut(
    prompt: tuple[int, list[int], list[PlaceholderSpan]], data: st.DataObject
) -> None:
    size, tokens, spans = prompt
    whole = kv(size).block_keys(tokens, spans)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    hasher, waiting, keys = kv(size).hasher(), list(spans), Keys.of([])
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        # Each span is declared early or with its first token, as the draw says.
        now = [span for span in waiting if span.offset < stop or data.draw(st.booleans())]
        waiting = [span for span in waiting if span not in now]
        keys = keys + hasher.extend(tokens[start:stop], now)
    assert keys == whole
    hasher.require_complete_spans()


def test_incremental_homes_are_the_homes_over_many_runs() -> None:
    tokens = np.arange(13_000)
    hasher, keys = kv(16).hasher(), Keys.of([])
    for start in range(0, len(tokens), 700):
        keys = keys + hasher.extend(tokens[start : start + 700])
    assert keys == kv(16).block_keys(tokens)


def test_a_span_may_be_declared_while_its_first_token_waits_in_a_partial_block() -> None:
    hasher = kv().hasher()
    keys = hasher.extend([1, 2, 3])
    keys = keys + hasher.extend([4, 5, 6, 7, 8], [PlaceholderSpan(2, 4, ITEM)])
    assert keys == kv().block_keys(range(1, 9), [PlaceholderSpan(2, 4, ITEM)])


def test_a_span_declared_after_its_first_token_was_hashed_is_refused() -> None:
    hasher = kv().hasher()
    hasher.extend(range(5))
    with pytest.raises(KeyInputError, match="starts before token 4, which is hashed already"):
        hasher.extend([5], [PlaceholderSpan(3, 2, ITEM)])


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([PlaceholderSpan(0, 3, ITEM), PlaceholderSpan(2, 3, ITEM)], "overlap"),
        ([PlaceholderSpan(2, 3, ITEM), PlaceholderSpan(2, 3, ITEM)], "overlap"),
        ([PlaceholderSpan(6, 3, ITEM)], "reaches beyond the 8 tokens"),
        ([PlaceholderSpan(8, 1, ITEM)], "reaches beyond the 8 tokens"),
        ([(0, 3, ITEM)], "object of type tuple is no PlaceholderSpan"),
    ],
)
def test_impossible_spans_are_refused(spans: list[Any], complaint: str) -> None:
    with pytest.raises(KeyInputError, match=complaint):
        kv().block_keys(range(8), spans)


@pytest.mark.parametrize(
    ("offset", "length", "item"),
    [(-1, 1, ITEM), (0, 0, ITEM), (0, 1, ITEM[:31]), (0, 1, ITEM[:8]), (0, 1, "x"), (0.0, 1, ITEM), (0, True, ITEM)],
)
def test_impossible_span_fields_are_refused(offset: Any, length: Any, item: Any) -> None:
    with pytest.raises(KeyInputError, match=r"PlaceholderSpan\.\w+: "):
        PlaceholderSpan(offset, length, item)


def test_an_extend_that_raises_changes_nothing() -> None:
    hasher, twin = kv().hasher(), kv().hasher()
    first = [PlaceholderSpan(2, 9, ITEM)]
    assert hasher.extend(range(6), first) == twin.extend(range(6), first)
    for tokens, spans in (
        ([1.5], []),
        ([6, 7, 8], [PlaceholderSpan(10, 4, OTHER)]),
        ([6], [PlaceholderSpan(0, 1, ITEM)]),
    ):
        with pytest.raises(KeyInputError):
            hasher.extend(tokens, spans)  # type: ignore[arg-type]
    more = [PlaceholderSpan(11, 2, OTHER)]
    assert hasher.extend(range(6, 20), more) == twin.extend(range(6, 20), more)


# --------------------------------------------------------------------------------------------------------- parts
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


# -------------------------------------------------------------------------------------------- keys as a sequence
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


# ------------------------------------------------------------------------------------------------- other kinds
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
