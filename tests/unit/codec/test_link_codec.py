"""What arrives is what the docstring of `LinkCodec` promises, and what cannot arrive is refused at the sender."""

import math
import struct
import warnings
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.basis import Basis
from codec.errors import BasisMismatch, CodecError, NonFiniteError, PacketError, SpecError
from codec.fit import orthonormalise
from codec.header import CHECKED_BYTES, HEADER_BYTES
from codec.link_codec import LinkCodec
from codec.spec import Direction, LinkSpec, packet_bytes
from codec.zstd_auto import WINDOW_PACKETS

FORWARD, BACKWARD = Direction
U = 2.0**-8  # unit roundoff of bf16
WIDTH = 12


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def basis_of(rank: int, width: int = WIDTH, version: int = 3, seed: int = 0) -> Basis:
    return Basis.orthonormal(version, orthonormalise(seeded(width, rank, seed=seed)))


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


LINKS = [
    (LinkSpec("identity", WIDTH, zstd="off"), FORWARD, None),
    (LinkSpec("identity", WIDTH, zstd="off", dtype="fp64"), BACKWARD, None),
    (LinkSpec("none", WIDTH, zstd="off"), FORWARD, None),
    (LinkSpec("lowrank", WIDTH, 4, 6, zstd="off"), FORWARD, basis_of(4)),
    (LinkSpec("lowrank", WIDTH, 4, 6, zstd="off"), BACKWARD, basis_of(6)),
    (LinkSpec("lowrank", WIDTH, 4, 6, backward="exact", zstd="off"), BACKWARD, basis_of(4)),
]
NAMES = ["identity", "identity64", "none", "forward", "straight_through", "exact"]
every_link = pytest.mark.parametrize(("spec", "direction", "basis"), LINKS, ids=NAMES)


@every_link
@pytest.mark.parametrize("rows", [0, 1, 5, 100])
def test_project_is_decode_of_encode_and_sizes_are_exact(
    spec: LinkSpec, direction: Direction, basis: Basis | None, rows: int
) -> None:
    codec = LinkCodec(spec)
    x_NH = seeded(rows, WIDTH)
    packet = codec.encode(x_NH, direction, basis)
    assert len(packet) == packet_bytes(spec, direction, rows)
    arrived_NH = codec.decode(packet, rows, direction, basis)
    assert arrived_NH.shape == (rows, WIDTH)
    assert arrived_NH.dtype == (torch.float64 if spec.dtype == "fp64" else torch.float32)
    assert bits(arrived_NH) == bits(codec.project(x_NH, direction, basis))
    assert packet == LinkCodec(spec).encode(x_NH.clone(), direction, basis)
    for wrapped in (bytearray(packet), memoryview(packet)):
        assert torch.equal(codec.decode(wrapped, rows, direction, basis), arrived_NH)


@every_link
def test_zstd_never_changes_values_and_never_adds_a_byte(
    spec: LinkSpec, direction: Direction, basis: Basis | None
) -> None:
    auto = LinkCodec(
        LinkSpec(spec.kind, WIDTH, spec.rank_forward, spec.rank_backward, spec.backward, "auto", spec.dtype)
    )
    off = LinkCodec(spec)
    smaller = 0
    for index, x_NH in enumerate(
        [seeded(50, WIDTH), torch.zeros(50, WIDTH), seeded(0, WIDTH), torch.ones(1, WIDTH)] * 3
    ):
        packet = auto.encode(x_NH, direction, basis)
        largest = packet_bytes(spec, direction, len(x_NH))
        assert len(packet) <= largest, index
        smaller += len(packet) < largest
        assert bits(off.decode(packet, len(x_NH), direction, basis)) == bits(off.project(x_NH, direction, basis))
    assert smaller >= 3


def test_each_direction_measures_zstd_for_itself() -> None:
    """Noise forward puts zstd to rest there, and only there."""
    codec = LinkCodec(LinkSpec("identity", WIDTH, dtype="fp64"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(WINDOW_PACKETS):
        words_NH = torch.randint(-(2**63), 2**63 - 1, (40, WIDTH), generator=generator) & ~(1 << 62)  # finite as fp64
        codec.encode(words_NH.view(torch.float64), FORWARD)
    zeros_NH = torch.zeros(40, WIDTH)
    assert len(codec.encode(zeros_NH, FORWARD)) == packet_bytes(codec.spec, FORWARD, 40)
    assert len(codec.encode(zeros_NH, BACKWARD)) < packet_bytes(codec.spec, BACKWARD, 40)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=0, max_size=24), st.booleans())
