"""The fit: bases fitted, refreshed and compared as the docstrings say, whatever the sketch looks like."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.basis import Basis, orthonormality_error, pair_error
from codec.errors import SpecError
from codec.fit import (
    Fit,
    fit_pair,
    metric_weights,
    moment,
    moment_weights,
    orthonormalise,
    overlap,
    refine,
    rms_weights,
    sketch,
    widened,
)
from codec.spec import Direction


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose second moment has clearly separated eigenvalues in a random frame."""
    frame_HH: Tensor = torch.linalg.qr(seeded(width, width, seed=seed))[0]
    scales_H: Tensor = 0.7 ** torch.arange(width)
    return (seeded(rows, width, seed=seed + 1) * scales_H) @ frame_HH.T


def calibrate(rows_NH: Tensor, rank: int, weights_N: Tensor | None = None) -> Tensor:
    return fit_pair(moment(rows_NH, weights_N), None, rank).encoder_HR


def captured_share(h_NH: Tensor, q_HR: Tensor, weights_N: Tensor | None = None) -> float:
    """Share of the rows' weighted energy in the span of orthonormal columns."""
    h_NH = h_NH.double() if weights_N is None else h_NH.double() * weights_N.double().sqrt()[:, None]
    return float((h_NH @ q_HR.double()).square().sum() / h_NH.square().sum())


def test_orthonormalise_keeps_the_span() -> None:
    v_HR = seeded(40, 7)
    q_HR = orthonormalise(v_HR)
    assert q_HR.dtype == torch.float32 and orthonormality_error(q_HR) < 1e-6
    torch.testing.assert_close(q_HR @ (q_HR.T @ v_HR), v_HR, atol=1e-5, rtol=0)


