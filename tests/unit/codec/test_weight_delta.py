"""Deltas between two versions of weights: every bit arrives, a wrong base never passes, and little changed is little sent."""

import struct
import tracemalloc

import msgpack
import pytest
import torch
import zstandard
from forged_packets import mutations, resealed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import weight_delta
from codec.errors import PacketError, SpecError
from codec.sections import HEAD_BYTES, HEADER_BYTES
from codec.weight_delta import decode, encode, largest_bytes

INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SHAPES = [(30, 8), (5,), ()]
FIRST_BLOCK = HEADER_BYTES + HEAD_BYTES + 32  # behind the digests


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


def with_block(packet: bytes, form: int, packing: int, raw_bytes: int, stored: bytes) -> bytes:
    """The same header and digests before another block."""
    head = struct.pack("<BBII", form, packing, raw_bytes, len(stored))
    return resealed(packet[:FIRST_BLOCK] + head + stored)


def weights(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def moved(base: Tensor, share: float, seed: int) -> Tensor:
    """A share of the weights, each by a few steps of its last bits."""
    generator = torch.Generator().manual_seed(seed)
    bits = base.clone().view(INTEGERS[base.dtype])
    steps = torch.randint(-3, 4, base.shape, generator=generator).to(bits.dtype)
    return (bits + steps * (torch.rand(base.shape, generator=generator) < share)).view(base.dtype)


@st.composite
def versions(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights and a base: any bit patterns at all, or such as training gives; alike, nearly alike, or not at all."""
    dtype = draw(st.sampled_from(list(INTEGERS)))
    shape = st.one_of(st.tuples(), st.tuples(st.integers(0, 200)), st.tuples(st.integers(0, 20), st.integers(1, 20)))
    new, base = [], []
    for its_shape in draw(st.lists(shape, max_size=4)):
        seed = draw(st.integers(0, 2**20))
        held = weights(its_shape, seed, dtype)
        if draw(st.booleans()):
            generator = torch.Generator().manual_seed(seed)
            held = torch.randint(-(2**63), 2**63 - 1, its_shape, generator=generator).to(INTEGERS[dtype]).view(dtype)
        base.append(held)
        kind = draw(st.sampled_from(["moved", "moved", "other", "turned"]))
        if kind == "moved":
            held = moved(held, draw(st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5, 1.0])), seed + 1)
        else:
            held = weights(its_shape, seed + 1, dtype) if kind == "other" else -held
        new.append(held.T.contiguous().T if held.ndim == 2 else held)
    return new, draw(st.sampled_from([base, base, base, None]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(versions(), st.sampled_from([7, 64, weight_delta.BLOCK]))
def test_every_bit_arrives(pair: tuple[list[Tensor], list[Tensor] | None], block: int) -> None:
    new, base = pair
    shapes, dtype = [tuple(tensor.shape) for tensor in new], new[0].dtype if new else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_delta, "BLOCK", block)
        packet = encode(new, base)
        assert len(packet) <= largest_bytes(shapes, dtype)
        arrived = decode(packet, base, shapes, dtype)
    assert len(arrived) == len(new) and all(map(same_bits, arrived, new))


@pytest.mark.parametrize("dtype", list(INTEGERS))
def test_nans_keep_their_payloads_and_zeros_their_signs(dtype: torch.dtype) -> None:
    quiet, signalling = (0x7FC1, 0x7F81) if dtype == torch.bfloat16 else (-3, torch.iinfo(INTEGERS[dtype]).max - 7)
    new = torch.tensor([quiet, signalling, 0, 1, torch.iinfo(INTEGERS[dtype]).min]).to(INTEGERS[dtype]).view(dtype)
    assert new.isnan().sum() == 2 and str(new[4].item()) == "-0.0"
    for base in (None, torch.zeros(5, dtype=dtype), new.flip(0).clone(), new.clone()):
        (arrived,) = decode(encode([new], None if base is None else [base]), None if base is None else [base],
                            [(5,)], dtype)  # fmt: skip
        assert same_bits(arrived, new)


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.0001), (0.01, 0.008), (0.1, 0.044), (0.3, 0.0975), (1.0, 0.19)])
def test_little_changed_is_little_sent(share: float, most: float) -> None:
    base = weights((1024, 512), 0)
    packet = encode([moved(base, share, 1)], [base])
    assert len(packet) < most * base.nbytes + FIRST_BLOCK + HEAD_BYTES
    other = encode([weights((1024, 512), 1)], [base])
    assert len(other) <= len(encode([weights((1024, 512), 1)], None)) < 0.7 * base.nbytes


def test_a_wrong_base_is_refused_and_named() -> None:
    base, other = [weights(shape, 0) for shape in SHAPES], [weights(shape, 0) for shape in SHAPES]
    other[1] = moved(other[1], 1.0, 3)
    packet = encode([moved(each, 0.3, 1) for each in base], base)
    for held in (other, None):
        with pytest.raises(PacketError, match="ask the sender for the weights as a whole") as caught:
            decode(packet, held, SHAPES, torch.bfloat16)
        assert caught.value.field == "base"
    whole = encode(base, None)
    assert all(map(same_bits, decode(whole, other, SHAPES, torch.bfloat16), base))


def test_a_packet_of_other_tensors_is_refused() -> None:
    base = [weights(shape, 0) for shape in SHAPES]
    packet = encode(base, None)
    for shapes, dtype, field in (
        (SHAPES[:2], torch.bfloat16, "entries"),
        ([(8, 30), (5,), ()], torch.bfloat16, "layout"),
        (SHAPES, torch.float32, "layout"),
    ):
        with pytest.raises(PacketError) as caught:
            decode(packet, None, shapes, dtype)
        assert caught.value.field == field
    assert msgpack.unpackb(packet[:HEADER_BYTES])[:3] == [4, 0, 3]


def test_calls_that_do_not_fit_are_refused() -> None:
    base = [weights(shape, 0) for shape in SHAPES]
    packet = encode(base, base)
    for wrong in (base[:2], [*base[:2], base[1]], [each.float() for each in base]):
        with pytest.raises(SpecError):
            encode(base, wrong)
        with pytest.raises(SpecError):
            decode(packet, wrong, SHAPES, torch.bfloat16)
    for bad in ([base[0].half()], [base[0], base[1].float()], [base[0].int()]):
        with pytest.raises(SpecError):
            encode(bad, None)
    with pytest.raises(SpecError):
        largest_bytes(SHAPES, torch.float16)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_damage_is_found_and_forgery_gives_no_other_bits(share: float | None, dtype: torch.dtype) -> None:
    """A stranger who also forges the checksum still cannot pass the digest of the result by flipping bits."""
    base = [weights(shape, 0, dtype) for shape in SHAPES]
    new = [weights(each.shape, 1, dtype) if share is None else moved(each, share, 1) for each in base]
    packet = encode(new, base)
    for mutated in mutations(packet, 250, 4):
        with pytest.raises(PacketError):
            decode(mutated, base, SHAPES, dtype)
        try:
            arrived = decode(resealed(bytes(mutated)), base, SHAPES, dtype)
        except PacketError:
            continue
        assert all(map(same_bits, arrived, new))  # a flip in what is never read: bits that pad a mask
    for length in range(len(packet)):
        for cut in (packet[:length], resealed(packet[:length]) if length >= HEADER_BYTES else b""):
            with pytest.raises(PacketError):
                decode(cut, base, SHAPES, dtype)
    for extra in (packet + b"\0", resealed(packet + b"\0"), resealed(packet + packet[HEADER_BYTES:])):
        with pytest.raises(PacketError):
            decode(extra, base, SHAPES, dtype)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    base = [weights(shape, 0) for shape in SHAPES]
    packet = encode(base, base)
    for each in (noise, *(resealed(packet[:size] + noise) for size in (HEADER_BYTES, FIRST_BLOCK) if noise)):
        with pytest.raises(PacketError):
            decode(each, base, SHAPES, torch.bfloat16)


def frame(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(raw)


@pytest.mark.parametrize(
    ("form", "packing", "raw_bytes", "stored", "field"),
    [
        (0, 0, 5, bytes([16, 0, 0, 2, 0]), "places"),
        (0, 0, 4, bytes(4), "block"),
        (0, 0, 10, bytes([0, 0, 0, 255, 0, 255, 2, 2, 0, 0]), "places"),
        (1, 0, 1, bytes(1), "block"),
        (1, 0, 4, bytes([1, 1, 2, 0]), "block"),
        (1, 0, 6, bytes([128, 1, 2, 0, 0, 0]), "result"),
        (2, 0, 31, bytes(31), "payload"),
        (2, 0, 34, bytes(34), "payload"),
        (3, 0, 0, b"", "block form"),
        (0, 0, 35, bytes(35), "section raw_bytes"),
        (0, 1, 32, frame(bytes(64 << 20))[:31], "zstd content size"),
        (0, 1, 2**31, frame(bytes(64 << 20)), "section raw_bytes"),
    ],
)
def test_blocks_that_no_sender_writes_are_refused(
    form: int, packing: int, raw_bytes: int, stored: bytes, field: str
) -> None:
    base, new = [torch.zeros(16, dtype=torch.bfloat16)], [torch.ones(16, dtype=torch.bfloat16)]
    packet = with_block(encode(new, base), form, packing, raw_bytes, stored)
    tracemalloc.start()
    try:
        with pytest.raises(PacketError) as caught:
            decode(packet, base, [(16,)], torch.bfloat16)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.field == field and peak_bytes < 1 << 20


def test_the_handmade_block_is_one() -> None:
    """One change by one step, at the third weight: gaps, mask, and all in one."""
    base = [torch.zeros(16, dtype=torch.bfloat16)]
    new = [torch.zeros(16, dtype=torch.int16).index_fill(0, torch.tensor([2]), -1).view(torch.bfloat16)]
    packet = encode(new, base)
    for form, raw in ((0, bytes([2, 0, 0, 1, 0])), (1, bytes([0x20, 0, 1, 0]))):
        (arrived,) = decode(with_block(packet, form, 0, len(raw), raw), base, [(16,)], torch.bfloat16)
        assert same_bits(arrived, new[0])
    with pytest.raises(PacketError, match="block form"):
        whole = encode(new, None)
        decode(with_block(whole, 0, 0, 0, b""), None, [(16,)], torch.bfloat16)


def test_a_block_at_a_time_is_unpacked() -> None:
    """Beside weights and base encoding needs the packet and a few blocks; decoding, but for the result, blocks alone."""
    base = weights((3, weight_delta.BLOCK), 0)
    new, blocks_bytes = moved(base, 0.5, 1), 16 << 20
    tracemalloc.start()
    try:
        packet = encode([new, new, new, new], [base, base, base, base])
        _, encode_bytes = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        decode(packet, [base, base, base, base], [tuple(base.shape)] * 4, torch.bfloat16)
        _, decode_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(packet) < 4 << 20 and encode_bytes < len(packet) * 1.2 + blocks_bytes
    assert decode_bytes - before < blocks_bytes
