"""Whatever a link is made of and whatever crosses it: the docstring's bound, the pure size function, one kind of error."""

import struct
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.basis import Basis
from codec.errors import CodecError, ReferenceMismatch
from codec.fit import orthonormalise
from codec.header import CRC_FIELD_BYTES, Element, Header
from codec.link_codec import LinkCodec
from codec.reuse import ReuseStore
from codec.spec import Direction, LinkSpec, largest_packet_bytes, packet_bytes

FORWARD, BACKWARD = Direction
EXACT_STEP = 0.07
SMALLEST_SCALE = 2.0**-100


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis_of(width: int, rank: int, seed: int, oblique: bool, step: float = 0.2) -> Basis:
    q_HR = orthonormalise(seeded(width, rank, seed=seed))
    if not oblique:
        return Basis.orthonormal(3, q_HR, step)
    return Basis.from_wire(3, q_HR, q_HR.T + 0.3 * seeded(rank, width, seed=seed + 1) / width**0.5, step)


@st.composite
def links(draw: st.DrawFn) -> tuple[LinkSpec, Direction, Basis]:
    """A link of any make, a direction, and the basis for it."""
    quantisers = st.sampled_from(["bf16", "int8", "int4", "uniform"])
    width = draw(st.integers(1, 24))
    rank = draw(st.integers(1, width))
    backward = draw(st.sampled_from(["straight_through", "exact"]))
    of_gradients = draw(quantisers)
    uniform = of_gradients == "uniform"
    spec = LinkSpec(
        kind="lowrank",
        width=width,
        rank_forward=rank,
        rank_backward=rank,
        backward=backward,
        zstd=draw(st.sampled_from(["auto", "off"])),
        quantiser_forward=draw(quantisers),
        quantiser_backward=of_gradients,
        gradient_scale=draw(st.sampled_from(["row", "packet"])) if uniform else "row",
        stochastic=draw(st.booleans()) if uniform else False,
        exact_step=EXACT_STEP,
        outliers=draw(st.sampled_from([0.0, 1.5, 30.0])),
    )
    try:
        basis = basis_of(width, rank, draw(st.integers(0, 2**20)), draw(st.booleans()))
    except CodecError:  # a pair that is too oblique
        assume(False)
    return spec, draw(st.sampled_from(Direction)), basis


@st.composite
def rows_of(draw: st.DrawFn, width: int) -> Tensor:
    """Rows of any float type and strides; some are zero, some are massive, all may be huge or tiny."""
    count, seed = draw(st.one_of(st.just(1), st.integers(1, 70))), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    exponent = draw(st.integers(-3, 0) if dtype == torch.float16 else st.integers(-42, 25))
    x_NH = seeded(count, width, seed=seed) * torch.logspace(-1, 1, width)
    x_NH[draw(st.lists(st.integers(0, count - 1), max_size=3))] *= 500.0
    x_NH[draw(st.lists(st.integers(0, count - 1), max_size=3))] = 0.0
    x_NH = (x_NH * 10.0**exponent).to(dtype)
    if draw(st.booleans()):
        x_NH = x_NH.T.contiguous().T  # column-major
    if draw(st.booleans()):
        x_NH = torch.stack((x_NH, x_NH), dim=1)[:, 1]  # with gaps
    return x_NH


def matrices(spec: LinkSpec, direction: Direction, basis: Basis) -> tuple[Tensor, Tensor]:
    """(H x R, R x H) that rows are multiplied by on their way, in fp64."""
    encoder_HR, decoder_RH = basis.encoder_HR.double(), basis.decoder_RH.double()
    own = spec.basis_direction(direction) == direction
    return (encoder_HR, decoder_RH) if own else (decoder_RH.T, encoder_HR.T)


def allowed(spec: LinkSpec, direction: Direction, basis: Basis, x_NH: Tensor, y_NR: Tensor) -> Tensor:
    """|y' - y| by the docstring of `LinkCodec`, for rows that travel as coefficients."""
    element = spec.element(direction)
    if element == Element.BF16:
        return 2.0**-8 * y_NR.abs()
    if element in (Element.INT8, Element.INT4):
        most = 1.008 * y_NR.abs().amax(dim=1, keepdim=True) / (127 if element == Element.INT8 else 7)
        return most.clamp(min=SMALLEST_SCALE).expand_as(y_NR) / 2
    square_N1 = x_NH.square().mean(dim=1, keepdim=True)
    if direction == BACKWARD and spec.gradient_scale == "packet":
        square_N1 = square_N1.mean().expand_as(square_N1)
    step = basis.step
    if spec.basis_direction(direction) != direction:
        step = EXACT_STEP * float(basis.decoder_RH.double().square().sum(dim=1).mean().sqrt())
    bound = (square_N1.sqrt() * 2**0.125).clamp(min=SMALLEST_SCALE) * step / 2
    return bound.expand_as(y_NR) * (2 if direction == BACKWARD and spec.stochastic else 1)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(links(), st.data(), st.integers(0, 3))
