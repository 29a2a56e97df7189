"""A simulator that notices nothing is worth nothing: planted mistakes, each of which it must notice."""

from __future__ import annotations

import pytest

from mmcache.testing.simulator.run import Run
from tests.sim.mutants import MUTANTS

EVENTS = 10_000


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.plant(monkeypatch)
    verdict = next((found for seed in range(mutant.seeds) if not (found := Run(seed, EVENTS).run())), None)
    assert verdict is not None, f"not noticed within {mutant.seeds} seeds"
    assert verdict.invariant in mutant.noticed, f"seed {verdict.seed}: {verdict.invariant}: {verdict.detail}"
