"""Every form of the objective runs through a whole swarm: the KL's reference pass, the losses, the ratio levels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Swarm = Callable[..., str]


def ticks(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["type"] == "tick"]


def test_kl_is_measured_against_the_initial_weights(
    recipe: Callable[..., Any], run_swarm: Swarm, tmp_path: Path
) -> None:
    made = recipe("qwen2")
    run_file = made.run_file(run={"ticks": 12}, grpo={"kl_beta": 0.05}, checkpoint={"every": 7})
    run_swarm(run_file, tmp_path / "whole")
    kl = [row["kl"] for row in ticks(tmp_path / "whole")]
    assert kl[0] == 0.0, "at the initial weights the policy is its own reference"
    assert all(value > 0 for value in kl[1:])
    # The reference is the initial checkpoint also after a resume in the middle of a batch.
    run_swarm(run_file, tmp_path / "parts", overrides={"run.ticks": "7"})
    run_swarm(run_file, tmp_path / "parts", resume=True)
    assert [row["kl"] for row in ticks(tmp_path / "parts")] == kl


@pytest.mark.parametrize(
    "objective",
    [
        {"loss": "grpo", "ratio_level": "sequence"},
        {"loss": "dr_grpo", "scale_rewards": "none", "sampler_correction_cap": "none"},
        {"loss": "bnpo", "dual_clip": 3.0, "clip_high": 0.28, "ticks_per_pass": 1, "max_reuse": 1},
    ],
    ids=["gspo", "dr_grpo", "bnpo-single-tick"],
)
def test_objectives_train(
    objective: dict[str, Any], recipe: Callable[..., Any], run_swarm: Swarm, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_swarm(recipe("llama").run_file(run={"ticks": 4}, grpo=objective), out)
    rows = ticks(out)
    assert [row["outcome"] for row in rows] == ["commit"] * 4
    assert all(row["grad_norm"] > 0 for row in rows)
    if objective.get("max_reuse") == 1:
        assert all(row["clip_ratio/region_mean"] == 0 for row in rows), "one tick a batch: the ratio is exactly 1"