def test_columns_stand_in_order_and_signs_are_fixed() -> None:
    u_HR, _ = torch.linalg.qr(seeded(30, 4))
    w_RR, _ = torch.linalg.qr(seeded(4, 4, seed=1))
    q_HR = orthonormalise(u_HR @ torch.diag(torch.tensor([1.0, 100.0, 10.0, 0.1])) @ w_RR)
    cosines_RR = (q_HR.T @ u_HR).abs()
    torch.testing.assert_close(cosines_RR, torch.eye(4)[[1, 2, 0, 3]], atol=1e-4, rtol=0)
    assert (q_HR.gather(0, q_HR.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_orthonormalise_is_deterministic_and_ignores_scale_and_sign() -> None:
    v_HR = seeded(50, 6)
    q_HR = orthonormalise(v_HR)
    assert torch.equal(q_HR, orthonormalise(v_HR.clone()))
    for factor in (-1.0, 2.0**-100, 2.0**100):
        torch.testing.assert_close(orthonormalise(v_HR * factor), q_HR, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 24),
    columns=st.integers(1, 24),
    rank=st.integers(0, 24),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_any_sketch_gives_an_orthonormal_basis_that_holds_its_span(
    height: int, columns: int, rank: int, exponent: int, seed: int
) -> None:
    columns = min(columns, height)
    rank = min(rank, columns)
    v_HR = (seeded(height, rank, seed=seed) @ seeded(rank, columns, seed=seed + 1)) * 10.0**exponent
    q_HR = orthonormalise(v_HR)
    assert orthonormality_error(q_HR) < 1e-6
    assert torch.equal(q_HR, orthonormalise(v_HR))
    v_HR, q_HR = v_HR.double(), q_HR.double()
    assert (v_HR - q_HR @ (q_HR.T @ v_HR)).norm() <= 1e-5 * v_HR.norm()


def test_repeated_columns_do_not_hide_later_ones() -> None:
    a, b = seeded(9, 1), seeded(9, 1, seed=1)
    q_HR = orthonormalise(torch.cat((a, a, 2 * a, torch.zeros_like(a), b), dim=1))
    assert orthonormality_error(q_HR) < 1e-6
    assert float(captured_share(torch.cat((a, b), dim=1).T, q_HR[:, :2])) == pytest.approx(1.0, abs=1e-6)


def test_a_zero_sketch_is_completed_with_axes() -> None:
    assert torch.equal(orthonormalise(torch.zeros(6, 3)), torch.eye(6)[:, :3])
    v_HR = torch.zeros(4, 2)
    v_HR[0, 1] = -5.0
    assert torch.equal(orthonormalise(v_HR), torch.eye(4)[:, :2])


def test_a_direction_a_million_times_weaker_is_kept() -> None:
    axes_HR = torch.eye(8)[:, :3]
    q_HR = orthonormalise(axes_HR * torch.tensor([1e9, 1.0, 1e-6]))
    assert torch.equal(q_HR, axes_HR)


@pytest.mark.parametrize(
    "v", [torch.full((4, 2), math.nan), torch.full((4, 2), math.inf), torch.ones(2, 4), torch.ones(4), torch.ones(4, 0)]
)
def test_no_basis_from_nonsense(v: Tensor) -> None:
    with pytest.raises(SpecError, match="sketch"):
        orthonormalise(v)


@pytest.mark.parametrize("weighted", [False, True])
def test_calibrate_finds_the_top_eigenvectors(weighted: bool) -> None:
    h_NH = decaying_rows(200, 16)
    weights_N = rms_weights(h_NH) if weighted else None
    q_HR = calibrate(h_NH, 5, weights_N)
    w_N = torch.ones(200) if weights_N is None else weights_N
    _, eigenvectors_HH = torch.linalg.eigh((h_NH.double() * w_N[:, None].double()).T @ h_NH.double())
    cosines_RR = (q_HR.double().T @ eigenvectors_HH.flip(1)[:, :5]).abs()
    torch.testing.assert_close(cosines_RR, torch.eye(5, dtype=torch.float64), atol=1e-5, rtol=0)
    assert orthonormality_error(q_HR) < 1e-6


def test_no_other_basis_of_the_rank_loses_less() -> None:
    h_NH = decaying_rows(100, 12)
    best = captured_share(h_NH, calibrate(h_NH, 3))
    for seed in range(20):
        assert captured_share(h_NH, orthonormalise(seeded(12, 3, seed=seed))) < best


def test_calibrate_completes_what_few_rows_cannot_fill() -> None:
    h_NH = seeded(2, 9)
    q_HR = calibrate(h_NH, 5)
    assert q_HR.shape == (9, 5) and orthonormality_error(q_HR) < 1e-6
    assert float(captured_share(h_NH, q_HR[:, :2])) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(calibrate(torch.zeros(0, 4), 4), torch.eye(4))


def test_calibrate_refuses_what_it_cannot_fit() -> None:
    h_NH = seeded(5, 4)
    for rank in (0, 5):
        with pytest.raises(SpecError, match="rank of a fit"):
            calibrate(h_NH, rank)
    with pytest.raises(SpecError, match="weights >= 0"):
        calibrate(h_NH, 2, -torch.ones(5))
    with pytest.raises(SpecError, match="one per row"):
        calibrate(h_NH, 2, torch.ones(4))
    with pytest.raises(SpecError, match="finite"):
        calibrate(h_NH * math.nan, 2)


def test_sketch_is_the_weighted_moment_times_the_basis() -> None:
    h_NH, q_HR, w_N = seeded(30, 10), orthonormalise(seeded(10, 3)), torch.rand(30)
    moment_HH = (h_NH.double() * w_N[:, None].double()).T @ h_NH.double()
    torch.testing.assert_close(sketch(h_NH, q_HR, w_N).double(), moment_HH @ q_HR.double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(sketch(h_NH, q_HR), sketch(h_NH, q_HR, torch.ones(30)))
    assert torch.equal(sketch(h_NH[:0], q_HR), torch.zeros(10, 3))
    parts = sketch(h_NH[:11], q_HR, w_N[:11]) + sketch(h_NH[11:], q_HR, w_N[11:])
    torch.testing.assert_close(parts, sketch(h_NH, q_HR, w_N), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_refreshes_converge_to_the_top_eigenspace(seed: int) -> None:
    """Subspace iteration: overlap and captured share rise to those of the calibrated basis, column by column."""
    h_NH = decaying_rows(300, 24, seed=seed)
    best_HR = calibrate(h_NH, 4)
    q_HR = orthonormalise(seeded(24, 4, seed=seed + 9))
    shares = []
    for _ in range(12):
        shares.append(float(captured_share(h_NH, q_HR)))
        q_HR = orthonormalise(sketch(h_NH, q_HR))
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(shares))
    assert float(overlap(q_HR, best_HR)) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(q_HR[:, :2], best_HR[:, :2], atol=1e-2, rtol=0)  # same order and signs


def test_overlap() -> None:
    eye = torch.eye(10)
    q_HR = orthonormalise(seeded(10, 4))
    turn_RR = orthonormalise(seeded(4, 4, seed=1))
    assert float(overlap(q_HR, q_HR)) == pytest.approx(1.0, abs=1e-6)
    assert float(overlap(q_HR, q_HR @ turn_RR)) == pytest.approx(1.0, abs=1e-6)
    assert float(overlap(eye[:, :3], eye[:, 3:6])) == 0.0
    assert float(overlap(eye[:, :4], eye[:, 2:6])) == 0.5
    assert float(overlap(eye[:, :2], eye)) == 1.0
    assert float(overlap(q_HR @ seeded(4, 4, seed=2), q_HR)) == pytest.approx(1.0, abs=1e-6)  # spans, not columns
    angle = torch.tensor([[math.cos(0.3)], [math.sin(0.3)]])
    assert float(overlap(torch.eye(2)[:, :1], angle)) == pytest.approx(math.cos(0.3) ** 2)
    with pytest.raises(SpecError, match="one width"):
        overlap(eye[:, :1], torch.eye(2))


def test_rms_weights_undo_the_norm_of_a_row() -> None:
    h_NH = torch.tensor([[1.0, -1.0], [10.0, 10.0], [0.0, 0.0], [1e-30, 0.0], [1e15, 1e15]])
    weights_N = rms_weights(h_NH)
    torch.testing.assert_close(weights_N[:2], torch.tensor([1.0, 0.01]))
    assert weights_N[2] == 0.0
    assert torch.isfinite(weights_N).all() and (weights_N[[0, 1, 3, 4]] > 0).all()
    torch.testing.assert_close(rms_weights(h_NH[:2].to(torch.bfloat16)), weights_N[:2])


def test_weights_keep_a_massive_token_from_deciding_the_fit() -> None:
    h_NH = seeded(200, 8) * torch.tensor([1.0, 1, 1, 1, 0.1, 0.1, 0.1, 0.1])
    h_NH[0] = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 500])
    ordinary_NH = h_NH[1:]
    plain, weighted = calibrate(h_NH, 4), calibrate(h_NH, 4, rms_weights(h_NH))
    assert captured_share(ordinary_NH, weighted) > 0.97 > captured_share(ordinary_NH, plain) + 0.1


def test_half_precision_rows_and_autocast_do_not_lower_the_precision() -> None:
    h_NH, q_HR = seeded(20, 16), orthonormalise(seeded(16, 4))
    exact_HR = sketch(h_NH, q_HR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sketch(h_NH, q_HR), exact_HR)
    rounded_NH = h_NH.to(torch.bfloat16)
    assert torch.equal(sketch(rounded_NH, q_HR), sketch(rounded_NH.float(), q_HR))


# Pairs: an error costs what the metric says ------------------------------------------------------------------------


def second_moment(width: int, decay: float, seed: int) -> Tensor:
    frame_HH: Tensor = torch.linalg.qr(seeded(width, width, seed=seed, dtype=torch.float64))[0]
    eigenvalues_H: Tensor = decay ** torch.arange(width)
    return (frame_HH * eigenvalues_H) @ frame_HH.T


def lost(c_HH: Tensor, g_HH: Tensor, fit: Fit | Basis, ridge: float) -> float:
    """The share of E (x - x')^T G (x - x') of what it is when nothing arrives."""
    width = len(c_HH)
    g_HH = g_HH * width / g_HH.trace() + ridge * torch.eye(width)
    rest_HH = torch.eye(width) - fit.encoder_HR.double() @ fit.decoder_RH.double()
    return float((rest_HH @ g_HH @ rest_HH.T @ c_HH).trace() / (g_HH @ c_HH).trace())


def refreshed(old: Basis, c_HH: Tensor, g_HH: Tensor, ridge: float, dtype: torch.dtype) -> Fit:
    v_HR, w_HR = (c_HH @ old.encoder_HR.double()).to(dtype), (g_HH @ old.decoder_RH.T.double()).to(dtype)
    return refine(old, v_HR, float(c_HH.trace()), w_HR, float(g_HH.trace()), ridge)


@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_no_other_pair_costs_less(ridge: float) -> None:
    c_HH, g_HH = second_moment(16, 0.8, 0), second_moment(16, 0.7, 1)
    best = fit_pair(c_HH, g_HH, 4, ridge)
    assert pair_error(best.encoder_HR, best.decoder_RH) < 1e-5
    least = lost(c_HH, g_HH, best, ridge)
    assert float(best.eigenvalues_R.sum()) / best.total == pytest.approx(1.0 - least, abs=1e-6)
    assert least < lost(c_HH, g_HH, fit_pair(c_HH, None, 4), ridge) - 0.02
    for seed in range(20):
        e_HR = best.encoder_HR + 0.03 * seeded(16, 4, seed=seed)
        d_RH = best.decoder_RH + 0.03 * seeded(4, 16, seed=seed + 50)
        other = Basis.from_wire(0, e_HR, d_RH)
        assert lost(c_HH, g_HH, other, ridge) > least


def test_a_pair_is_in_eigenvalue_order_and_has_one_scale() -> None:
    c_HH, g_HH = 5.0 * second_moment(20, 0.8, 2), 7.0 * second_moment(20, 0.7, 3)
    fit = fit_pair(c_HH, g_HH, 6, 0.05)
    e_HR, d_RH = fit.encoder_HR.double(), fit.decoder_RH.double()
    variance_RR = e_HR.T @ (c_HH * 20 / c_HH.trace()) @ e_HR
    torch.testing.assert_close(variance_RR, torch.diag(fit.eigenvalues_R), atol=1e-4, rtol=1e-4)
    assert float(fit.eigenvalues_R.sum()) == pytest.approx(20.0)  # tr(E^T C E) = tr(C) for rows of rms 1
    assert all(a >= b for a, b in pairwise(fit.eigenvalues_R.tolist()))
    metric_RR = d_RH @ (g_HH * 20 / g_HH.trace() + 0.05 * torch.eye(20)) @ d_RH.T
    torch.testing.assert_close(metric_RR, torch.eye(6).double() * metric_RR[0, 0], atol=1e-4, rtol=1e-4)
    smaller = fit_pair(c_HH, g_HH, 3, 0.05)
    prefix = Basis(0, fit.encoder_HR, fit.decoder_RH).prefix(3)
    assert lost(c_HH, g_HH, prefix, 0.05) == pytest.approx(lost(c_HH, g_HH, smaller, 0.05), abs=1e-5)


def test_a_metric_that_is_flat_or_empty_changes_nothing() -> None:
    c_HH = second_moment(12, 0.7, 4)
    plain = fit_pair(c_HH, None, 4)
    flat = fit_pair(c_HH, torch.eye(12), 4)
    assert torch.equal(fit_pair(c_HH, torch.zeros(12, 12), 4).encoder_HR, plain.encoder_HR)
    torch.testing.assert_close(
        flat.encoder_HR @ flat.decoder_RH, plain.encoder_HR @ plain.decoder_RH, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["random", "no metric", "another pair"])
def test_refreshes_converge_to_the_best_pair(start: str, dtype: torch.dtype) -> None:
    """From sketches alone, rounded as they travel, and with the pair itself rounded after each step."""
    c_HH, g_HH = second_moment(32, 0.75, 5), second_moment(32, 0.85, 6)
    q_HR = orthonormalise(seeded(32, 6, seed=7))
    basis = Basis.orthonormal(0, q_HR)
    if start != "random":
        stale = second_moment(32, 0.8, 8)
        fit = fit_pair(c_HH, None, 6) if start == "no metric" else fit_pair(stale, g_HH, 6, 0.05)
        basis = Basis(0, fit.encoder_HR, fit.decoder_RH)
    best = lost(c_HH, g_HH, fit_pair(c_HH, g_HH, 6, 0.05), 0.05)
    losses = [lost(c_HH, g_HH, basis, 0.05)]
    for version in range(1, 9):
        fit = refreshed(basis, c_HH, g_HH, 0.05, dtype)
        basis = Basis.from_wire(version, *Basis(version, fit.encoder_HR, fit.decoder_RH).to_wire())
        losses.append(lost(c_HH, g_HH, basis, 0.05))
    assert losses[0] > 1.2 * best
    assert all(later <= earlier + 1e-3 for earlier, later in pairwise(losses))
    assert losses[-1] <= 1.03 * best
    estimated = 1.0 - float(fit.eigenvalues_R.sum()) / fit.total
    assert estimated == pytest.approx(losses[-1], abs=0.05)


def test_at_the_best_pair_a_refresh_changes_nothing() -> None:
    c_HH, g_HH = second_moment(24, 0.7, 9), second_moment(24, 0.8, 10)
    best = fit_pair(c_HH, g_HH, 5, 0.05)
    again = refreshed(Basis(0, best.encoder_HR, best.decoder_RH), c_HH, g_HH, 0.05, torch.float32)
    torch.testing.assert_close(again.encoder_HR, best.encoder_HR, atol=2e-4, rtol=0)
    torch.testing.assert_close(again.decoder_RH, best.decoder_RH, atol=2e-4, rtol=0)
    torch.testing.assert_close(again.eigenvalues_R, best.eigenvalues_R, atol=1e-3, rtol=1e-4)


def test_sketches_without_a_metric_give_the_power_iteration() -> None:
    c_HH = second_moment(10, 0.7, 11)
    old = Basis.orthonormal(0, orthonormalise(seeded(10, 3)))
    v_HR = (c_HH @ old.encoder_HR.double()).float()
    fit = refine(old, v_HR, float(c_HH.trace()))
    torch.testing.assert_close(fit.encoder_HR, orthonormalise(v_HR), atol=1e-6, rtol=0)
    assert torch.equal(fit.decoder_RH, fit.encoder_HR.T)


@pytest.mark.parametrize("broken", ["nan", "zero", "dependent", "shape", "trace"])
@pytest.mark.parametrize("side", ["moment", "metric"])
def test_a_sketch_that_shows_too_little_is_refused(broken: str, side: str) -> None:
    c_HH, g_HH = second_moment(12, 0.8, 12), second_moment(12, 0.8, 13)
    best = fit_pair(c_HH, g_HH, 4, 0.05)
    old = Basis(0, best.encoder_HR, best.decoder_RH)
    sketches = {"moment": c_HH @ old.encoder_HR.double(), "metric": g_HH @ old.decoder_RH.T.double()}
    traces = {"moment": float(c_HH.trace()), "metric": float(g_HH.trace())}
    v_HR = sketches[side]
    if broken == "trace":
        traces[side] = math.nan
    else:
        u_H = seeded(12, 1, seed=3, dtype=torch.float64)
        sketches[side] = {
            "nan": v_HR * math.nan,
            "zero": v_HR * 0.0,
            "dependent": u_H @ (u_H.T @ (old.encoder_HR if side == "moment" else old.decoder_RH.T).double()),
            "shape": v_HR[:, :3],
        }[broken]
    if (broken, side) == ("dependent", "metric"):  # one gradient direction is little, but something: the ridge is left
        fit = refine(old, sketches["moment"], traces["moment"], sketches["metric"], traces["metric"], 0.05)
        assert pair_error(fit.encoder_HR, fit.decoder_RH) < 1e-4
        return
    with pytest.raises(SpecError):
        refine(old, sketches["moment"], traces["moment"], sketches["metric"], traces["metric"], 0.05)


@pytest.mark.parametrize("oblique", [False, True])
def test_a_widened_pair_is_a_pair_and_keeps_its_columns(oblique: bool) -> None:
    c_HH, g_HH = second_moment(12, 0.8, 12), second_moment(12, 0.6, 13)
    fit = fit_pair(c_HH, g_HH if oblique else None, 4, 0.05)
    e_HR, d_RH = widened(Basis(3, fit.encoder_HR, fit.decoder_RH), 7)
    assert torch.equal(e_HR[:, :4], fit.encoder_HR) and torch.equal(d_RH[:4], fit.decoder_RH)
    basis = Basis(4, e_HR, d_RH)
    for version in range(5, 12):
        fit = refreshed(basis, c_HH, g_HH, 0.05, torch.bfloat16)
        basis = Basis(version, fit.encoder_HR, fit.decoder_RH)
    assert lost(c_HH, g_HH, basis, 0.05) <= 1.03 * lost(c_HH, g_HH, fit_pair(c_HH, g_HH, 7, 0.05), 0.05)


def test_outliers_stay_out_of_the_fit() -> None:
    h_NH = torch.ones(9, 4) * torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 1.0, 17.0, 15.0])[:, None]
    weights_N = rms_weights(h_NH, 16.0)
    assert weights_N[7] == 0.0 and weights_N[8] == pytest.approx(1 / 225) and weights_N[5] == 0.0
    assert rms_weights(h_NH)[7] == pytest.approx(1 / 289)
    assert rms_weights(h_NH[:0], 16.0).shape == (0,)
    grad_NH = torch.ones(9, 4) * torch.tensor([1.0, 1.0, 1e-6, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    weights_N = metric_weights(h_NH, grad_NH, 16.0)
    assert torch.allclose(weights_N, torch.tensor([1.0, 2.0, 1e6, 0.0, 1.0, 0.0, 1.0, 0.0, 15.0]))


def test_weights_of_a_moment_are_the_fits_and_the_directions() -> None:
    x_NH = torch.tensor([[2.0, 2.0], [0.5, 0.5], [0.0, 0.0]])
    forward, backward = Direction.FORWARD, Direction.BACKWARD
    assert moment_weights(x_NH, forward, "plain") is None and moment_weights(x_NH, backward, "plain") is None
    for fit in ("weighted", "metric"):
        assert torch.equal(moment_weights(x_NH, forward, fit), torch.tensor([0.25, 4.0, 0.0]))
        assert torch.equal(moment_weights(x_NH, backward, fit), torch.tensor([0.5, 2.0, 0.0]))
