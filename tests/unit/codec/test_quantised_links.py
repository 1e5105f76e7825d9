"""What arrives over quantised links is what the docstring of `LinkCodec` promises, and forged packets do no harm."""

import itertools
import math
import struct
import zlib

import pytest
import torch
from torch import Tensor

from codec.basis import Basis
from codec.errors import BasisMismatch, CodecError, NonFiniteError, PacketError, SpecError
from codec.fit import orthonormalise
from codec.header import CRC_FIELD_BYTES, HEADER2_BYTES
from codec.link_codec import LinkCodec
from codec.spec import Direction, LinkSpec, largest_packet_bytes, packet_bytes

FORWARD, BACKWARD = Direction
WIDTH, RANK, STEP = 48, 10, 0.2
QUANTISERS = ("bf16", "int8", "int4", "uniform")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oblique(rank: int = RANK, step: float = STEP, version: int = 3) -> Basis:
    """E and D of different spans."""
    encoder_HR = orthonormalise(seeded(WIDTH, rank)) + 0.1 * seeded(WIDTH, rank, seed=1)
    return Basis.from_wire(version, encoder_HR, encoder_HR.T + 0.2 * seeded(rank, WIDTH, seed=2), step)


BASIS = oblique()


def link(quantiser: str, direction: Direction = FORWARD, **more: object) -> LinkSpec:
    name = f"quantiser_{direction.name.lower()}"
    return LinkSpec("lowrank", WIDTH, RANK, RANK, **{name: quantiser}, **more)  # type: ignore[arg-type]


def rows_of(count: int, seed: int = 5) -> Tensor:
    """Rows whose sizes differ by orders of magnitude, one of them zero."""
    x_NH = seeded(count, WIDTH, seed=seed) * torch.logspace(-3, 2, count)[:, None] if count else torch.zeros(0, WIDTH)
    x_NH[count // 2 : count // 2 + 1] = 0
    return x_NH


def row_scale(x_NH: Tensor) -> Tensor:
    """The largest scale that the docstring allows a row."""
    return (x_NH.double().square().mean(dim=1).sqrt() * 2**0.125).clamp(min=2.0**-100)


def allowed_error(quantiser: str, x_NH: Tensor, y_NR: Tensor, step: float = STEP) -> Tensor:
    """Of each coefficient, by the docstring."""
    largest_N = y_NR.abs().amax(dim=1)
    return {
        "bf16": 2.0**-8 * y_NR.abs(),
        "int8": (1.008 * largest_N / 127 / 2)[:, None].clamp(min=2.0**-101),
        "int4": (1.008 * largest_N / 7 / 2)[:, None].clamp(min=2.0**-101),
        "uniform": (row_scale(x_NH) * step / 2)[:, None],
    }[quantiser]


def coefficients(x_NH: Tensor, direction: Direction, backward: str = "straight_through") -> tuple[Tensor, Tensor]:
    """What travels, and what undoes the receiver's product."""
    encoder_HR, decoder_RH = BASIS.encoder_HR.double(), BASIS.decoder_RH.double()
    if backward == "exact" and direction == BACKWARD:
        encoder_HR, decoder_RH = decoder_RH.T, encoder_HR.T
    return x_NH.double() @ encoder_HR, torch.linalg.pinv(decoder_RH)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("backward", ["straight_through", "exact"])
@pytest.mark.parametrize("count", [0, 1, 2, 77])
@pytest.mark.parametrize("zstd", ["auto", "off"])
def test_every_coefficient_arrives_within_its_bound(
    quantiser: str, direction: Direction, backward: str, count: int, zstd: str
) -> None:
    spec = link(quantiser, direction, backward=backward, zstd=zstd, exact_step=0.3)
    codec, x_NH = LinkCodec(spec), rows_of(count)
    packet = codec.encode(x_NH, direction, BASIS)
    if zstd == "off" and quantiser != "uniform":
        assert len(packet) == packet_bytes(spec, direction, count)
    assert len(packet) <= packet_bytes(spec, direction, count)
    arrived_NH = codec.decode(packet, count, direction, BASIS)
    assert arrived_NH.shape == (count, WIDTH) and arrived_NH.dtype == torch.float32
    assert torch.equal(arrived_NH, codec.project(x_NH, direction, BASIS))
    y_NR, back_HR = coefficients(x_NH, direction, backward)
    step = STEP  # or, of gradients on the activations' basis, the link's, relative to the rms length of D's rows
    if backward == "exact" and direction == BACKWARD:
        step = 0.3 * float(BASIS.decoder_RH.double().square().sum(dim=1).mean().sqrt())
    slack = 2e-5 * x_NH.double().norm(dim=1, keepdim=True) + 1e-30
    assert ((arrived_NH.double() @ back_HR - y_NR).abs() <= allowed_error(quantiser, x_NH, y_NR, step) + slack).all()
    if count > 1:
        assert not arrived_NH[count // 2].any()


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_dtype_and_strides(quantiser: str, dtype: torch.dtype) -> None:
    codec = LinkCodec(link(quantiser, outliers=20.0))
    x_NH = seeded(2 * WIDTH, 60, seed=3).to(dtype).T[::2, ::2]
    assert codec.encode(x_NH, FORWARD, BASIS) == codec.encode(x_NH.float().contiguous(), FORWARD, BASIS)


@pytest.mark.parametrize("quantiser", QUANTISERS[1:])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-12, 1e10, 1e25])
def test_huge_and_tiny_rows(quantiser: str, size: float) -> None:
    x_NH = rows_of(9).sign() * size
    arrived_NH = LinkCodec(link(quantiser)).project(x_NH, FORWARD, BASIS)
    y_NR, back_HR = coefficients(x_NH, FORWARD)
    error = (arrived_NH.double() @ back_HR - y_NR).abs()
    assert (
        error <= allowed_error(quantiser, x_NH, y_NR) + 2e-5 * x_NH.double().norm(dim=1, keepdim=True) + 1e-37
    ).all()


