"""What every way to a shard must do alike, as checks of a connected client: plain functions, for any test runner.

`CHECKS` has them all. A check takes an object with the calls of `Client` (the asyncio client behind something that
waits for it will do) and raises AssertionError where a promise is broken. Checks leave values behind, and keys of
their own, so one client may go through all. Its server must have MEMORY bytes and be started with LIMITS in its
environment: small, so that batches and inline payloads are split on every path. Run them without `python -O`. A test
that has pytest call `register_assert_rewrite` on this module, before it is imported, sees what a failed one compared.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import numpy as np

from mmcache.client.blocking import Client
from mmcache.errors import TensorError, UsageError
from mmcache.keyset import Keys
from mmcache.tensors import Pieces, as_dtype, as_numpy
from mmcache.testing.values import blanks, eventually, keys_of, value_of, values_of
from mmcache.transport.base import RING_SLOT_NBYTES, RING_SLOTS, SLICE_NBYTES, Outcome

MEMORY: Final = 64 << 20
BATCH_KEYS: Final = 8
INLINE_NBYTES: Final = 1 << 20
LIMITS: Final = {
    "MMCACHE_MAX_BATCH_KEYS": str(BATCH_KEYS),
    "MMCACHE_MAX_INLINE_NBYTES": str(INLINE_NBYTES),
    "MMCACHE_MAX_GRPC_NBYTES": str(2 * MEMORY),  # a gRPC message holds whole values, too large ones too
}
RING_NBYTES: Final = RING_SLOTS * RING_SLOT_NBYTES
_fresh = count()


class Check(NamedTuple):
    """One promise, and what tries it."""

    name: str
    run: Callable[[Any], None]


CHECKS: Final[list[Check]] = []


def _check(*cases: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to CHECKS, once for each case: a list of what it takes after the client."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for number, case in enumerate(cases or ((),)):
            name = f"{function.__name__}-{number}" if cases else function.__name__
            CHECKS.append(Check(name, partial(_run, function, case)))
        return function

    return add


def _run(function: Callable[..., None], case: Sequence[Any], cache: Any) -> None:
    function(cache, *case)


@contextlib.contextmanager
def _raising(kind: type[Exception], words: str) -> Iterator[None]:
    said: str | None = None
    try:
        yield
    except kind as error:
        said = str(error)
    assert said is not None, f"nothing was raised; expected {kind.__name__}: {words}"
    assert re.search(words, said), f"{said} does not say {words}"


def fresh_keys(number: int) -> Keys:
    return keys_of(number, f"contract/{next(_fresh)}")


def outcomes(results: Any) -> list[str]:
    return [str(result.outcome) for result in results]


@_check(
    [1], [63], [64], [4097], [SLICE_NBYTES - 1], [SLICE_NBYTES], [SLICE_NBYTES + 1], [2 * RING_SLOT_NBYTES],
    [RING_NBYTES + RING_SLOT_NBYTES + 17],
)  # fmt: skip
def what_is_put_comes_back_whatever_its_size(cache: Client, nbytes: int) -> None:
    keys = fresh_keys(3)
    values, buffers = values_of(keys, nbytes), blanks(3, nbytes)
    assert outcomes(cache.put(keys, values)) == ["stored"] * 3
    assert outcomes(cache.get_into(keys, buffers)) == ["hit"] * 3
    assert all(map(np.array_equal, values, buffers))


@_check([1, 100], [3, 7], [24, 16_384], [5, SLICE_NBYTES + 3], [700, 1000], [4, 0])
def a_destination_in_pieces_is_filled_and_what_lies_between_is_left_alone(
    cache: Client, pieces: int, nbytes: int
) -> None:
    keys = fresh_keys(2)
    values = values_of(keys, pieces * nbytes)
    assert all(cache.put(keys, values))
    memory = np.full((pieces, 2, nbytes + 5), 0x5A, np.uint8)
    places = [Pieces(memory[:, at, 2 : 2 + nbytes], "uint8", (pieces * nbytes,)) for at in (1, 0)]
    for verify in (True, False):
        memory[:] = 0x5A
        assert outcomes(cache.get_into(keys, places, verify=verify)) == ["hit"] * 2
        for at, value in zip((1, 0), values, strict=True):
            assert np.array_equal(memory[:, at, 2 : 2 + nbytes].reshape(-1), value)
        assert np.all(memory[:, :, :2] == 0x5A)
        assert np.all(memory[:, :, 2 + nbytes :] == 0x5A)


@_check()
def pieces_of_another_form_are_a_mismatch(cache: Client) -> None:
    keys = fresh_keys(2)
    assert all(cache.put(keys, values_of(keys, 60)))
    memory = np.full((6, 20), 0x5A, np.uint8)
    wrong = [Pieces(memory[:, :10], "uint8", (6, 10)), Pieces(memory, "uint8", (60,))]
    assert outcomes(cache.get_into(keys, wrong)) == ["mismatch"] * 2
    assert np.all(memory == 0x5A)


@_check()
def an_absent_key_is_a_miss_and_costs_the_present_ones_nothing(cache: Client) -> None:
    keys, absent = fresh_keys(2), fresh_keys(1)
    values, buffers = values_of(keys, 1000), blanks(3, 1000)
    cache.put(keys, values)
    mixed = keys[:1] + absent + keys[1:]
    assert outcomes(cache.get_into(mixed, buffers)) == ["hit", "miss", "hit"]
    assert np.array_equal(buffers[0], values[0])
    assert np.array_equal(buffers[2], values[1])
    assert not cache.get_into(absent, blanks(1, 1000))[0]


@_check()
def a_key_already_stored_is_present_and_keeps_its_value(cache: Client) -> None:
    keys, buffers = fresh_keys(1), blanks(1, 5000)
    value = value_of(keys.digests[0], 5000)
    assert outcomes(cache.put(keys, [value])) == ["stored"]
    written = cache.counters["bytes_written"]
    assert outcomes(cache.put(keys, [value ^ 1])) == ["present"]
    assert cache.counters["bytes_written"] == written
    assert all(cache.get_into(keys, buffers))
    assert np.array_equal(buffers[0], value)


@_check()
def matching_stops_at_the_first_absent_key_and_crosses_batches(cache: Client) -> None:
    number = 2 * BATCH_KEYS + 3
    keys = fresh_keys(number + 1)
    values = values_of(keys, 100)
    assert cache.match_prefix(keys) == 0
    assert all(cache.put(keys[:number], values[:number]))
    assert cache.match_prefix(keys) == number
    assert cache.match_prefix(keys[:BATCH_KEYS]) == BATCH_KEYS
    assert cache.delete(keys[BATCH_KEYS + 1]) == [True]
    assert cache.match_prefix(keys) == BATCH_KEYS + 1
    assert cache.match_prefix([]) == 0


@_check()
def batches_over_the_servers_limits_are_split(cache: Client) -> None:
    number, nbytes = 3 * BATCH_KEYS + 1, INLINE_NBYTES // 3
    keys = fresh_keys(number)
    values, buffers = values_of(keys, nbytes), blanks(number, nbytes)
    assert outcomes(cache.put(keys, values)) == ["stored"] * number
    assert outcomes(cache.get_into(keys, buffers)) == ["hit"] * number
    assert all(map(np.array_equal, values, buffers))
    with cache.acquire(keys) as lease:
        assert all(lease.frames)
    assert cache.delete(keys) == [True] * number


@_check()
def acquired_frames_show_the_values_read_only_and_verify(cache: Client) -> None:
    keys, absent = fresh_keys(2), fresh_keys(1)
    values = values_of(keys, 70_000)
    cache.put(keys, values)
    with cache.acquire(keys + absent) as lease:
        assert lease.frames[2] is None
        for frame, key, value in zip(lease.frames[:2], keys.digests, values, strict=True):
            assert frame is not None
            frame.verify()
            assert frame.header.meta.key == key
            (tensor,) = frame.header.tensors
            array = as_numpy(tensor.spec, frame.payload(tensor))
            assert np.array_equal(array, value)
            with _raising(ValueError, "read-only"):
                array[0] = 0
    assert lease.frames == [None] * 3
    assert lease.release()


@_check()
def several_tensors_of_one_key_keep_names_shapes_and_dtypes(cache: Client) -> None:
    keys = fresh_keys(1)
    value = {
        "hidden": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "mask": np.array([True, False, True]),
        "nothing": np.empty((0, 7), np.int64),
        "step": np.array(7, np.int32),
    }
    assert all(cache.put(keys, [value]))
    into = {name: np.zeros_like(array) for name, array in reversed(value.items())}
    assert all(cache.get_into(keys, [into]))
    assert all(np.array_equal(into[name], array) for name, array in value.items())
    with cache.acquire(keys) as lease:
        assert lease.frames[0] is not None
        specs = [tensor.spec for tensor in lease.frames[0].header.tensors]
    assert [(s.name, s.dtype, s.shape) for s in specs] == [(n, a.dtype.name, a.shape) for n, a in value.items()]


@_check([(0,)], [(0, 5)], [(4, 0, 2)])
def tensors_without_elements_are_values_too(cache: Client, shape: tuple[int, ...]) -> None:
    keys = fresh_keys(2)
    value = np.empty(shape, np.float16)
    assert outcomes(cache.put(keys, [value, {}])) == ["stored"] * 2
    assert outcomes(cache.get_into(keys, [np.empty(shape, np.float16), {}])) == ["hit"] * 2
    assert outcomes(cache.get_into(keys, [bytearray(0), {}])) == ["hit"] * 2
    assert outcomes(cache.get_into(keys[:1], [np.empty((3, 1), np.float16)])) == ["mismatch"]


@_check([[{}] * 20], [[{"a": np.arange(3), "b": np.empty(0)}] * 20], [[{"a": np.arange(3)}, {}] * 10])
def many_small_values_in_one_batch_come_back(cache: Client, values: list[dict[str, Any]]) -> None:
    keys = fresh_keys(len(values))
    assert all(cache.put(keys, values))
    into = [{name: np.zeros_like(array) for name, array in value.items()} for value in values]
    assert outcomes(cache.get_into(keys, into)) == ["hit"] * len(keys)
    assert all(
        np.array_equal(one[name], value[name]) for one, value in zip(into, values, strict=True) for name in value
    )
    into[7] = {"a": np.zeros(4)}
    assert outcomes(cache.get_into(keys, into)) == ["hit"] * 7 + ["mismatch"] + ["hit"] * (len(keys) - 8)


@_check()
def bfloat16_is_kept_as_words_under_its_own_name(cache: Client) -> None:
    keys = fresh_keys(1)
    words = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert all(cache.put(keys, [as_dtype(words, "bfloat16")]))
    into = np.zeros((8, 8), np.uint16)
    assert all(cache.get_into(keys, [as_dtype(into, "bfloat16")]))
    assert np.array_equal(into, words)
    assert outcomes(cache.get_into(keys, [np.zeros((8, 8), np.float16)])) == ["mismatch"]


@_check(
    [np.zeros(10, np.float32), "stored float32"],
    [np.zeros((3, 4), np.float64), "stored float32"],
    [np.zeros((4, 3), np.float32), "stored float32"],
    [[np.zeros((3, 4), np.float32)] * 2, "holds 1 tensors, 2 destinations"],
    [{"other": np.zeros((3, 4), np.float32)}, "no destination"],
)
def a_destination_that_does_not_fit_says_so_and_the_rest_is_read(cache: Client, destination: Any, says: str) -> None:
    keys = fresh_keys(2)
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    cache.put(keys, [value, value])
    good = np.zeros_like(value)
    misfit, hit = cache.get_into(keys, [destination, good])
    assert misfit.outcome is Outcome.MISMATCH
    assert says in misfit.reason
    assert hit
    assert np.array_equal(good, value)
    assert cache.match_prefix(keys) == 2


@_check()
def deleted_entries_are_gone_and_may_be_stored_again(cache: Client) -> None:
    keys, absent = fresh_keys(2), fresh_keys(1)
    values = values_of(keys, 300)
    cache.put(keys, values)
    assert cache.delete(keys + absent) == [True, True, False]
    assert outcomes(cache.get_into(keys, blanks(2, 300))) == ["miss", "miss"]
    assert outcomes(cache.put(keys, values)) == ["stored"] * 2


@_check()
def an_entry_past_its_ttl_is_a_miss(cache: Client) -> None:
    short, long = fresh_keys(1), fresh_keys(1)
    value = values_of(short, 100)
    began = time.monotonic()
    eventually(lambda: all(cache.put(short, value, ttl_s=1.0)), "it is stored in time")
    assert all(cache.put(long, values_of(long, 100), ttl_s=3600))
    eventually(lambda: cache.match_prefix(short) == 0, "the entry expires", 20)
    assert time.monotonic() - began > 0.5
    assert outcomes(cache.get_into(short + long, blanks(2, 100))) == ["miss", "hit"]
    assert outcomes(cache.put(short, value)) == ["stored"]


@_check([0], [-1], [float("nan")], [float("inf")], [1e11])
def a_ttl_that_cannot_be_is_refused_and_nothing_is_stored(cache: Client, ttl_s: float) -> None:
    keys = fresh_keys(1)
    with _raising(UsageError, "above 0"):
        cache.put(keys, values_of(keys, 10), ttl_s=ttl_s)
    assert cache.match_prefix(keys) == 0


@_check()
def arguments_that_can_never_work_are_errors(cache: Client) -> None:
    keys = fresh_keys(2)
    with _raising(TensorError, "2 keys but 1"):
        cache.put(keys, values_of(keys, 10)[:1])
    with _raising(TensorError, "writable"):
        cache.get_into(keys[:1], [bytes(10)])
    with _raising(TensorError, "not a tensor"):
        cache.put(keys[:1], [3.5])
    with _raising(TensorError, "cannot be stored"):
        cache.put(keys[:1], [np.zeros(3, np.complex64)])


@_check()
def a_value_larger_than_the_store_is_refused_with_a_remedy(cache: Client) -> None:
    keys = fresh_keys(2)
    big = np.zeros(MEMORY + 1, np.uint8)
    refused, stored = cache.put(keys, [big, value_of(keys.digests[1], 100)])
    assert refused.outcome is Outcome.REFUSED
    assert "raise --memory" in refused.reason
    assert stored


@_check()
def counters_add_up(cache: Client) -> None:
    keys, absent = fresh_keys(2), fresh_keys(1)
    before, server_before = dict(cache.counters), cache.stat()["counters"]
    cache.put(keys, values_of(keys, 1000))
    cache.put(keys, values_of(keys, 1000))
    cache.get_into(keys + absent, blanks(3, 1000))
    gained = {name: value - before.get(name, 0) for name, value in cache.counters.items()}
    wanted = {"put_stored": 2, "put_present": 2, "hits": 2, "misses": 1, "bytes_read": 2000, "bytes_written": 2000}
    assert {name: gained[name] for name in wanted} == wanted
    assert gained["verify_failures"] == 0
    server_after = cache.stat()["counters"]
    assert server_after["stored"] - server_before.get("stored", 0) == 2
    assert server_after["hits"] - server_before.get("hits", 0) == 2
    assert server_after["misses"] - server_before.get("misses", 0) == 1


@_check()
def nothing_stays_held_after_the_calls(cache: Client) -> None:
    keys = fresh_keys(4)
    cache.put(keys, values_of(keys, 5000))
    cache.get_into(keys, blanks(4, 5000))
    cache.get_into(keys, blanks(4, 5000), verify=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache.acquire(keys))
    counters = eventually(
        lambda: (now := cache.stat()["counters"])["leases"] == 0 and now, "the last lease is given back"
    )
    assert (counters["held_bytes"], counters["reservations"], counters["inflight_bytes"]) == (0, 0, 0)