def test_identity_is_bit_exact(values: list[float], compress: bool) -> None:
    codec = LinkCodec(LinkSpec("identity", 2, zstd="auto" if compress else "off"))
    x_NH = torch.tensor(values[: len(values) // 2 * 2], dtype=torch.float32).reshape(-1, 2)
    assert bits(codec.decode(codec.encode(x_NH, FORWARD), len(x_NH), FORWARD)) == bits(x_NH)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=0, max_size=12))
def test_identity_is_bit_exact_in_fp64(values: list[float]) -> None:
    codec = LinkCodec(LinkSpec("identity", 1, dtype="fp64"))
    x_NH = torch.tensor(values, dtype=torch.float64).reshape(-1, 1)
    assert bits(codec.decode(codec.encode(x_NH, BACKWARD), len(x_NH), BACKWARD)) == bits(x_NH)


@every_link
def test_strides_do_not_matter(spec: LinkSpec, direction: Direction, basis: Basis | None) -> None:
    codec = LinkCodec(spec)
    big = seeded(2 * WIDTH, 30)
    for view_NH in (big.T[:, ::2], big.T[5:6, :WIDTH], seeded(1, WIDTH).expand(9, WIDTH), big[:WIDTH].T):
        assert codec.encode(view_NH, direction, basis) == codec.encode(view_NH.contiguous(), direction, basis)


@every_link
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_type_is_read_for_its_value(
    spec: LinkSpec, direction: Direction, basis: Basis | None, dtype: torch.dtype
) -> None:
    codec = LinkCodec(spec)
    x_NH = seeded(6, WIDTH).to(dtype)
    assert codec.encode(x_NH, direction, basis) == codec.encode(x_NH.float(), direction, basis)


def test_rows_with_a_graph_are_read_without_it() -> None:
    codec = LinkCodec(LINKS[3][0])
    x_NH = seeded(4, WIDTH).requires_grad_()
    arrived_NH = codec.decode(codec.encode(x_NH, FORWARD, LINKS[3][2]), 4, FORWARD, LINKS[3][2])
    assert not arrived_NH.requires_grad and not codec.project(x_NH, FORWARD, LINKS[3][2]).requires_grad


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_none_is_bf16_rounding(value: float) -> None:
    codec = LinkCodec(LinkSpec("none", 1))
    x_NH = torch.tensor([[value]])
    arrived = codec.decode(codec.encode(x_NH, FORWARD), 1, FORWARD)
    bits32 = struct.unpack("<I", struct.pack("<f", value))[0]
    rounded = (bits32 + 0x7FFF + (bits32 >> 16 & 1)) & 0xFFFF0000  # nearest, ties to even, on the bits themselves
    assert bits(arrived) == struct.pack("<I", rounded)
    if abs(value) >= 1.2e-38:
        assert abs(arrived.item() - value) <= U * abs(value)


@pytest.mark.parametrize("direction", Direction)
def test_lowrank_equals_a_plain_reference(direction: Direction) -> None:
    """float64 arithmetic written out, with one rounding to bf16 in the middle."""
    spec = LinkSpec("lowrank", WIDTH, 4, 6)
    basis = basis_of(spec.columns(direction))
    x_NH = seeded(50, WIDTH)
    q_HR = basis.encoder_HR.double()
    y_NR = (x_NH.double() @ q_HR).float()
    reference_NH = y_NR.to(torch.bfloat16).double() @ q_HR.T
    arrived_NH = LinkCodec(spec).project(x_NH, direction, basis).double()
    # a coefficient beside a rounding boundary may fall to the other side in fp32: one bf16 step, rarely
    off_N = (arrived_NH - reference_NH).norm(dim=1) > 1e-6 * x_NH.norm(dim=1)
    assert off_N.sum() <= 2
    assert ((arrived_NH - reference_NH).norm(dim=1) <= U * y_NR.norm(dim=1) + 1e-5).all()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 8),
    width=st.integers(1, 40),
    rank=st.integers(1, 40),
    exponent=st.integers(-28, 23),
    spread=st.integers(0, 5),  # up to 1e28 times a few: beyond 1e30 the sender refuses
    seed=st.integers(0, 2**31),
)
def test_the_stated_error_bound_holds(rows: int, width: int, rank: int, exponent: int, spread: int, seed: int) -> None:
    rank = min(rank, width)
    basis = basis_of(rank, width, seed=seed)
    codec = LinkCodec(LinkSpec("lowrank", width, rank, rank))
    x_NH = seeded(rows, width, seed=seed + 1) * 10.0 ** (exponent + spread * seeded(1, width, seed=seed).clamp(-1, 1))
    arrived_NH = codec.decode(codec.encode(x_NH, FORWARD, basis), rows, FORWARD, basis).double()
    x_NH, q_HR = x_NH.double(), basis.encoder_HR.double()
    y_NR = x_NH @ q_HR
    projected_NH = y_NR @ q_HR.T
    rounding_N = U * y_NR.norm(dim=1) + 1e-5 * x_NH.norm(dim=1)
    large_N = x_NH.norm(dim=1) >= 1e-30
    assert ((arrived_NH - projected_NH).norm(dim=1) <= rounding_N)[large_N].all()
    assert ((arrived_NH - x_NH).norm(dim=1) <= (x_NH - projected_NH).norm(dim=1) + rounding_N)[large_N].all()