def test_one_scale_for_the_packet() -> None:
    spec = link("uniform", BACKWARD, gradient_scale="packet")
    x_NH = rows_of(77)
    arrived_NH = LinkCodec(spec).decode(LinkCodec(spec).encode(x_NH, BACKWARD, BASIS), 77, BACKWARD, BASIS)
    y_NR, back_HR = coefficients(x_NH, BACKWARD)
    scale = float(x_NH.double().square().mean().sqrt()) * 2**0.125
    assert ((arrived_NH.double() @ back_HR - y_NR).abs() <= scale * STEP / 2 + 1e-3).all()
    assert not arrived_NH[:20].any()  # rows far below the packet's rms are nothing at its step


def test_stochastic_rounding_is_right_in_the_mean_and_repeats_with_its_seed() -> None:
    spec = link("uniform", BACKWARD, stochastic=True)
    codec, x_NH = LinkCodec(spec), seeded(40, WIDTH)
    y_NR, back_HR = coefficients(x_NH, BACKWARD)
    draws = torch.stack([codec.project(x_NH, BACKWARD, BASIS, seed=s).double() @ back_HR - y_NR for s in range(400)])
    bound = (row_scale(x_NH) * STEP)[:, None]
    assert (draws.abs() <= bound + 1e-4).all()
    assert (draws.mean(dim=0).abs() <= 5 * bound * 0.5 / 20).all() and draws.mean().abs() < 0.001
    same = [codec.encode(x_NH, BACKWARD, BASIS, seed=s) for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    assert torch.equal(codec.decode(same[0], 40, BACKWARD, BASIS), codec.project(x_NH, BACKWARD, BASIS, seed=1))


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_outliers_arrive_exactly_and_leave_the_others_alone(quantiser: str) -> None:
    spec = link(quantiser, outliers=10.0)
    codec, x_NH = LinkCodec(spec), seeded(64, WIDTH)
    x_NH[[5, 63]] *= torch.tensor([[1e4], [30.0]])
    packet = codec.encode(x_NH, FORWARD, BASIS)
    assert len(packet) <= packet_bytes(spec, FORWARD, 64, RANK, 2) <= largest_packet_bytes(spec, FORWARD, 64)
    arrived_NH = codec.decode(packet, 64, FORWARD, BASIS)
    assert torch.equal(arrived_NH[[5, 63]], x_NH[[5, 63]])
    kept = [row for row in range(64) if row not in (5, 63)]
    alone_NH = LinkCodec(link(quantiser)).project(x_NH[kept], FORWARD, BASIS)
    assert torch.allclose(arrived_NH[kept], alone_NH, atol=1e-5)


def test_at_most_one_row_in_sixteen_is_an_outlier() -> None:
    x_NH = seeded(64, WIDTH)
    x_NH[:20] = x_NH[:20].sign() * torch.arange(100.0, 120.0)[:, None]
    arrived_NH = LinkCodec(link("uniform", outliers=10.0)).project(x_NH, FORWARD, BASIS)
    assert (arrived_NH == x_NH).all(dim=1).nonzero().flatten().tolist() == [16, 17, 18, 19]
    few_NH = x_NH[:15]  # too few rows for even one
    assert not (LinkCodec(link("uniform", outliers=1.0)).project(few_NH, FORWARD, BASIS) == few_NH).all(dim=1).any()


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("outliers", [0.0, 4.0])
def test_non_finite_rows_are_refused_at_the_sender(quantiser: str, poison: float, outliers: float) -> None:
    codec = LinkCodec(link(quantiser, outliers=outliers))
    x_NH = seeded(40, WIDTH)
    x_NH[[7, 30]] *= 100.0
    x_NH[4, 2] = x_NH[2, 7] = poison
    for send in (codec.encode, codec.project):
        with pytest.raises(NonFiniteError) as caught:
            send(x_NH, FORWARD, BASIS)
        assert (caught.value.bad_values, caught.value.bad_rows, caught.value.first_row) == (2, 2, 2)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_rows_too_large_to_be_rebuilt_are_refused_at_the_sender(quantiser: str) -> None:
    x_NH = seeded(4, WIDTH)
    x_NH[3] *= 1e33
    with pytest.raises(NonFiniteError, match="first: row 3"):
        LinkCodec(link(quantiser)).encode(x_NH, FORWARD, BASIS)


def test_a_basis_may_have_fewer_columns_than_the_link() -> None:
    for quantiser in QUANTISERS:
        spec = link(quantiser, zstd="off")
        codec, small = LinkCodec(spec), BASIS.prefix(4)
        packet = codec.encode(rows_of(20), FORWARD, small)
        assert len(packet) <= packet_bytes(spec, FORWARD, 20, columns=4)
        assert torch.equal(codec.decode(packet, 20, FORWARD, small), codec.project(rows_of(20), FORWARD, small))
        for held in (None, oblique(4, version=9), oblique(RANK, version=9)):
            with pytest.raises(BasisMismatch):
                codec.decode(packet, 20, FORWARD, held)
        with pytest.raises(PacketError, match="columns"):
            codec.decode(packet, 20, FORWARD, BASIS)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e6])
