"""A run can be repeated exactly from what it recorded: generated rollouts, DGG, reuse and all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm_core.config import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny" / "run.toml"
SMALL = {
    "run.ticks": "10",
    "swarm.microbatch_size": "16",
    "grpo.prompts_per_batch": "8",
    "grpo.max_reuse": "2",
    "dgg.window": "2",
    "sampler.eval_prompts": "8",
    "anchor.calibration_prompts": "16",
    "corrections.merger": "none",  # when one is merged depends on the clock
}


# When a refreshed basis is adopted depends on the clock, so it stays as it is calibrated.
LINKS = {"identity": {"links.kind": "identity"}, "lowrank": {"links.kind": "lowrank", "anchor.q_cadence": "0"}}


@pytest.mark.parametrize("kind", LINKS)
def test_a_replayed_recording_gives_the_same_run(kind: str, run_swarm: Callable[..., str], tmp_path: Path) -> None:
    small = {**SMALL, **LINKS[kind]}
    run_swarm(EXAMPLE, tmp_path / "first", overrides={**small, "sampler.record": "true"})
    record = tmp_path / "first" / "rollouts.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert {line["weight_version"] for line in lines} > {0}, "later batches come from newer weights"
    replay = {"sampler.engine": "replay", "sampler.replay": str(record)}
    # A recording holds what was trained on, so it may be one batch short of what was ordered.
    assert run_swarm(EXAMPLE, tmp_path / "again", overrides={**small, **replay}) == "all 10 ticks are done"
    first, again = ((tmp_path / run / "journal.jsonl").read_text() for run in ("first", "again"))
    assert first == again, "same decisions, same clip coefficients to the last bit"
    written = load(tmp_path / "first" / "run.toml")
    assert written.grpo.prompts_per_batch == 8 and written.model.path == load(EXAMPLE).model.path
