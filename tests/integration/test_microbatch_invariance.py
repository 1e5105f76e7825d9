"""One tick's gradient does not depend on how the tick is cut into microbatches: two stages and the codec, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swarm_core.config import load
from swarm_core.learning.batch import Batch, make_batch
from swarm_core.learning.rollout import RolloutBatch, to_samples
from swarm_core.manifest import Manifest, make_manifest
from swarm_core.models.architecture import fingerprint, read_shape
from swarm_worker.compute import Packet, StageCompute
from swarm_worker.sampler.replay import read_rollouts
from swarm_worker.schedule import Mode, Stamp


def make_stages(manifest: Manifest, path: Path, batch: Batch) -> list[StageCompute]:
    stages = [StageCompute(manifest, i, path, torch.device("cpu")) for i in range(2)]
    for stage in stages:
        stage.add_batch(batch)
    return stages


def payload(packet: Packet | None) -> bytes:
    assert packet is not None
    return packet.payload


def gradient(manifest: Manifest, path: Path, rollouts: RolloutBatch, size: int) -> list[Tensor]:
    """All gradients of one scored tick, stage by stage, with `size` sequences a microbatch."""
    first = StageCompute(manifest, 0, path, torch.device("cpu"))
    samples, stats = to_samples(rollouts, first.loss_spec)
    batch = make_batch(0, 0, [samples], [stats.denominators.tokens], [stats.denominators.sequences], size)
    stages = make_stages(manifest, path, batch)
    train = Stamp(microbatches=batch.microbatches[0], pass_=1)
    score = replace(train, mode=Mode.SCORE, pass_=0)
    for i in range(train.microbatches):
        stages[1].score(score, i, payload(stages[0].score(score, i, None)))
    # A ratio of 1 would hide mistakes in the old log-probs.
    assert batch.old_logprobs_M is not None
    batch.old_logprobs_M += 0.1 * torch.sin(
        torch.arange(batch.old_logprobs_M.numel(), dtype=batch.old_logprobs_M.dtype)
    )
    for i in range(train.microbatches):
        stages[0].backward(train, i, payload(stages[1].loss(train, i, payload(stages[0].forward(train, i, None)))))
    return [p.grad for stage in stages for p in stage.parameters if p.grad is not None]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_gradient_is_the_same_with_1_2_and_4_microbatches(
    precision: str, tolerance: float, loss: str, recipe: Callable[..., Any]
) -> None:
    made = recipe("qwen3", batches=1)
    run_file = made.run_file(
        run={"precision": precision}, swarm={"stages": 2}, grpo={"loss": loss, "ticks_per_pass": 1}
    )
    manifest = make_manifest(load(run_file), read_shape(made.model), fingerprint(made.model))
    rollouts = next(read_rollouts(made.record, 4))
    whole = gradient(manifest, made.model, rollouts, 32)
    assert sum(float(g.abs().sum()) for g in whole) > 0
    for size in (12, 6):
        parts = gradient(manifest, made.model, rollouts, size)
        assert len(parts) == len(whole)
        for got, wanted in zip(parts, whole, strict=True):
            assert got.dtype == getattr(torch, {"fp64": "float64", "fp32": "float32"}[precision])
            assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()) + tolerance * 1e-6