def test_uniform_needs_a_step(step: float) -> None:
    with pytest.raises(SpecError, match="basis step"):
        LinkCodec(link("uniform")).encode(rows_of(3), FORWARD, oblique(step=step))


def resealed(packet: bytes) -> bytes:
    checked = HEADER2_BYTES - CRC_FIELD_BYTES
    crc = zlib.crc32(packet[HEADER2_BYTES:], zlib.crc32(packet[:checked]))
    return packet[:checked] + struct.pack(">BI", 0xCE, crc) + packet[HEADER2_BYTES:]


@pytest.mark.parametrize(
    ("quantiser", "outliers", "zstd"),
    [*itertools.product(QUANTISERS[1:], [0.0], ["auto", "off"]), ("uniform", 6.0, "off"), ("bf16", 6.0, "off")],
)
def test_every_mutated_byte_is_an_error_and_every_forged_one_a_value_or_an_error(
    quantiser: str, outliers: float, zstd: str
) -> None:
    basis = oblique(4)
    codec = LinkCodec(link(quantiser, outliers=outliers, zstd=zstd))
    x_NH = seeded(3, WIDTH) if zstd == "off" else torch.ones(12, WIDTH)
    if outliers:
        x_NH = seeded(16, WIDTH)
        x_NH[3] *= 1000.0
    packet = codec.encode(x_NH, FORWARD, basis)
    rows = len(x_NH)
    for position in range(len(packet)):
        for flip in (1, 16, 255):
            damaged = bytearray(packet)
            damaged[position] ^= flip
            with pytest.raises(CodecError):
                codec.decode(damaged, rows, FORWARD, basis)
            try:
                forged_NH = codec.decode(resealed(bytes(damaged)), rows, FORWARD, basis)
            except CodecError:
                continue
            assert forged_NH.shape == (rows, WIDTH) and torch.isfinite(forged_NH).all()
    for length in range(len(packet)):
        with pytest.raises(PacketError):
            codec.decode(packet[:length], rows, FORWARD, basis)
