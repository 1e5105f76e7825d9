"""The GRPO objective of one microbatch and its metrics. No model, no optimizer, no rewards: log-probs in, a scalar out.

With r = exp(logp - old), advantage A and w the truncated sampler correction, per token

    loss = -w * min(min(r, dual_clip) A, clip(r, 1 - low, 1 + high) A) + beta * k3(ref || policy)

summed over the active tokens and divided by a denominator of the *whole tick*, so that gradients of microbatches simply
add: `dapo` and `bnpo` the tick's active tokens; `grpo` each sequence's own active tokens, then the tick's sequences;
`dr_grpo` sequences x max_completion_length. `level="sequence"` (GSPO, 2507.18071) replaces r by the exponential of the
sequence's mean log-ratio. `dual_clip` (1912.09729; TRL's `delta`) bounds r where A < 0. k3 is Schulman's estimator.

Against TRL 1.16 (tests/golden holds its numbers), differences are deliberate:
- `bnpo`, `grpo` and `dr_grpo` there divide by the microbatch and by the accumulation steps, and `dapo` by the tokens of
  the generation batch / steps_per_generation; here the tick is the unit, equal when the batch is one optimizer step.
- its default correction is `sequence_mask` with cap 3; here it is `token_truncate` with cap 2, no lower bound.
- its KL is weighted by r by default (`use_bias_correction_kl`); here it is the plain k3.
- a completion without a reward keeps its tokens in its denominators; here it is masked (sequence count: it stays).
- sequence-level clip ratios count only sequences that have active tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swarm_core.learning.advantages import ScaleRewards
from swarm_core.learning.errors import LossError
from swarm_core.learning.microbatch import Microbatch

Metrics = dict[str, Tensor | float]

# exp(88.7) overflows fp32. A ratio this large is long lost, but a finite one lets `dual_clip` return a zero gradient
# where an infinite one would give 0 * inf = NaN.
MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class LossSpec:
    """The [grpo] knobs that the arithmetic needs. See the module for the formulas.

    `clip_low`/`clip_high`: the ratio is clipped to [1 - low, 1 + high]. `dual_clip`: None or > 1 + clip_high. `beta`:
    weight of the KL to the reference, 0 is off. `tis_cap`: cap of the sampler correction, None is off (still measured).
    `max_completion_length` (tokens) is needed by `dr_grpo`. `scale_rewards` and `mask_truncated` act in `to_samples`.

    Raises: LossError for a value out of range.
    """

    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    level: Literal["token", "sequence"] = "token"
    tis_cap: float | None = 2.0
    max_completion_length: int | None = None
    scale_rewards: ScaleRewards = "group"
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        if self.loss not in ("dapo", "grpo", "bnpo", "dr_grpo"):
            raise LossError("loss", f"got {self.loss!r}, wanted 'dapo', 'grpo', 'bnpo' or 'dr_grpo'")
        if self.level not in ("token", "sequence"):
            raise LossError("level", f"got {self.level!r}, wanted 'token' or 'sequence'")
        if not 0 <= self.clip_low <= 1:
            raise LossError("clip_low", f"got {self.clip_low}, wanted 0..1")
        if not self.clip_high >= 0:
            raise LossError("clip_high", f"got {self.clip_high}, wanted >= 0")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise LossError("dual_clip", f"got {self.dual_clip}, wanted > 1 + clip_high = {1 + self.clip_high} or None")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise LossError("beta", f"got {self.beta}, wanted a finite weight >= 0")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise LossError("tis_cap", f"got {self.tis_cap}, wanted > 0 or None")
        if self.loss == "dr_grpo" and (self.max_completion_length is None or self.max_completion_length < 1):
            raise LossError("max_completion_length", f"got {self.max_completion_length}, wanted >= 1 for 'dr_grpo'")


@dataclass(frozen=True)
class Denominators:
    """What the losses of a tick are divided by: its active `tokens` and its `sequences`.

    Both count the zero-variance groups that cost no compute. A masked completion (cut at the limit, or without a
    reward) has no active tokens but remains a sequence.
    """

    tokens: int
    sequences: int

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.sequences < 0:
            raise LossError("denominators", f"got {self}, wanted counts >= 0 over the whole tick")


def grpo_loss(
    logp_M: Tensor,
    mb: Microbatch,
    spec: LossSpec,
    denominators: Denominators,
    ref_logp_M: Tensor | None = None,
    entropy_M: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """This microbatch's share of the tick's loss (add them up), and metrics for `merge_metrics`.

    `logp_M` are the current log-probs, differentiable. `mb.old_logprobs_M` None makes every ratio exactly 1.
    `entropy_M` is only logged. Inactive tokens cannot influence the loss, whatever their values.

    Raises: LossError when a shape does not fit, or `beta` is on without reference log-probs.
    """
    _check_shapes(logp_M, mb, spec, ref_logp_M, entropy_M)
    active_M = mb.active_M
    old_M = logp_M.detach() if mb.old_logprobs_M is None else mb.old_logprobs_M
    log_ratio_M = torch.where(active_M, logp_M - old_M, 0.0)
    log_weight_M = log_ratio_M if spec.level == "token" else _sequence_means(log_ratio_M, mb)
    ratio_M = torch.exp(log_weight_M.clamp(max=MAX_LOG_RATIO))

    clipped_M = ratio_M.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    bounded_M = ratio_M if spec.dual_clip is None else ratio_M.clamp(max=spec.dual_clip)
    loss_M = -torch.min(bounded_M * mb.advantages_M, clipped_M * mb.advantages_M)

    correction_M, metrics = _sampler_correction(old_M.detach(), mb, spec.tis_cap)
    if spec.tis_cap is not None:
        loss_M = loss_M * correction_M
    if ref_logp_M is not None and spec.beta > 0:
        log_reference_M = torch.where(active_M, ref_logp_M - logp_M, 0.0)
        kl_M = torch.exp(log_reference_M.clamp(max=MAX_LOG_RATIO)) - log_reference_M - 1
        loss_M = loss_M + spec.beta * kl_M
        metrics |= _mean("kl", kl_M.detach(), active_M)

    loss = _reduce(torch.where(active_M, loss_M, 0.0), mb, spec, denominators)
    metrics["loss:total"] = loss.detach()
    metrics |= _clip_metrics(ratio_M.detach(), mb, spec)
    metrics |= _policy_metrics(log_ratio_M.detach(), mb)
    if entropy_M is not None:
        metrics |= _mean("entropy", entropy_M.detach(), active_M)
    return loss, metrics


def merge_metrics(parts: Iterable[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """The metrics of a tick from those of its microbatches, under their final names.

    `name:sum` / `name:count` make a mean (0 when nothing was counted, as TRL has it), `name:total` adds up, `name:max`
    and `name:min` keep the extreme (0 when there was no value). The order of `parts` only matters for rounding.
    """
    gathered: dict[str, list[float]] = {}
    for part in parts:
        for key, value in part.items():
            gathered.setdefault(key, []).append(float(value))
    merged: dict[str, float] = {}
    for key, values in gathered.items():
        name, _, kind = key.rpartition(":")
        if kind == "total":
            merged[name] = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
        elif kind == "sum":
            count = sum(gathered[f"{name}:count"])
            merged[name] = sum(values) / count if count else 0.0
        elif kind == "max":
            merged[name] = 0.0 if max(values) == -math.inf else max(values)
        elif kind == "min":
            merged[name] = 0.0 if min(values) == math.inf else min(values)
        elif kind != "count":
            raise LossError("metrics", f"got the key {key!r}, wanted name:sum, :count, :total, :max or :min")
    return merged


def _check_shapes(
    logp_M: Tensor, mb: Microbatch, spec: LossSpec, ref_logp_M: Tensor | None, entropy_M: Tensor | None
) -> None:
    wanted = (mb.layout.targets,)
    for field, column in (("logp_M", logp_M), ("ref_logp_M", ref_logp_M), ("entropy_M", entropy_M)):
        if column is not None and tuple(column.shape) != wanted:
            raise LossError(field, f"got shape {tuple(column.shape)}, wanted {wanted}, one a completion token")
    if spec.beta > 0 and ref_logp_M is None:
        raise LossError("ref_logp_M", f"got None with beta={spec.beta}, wanted reference log-probs, or set beta to 0")


def _reduce(loss_M: Tensor, mb: Microbatch, spec: LossSpec, denominators: Denominators) -> Tensor:
    if spec.loss in ("dapo", "bnpo"):
        return loss_M.sum() / max(denominators.tokens, 1)
    sequences = max(denominators.sequences, 1)
    if spec.loss == "dr_grpo":
        return loss_M.sum() / (sequences * (spec.max_completion_length or 1))
    return (_per_sequence(loss_M, mb) / _active_counts(mb, loss_M.dtype)).sum() / sequences


def _per_sequence(x_M: Tensor, mb: Microbatch) -> Tensor:
    # Splitting and summing, unlike index_add, gives the same bits every time on a GPU too.
    return torch.stack([part.sum() for part in torch.split(x_M, list(mb.layout.completion_lengths))])


def _active_counts(mb: Microbatch, dtype: torch.dtype) -> Tensor:
    return _per_sequence(mb.active_M.to(dtype), mb).clamp(min=1.0)


def _sequence_means(x_M: Tensor, mb: Microbatch) -> Tensor:
    """Mean over each sequence's active tokens, repeated for each of its tokens (GSPO eq. 7)."""
    means_B = _per_sequence(x_M, mb) / _active_counts(mb, x_M.dtype)
    counts: Sequence[int] = mb.layout.completion_lengths
    return torch.cat([mean.expand(count) for mean, count in zip(means_B, counts, strict=True)])


