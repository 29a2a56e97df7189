"""What a caller may get wrong at the edges: a clear UsageError, never another exception and never a silent loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mmcache
from mmcache.errors import KeyInputError, TensorError, UsageError
from mmcache.frame import TensorSpec, check_specs
from mmcache.keys import Namespace, item_digest, namespace_id, opaque_key
from mmcache.keyset import Keys
from mmcache.media import samples_digest
from mmcache.tensors import as_dtype, host_tensor

FACTS: dict[str, Any] = {"kind": "kv", "model": "m/x", "dtype": "uint8", "layout": "LBHNC", "block_size": 16}
SPACE = Namespace(**FACTS)
KEY = opaque_key(SPACE, b"one")


@pytest.mark.parametrize(
    "path", ["/models/draft", "./x", "../x", "~/x", "~user", "file:///x", "C:\\x", "\\\\host\\x", "."]
)
@pytest.mark.parametrize("fact", ["model", "adapter", "draft", "processor", "scale_file"])
def test_no_fact_is_a_local_path(fact: str, path: str) -> None:
    with pytest.raises(KeyInputError, match="looks like a local path"):
        Namespace(**FACTS | {fact: path})


@pytest.mark.parametrize(
    "text", ["Qwen/Qwen2.5-VL-7B-Instruct", "b3:00", '{"a":"x\\\\y"}', "flash_attn", "", "1.5", ".5"]
)
def test_what_only_resembles_a_path_is_a_fact(text: str) -> None:
    assert Namespace(**FACTS, backend=text).facts["backend"] == text


def test_a_salt_is_free_text() -> None:
    assert Namespace(**FACTS, cache_salt="/home or ~ or C:\\ ").id != SPACE.id


def test_facts_have_a_size_together() -> None:
    facts: dict[str, Any] = {f"f{i}": "x" * 60_000 for i in range(5)}
    with pytest.raises(KeyInputError, match="pass one structure as a fact"):
        Namespace(**FACTS, **facts)
    with pytest.raises(KeyInputError, match="pass one structure as a fact"):
        namespace_id("kv", facts)
    assert Namespace(**FACTS, overrides=facts).facts["overrides"].startswith("b3:")


def test_a_namespace_id_is_of_a_known_kind() -> None:
    with pytest.raises(KeyInputError, match="kind='other' is unknown"):
        namespace_id("other", {})


def test_a_block_has_fewer_than_two_to_the_32_tokens() -> None:
    with pytest.raises(KeyInputError, match="block_size"):
        Namespace(**FACTS | {"block_size": 1 << 32})


@pytest.mark.parametrize("time", [10**400, (1 << 53) + 1, np.longdouble(1) + np.finfo(np.longdouble).eps])
def test_times_and_rates_that_a_float_would_round_are_refused(time: Any) -> None:
    with pytest.raises(KeyInputError, match="does not fit a 64-bit float"):
        item_digest(bytes(32), timestamps=[time])
    if isinstance(time, int):
        with pytest.raises(KeyInputError, match="does not fit a 64-bit float"):
            samples_digest(np.zeros(3), "audio", "mono", sample_rate=time)


def test_masks_are_not_dropped() -> None:
    masked = np.ma.masked_array(np.arange(4.0), mask=[False, True, False, True])
    with pytest.raises(KeyInputError, match="filled"):
        samples_digest(masked, "image", "L")
    with pytest.raises(TensorError, match="filled"):
        host_tensor(masked)


def released() -> memoryview:
    view = memoryview(bytearray(4))
    view.release()
    return view


@pytest.mark.parametrize("value", [released(), object(), 5, None, "text"])
def test_what_is_no_tensor_is_a_tensor_error(value: Any) -> None:
    with pytest.raises(TensorError, match="is not a tensor"):
        host_tensor(value)


@pytest.mark.parametrize("keys", [5, None, 1.5, [b"x" * 32], "text"])
def test_what_are_no_keys_is_a_key_input_error(keys: Any) -> None:
    with pytest.raises(KeyInputError):
        Keys.of(keys)


def test_specs_are_checked_before_a_server_is_asked() -> None:
    bad = [
        [TensorSpec("x", "uint8", (1,) * 9)],
        [TensorSpec("", "uint8", (1,))],
        [TensorSpec("n" * 57, "uint8", (1,))],
        [TensorSpec("x", "complex64", (1,))],
        [TensorSpec("x", "uint8", (1,)), TensorSpec("x", "uint8", (2,))],
        [TensorSpec(str(i), "uint8", (1,)) for i in range(1025)],
        [TensorSpec("x", "uint8", (1 << 41,))],
    ]
    for specs in bad:
        with pytest.raises(TensorError):
            check_specs(specs)
    with mmcache.connect("mmcache://127.0.0.1:1", lazy=True) as cache:  # nobody is there
        with pytest.raises(TensorError):
            cache.put(KEY, [np.zeros((1,) * 9, np.uint8)])
        assert cache.put(KEY, [np.zeros(3, np.uint8)])[0].outcome == "unavailable"


def test_data_calls_raise_usage_errors_only() -> None:
    with mmcache.connect("embedded://?memory=1MiB") as cache:
        target = np.zeros(4, np.uint8)
        calls: list[Any] = [
            lambda: cache.match_prefix(None),  # type: ignore[arg-type]
            lambda: cache.get_into(5, [target]),  # type: ignore[arg-type]
            lambda: cache.get_into(KEY, None),  # type: ignore[arg-type]
            lambda: cache.get_into(KEY, (t for t in [target])),  # type: ignore[arg-type]
            lambda: cache.get_into(KEY, [released()]),
            lambda: cache.put(KEY, target),  # type: ignore[arg-type]
            lambda: cache.put(KEY, [target], ttl_s="5"),  # type: ignore[arg-type]
            lambda: cache.put(KEY, [target], ttl_s=float("nan")),
            lambda: cache.put(KEY, [target], ttl_s=1e12),
        ]
        for call in calls:
            with pytest.raises(UsageError):
                call()
        assert cache.match_prefix(KEY) == 0


def test_bfloat16_goes_out_of_and_into_words() -> None:
    words = np.arange(8, dtype=np.uint16).reshape(2, 4)
    with mmcache.connect("embedded://?memory=1MiB", deadline_s=10) as cache:
        assert cache.put(KEY, [as_dtype(words, "bfloat16")])[0].outcome == "stored"
        for target in (np.zeros((2, 4), np.uint16), np.zeros(16, np.uint8)):
            assert cache.get_into(KEY, [target])[0].outcome == "hit"
            assert target.tobytes() == words.tobytes()
        assert cache.get_into(KEY, [np.zeros((4, 2), np.uint16)])[0].outcome == "mismatch"
        assert cache.get_into(KEY, [np.zeros((2, 4), np.float16)])[0].outcome == "mismatch"
