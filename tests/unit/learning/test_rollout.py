"""Rollout batches: validation, slices, and what becomes a sample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from swarm_core.learning.errors import RolloutError
from swarm_core.learning.grpo import Denominators, LossSpec
from swarm_core.learning.rollout import Completion, RolloutBatch, reward_metrics, slices, to_samples


def completion(prompt: int, reward: float | None, length: int = 2, **changes: Any) -> Completion:
    made = Completion(prompt, [prompt, 9], list(range(1, length + 1)), [-0.5] * length, reward, truncated=False)
    return replace(made, **changes)


def batch(rewards: list[float | None], group_size: int = 2, **changes: Any) -> RolloutBatch:
    completions = [completion(i // group_size, r, 2 + i, **changes) for i, r in enumerate(rewards)]
    return RolloutBatch(7, 3, group_size, completions)


def test_zero_variance_groups_cost_nothing_and_stay_in_the_denominators() -> None:
    samples, stats = to_samples(batch([1.0, 0.0, 1.0, 1.0]), LossSpec())
    assert [s.completion_ids.numel() for s in samples] == [2, 3]
    assert [s.advantage for s in samples] == pytest.approx([0.70700678, -0.70700678])
    assert stats.denominators == Denominators(tokens=2 + 3 + 4 + 5, sequences=4)
    assert (stats.sample_positions, stats.dropped_groups, stats.dropped_sequences) == ((0, 1), 1, 2)
    assert samples[0].prompt_ids.tolist() == [0, 9] and samples[0].sampler_logprobs_C.dtype == torch.float32


def test_with_the_kl_on_zero_variance_groups_still_pull_to_the_reference() -> None:
    samples, stats = to_samples(batch([1.0, 0.0, 1.0, 1.0]), LossSpec(beta=0.1))
    assert len(samples) == 4 and stats.dropped_groups == stats.dropped_sequences == 0


def test_failed_verifiers_are_masked() -> None:
    samples, stats = to_samples(batch([1.0, None, 0.0, 0.5], group_size=4), LossSpec(beta=0.1))
    assert stats.sample_positions == (0, 2, 3)
    assert stats.denominators == Denominators(tokens=2 + 4 + 5, sequences=4)
    assert stats.metrics["rewards/failed"] == 1
    alone = to_samples(batch([1.0, 0.0, 0.5], group_size=3), LossSpec())[0]
    assert samples[0].advantage == alone[0].advantage


def test_truncated_completions_are_masked_when_asked() -> None:
    rollouts = batch([1.0, 0.0, 0.5], group_size=3)
    rollouts.completions[1] = replace(rollouts.completions[1], truncated=True)
    kept = to_samples(rollouts, LossSpec())
    assert kept[1].denominators.tokens == 9 and len(kept[0]) == 2  # the third has advantage 0
    samples, stats = to_samples(rollouts, LossSpec(mask_truncated=True))
    assert stats.denominators == Denominators(tokens=2 + 4, sequences=3) and stats.sample_positions == (0,)
    assert samples[0].advantage == kept[0][0].advantage  # its reward still counts for the group
    assert stats.metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)


def test_nothing_to_learn_gives_no_samples() -> None:
    samples, stats = to_samples(batch([0.0, 0.0, None, None]), LossSpec())
    assert samples == [] and stats.denominators == Denominators(tokens=5, sequences=4)
    assert stats.metrics["frac_reward_zero_std"] == 1.0 and stats.dropped_groups == 2


def test_slices_are_whole_groups_in_order() -> None:
    whole = batch([float(i % 2) for i in range(10)])
    parts = slices(whole, 2)
    assert [part.groups for part in parts] == [2, 3]
    assert [c for part in parts for c in part.completions] == whole.completions
    assert {(p.batch, p.weight_version, p.group_size) for p in parts} == {(7, 3, 2)}
    assert slices(whole, 1)[0] == whole
    tokens = [to_samples(part, LossSpec())[1].denominators.tokens for part in parts]
    assert sum(tokens) == to_samples(whole, LossSpec())[1].denominators.tokens
    for ticks in (0, 6):
        with pytest.raises(RolloutError, match="wanted 1..5"):
            slices(whole, ticks)


def test_reward_and_length_metrics_under_trls_names() -> None:
    rollouts = batch([1.0, 0.0, None, 1.0])
    rollouts.completions[0] = replace(rollouts.completions[0], truncated=True)
    metrics = reward_metrics(rollouts)
    assert metrics == pytest.approx(
        {
            "reward": 2 / 3, "reward_std": math.sqrt(1 / 3), "frac_reward_zero_std": 0.5, "rewards/failed": 1.0,
            "completions/mean_length": 3.5, "completions/min_length": 2.0, "completions/max_length": 5.0,
            "completions/clipped_ratio": 0.25, "completions/mean_terminated_length": 4.0,
            "completions/min_terminated_length": 3.0, "completions/max_terminated_length": 5.0,
        }
    )  # fmt: skip


def test_no_reward_at_all_is_not_a_reward_of_zero() -> None:
    metrics = reward_metrics(batch([None, None, None, None]))
    assert math.isnan(metrics["reward"]) and math.isnan(metrics["reward_std"]) and metrics["rewards/failed"] == 4


@pytest.mark.parametrize(
    ("completions", "position", "part"),
    [
        ([], None, "whole groups"),
        ([completion(0, 1.0)] * 3, None, "whole groups"),
        ([completion(0, 1.0), completion(1, 1.0)], 1, "next to each other"),
        ([completion(0, 1.0), completion(0, 1.0, prompt_ids=[4])], 1, "next to each other"),
        ([completion(0, 1.0), completion(0, 1.0, logprobs=[-1.0])], 1, "1 log-probs for 2"),
        ([completion(0, 1.0), completion(0, 1.0, 0)], 1, "end-of-sequence"),
        ([completion(0, 1.0), completion(0, math.nan)], 1, "finite"),
        ([completion(0, 1.0), completion(0, 1.0, completion_ids=[1, -1])], 1, "negative"),
    ],
)
def test_broken_batches_are_refused(completions: list[Completion], position: int | None, part: str) -> None:
    with pytest.raises(RolloutError, match=part) as caught:
        RolloutBatch(7, 0, 2, completions)
    assert (caught.value.batch, caught.value.position) == (7, position)