def test_what_arrives_is_within_the_stated_bound(
    link: tuple[LinkSpec, Direction, Basis], data: st.DataObject, seed: int
) -> None:
    spec, direction, basis = link
    x_NH = data.draw(rows_of(spec.width))
    codec, count = LinkCodec(spec), len(x_NH)
    packet = codec.encode(x_NH, direction, basis, seed=seed)
    header = Header.parse(memoryview(packet))
    assert header is not None
    stated = packet_bytes(spec, direction, count, basis.rank, header.outliers)
    assert len(packet) <= stated <= largest_packet_bytes(spec, direction, count)
    if spec.zstd == "off" and header.element != Element.UNIFORM:
        assert len(packet) == stated
    arrived_NH = codec.decode(packet, count, direction, basis)
    assert torch.equal(arrived_NH, codec.project(x_NH, direction, basis, seed=seed))
    x_NH, arrived_NH = x_NH.double(), arrived_NH.double()
    exactly_N = (x_NH == arrived_NH).all(dim=1)
    assert exactly_N.sum() >= header.outliers
    encoder_HR, decoder_RH = matrices(spec, direction, basis)
    y_NR = x_NH @ encoder_HR
    products = 1e-5 * x_NH.norm(dim=1, keepdim=True) * encoder_HR.norm(dim=0)
    slack = products * (1 + encoder_HR.norm() * decoder_RH.norm()) + 1e-36
    error = (arrived_NH @ encoder_HR - y_NR).abs()
    assert ((error <= allowed(spec, direction, basis, x_NH, y_NR) + slack).all(dim=1) | exactly_N).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(links(), st.data())
def test_a_mutated_packet_gives_finite_rows_or_a_codec_error(
    link: tuple[LinkSpec, Direction, Basis], data: st.DataObject
) -> None:
    """Damage is always found; a stranger who also forges the checksum may change numbers, and nothing else."""
    spec, direction, basis = link
    x_NH = data.draw(rows_of(spec.width))
    codec = LinkCodec(spec)
    packet = codec.encode(x_NH, direction, basis)
    for _ in range(4):
        mutated = bytearray(packet)
        for _ in range(data.draw(st.integers(1, 3))):
            mutated[data.draw(st.integers(0, len(packet) - 1))] ^= data.draw(st.integers(1, 255))
        if bytes(mutated) == packet:
            continue
        with pytest.raises(CodecError):
            codec.decode(mutated, len(x_NH), direction, basis)
        try:
            forged_NH = codec.decode(resealed(bytes(mutated)), len(x_NH), direction, basis)
        except CodecError:
            continue
        assert forged_NH.shape == x_NH.shape and torch.isfinite(forged_NH).all()


def resealed(packet: bytes) -> bytes:
    header = Header.parse(memoryview(packet))
    if header is None:
        return packet
    crc = zlib.crc32(packet[header.size :], zlib.crc32(packet[: header.size - CRC_FIELD_BYTES]))
    return packet[: header.size - CRC_FIELD_BYTES] + struct.pack(">BI", 0xCE, crc) + packet[header.size :]


REUSE = LinkSpec("lowrank", 12, 5, 5, quantiser_forward="uniform", reuse=True)


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[list[list[int]], bool, bool]]:
    """Of each pass: samples by microbatch, whether it is kept, and whether the receiver has lost all before."""
    return draw(
        st.lists(
            st.tuples(
                st.permutations(range(6)).map(lambda order: [list(order[:2]), list(order[2:5])]),
                st.booleans(),
                st.sampled_from([False, False, True]),
            ),
            min_size=2,
            max_size=5,
        )
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(passes(), st.lists(st.integers(0, 20), min_size=6, max_size=6), st.sampled_from([0, 600, 1500, 1 << 20]),
       st.sampled_from([0.0, 3.0]), st.integers(0, 2**20))  # fmt: skip
def test_both_ends_agree_over_any_passes(
    turns: list[tuple[list[list[int]], bool, bool]], sizes: list[int], limit_bytes: int, outliers: float, seed: int
) -> None:
    """Samples regrouped, partly held, dropped rounds, a receiver that forgets, memory that is short: the values are on
    the grid next to the rows that were sent, and who has the references has the sender's."""
    spec, basis = replace(REUSE, outliers=outliers), basis_of(12, 5, seed, oblique=True)
    sender, receiver = LinkCodec(spec), LinkCodec(spec)
    held, far = ReuseStore(limit_bytes), ReuseStore(limit_bytes)
    samples = [seeded(size, 12, seed=seed + key) for key, size in enumerate(sizes)]
    lost = False
    for number, (microbatches, keep, forgets) in enumerate(turns):
        if forgets:
            far.forget()
            lost = True
        samples = [rows + 0.01 * seeded(*rows.shape, seed=seed + 99 * number) for rows in samples]
        for keys in microbatches:
            x_NH, parts = torch.cat([samples[key] for key in keys]), [(key, sizes[key]) for key in keys]
            packet = sender.encode(x_NH, FORWARD, basis, rows=held.rows(parts))
            assert len(packet) <= largest_packet_bytes(spec, FORWARD, len(x_NH))
            try:
                arrived_NH = receiver.decode(packet, len(x_NH), FORWARD, basis, rows=far.rows(parts))
            except ReferenceMismatch:
                assert lost
                packet = sender.encode_whole(held.rows(parts), basis)
                arrived_NH = receiver.decode(packet, len(x_NH), FORWARD, basis, rows=far.rows(parts))
            error_NR = ((arrived_NH - x_NH).double() @ basis.encoder_HR.double()).abs()
            rms_N1 = x_NH.square().mean(dim=1, keepdim=True).sqrt()
            assert (error_NR <= 1.15 * 2**0.125 * rms_N1 * basis.step / 2 + 1e-4 * rms_N1).all()
            assert held.held_bytes <= limit_bytes and far.held_bytes <= limit_bytes
        held.settle(keep)
        far.settle(keep)
        if not lost:
            ours, theirs = held.state(), far.state()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
