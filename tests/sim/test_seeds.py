"""Seeds that must pass, those that once found something by name; and that a seed says the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mmcache.testing.simulator.command import main
from mmcache.testing.simulator.run import Run
from tests.sim.mutants import MUTANTS

EVENTS = 10_000
SEEDS = 50
AT_A_TIME = 5

# What a seed once showed. Whoever changes what the simulator draws finds other seeds for them: `--json` says `passes`.
REGRESSIONS = {
    "a shard that is restarted warm forgets a fork whose tails lie elsewhere by then": 0,
    "a shard that comes back empty finds its forks anew, tail by tail": 139,
}


@pytest.mark.parametrize("first", range(0, SEEDS, AT_A_TIME))
def test_nothing_is_violated(first: int) -> None:
    for seed in range(first, first + AT_A_TIME):
        verdict = Run(seed, EVENTS).run()
        assert verdict, f"seed {seed}: {verdict.invariant}: {verdict.detail}"
        assert verdict.events >= EVENTS
        assert verdict.before - 0.02 <= verdict.after
        assert verdict.trouble < verdict.before, "nothing went wrong in the time of trouble"


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_found_once_is_not_found_again(name: str) -> None:
    verdict = Run(REGRESSIONS[name], EVENTS).run()
    assert verdict, f"{verdict.invariant}: {verdict.detail}"


def test_a_seed_says_the_same_in_every_process() -> None:
    said = set()
    for salt in ("1", "2"):
        command = [sys.executable, "-m", "mmcache.testing.simulator", "--seed", "7", "--events", "3000", "--trace"]
        ran = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True, check=True)
        said.add(ran.stdout)
    assert len(said) == 1
    assert len(said.pop().splitlines()) > 1000


def test_a_seed_that_fails_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    MUTANTS["a_slice_is_placed_by_its_first_block"].plant(monkeypatch)
    assert main(["--seed", "3", "--events", "5000"]) == 1
    told = capsys.readouterr().err
    command = next(line for line in told.splitlines() if "again:" in line).partition("simulator ")[2]
    assert command == "--seed 3 --events 5000 --trace"
    assert main(command.split()) == 1
    again = capsys.readouterr()
    assert again.err == told
    assert " count s" in again.out


def test_many_seeds_are_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "5", "--first", "100", "--events", "2000", "--workers", "2", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in verdicts] == [100, 101, 102, 103, 104]
    assert all(one["events"] >= 2000 and one["before"] > 0.98 and not one["invariant"] for one in verdicts)