def _sampler_correction(old_M: Tensor, mb: Microbatch, cap: float | None) -> tuple[Tensor, Metrics]:
    """Truncated importance weights exp(old - sampler) and how far trainer and sampler are apart.

    A token for which the sampler reported no finite log-prob gets weight 1 and is left out of the statistics.
    """
    known_M = mb.active_M & torch.isfinite(mb.sampler_logprobs_M)
    difference_M = torch.where(known_M, old_M - mb.sampler_logprobs_M, 0.0)
    weight_M = torch.exp(difference_M.clamp(max=MAX_LOG_RATIO))
    if cap is not None:
        weight_M = weight_M.clamp(max=cap)
    metrics = _mean("sampling/sampling_logp_difference/mean", difference_M.abs(), known_M)
    metrics |= _mean("sampling/importance_sampling_ratio/mean", weight_M, known_M)
    metrics["sampling/sampling_logp_difference/max:max"] = _masked(difference_M.abs(), known_M, -math.inf).amax()
    metrics["sampling/importance_sampling_ratio/max:max"] = _masked(weight_M, known_M, -math.inf).amax()
    metrics["sampling/importance_sampling_ratio/min:min"] = _masked(weight_M, known_M, math.inf).amin()
    metrics["sampling/missing_logprobs:total"] = (mb.active_M & ~known_M).sum()
    return weight_M, metrics


