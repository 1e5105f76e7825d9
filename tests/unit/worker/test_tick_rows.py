"""What stage 0 makes of votes: where NaN was caught reaches log, journal and metrics, and so do probes."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from swarm_core.config import RunConfig
from swarm_core.knobs import DataSection, ModelSection
from swarm_core.learning.grpo import LossSpec
from swarm_core.learning.partition import Span
from swarm_core.manifest import Manifest
from swarm_core.wire.messages import Report, StageVote
from swarm_worker.fidelity import POISONED
from swarm_worker.journal import Journal
from swarm_worker.lead import LeadState, Stock
from swarm_worker.schedule import Stamp
from swarm_worker.stage_zero import StageZero

STAGES = 3
STAMP = Stamp(epoch=1, tick=17, batch=2, pass_=1, microbatches=4)
FAULT = "stage 1, microbatch 3, tick 17: lowrank forward rows: got 5 values that are NaN"


def decided(folder: Path, votes: list[StageVote]) -> tuple[Report, dict[str, object]]:
    """(metrics row, journal line) of a tick with these votes."""
    spans = tuple(Span(i, STAGES, i, i + 1) for i in range(STAGES))
    config = RunConfig(model=ModelSection(path="model"), data=DataSection(train="train.jsonl"))
    manifest = Manifest(config, spans, width=8, vocab=40, model_fingerprint="")
    state = LeadState(tick=17, current=Stock(2, 17, (4,)), plan=[(1, 0)])
    journal = Journal(folder / "journal.jsonl", 0)
    zero = StageZero(manifest, LossSpec(), torch.float32, journal, state, None, {})
    _, row = zero.decide(STAMP, votes, gated=False, tokens=100)
    journal.close()
    return row, json.loads((folder / "journal.jsonl").read_text())


def votes(**changes: dict[str, object]) -> list[StageVote]:
    """One vote a stage; `changes` by "stage_N"."""
    plain = {"ready": True, "norms": [1.0, 2.0]}
    return [StageVote(stage=i, **(plain | changes.get(f"stage_{i}", {}))) for i in range(STAGES)]  # type: ignore[arg-type]


def test_a_sound_tick_has_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row, line = decided(tmp_path, votes())
    assert row.words == {"outcome": "commit", "skip_reason": ""} and "fault" not in line and not caplog.records


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"stage_1": {"ready": False, "fault": FAULT}}, FAULT),
        (
            {"stage_2": {"ready": False, "fault": "stage 2, b"}, "stage_0": {"ready": False, "fault": "stage 0, a"}},
            "stage 0, a; stage 2, b",
        ),
        ({"stage_2": {"ready": False}}, "stage 2, tick 17: not ready"),
        (
            {"stage_1": {"norms": [1.0, math.nan, math.inf]}},
            "stage 1, tick 17: the gradient is not finite in 2 of 3 tensors, the first number 1",
        ),
    ],
)
def test_where_a_tick_was_poisoned_is_said_everywhere(
    changes: dict[str, dict[str, object]], wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        row, line = decided(tmp_path, votes(**changes))
    assert row.words == {"outcome": "skip", "skip_reason": "nonfinite", "fault": wanted}
    assert (line["outcome"], line["reason"], line["fault"]) == ("SKIP", "nonfinite", wanted)
    assert [record.getMessage() for record in caplog.records] == [f"tick 17 is skipped: {wanted}"]


def test_the_numbers_of_a_probe_come_with_its_tick(tmp_path: Path) -> None:
    numbers = {"fidelity/grad_cosine/stage_1": 0.9}
    row, _ = decided(tmp_path, votes(stage_1={"numbers": numbers}, stage_2={"numbers": {"fidelity/kl": 0.01}}))
    assert (row.numbers["fidelity/grad_cosine/stage_1"], row.numbers["fidelity/kl"]) == (0.9, 0.01)


def test_where_one_stage_s_probe_was_poisoned_no_stage_s_is_reported(tmp_path: Path) -> None:
    numbers = {"fidelity/grad_cosine/stage_1": 0.9, "busy_s/stage_1": 2.0}
    row, _ = decided(tmp_path, votes(stage_0={"numbers": {POISONED: 1.0}}, stage_1={"numbers": numbers}))
    assert row.words["outcome"] == "commit"
    assert {n for n in row.numbers if n.startswith("fidelity/")} == {POISONED} and row.numbers["busy_s/stage_1"] == 2.0
