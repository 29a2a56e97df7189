"""Copying planned frames: several threads give what one gives, and each bad frame is told apart from its neighbours."""

from __future__ import annotations

import contextlib
import gc
import signal
import time

import numpy as np
import pytest
import xxhash

from mmcache.transport.base import HIT, Outcome, Result
from mmcache.transport.planned import Move, Planned
from mmcache.transport.shm import PARALLEL_NBYTES, Copier
from tests.unit.threads import without_threads


def frames(count: int, nbytes: int) -> list[Planned]:
    """Frames of one random tensor each, with poisoned destinations."""
    rng = np.random.default_rng(1)
    plans = []
    for _ in range(count):
        source = rng.integers(0, 256, nbytes, dtype=np.uint8)
        target = np.full(nbytes, 0xA5, np.uint8)
        plans.append(Planned([Move(source, target, xxhash.xxh3_128_digest(source.data))], []))
    return plans


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("count", "nbytes"), [(1, PARALLEL_NBYTES + 3), (9, 1 << 20), (40, (1 << 18) + 1), (3, 10)])
def test_every_frame_arrives_whole(threads: int, count: int, nbytes: int) -> None:
    plans = frames(count, nbytes)
    assert Copier(threads).copy(plans, verify=True) == [HIT] * count
    assert all(np.array_equal(move.source, move.target) for plan in plans for move in plan.moves)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_keep_their_places(threads: int) -> None:
    plans: list[Planned | Result] = [*frames(12, 1 << 20)]
    mismatch = Result(Outcome.MISMATCH, "of another shape")
    plans[3] = mismatch
    for position in (0, 7, 11):
        plan = plans[position]
        assert isinstance(plan, Planned)
        plan.moves[0].source[position * 1000] ^= 1
    outcomes = [result.outcome for result in Copier(threads).copy(plans, verify=True)]
    wrong = {0: Outcome.CORRUPT, 3: Outcome.MISMATCH, 7: Outcome.CORRUPT, 11: Outcome.CORRUPT}
    assert outcomes == [wrong.get(position, Outcome.HIT) for position in range(12)]
    unverified = Copier(threads).copy(plans, verify=False)
    assert [bool(result) for result in unverified] == [position != 3 for position in range(12)]


def test_a_gap_that_is_not_zero_is_corrupt() -> None:
    (plan,) = frames(1, 100)
    gap = np.zeros(28, np.uint8)
    assert Copier(1).copy([plan._replace(gaps=[gap])], verify=True) == [HIT]
    gap[27] = 1
    assert Copier(1).copy([plan._replace(gaps=[gap])], verify=True)[0].outcome is Outcome.CORRUPT


def test_no_destination_is_written_after_an_interrupted_copy_returned() -> None:
    plans = frames(24, 1 << 20)
    first = plans[0]
    plans[0] = first._replace(moves=[first.moves[0]._replace(target=np.zeros(3, np.uint8))])  # raises in this thread
    with pytest.raises(ValueError, match="broadcast"):
        Copier(2).copy(plans, verify=True)
    second_half = plans[13:]
    assert all(np.array_equal(move.source, move.target) for plan in second_half for move in plan.moves)


def test_a_signal_that_raises_does_not_end_the_call_before_its_threads() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # what is raised in a callback of a collection gets nowhere
    try:
        for delay_s in (0.001, 0.003, 0.006, 0.01):
            plans = frames(48, 1 << 20)
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, delay_s)
                Copier(2).copy(plans, verify=True)
                time.sleep(0.1)
            for plan in plans:
                plan.moves[0].target[:] = 0x77  # the caller's again
            time.sleep(0.05)
            assert all((plan.moves[0].target == 0x77).all() for plan in plans)
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_without_threads_the_caller_copies_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    without_threads(monkeypatch)
    plans = frames(12, 1 << 20)
    assert Copier(2).copy(plans, verify=True) == [HIT] * 12
    assert all(np.array_equal(move.source, move.target) for plan in plans for move in plan.moves)
