"""The basis: fitted, refreshed and compared as the docstrings say, whatever the sketch looks like."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.basis import (
    Basis,
    calibrate,
    captured_share,
    orthonormalise,
    orthonormality_error,
    overlap,
    rms_weights,
    sketch,
)
from codec.errors import SpecError


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows whose second moment has clearly separated eigenvalues in a random frame."""
    frame_HH: Tensor = torch.linalg.qr(seeded(width, width, seed=seed))[0]
    scales_H: Tensor = 0.7 ** torch.arange(width)
    return (seeded(rows, width, seed=seed + 1) * scales_H) @ frame_HH.T


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


@settings(max_examples=60, deadline=None)
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
        with pytest.raises(SpecError, match="calibration rank"):
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
    angle = torch.tensor([[math.cos(0.3)], [math.sin(0.3)]])
    assert float(overlap(torch.eye(2)[:, :1], angle)) == pytest.approx(math.cos(0.3) ** 2)
    with pytest.raises(SpecError, match="one width"):
        overlap(eye[:, :1], torch.eye(2))


def test_captured_share() -> None:
    h_NH = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    q_HR = torch.eye(3)[:, :1]
    assert float(captured_share(h_NH, q_HR)) == pytest.approx(9 / 29)
    assert float(captured_share(h_NH, q_HR, torch.tensor([1.0, 0.0]))) == pytest.approx(9 / 25)
    assert float(captured_share(h_NH, torch.eye(3))) == 1.0
    assert float(captured_share(torch.zeros(2, 3), q_HR)) == 1.0
    assert float(captured_share(h_NH * 1e30, q_HR)) == pytest.approx(9 / 29)
    assert float(captured_share(h_NH[:0], q_HR)) == 1.0


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


def test_a_basis_is_what_it_says() -> None:
    q_HR = orthonormalise(seeded(6, 2))
    basis = Basis(4, q_HR)
    assert (basis.width, basis.rank) == (6, 2)
    assert basis.digest() == Basis(4, q_HR.T.contiguous().T).digest()
    flipped_HR = q_HR.clone()
    flipped_HR[:, 0] *= -1
    assert len({basis.digest(), Basis(5, q_HR).digest(), Basis(4, flipped_HR).digest()}) == 3
    golden = Basis(1, torch.eye(3)[:, :2]).digest()
    assert golden == "a2e672c26c82e9e9c79685aa45f10222eca2056000c40cbd3a49cfb2defc2b45"


@pytest.mark.parametrize("version", [-1, 2**32 - 1, 1.0, True])
def test_versions_out_of_range_are_refused(version: int) -> None:
    with pytest.raises(SpecError, match="basis version"):
        Basis(version, torch.eye(3))


@pytest.mark.parametrize(
    "q",
    [
        torch.ones(3, 3),
        torch.eye(3) * 1.001,
        torch.eye(3) * math.nan,
        torch.eye(3).double(),
        torch.eye(4)[:2],
        torch.ones(3),
    ],
)
def test_what_is_not_orthonormal_is_no_basis(q: Tensor) -> None:
    with pytest.raises(SpecError, match="basis"):
        Basis(0, q)


def test_half_precision_rows_and_autocast_do_not_lower_the_precision() -> None:
    h_NH, q_HR = seeded(20, 16), orthonormalise(seeded(16, 4))
    exact_HR = sketch(h_NH, q_HR)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sketch(h_NH, q_HR), exact_HR)
    rounded_NH = h_NH.to(torch.bfloat16)
    assert torch.equal(sketch(rounded_NH, q_HR), sketch(rounded_NH.float(), q_HR))
