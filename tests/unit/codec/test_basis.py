"""The basis: what is one and what is not, and that what travels is what both ends hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.basis import LONGEST, Basis, pair_error
from codec.errors import SpecError
from codec.fit import fit_pair, orthonormalise


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(width: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    a_HH, b_HH = seeded(width, width, seed=seed), seeded(width, width, seed=seed + 1)
    fit = fit_pair(a_HH @ a_HH.T, b_HH @ b_HH.T, rank)
    return fit.encoder_HR, fit.decoder_RH


def test_a_basis_is_what_it_says() -> None:
    q_HR = orthonormalise(seeded(6, 2))
    basis = Basis.orthonormal(4, q_HR, 0.25)
    assert (basis.width, basis.rank, basis.step) == (6, 2, 0.25)
    assert torch.equal(basis.encoder_HR, q_HR) and torch.equal(basis.decoder_RH, q_HR.T)
    assert basis.digest() == Basis(4, q_HR.T.contiguous().T, q_HR.T.contiguous(), 0.25).digest()
    flipped_HR = q_HR * torch.tensor([-1.0, 1.0])
    others = [Basis.orthonormal(5, q_HR, 0.25), Basis.orthonormal(4, q_HR), Basis.orthonormal(4, flipped_HR, 0.25)]
    assert len({basis.digest(), *(other.digest() for other in others)}) == 4
    golden = Basis.orthonormal(1, torch.eye(3)[:, :2]).digest()
    assert golden == "06c0643eb605925c2ad815f03567b4d87d213740433efb120ab7fcfb0bf57776"


@pytest.mark.parametrize("version", [-1, 2**32 - 1, 1.0, True])
def test_versions_out_of_range_are_refused(version: int) -> None:
    with pytest.raises(SpecError, match="basis version"):
        Basis.orthonormal(version, torch.eye(3))


@pytest.mark.parametrize("step", [-0.1, math.nan, math.inf])
def test_steps_out_of_range_are_refused(step: float) -> None:
    with pytest.raises(SpecError, match="basis step"):
        Basis.orthonormal(0, torch.eye(3), step)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (torch.ones(3, 3), torch.ones(3, 3)),
        (torch.eye(3) * 1.001, torch.eye(3)),
        (torch.eye(3) * math.nan, torch.eye(3)),
        (torch.eye(3), torch.eye(3) * math.nan),
        (torch.eye(3), torch.eye(3) * math.inf),
        (torch.eye(3).double(), torch.eye(3).double()),
        (torch.eye(3), torch.eye(3).double()),
        (torch.eye(4)[:2], torch.eye(4)[:, :2]),
        (torch.eye(3), torch.eye(3)[:2]),
        (torch.ones(3), torch.ones(3)),
        (torch.eye(3) * 2 * LONGEST, torch.eye(3) / (2 * LONGEST)),
        (torch.eye(3) / (2 * LONGEST), torch.eye(3) * 2 * LONGEST),
        (torch.eye(3)[:, :0], torch.eye(3)[:0]),
    ],
)
def test_what_is_no_pair_is_no_basis(encoder: Tensor, decoder: Tensor) -> None:
    with pytest.raises(SpecError, match="basis"):
        Basis(0, encoder, decoder)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 40), rank=st.integers(1, 40), oblique=st.booleans(), seed=st.integers(0, 2**31))
def test_what_travels_is_a_pair_again(width: int, rank: int, oblique: bool, seed: int) -> None:
    rank = min(rank, width)
    q_HR = orthonormalise(seeded(width, rank, seed=seed))
    e_HR, d_RH = pair(width, rank, seed) if oblique else (q_HR, q_HR.T)
    made = Basis(3, e_HR, d_RH, 0.5)
    wire_HR, wire_RH = made.to_wire()
    assert wire_HR.dtype == torch.bfloat16 and (wire_RH is not None or not oblique or rank == width)
    held = Basis.from_wire(3, wire_HR, wire_RH, 0.5)
    assert pair_error(held.encoder_HR, held.decoder_RH) < 2e-5
    assert held.digest() == Basis.from_wire(3, wire_HR, wire_RH, 0.5).digest()
    assert (held.encoder_HR - e_HR).abs().max() <= 2.0**-8 * e_HR.abs().max()
    assert (held.decoder_RH - d_RH).norm() <= 0.1 * d_RH.norm()  # one column's rounding reaches all rows of D


def test_without_a_decoder_it_is_the_pseudo_inverse() -> None:
    e_HR = seeded(9, 3)
    held = Basis.from_wire(0, e_HR.to(torch.bfloat16), None)
    torch.testing.assert_close(held.decoder_RH, torch.linalg.pinv(held.encoder_HR), atol=1e-5, rtol=0)
    assert held.to_wire()[1] is None


@pytest.mark.parametrize("bad", [torch.zeros(4, 2), torch.ones(4, 2), torch.full((4, 2), math.nan), torch.ones(2, 4)])
def test_nonsense_from_the_wire_is_refused(bad: Tensor) -> None:
    for decoder in (None, bad.T.to(torch.bfloat16), torch.eye(3).to(torch.bfloat16)):
        with pytest.raises(SpecError, match="basis"):
            Basis.from_wire(0, bad.to(torch.bfloat16), decoder)


def test_any_prefix_is_a_basis() -> None:
    basis = Basis(2, *pair(8, 5), 0.5)
    for rank in range(1, 6):
        part = basis.prefix(rank)
        assert (part.version, part.rank, part.step) == (2, rank, 0.5)
        assert torch.equal(part.encoder_HR, basis.encoder_HR[:, :rank])
    for rank in (0, 6):
        with pytest.raises(SpecError, match="prefix"):
            basis.prefix(rank)
    assert basis.to("cpu").digest() == basis.digest()
