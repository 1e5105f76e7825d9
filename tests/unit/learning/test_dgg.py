"""The gate against a short numpy reference, and its rules one by one."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from swarm_core.learning.dgg import Gate
from swarm_core.learning.errors import GateError


def reference(series: list[tuple[float, int]], window: int, tau: float) -> list[tuple[float | None, bool, bool]]:
    """METHOD section 4 in numpy: (z, gated, full) of every (g, pass)."""
    increments: list[float] = []
    previous: float | None = None
    out: list[tuple[float | None, bool, bool]] = []
    for g, pass_index in series:
        z, gated, full = None, False, len(increments) >= window
        if previous is not None:
            d = g - previous
            past = np.array(increments[-window:])
            if len(past) >= 2:
                z = float((d - past.mean()) / (past.std() + 1e-8))
            gated = full and pass_index > 1 and z is not None and z > tau
            if not gated:
                increments.append(d)
        previous = g
        out.append((z, gated, full))
    return out


def random_series(seed: int, count: int = 400) -> list[tuple[float, int]]:
    rng = np.random.default_rng(seed)
    g = np.exp(rng.normal(size=count)) * np.where(rng.random(count) < 0.1, 30.0, 1.0)
    return [(float(value), int(index)) for value, index in zip(g, rng.integers(1, 5, count), strict=True)]


@pytest.mark.parametrize("window", [2, 5, 20])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_the_reference(window: int, tau: float, seed: int) -> None:
    series, gate = random_series(seed), Gate(window, tau)
    found = [gate.observe(g, pass_index) for g, pass_index in series]
    wanted = reference(series, window, tau)
    assert [(v.gated, v.full) for v in found] == [(gated, full) for _, gated, full in wanted]
    for verdict, (z, _, _) in zip(found, wanted, strict=True):
        assert verdict.z == (None if z is None else pytest.approx(z, rel=1e-9, abs=1e-9))
    assert 0 < sum(v.gated for v in found) < len(found)


def filled(window: int = 4, tau: float = 0.5, **options: Any) -> Gate:
    gate = Gate(window, tau, **options)
    for g in [1.0, 1.1, 0.9, 1.05, 1.0]:
        assert not gate.observe(g, 1).gated
    return gate


def test_the_first_pass_is_never_gated_but_enters_the_window() -> None:
    gate = filled()
    verdict = gate.observe(1000.0, 1)
    assert verdict.full and verdict.z is not None and verdict.z > 100 and not verdict.gated
    assert gate.state_dict()["increments"][-1] == 999.0


def test_a_window_that_is_not_full_gates_nothing() -> None:
    gate = Gate(window=4)
    for g in [1.0, 1.1, 0.9, 1.0]:  # three increments
        gate.observe(g, 1)
    verdict = gate.observe(1e6, 2)
    assert not verdict.full and not verdict.gated and verdict.z is not None
    assert gate.observe(1.0, 2).full


def test_a_gated_increment_stays_out_but_its_g_is_the_last_observed() -> None:
    gate = filled()
    before = gate.state_dict()["increments"]
    assert gate.observe(50.0, 2).gated
    assert gate.state_dict()["increments"] == before
    after = gate.observe(1.0, 1)
    assert after.increment == -49.0 and gate.state_dict()["increments"][-1] == -49.0


def test_a_drop_is_not_a_surge() -> None:
    verdict = filled().observe(0.0, 2)
    assert verdict.z is not None and verdict.z < 0 and not verdict.gated


def test_switched_off_it_measures_and_never_gates() -> None:
    gate = filled(enabled=False)
    verdict = gate.observe(50.0, 2)
    assert verdict.z is not None and verdict.z > 0.5 and not verdict.gated
    assert gate.state_dict()["increments"][-1] == 49.0


@pytest.mark.parametrize("g", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_not_observed_and_says_so(g: float) -> None:
    gate = filled()
    before = gate.state_dict()
    verdict = gate.observe(g, 2)
    assert not verdict.observed and not verdict.gated and verdict.z is None
    assert gate.state_dict() == before
    assert gate.observe(1.01, 2).increment == pytest.approx(0.01)


def test_constant_gradients_do_not_divide_by_zero() -> None:
    gate = Gate(window=3)
    verdicts = [gate.observe(2.0, 2) for _ in range(8)]
    assert verdicts[-1].z == 0.0 and not any(v.gated for v in verdicts)


def test_judging_twice_changes_nothing_and_recording_is_checked() -> None:
    gate = filled()
    before = gate.state_dict()
    verdict = gate.judge(3.0, 2)
    assert gate.judge(3.0, 2) == verdict and gate.state_dict() == before
    gate.record(verdict)
    with pytest.raises(GateError, match="judge the tick again"):
        gate.record(verdict)


@pytest.mark.parametrize("cut", [0, 1, 2, 25, 300])
def test_state_survives_a_round_trip_through_json(cut: int) -> None:
    series = random_series(9)
    straight, first = Gate(), Gate()
    wanted = [straight.observe(*item) for item in series]
    found = [first.observe(*item) for item in series[:cut]]
    second = Gate()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(*item) for item in series[cut:]]
    assert found == wanted and second.state_dict() == straight.state_dict()


def test_a_smaller_window_keeps_the_newest_increments() -> None:
    gate = filled()
    smaller = Gate(window=2)
    smaller.load_state_dict(gate.state_dict())
    assert smaller.state_dict()["increments"] == gate.state_dict()["increments"][-2:]


def test_impossible_values_are_refused() -> None:
    for make in (
        lambda: Gate(1),
        lambda: Gate(tau=math.inf),
        lambda: Gate().judge(1.0, 0),
        lambda: Gate().judge(-1, 1),
    ):
        with pytest.raises(GateError, match="wanted"):
            make()
    with pytest.raises(GateError, match="previous_g"):
        Gate().load_state_dict({"increments": []})
    with pytest.raises(GateError, match="finite"):
        Gate().load_state_dict({"increments": [math.nan], "previous_g": 1.0})
