"""Advantages against TRL's and against the formula."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from swarm_core.learning.advantages import group_advantages
from swarm_core.learning.errors import LearningError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_grpo.json").read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN["cases"]))
def test_as_trl_computes_them(name: str) -> None:
    case = GOLDEN["cases"][name]
    rewards = case["options"].get("rewards", GOLDEN["rewards"])
    found = group_advantages(rewards, GOLDEN["group_size"], case["options"].get("scale_rewards", "group"))
    assert found.advantages == pytest.approx(case["advantages"], abs=1e-6)
    assert sum(found.zero_variance) / len(found.zero_variance) == pytest.approx(
        case["metrics"]["frac_reward_zero_std"], abs=1e-6
    )


def test_the_formula_with_ddof_one() -> None:
    rewards = np.random.default_rng(0).normal(size=8)
    found = np.array(group_advantages(rewards.tolist(), 8).advantages)
    assert found == pytest.approx((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), rel=1e-12)
    assert np.array(group_advantages(rewards.tolist(), 8, "none").advantages) == pytest.approx(rewards - rewards.mean())


def test_equal_rewards_give_exactly_zero_and_are_flagged() -> None:
    found = group_advantages([0.1] * 3 + [0.1, 0.2, 0.3], 3)  # the mean of three 0.1 is not exactly 0.1
    assert found.zero_variance == (True, False)
    assert found.advantages[:3] == (0.0, 0.0, 0.0)
    assert found.stds[0] == 0.0


def test_a_failed_verifier_is_left_out_of_the_group() -> None:
    found = group_advantages([1.0, None, 0.0, math.nan], 4)
    alone = group_advantages([1.0, 0.0], 2)
    assert found.advantages == (alone.advantages[0], 0.0, alone.advantages[1], 0.0)
    assert found.failed == (False, True, False, True)
    assert found.means == alone.means


@pytest.mark.parametrize("rewards", [[None, None], [1.0, None]])
def test_fewer_than_two_known_rewards_say_nothing(rewards: list[float | None]) -> None:
    found = group_advantages(rewards, 2)
    assert found.advantages == (0.0, 0.0) and found.zero_variance == (True,)
    assert found.means == ((None,) if rewards[0] is None else (1.0,))


def test_groups_of_one_give_zero() -> None:
    assert group_advantages([1.0, 0.0], 1).advantages == (0.0, 0.0)


def test_incomplete_groups_and_unknown_scaling_are_refused() -> None:
    with pytest.raises(LearningError, match="whole groups of 2"):
        group_advantages([1.0] * 3, 2)
    with pytest.raises(LearningError, match="scale_rewards"):
        group_advantages([1.0], 1, "batch")  # type: ignore[arg-type]