def test_exact_backward_is_the_gradient_of_the_compressed_network() -> None:
    spec = LinkSpec("lowrank", WIDTH, 4, 9, backward="exact")
    basis = basis_of(4)
    q_HR = basis.encoder_HR.double()
    h_NH = seeded(20, WIDTH, dtype=torch.float64).requires_grad_()
    arrived_NH = (h_NH @ q_HR @ q_HR.T).requires_grad_()
    arrived_NH.retain_grad()
    (arrived_NH.sin() * seeded(20, WIDTH, seed=2, dtype=torch.float64)).sum().backward()  # type: ignore[no-untyped-call]
    assert h_NH.grad is not None and arrived_NH.grad is not None
    g_NH = arrived_NH.grad
    got_NH = LinkCodec(spec).project(g_NH, BACKWARD, basis).double()
    error_N = (got_NH - h_NH.grad).norm(dim=1)
    assert (error_N <= U * (g_NH @ q_HR).norm(dim=1) + 1e-5 * g_NH.norm(dim=1)).all()
    assert (h_NH.grad - g_NH).norm() > 0.1 * g_NH.norm()  # straight-through's target would have been another one


def test_exact_backward_is_exact_where_bf16_is() -> None:
    """A basis of signed axes and gradients of small integers: not a bit may differ from autograd."""
    basis = Basis.orthonormal(0, torch.eye(WIDTH)[:, [7, 2, 5]] * torch.tensor([1.0, -1.0, 1.0]))
    g_NH = torch.randint(-100, 100, (10, WIDTH), generator=torch.Generator().manual_seed(1)).float()
    h_NH = seeded(10, WIDTH).requires_grad_()
    (h_NH @ basis.encoder_HR @ basis.encoder_HR.T * g_NH).sum().backward()  # type: ignore[no-untyped-call]
    codec = LinkCodec(LinkSpec("lowrank", WIDTH, 3, backward="exact"))
    assert h_NH.grad is not None
    assert torch.equal(codec.decode(codec.encode(g_NH, BACKWARD, basis), 10, BACKWARD, basis), h_NH.grad)


def test_zero_huge_and_tiny_rows() -> None:
    basis = basis_of(4)
    codec = LinkCodec(LINKS[3][0])
    x_NH = seeded(5, WIDTH) * torch.tensor([0.0, 1e29, 1e-35, 1e-44, 1.0])[:, None]
    arrived_NH = codec.decode(codec.encode(x_NH, FORWARD, basis), 5, FORWARD, basis)
    assert torch.equal(arrived_NH[0], torch.zeros(WIDTH))
    assert torch.isfinite(arrived_NH).all() and (arrived_NH[1].abs().max() > 1e27)
    assert arrived_NH[3].abs().max() < 1e-42
    assert torch.equal(arrived_NH[4], codec.project(x_NH, FORWARD, basis)[4])


def test_the_largest_coefficients_allowed_are_rebuilt_without_overflow() -> None:
    q_HR = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # rows as long as can be
    basis, codec = Basis.orthonormal(0, q_HR), LinkCodec(LinkSpec("lowrank", 4, 4, 4))
    x_NH = torch.tensor([[1.98e30, 0.0, 0.0, 0.0]])
    assert torch.isfinite(codec.decode(codec.encode(x_NH, FORWARD, basis), 1, FORWARD, basis)).all()
    with pytest.raises(NonFiniteError):
        codec.encode(x_NH * 1.1, FORWARD, basis)


@every_link
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_refused_at_the_sender(
    spec: LinkSpec, direction: Direction, basis: Basis | None, poison: float
) -> None:
    codec = LinkCodec(spec)
    x_NH = seeded(6, WIDTH)
    x_NH[4, 2] = x_NH[2, 7] = poison
    for send in (codec.encode, codec.project):
        with pytest.raises(NonFiniteError) as caught:
            send(x_NH, direction, basis)
        assert (caught.value.bad_values, caught.value.bad_rows, caught.value.first_row) == (2, 2, 2)


def test_finite_values_that_overflow_on_the_way_are_refused_at_the_sender() -> None:
    with pytest.raises(NonFiniteError, match="first: row 1"):
        LinkCodec(LinkSpec("none", 1)).encode(torch.tensor([[1.0], [3.4e38]]), FORWARD)  # rounds to Inf in bf16
    with pytest.raises(NonFiniteError):
        LinkCodec(LINKS[3][0]).encode(torch.full((1, WIDTH), 1e300, dtype=torch.float64), FORWARD, LINKS[3][2])


