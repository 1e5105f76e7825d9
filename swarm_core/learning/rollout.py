"""Rollout batches: what a sampler delivers, its slices, and the samples and denominators made of it. No I/O, no model.

A rollout batch is P prompts x G completions, group after group. A pass over it is cut into `ticks_per_pass` slices of
whole groups; every slice is one tick, with its own denominators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from swarm_core.learning.advantages import GroupAdvantages, group_advantages, mean_and_std
from swarm_core.learning.errors import RolloutError
from swarm_core.learning.grpo import Denominators, LossSpec
from swarm_core.learning.microbatch import Sample


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `prompt_index` is the row of the data set. `logprobs` are the sampler's, at the sampling temperature, one a token
    (NaN where it had none). `reward` None: the verifier failed. `truncated`: cut at the length limit, so the last token
    is not an end-of-sequence token.
    """

    prompt_index: int
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    reward: float | None
    truncated: bool


@dataclass(frozen=True)
class RolloutBatch:
    """P x `group_size` completions, group after group; `weight_version` is the tick whose weights sampled them.

    Raises: RolloutError when groups are incomplete or mixed, or a completion contradicts itself.
    """

    batch: int
    weight_version: int
    group_size: int
    completions: list[Completion]

    def __post_init__(self) -> None:
        count = len(self.completions)
        if self.group_size < 1 or count == 0 or count % self.group_size:
            raise RolloutError(
                self.batch,
                None,
                f"got {count} completions, wanted whole groups of {self.group_size}, at least one; "
                "drop the prompts that are not complete",
            )
        for position, completion in enumerate(self.completions):
            self._check(position, completion)

    def _check(self, position: int, completion: Completion) -> None:
        first = self.completions[position - position % self.group_size]
        if (completion.prompt_index, completion.prompt_ids) != (first.prompt_index, first.prompt_ids):
            raise RolloutError(
                self.batch,
                position,
                f"got prompt {completion.prompt_index} in a group of prompt "
                f"{first.prompt_index}, wanted the {self.group_size} completions of a prompt next to each other",
            )
        if not completion.prompt_ids or not completion.completion_ids:
            raise RolloutError(
                self.batch,
                position,
                "got an empty prompt or completion, wanted at least one token each; a completion "
                "that ends at once holds its end-of-sequence token",
            )
        if min(min(completion.prompt_ids), min(completion.completion_ids)) < 0:
            raise RolloutError(self.batch, position, "got a negative token id, wanted ids of the vocabulary")
        if len(completion.logprobs) != len(completion.completion_ids):
            raise RolloutError(
                self.batch,
                position,
                f"got {len(completion.logprobs)} log-probs for "
                f"{len(completion.completion_ids)} completion tokens, wanted one a token",
            )
        if completion.reward is not None and not math.isfinite(completion.reward):
            raise RolloutError(
                self.batch, position, f"got reward {completion.reward}, wanted a finite number, or None for a failure"
            )

    @property
    def groups(self) -> int:
        """P, the number of prompts."""
        return len(self.completions) // self.group_size


@dataclass(frozen=True)
class RolloutStats:
    """What became of a batch or slice. `metrics` are final values under TRL's names, see `reward_metrics`.

    `sample_positions[i]` is the index in `completions` of sample i. `dropped_groups` had no variance in their rewards;
    `dropped_sequences` is everything that cost no compute (those groups, masked completions, zero advantages).
    """

    denominators: Denominators
    sample_positions: tuple[int, ...]
    dropped_groups: int
    dropped_sequences: int
    metrics: dict[str, float]


def slices(batch: RolloutBatch, ticks_per_pass: int) -> list[RolloutBatch]:
    """`batch` cut into `ticks_per_pass` slices of whole groups, in order; sizes differ by at most one group.

    Raises: RolloutError when there are fewer groups than ticks.
    """
    if not 1 <= ticks_per_pass <= batch.groups:
        raise RolloutError(
            batch.batch,
            None,
            f"got ticks_per_pass={ticks_per_pass}, wanted 1..{batch.groups} (a tick needs a group); "
            "use more prompts or fewer ticks",
        )
    edges = [batch.groups * tick // ticks_per_pass * batch.group_size for tick in range(ticks_per_pass + 1)]
    return [replace(batch, completions=batch.completions[start:end]) for start, end in pairwise(edges)]


def to_samples(batch: RolloutBatch, spec: LossSpec) -> tuple[list[Sample], RolloutStats]:
    """The samples of a batch or slice that can move the policy, and the denominators of all of it.

    A completion whose verifier failed is masked, and one cut at the limit if `spec.mask_truncated`; masked ones are
    dropped. So are completions with advantage 0 (whole zero-variance groups above all), unless the KL is on, where they
    still pull towards the reference. The gradient is the same as without dropping: the denominators count every
    unmasked token and every sequence. The list can be empty: then the tick's gradient is exactly zero.
    """
    rewards = [completion.reward for completion in batch.completions]
    groups = group_advantages(rewards, batch.group_size, spec.scale_rewards)
    samples: list[Sample] = []
    positions: list[int] = []
    tokens = 0
    for position, (completion, advantage) in enumerate(zip(batch.completions, groups.advantages, strict=True)):
        if groups.failed[position] or (spec.mask_truncated and completion.truncated):
            continue
        tokens += len(completion.completion_ids)
        if advantage != 0.0 or spec.beta > 0:
            samples.append(_sample(completion, advantage))
            positions.append(position)
    stats = RolloutStats(
        denominators=Denominators(tokens=tokens, sequences=len(batch.completions)),
        sample_positions=tuple(positions),
        dropped_groups=0 if spec.beta > 0 else sum(groups.zero_variance),
        dropped_sequences=len(batch.completions) - len(samples),
        metrics=reward_metrics(batch, groups),
    )
    return samples, stats


def reward_metrics(batch: RolloutBatch, groups: GroupAdvantages | None = None) -> dict[str, float]:
    """Rewards and lengths of a batch or slice under TRL's names (lengths in tokens, standard deviations with ddof=1).

    Without any reward their mean is NaN, not 0: "nobody answered" must not look like "all wrong".
    `frac_reward_zero_std` is the share of groups without variance, `completions/clipped_ratio` of completions cut at
    the limit, `rewards/failed` the number of completions without a reward.
    """
    groups = groups or group_advantages([c.reward for c in batch.completions], batch.group_size)
    known = [c.reward for c in batch.completions if c.reward is not None]
    mean, std = mean_and_std(known) if known else (math.nan, math.nan)
    lengths = [len(c.completion_ids) for c in batch.completions]
    ended = [len(c.completion_ids) for c in batch.completions if not c.truncated] or [0]
    metrics = {
        "reward": mean,
        "reward_std": std,
        "frac_reward_zero_std": sum(groups.zero_variance) / len(groups.zero_variance),
        "rewards/failed": float(sum(groups.failed)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(c.truncated for c in batch.completions) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": float(min(ended)),
        "completions/max_terminated_length": float(max(ended)),
    }
    return metrics


def _sample(completion: Completion, advantage: float) -> Sample:
    return Sample(
        prompt_ids=torch.tensor(completion.prompt_ids, dtype=torch.int64),
        completion_ids=torch.tensor(completion.completion_ids, dtype=torch.int64),
        advantage=advantage,
        sampler_logprobs_C=torch.tensor(completion.logprobs, dtype=torch.float32),
    )
