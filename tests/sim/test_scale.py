"""The scale curve at small sizes: what placing runs is for, beside placing blocks; that a change moves what it must."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mmcache.chain import run_bounds
from mmcache.cluster.placement import View
from mmcache.cluster.redis_members import POLL_S
from mmcache.errors import UsageError
from mmcache.testing.simulator import fleet, scale
from mmcache.testing.simulator.command import main
from mmcache.testing.simulator.prompts import BLOCK_TOKENS, WORKLOADS, requests

TOKENS = 400_000


def test_prompts_have_the_homes_of_keys_v1() -> None:
    for make in WORKLOADS.values():
        stream = make(random.Random(1), 4)
        for _ in range(50):
            keys = next(stream)
            starts = [run_bounds(row * BLOCK_TOKENS)[0] // BLOCK_TOKENS for row in range(len(keys))]
            assert keys.homes == [keys.chains[start] for start in starts]
            assert keys.parents[1:] == keys.digests[:-1]


def test_runs_ask_fewer_shards_than_blocks_and_copies_spread_reads() -> None:
    blocks, runs, hot = (
        scale.measure("conversations", placement, 32, 500, TOKENS, 1) for placement in scale.PLACEMENTS
    )
    assert runs.asks < blocks.asks / 1.5
    assert runs.asks_least <= runs.asks <= 6
    assert runs.bytes_ratio < 1.4
    assert hot.reads_ratio < runs.reads_ratio
    assert hot.lookups_ratio < runs.lookups_ratio / 1.2
    assert 0 < hot.copied < 0.05


def test_one_that_joins_or_leaves_moves_what_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scale.measure("conversations", "runs", 8, 100, 100_000, 1)
    assert made.joined == made.left == 1.0
    assert made.joined_share == pytest.approx(1 / 9, rel=0.4)
    owners = View.owners

    def owners_by_place(self: View, home: bytes, count: int = 1) -> tuple[int, ...]:
        return (int.from_bytes(home[:8], "little") % len(self.members),) if count == 1 else owners(self, home, count)

    monkeypatch.setattr(View, "owners", owners_by_place)  # as if by remainder: a change moves nearly everything
    assert scale.measure("conversations", "runs", 8, 100, 100_000, 1).joined > 4


def test_a_trace_is_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps({"hash_ids": [1, 2, *range(n, n + 20)]}) for n in range(10, 400)))
    arguments = ["scale", "--shards", "4", "--clients", "20", "--workloads", str(path), "--tokens", "20000", "--json"]
    assert main([*arguments, "--processes", "2"]) == 0
    curves = json.loads(capsys.readouterr().out)
    assert [curve["placement"] for curve in curves] == list(scale.PLACEMENTS)
    assert all(curve["shards"] == 4 and curve["bytes_ratio"] >= 1 for curve in curves)


def test_a_fleet_is_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.POLL_S == POLL_S
    assert main(["fleet", "--gpus", "80", "--rate", "1", "--memory-gib", "64"]) == 0
    said = capsys.readouterr().out
    assert "10" in next(line for line in said.splitlines() if "shards, one a host" in line)
    assert "5" in next(line for line in said.splitlines() if "heartbeats a second" in line)


def test_what_is_no_trace_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trace in a file"):
        next(requests(str(tmp_path / "none"), 1, 4))
    (tmp_path / "bad").write_text('{"hash_ids": "abc"}\n')
    with pytest.raises(UsageError, match="no trace in a file"):
        next(requests(str(tmp_path / "bad"), 1, 4))
