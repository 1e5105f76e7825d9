"""Bases of the anchor's replays in a whole swarm: versions come, every member takes them up, and no stage sketches."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchor_node import replay_bases


@pytest.mark.parametrize("backward", ["straight_through", "exact"])
def test_bases_come_from_replays_and_nothing_is_sketched(
    backward: str,
    recipe: Callable[..., Any],
    run_swarm: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replay_bases, "ENOUGH", 1)  # a slice here has a hundred rows
    run_file = recipe("llama").run_file(
        run={"ticks": 20},
        links={"kind": "lowrank", "rank_forward": 12, "rank_backward": 16, "backward": backward},
        anchor={"q_source": "anchor_replay", "q_cadence": 4, "m_cadence": 2, "calibration_prompts": 1},
        corrections={"merger": "held_delta"},
    )
    run_swarm(run_file, tmp_path / "run")

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    made = [row for row in rows if row.get("event") == "basis"]
    assert len(made) >= 2
    for place in ("forward/boundary_0", "forward/boundary_1"):
        assert all(0 < row[f"basis/overlap_{place}"] <= 1 <= row[f"basis/condition_{place}"] + 1e-6 for row in made)
    trained_on = [row["basis/version"] for row in rows if row["type"] == "tick"]
    assert trained_on == sorted(trained_on) and trained_on[-1] > 0
    with (tmp_path / "run" / "ledger.csv").open() as file:
        kinds = {row["kind"] for row in csv.DictReader(file)}
    assert "sketch" not in kinds and "basis" in kinds
