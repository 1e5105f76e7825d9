"""The loop that steers rank and step: it reaches its budget on a model of a quantiser, and stays there."""

import math

import pytest

from anchor_node.steering import COARSEST, FINEST, Decision, Steering, Window

WIDTH = 96


def spectrum(rank: int) -> list[float]:
    """A power law, as hidden states have, of which all 96 columns would hold everything."""
    whole = [1.0 / (i + 1) ** 1.5 for i in range(WIDTH)]
    return [value / sum(whole) for value in whole][:rank]


def cost(rank: int, step: float) -> float:
    """Bytes a token of an ideal entropy coder of Gaussian columns."""
    spreads = [math.sqrt(share * WIDTH) for share in spectrum(rank)]
    return sum(max(0.0, math.log2(s / step) + 2.05) for s in spreads) / 8


@pytest.mark.parametrize("aim", [2.0, 6.0, 15.0])
@pytest.mark.parametrize("start", [(24, 0.5), (4, 4.0), (60, 0.05)])
def test_bytes_are_reached_and_kept(aim: float, start: tuple[int, float]) -> None:
    steering = Steering(bytes_per_token=aim, target_share=None, most=64)
    rank, step = start
    for _ in range(14):
        decision = steering.decide(Window(spectrum(rank), WIDTH, cost(rank, step), step))
        rank, step = decision.rank, decision.step
        assert 1 <= rank <= 64
    assert cost(rank, step) == pytest.approx(aim, rel=0.12)
    settled = steering.decide(Window(spectrum(rank), WIDTH, cost(rank, step), step))
    assert settled.step == pytest.approx(step, rel=0.15)


@pytest.mark.parametrize(("aim", "limit"), [(1000.0, FINEST), (0.01, COARSEST)])
def test_a_budget_out_of_reach_drives_no_step_out_of_bounds(aim: float, limit: float) -> None:
    steering, rank, step = Steering(bytes_per_token=aim, target_share=None, most=64), 24, 0.5
    for _ in range(20):  # whatever the step, packets cost what they cost
        decision = steering.decide(Window(spectrum(rank), WIDTH, 5.0, step))
        rank, step = decision.rank, decision.step
    assert step == limit and 1 <= rank <= 64


def test_without_a_step_the_rank_is_the_rate() -> None:
    steering = Steering(bytes_per_token=20.0, target_share=None, most=64)
    decision = steering.decide(Window(spectrum(24), WIDTH, 48.0, 0.0))
    assert (decision.rank, decision.step) == (10, 0.0) and "24 -> 10" in decision.why


def test_a_share_takes_the_fewest_columns_that_reach_it_and_grows_when_none_do() -> None:
    steering = Steering(bytes_per_token=None, target_share=0.8, most=40)
    shares = spectrum(40)
    enough = next(r for r in range(1, 41) if sum(shares[:r]) >= 0.8)
    assert steering.decide(Window(shares, WIDTH, 5.0, 0.5)).rank == enough
    grown = steering.decide(Window(spectrum(4), WIDTH, 5.0, 0.5))
    assert grown.rank == 5 and grown.step == 0.5
    assert Steering(None, 0.999, 40).decide(Window(shares, WIDTH, 5.0, 0.5)).rank == 40


def test_without_an_aim_nothing_moves_and_nothing_is_said() -> None:
    assert Steering(None, None, 40).decide(Window(spectrum(8), WIDTH, 5.0, 0.5)) == Decision(8, 0.5, "")
