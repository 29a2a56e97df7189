"""A simulator that notices nothing is worth nothing: planted mistakes, each of which it must notice."""

from __future__ import annotations

import pytest

from mmcache.testing.simulator import world
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


def test_each_invariant_is_the_one_that_some_mistake_must_violate() -> None:
    """So none of them is there that could never be violated."""
    invariants = {text for name, text in vars(world).items() if name.isupper() and isinstance(text, str)}
    alone = set().union(*(mutant.noticed for mutant in MUTANTS.values() if len(mutant.noticed) == 1))
    assert invariants - alone <= {world.FOUND}  # beside the hit rate, as a mistake that loses much shows in either