def _clip_metrics(ratio_M: Tensor, mb: Microbatch, spec: LossSpec) -> Metrics:
    """Shares of tokens (of sequences at sequence level) whose ratio was clipped, as TRL defines them."""
    low_M = (ratio_M < 1 - spec.clip_low) & (mb.advantages_M < 0)
    high_M = (ratio_M > 1 + spec.clip_high) & (mb.advantages_M > 0)
    metrics: Metrics = {}
    for name, flag_M in (("low", low_M), ("high", high_M), ("region", low_M | high_M)):
        counted_M, mask_M = flag_M.to(ratio_M.dtype), mb.active_M
        if spec.level == "sequence":  # one ratio a sequence: reduce the flags to one value each
            counted_M = _per_sequence(torch.where(mask_M, counted_M, 0.0), mb) / _active_counts(mb, ratio_M.dtype)
            mask_M = _per_sequence(mb.active_M.to(ratio_M.dtype), mb) > 0
        metrics |= _mean(f"clip_ratio/{name}_mean", counted_M, mask_M)
    return metrics


def _policy_metrics(log_ratio_M: Tensor, mb: Microbatch) -> Metrics:
    """What the near-zero loss hides: did the policy move, and towards the advantages?

    `policy/kl_old` is k3 of the old policy against the current one, `policy/advantage_logp_change` the mean of
    A * (logp - old): positive when good completions have become likelier.
    """
    kl_old_M = torch.exp(log_ratio_M.clamp(max=MAX_LOG_RATIO)) - log_ratio_M - 1
    moved_M = mb.advantages_M * log_ratio_M
    metrics = _mean("policy/kl_old", kl_old_M, mb.active_M)
    metrics |= _mean("policy/advantage_logp_change", moved_M, mb.active_M)
    metrics["policy/active_tokens:total"] = mb.active_M.sum()
    return metrics


def _mean(name: str, values: Tensor, mask: Tensor) -> Metrics:
    return {f"{name}:sum": _masked(values, mask, 0.0).sum(), f"{name}:count": mask.sum()}


def _masked(values: Tensor, mask: Tensor, otherwise: float) -> Tensor:
    return torch.where(mask, values, otherwise)
