"""Group-normalised advantages: rewards in, advantages out, plain Python floats. No tensors, no token bookkeeping.

A_i = (r_i - mean(group)) / (std(group) + 1e-4) with the sample standard deviation (ddof=1), DeepSeekMath (2402.03300)
eq. 3 as TRL computes it; `scale_rewards="none"` leaves out the division (Dr. GRPO, 2503.20783).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swarm_core.learning.errors import LearningError

ScaleRewards = Literal["group", "none"]

STD_EPSILON = 1e-4  # TRL's; large enough that a group differing by rounding is not blown up
ZERO_STD = 1e-8  # TRL's torch.isclose(std, 0): below this a group says nothing


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages of P groups of G completions, and what was seen on the way.

    `advantages` and `failed` have P*G entries, the others P. `failed` marks a completion whose verifier gave no
    reward: it is left out of the group's statistics, its advantage is 0, and the caller masks its tokens. A group is
    `zero_variance` when fewer than two rewards are known or all known ones are equal; all its advantages are exactly 0.
    """

    advantages: tuple[float, ...]
    failed: tuple[bool, ...]
    zero_variance: tuple[bool, ...]
    means: tuple[float | None, ...]
    stds: tuple[float, ...]


def group_advantages(
    rewards: Sequence[float | None], group_size: int, scale_rewards: ScaleRewards = "group"
) -> GroupAdvantages:
    """Advantages of `rewards`, which holds whole groups one after the other. A NaN or infinite reward counts as None.

    Raises: LearningError when the rewards are not whole groups or the scaling is unknown.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise LearningError(f"advantages: got {len(rewards)} rewards, wanted whole groups of {group_size}")
    if scale_rewards not in ("group", "none"):
        raise LearningError(f"advantages: got scale_rewards={scale_rewards!r}, wanted 'group' or 'none'")
    advantages: list[float] = []
    failed: list[bool] = []
    flat: list[bool] = []
    means: list[float | None] = []
    stds: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = [r if r is not None and math.isfinite(r) else None for r in rewards[start : start + group_size]]
        known = [r for r in group if r is not None]
        mean, std = mean_and_std(known)
        zero = std <= ZERO_STD
        divisor = std + STD_EPSILON if scale_rewards == "group" else 1.0
        advantages += [0.0 if zero or r is None else (r - mean) / divisor for r in group]
        failed += [r is None for r in group]
        flat.append(zero)
        means.append(mean if known else None)
        stds.append(std)
    return GroupAdvantages(tuple(advantages), tuple(failed), tuple(flat), tuple(means), tuple(stds))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof=1); (0, 0) without values, std 0 with one or with all equal."""
    if not values:
        return 0.0, 0.0
    if min(values) == max(values):  # exact: rounding in the mean must not leave a standard deviation behind
        return float(values[0]), 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