def test_another_version_is_a_mismatch_and_no_basis_is_one_too() -> None:
    codec, basis = LinkCodec(LINKS[3][0]), basis_of(4, version=3)
    packet = codec.encode(seeded(2, WIDTH), FORWARD, basis)
    for held, version in ((basis_of(4, version=4), 4), (None, None)):
        with pytest.raises(BasisMismatch) as caught:
            codec.decode(packet, 2, FORWARD, held)
        assert (caught.value.needed, caught.value.held) == (3, version)


def test_calls_that_do_not_fit_the_link_are_refused() -> None:
    codec = LinkCodec(LINKS[3][0])
    good = basis_of(4)
    with pytest.raises(SpecError, match="Q_f"):
        codec.encode(seeded(2, WIDTH), FORWARD, None)
    with pytest.raises(SpecError, match="Q_b"):
        codec.encode(seeded(2, WIDTH), BACKWARD, basis_of(7))
    with pytest.raises(SpecError, match="basis shape"):
        codec.decode(b"", 2, FORWARD, basis_of(4, width=13))
    for x in (seeded(2, WIDTH + 1), seeded(WIDTH), torch.ones(2, WIDTH, dtype=torch.int64), seeded(1, 2, WIDTH)):
        with pytest.raises(SpecError, match="rows"):
            codec.encode(x, FORWARD, good)
    with pytest.raises(SpecError, match="lossless"):
        LinkCodec(LinkSpec("identity", WIDTH)).encode(seeded(2, WIDTH).double(), FORWARD)
    with pytest.raises(SpecError, match="packet rows"):
        codec.decode(b"", -1, FORWARD, good)


@every_link
def test_a_basis_is_ignored_where_none_is_used(spec: LinkSpec, direction: Direction, basis: Basis | None) -> None:
    if spec.kind == "lowrank":
        return
    codec = LinkCodec(spec)
    packet = codec.encode(seeded(2, WIDTH), direction, basis_of(5))
    assert packet == codec.encode(seeded(2, WIDTH), direction)
    assert torch.equal(codec.decode(packet, 2, direction, basis_of(5)), codec.decode(packet, 2, direction))


def resealed(packet: bytes) -> bytes:
    crc = zlib.crc32(packet[HEADER_BYTES:], zlib.crc32(packet[:CHECKED_BYTES]))
    return packet[:CHECKED_BYTES] + struct.pack(">BI", 0xCE, crc) + packet[HEADER_BYTES:]


@every_link
@pytest.mark.parametrize("zstd", ["off", "auto"])
def test_every_mutated_byte_is_an_error_and_every_forged_one_a_value_or_an_error(
    spec: LinkSpec, direction: Direction, basis: Basis | None, zstd: str
) -> None:
    spec = LinkSpec(spec.kind, WIDTH, spec.rank_forward, spec.rank_backward, spec.backward, zstd, spec.dtype)  # type: ignore[arg-type]
    codec = LinkCodec(spec)
    rows = 2 if zstd == "off" else 12
    x_NH = seeded(rows, WIDTH) if zstd == "off" else torch.ones(rows, WIDTH)
    packet = codec.encode(x_NH, direction, basis)
    assert (len(packet) < packet_bytes(spec, direction, rows)) == (zstd == "auto")
    for position in range(len(packet)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(packet)
            damaged[position] ^= flip
            with pytest.raises(CodecError):
                codec.decode(damaged, rows, direction, basis)
            try:
                forged_NH = codec.decode(resealed(bytes(damaged)), rows, direction, basis)
            except CodecError:
                continue
            assert forged_NH.shape == (rows, WIDTH) and torch.isfinite(forged_NH).all()
    for length in range(len(packet)):
        with pytest.raises(PacketError):
            codec.decode(packet[:length], rows, direction, basis)


def test_a_stranger_cannot_send_what_a_sender_would_not() -> None:
    codec = LinkCodec(LinkSpec("none", 2, zstd="off"))
    packet = codec.encode(torch.ones(1, 2), FORWARD)
    for half in (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"):  # NaN, Inf, -Inf
        with pytest.raises(PacketError) as caught:
            codec.decode(resealed(packet[:-2] + half), 1, FORWARD)
        assert caught.value.field == "values"


def test_decoding_is_silent_and_leaves_the_packet_alone() -> None:
    codec = LinkCodec(LinkSpec("identity", WIDTH, zstd="off"))
    packet = codec.encode(seeded(3, WIDTH), FORWARD)
    before = bytes(packet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrived_NH = codec.decode(packet, 3, FORWARD)
    arrived_NH.zero_()
    assert packet == before
