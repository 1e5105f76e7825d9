"""A checkpoint that is torn, on whichever stage's disk, is passed over before anything starts; without another one the run does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchor_node.checkpoints import CheckpointError, found


def tear(shard: Path, damage: str) -> None:
    if damage == "missing":
        shard.unlink()
        return
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def shard_of(out: Path, tick: int, stage: int) -> Path:
    return out / "checkpoints" / f"tick-{tick:08d}" / f"stage-{stage:02d}-of-03.safetensors"


def events(out: Path, name: str) -> list[str]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["message"] for row in rows if row.get("event") == name]


def cause_of(failed: BaseExceptionGroup[BaseException]) -> str:
    found = failed.subgroup(CheckpointError)
    assert found is not None, failed
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


@pytest.mark.parametrize("damage", ["a bit", "missing"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_on_all_stages(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    anchor = {"q_cadence": 0, "calibration_prompts": 1}
    links = {"kind": "lowrank", "rank_forward": 12, "rank_backward": 12}
    run_file = recipe().run_file(run={"ticks": 6}, checkpoint={"every": 2, "keep": 3}, links=links, anchor=anchor)
    out, calm = tmp_path / "run", tmp_path / "calm"
    run_swarm(run_file, out)
    tear(shard_of(out, 6, 1), damage)
    tear(shard_of(out, 4, 2), damage)
    run_swarm(run_file, out, overrides={"run.ticks": "8"}, resume=True)
    first, second = events(out, "passed_over")
    why = {"missing": "no such shard", "a bit": "the file is damaged"}[damage]
    assert first.startswith("tick-00000006: stage 1: ") and why in first
    assert second.startswith("tick-00000004: stage 2: ") and why in second
    assert events(out, "start") == ["3 stages, at tick 0", "3 stages, at tick 2"]
    assert [checkpoint.tick for checkpoint in found(out)] == [4, 6, 8], "written anew, all of them"
    run_swarm(run_file, calm, overrides={"run.ticks": "8"})
    for stage in range(3):
        mine, its = load_file(shard_of(out, 8, stage)), load_file(shard_of(calm, 8, stage))
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


@pytest.mark.parametrize("damage", ["a bit", "missing"])
def test_without_a_whole_one_the_run_says_what_is_wrong_and_does_not_start(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    run_file = recipe().run_file(run={"ticks": 2})
    out = tmp_path / "run"
    run_swarm(run_file, out)
    tear(shard_of(out, 2, 1), damage)
    with pytest.raises(BaseExceptionGroup) as caught:
        run_swarm(run_file, out, overrides={"run.ticks": "4"}, resume=True)
    told = cause_of(caught.value)
    why = {"missing": "no such shard", "a bit": "the file is damaged"}[damage]
    assert told.startswith("no checkpoint is left to go on from (tick-00000002: stage 1: ") and why in told
    assert str(shard_of(out, 2, 1)) in told and "put a whole copy there" in told and "\n" not in told
    assert [checkpoint.tick for checkpoint in found(out)] == [2], "nothing was set aside"
