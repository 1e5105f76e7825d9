"""What pinning is for: a large jump of the basis while a batch is trained on shows in the clip fraction, or it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from codec.spec import Direction
from experiments.codec.training import Training
from swarm_core.config import load
from swarm_core.wire.bases import matrix_of
from swarm_core.wire.messages import BasisSet

WIDTH, RANKS, TICKS_A_BATCH = 32, (20, 16), 4  # two slices, two passes
JUMP_AT = TICKS_A_BATCH + 2  # between the passes of the second batch


def elsewhere(version: int, tick: int) -> BasisSet:
    """A version as no refresh would make it: random directions."""
    generator = torch.Generator().manual_seed(version)
    matrices = []
    for boundary in (0, 1):
        for direction in Direction:
            q_HR = torch.linalg.qr(torch.randn(WIDTH, RANKS[direction], generator=generator))[0]
            matrices.append(matrix_of((boundary, direction), q_HR, step=0.25))
    return BasisSet(version, tick, matrices)


@pytest.mark.parametrize("pinned", [True, False])
def test_the_clip_fraction_jumps_with_the_basis_inside_a_batch_unless_it_is_pinned(
    pinned: bool, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    links = {"kind": "lowrank", "rank_forward": RANKS[0], "rank_backward": RANKS[1], "reuse_deltas": False}
    run_file = recipe("llama", batches=3).run_file(
        run={"ticks": 3 * TICKS_A_BATCH},
        links=links,
        optimizer={"lr": 1e-6},
        anchor={"q_cadence": 0, "calibration_prompts": 1, "pin_basis": pinned},
    )
    training = Training(load(run_file), tmp_path / "run")
    training.zero.lead.plan = replace(training.zero.lead.plan, pin_basis=pinned)
    while not training.zero.lead.finished:
        if len(training.ticks) == JUMP_AT and training.chain.newest_basis == 0:
            training.chain.add_bases(elsewhere(1, JUMP_AT))
        training.advance()
    training.close()

    versions = [int(row.numbers["basis/version"]) for row in training.ticks]
    begins = JUMP_AT if not pinned else 2 * TICKS_A_BATCH
    assert versions == [0] * begins + [1] * (len(versions) - begins)
    clipped = [row.numbers["clip_ratio/region_mean"] for row in training.ticks]
    inside = mean(clipped[JUMP_AT : 2 * TICKS_A_BATCH])
    others = mean(clipped[:JUMP_AT] + clipped[2 * TICKS_A_BATCH :])  # the batch that began on the new basis included
    assert others < 0.01
    assert inside < 0.01 if pinned else inside > 0.2
