"""A stage's correction on the wire: what arrives is what the docstring promises, or one kind of error."""

import math
import struct
import tracemalloc
from dataclasses import replace

import msgpack
import pytest
import torch
import zstandard
from forged_packets import mutations, resealed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import powersgd
from codec.corrections import CorrectionEncoder, CorrectionSpec, decode, largest_bytes
from codec.errors import CodecError, NonFiniteError, PacketError, SpecError
from codec.sections import HEAD_BYTES, HEADER_BYTES
from codec.topk import largest_places

FORMS = ["sign", "lowrank", "topk", "bf16"]
SHAPES = [(40, 24), (7,), (3, 5)]
FIRST_RAW = HEADER_BYTES + HEAD_BYTES  # where the first section's bytes begin


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_sections(packet: bytes, *sections: tuple[int, int, int, bytes]) -> bytes:
    """The same header before other sections: (form, packing, raw_bytes, stored)."""
    stored = [struct.pack("<BBII", form, packing, raw, len(data)) + data for form, packing, raw, data in sections]
    return resealed(packet[:HEADER_BYTES] + b"".join(stored))


def projection(m_RC: Tensor, x_RC: Tensor) -> Tensor:
    """x in the span of M's columns."""
    u_RK, s_K, _ = torch.linalg.svd(m_RC.double(), full_matrices=False)
    u_RK = u_RK[:, s_K > 1e-6 * s_K.max()]
    return u_RK @ (u_RK.T @ x_RC.double())


specs = st.builds(
    CorrectionSpec,
    st.sampled_from(FORMS),
    rank=st.integers(1, 6),
    share=st.sampled_from([0.001, 0.07, 0.3, 0.999, 1.0]),
)
shapes = st.lists(
    st.one_of(
        st.tuples(), st.tuples(st.integers(0, 300)), st.tuples(st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Of any float type and size; some rows, and some of the rest, are zero."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    x = seeded(*shape, seed=draw(st.integers(0, 2**20))) * 10.0 ** draw(st.integers(-42, 30))
    if x.ndim and len(x):
        x[draw(st.lists(st.integers(0, len(x) - 1), max_size=3))] = 0.0
    if draw(st.booleans()):
        x[seeded(*shape, seed=1) > draw(st.sampled_from([-9.0, 0.0, 1.5]))] = -0.0
    x = x.to(dtype)
    return x.T.contiguous().T if x.ndim == 2 and draw(st.booleans()) else x


@settings(max_examples=150, deadline=None, derandomize=True)
@given(specs, shapes, st.data())
def test_what_arrives_is_what_its_form_promises(
    spec: CorrectionSpec, of: list[tuple[int, ...]], data: st.DataObject
) -> None:
    sent = [data.draw(tensors(shape)) for shape in of]
    packet = CorrectionEncoder(spec, of).encode(sent)
    assert len(packet) <= largest_bytes(spec, of)
    arrived = decode(packet, spec, of)
    for index, (x, y, shape) in enumerate(zip(sent, arrived, of, strict=True)):
        x = x.to(torch.float32)
        assert y.shape == x.shape == shape and y.dtype == torch.float32
        if spec.form == "sign":
            assert torch.equal(y, torch.sign(x))
        elif rank := spec.rank_of(shape):
            check_projection(x.reshape(shape[0], -1), y.reshape(shape[0], -1), rank, index)
        elif spec.form == "topk":
            check_largest(x.flatten(), y.flatten(), spec.kept(x.numel()))
        else:
            assert ((y - x).double().abs() <= (2.0**-8 * x.double().abs()).clamp(min=2.0**-134)).all()


def check_projection(m_RC: Tensor, arrived_RC: Tensor, rank: int, seed: int) -> None:
    """P P^T M, with the P and Q that a first call finds, each rounded to bf16."""
    p_RK, q_CK = powersgd.factors(m_RC, powersgd.first_start(m_RC.shape[1], rank, seed), powersgd.FIRST_STEPS)
    assert torch.allclose(p_RK.T @ p_RK, torch.eye(rank), atol=1e-5)
    scale = float(m_RC.abs().max()) or 1.0
    assert torch.allclose(q_CK.double() / scale, m_RC.double().T @ p_RK.double() / scale, atol=1e-5)
    p_RK, q_CK = p_RK.double(), q_CK.double()
    allowed_RC = (2.0**-7 + 1e-5) * (p_RK.abs() @ q_CK.abs().T) + rank * 2.0**-132
    assert ((arrived_RC.double() - p_RK @ q_CK.T).abs() <= allowed_RC).all()
    assert arrived_RC.double().norm() <= 1.02 * m_RC.double().norm() + 1e-36
    if (m_RC != 0).any() and scale > 1e-30:
        outside_RC = arrived_RC.double() - projection(m_RC, arrived_RC)
        assert outside_RC.norm() <= 2.0**-6 * m_RC.double().norm()


def check_largest(x: Tensor, y: Tensor, kept: int) -> None:
    order = torch.sort(x.abs(), descending=True, stable=True).indices[:kept]  # stable: of equal ones the first
    wanted = torch.zeros_like(x)
    wanted[order] = x[order].to(torch.bfloat16).to(torch.float32)
    assert torch.equal(y, wanted)


def test_topk_keeps_ceil_of_share_times_n() -> None:
    kept = CorrectionSpec("topk", share=0.07).kept
    assert [kept(n) for n in (0, 1, 14, 15, 100, 101)] == [0, 1, 1, 2, 7, 8]


@pytest.mark.parametrize("kind", ["normal", "few values", "zeros", "across parts"])
def test_largest_places_are_those_of_a_stable_sort(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.topk._PART", 97)
    x = seeded(1000, seed=5)
    if kind == "few values":
        x = x.round()
    elif kind == "zeros":
        x[seeded(1000) < 1.0] = 0.0
    for count in (1, 2, 96, 97, 500, 999, 1000):
        wanted = torch.sort(x.abs(), descending=True, stable=True).indices[:count].sort().values
        assert largest_places(x.numpy(), count).tolist() == wanted.tolist()


def test_signs_cost_a_bit_and_absent_rows_next_to_nothing() -> None:
    """A dense gradient; an embedding's, of which a tenth of the rows occurred; one with a single zero."""
    spec, shape = CorrectionSpec("sign"), (1000, 64)
    dense = seeded(*shape)
    embedding = dense * (torch.arange(1000) % 10 == 0)[:, None]
    one_zero = dense.clone()
    one_zero[3, 3] = 0.0
    sizes = [len(CorrectionEncoder(spec, [shape]).encode([x])) for x in (dense, embedding, one_zero)]
    assert sizes[0] == FIRST_RAW + 8000
    assert FIRST_RAW + 800 <= sizes[1] <= FIRST_RAW + 800 + 125
    assert sizes[2] <= FIRST_RAW + 8000 + 200


@pytest.mark.parametrize(("form", "bytes_a_weight"), [("lowrank", 0.2), ("topk", 0.09), ("bf16", 1.5)])
def test_forms_cost_what_they_should(form: str, bytes_a_weight: float) -> None:
    spec, shape = CorrectionSpec(form, share=0.02), (200, 100)  # type: ignore[arg-type]
    assert len(CorrectionEncoder(spec, [shape]).encode([seeded(*shape)])) < bytes_a_weight * 20_000


def test_the_warm_start_turns_towards_the_best_directions() -> None:
    """On one matrix with slowly falling singular values each call captures more, up to all that the rank can."""
    u_RC, v_CC = torch.linalg.qr(seeded(64, 32))[0], torch.linalg.qr(seeded(32, 32, seed=1))[0]
    singular_C = torch.arange(1, 33.0) ** -0.5
    m_RC = u_RC * singular_C @ v_CC.T
    best = float(singular_C[:4].square().sum())
    spec = CorrectionSpec("lowrank", rank=4)
    encoder, captured = CorrectionEncoder(spec, [(64, 32)]), []
    for _ in range(30):
        (y_RC,) = decode(encoder.encode([m_RC]), spec, [(64, 32)])
        captured.append(float(y_RC.square().sum()) / best)
    assert 0.9 < captured[0] < captured[9] < 1.01 and captured[29] > 0.985
    assert float((y_RC - m_RC).norm() / m_RC.norm()) < 1.01 * math.sqrt(1 - best / float(singular_C.square().sum()))


@pytest.mark.parametrize("dull", ["zeros", "one entry", "zeros at last"])
def test_a_start_survives_matrices_that_teach_nothing(dull: str) -> None:
    """Whose factors are zero, or all but one column; the rows that such factors name are zero in what follows."""
    spec, of = CorrectionSpec("lowrank", rank=4), [(30, 20)]
    dull_RC, full_RC = torch.zeros(30, 20), seeded(30, 4, seed=2) @ seeded(4, 20, seed=3)
    full_RC[:8] = 0.0
    if dull == "one entry":
        dull_RC[12, 3] = 1.0
    encoder = CorrectionEncoder(spec, of)
    for m_RC in [full_RC, dull_RC] if dull == "zeros at last" else [dull_RC] * 3:
        assert torch.allclose(decode(encoder.encode([m_RC]), spec, of)[0], m_RC, atol=0.1)
    state = encoder.state()["start.0"]
    assert (torch.linalg.matrix_rank(state) == 4) and (state.norm(dim=0) > 0.1).all()
    for _ in range(1 if dull == "zeros at last" else 3):
        (y_RC,) = decode(encoder.encode([full_RC]), spec, of)
    assert float((y_RC - full_RC).norm() / full_RC.norm()) < 2.0**-7


def test_state_continues_bit_for_bit_and_errors_do_not_move_it() -> None:
    spec, of = CorrectionSpec("lowrank", rank=2), [(20, 30), (5,), (30, 20)]
    turns = [[seeded(*shape, seed=turn) for shape in of] for turn in range(3)]
    first, second = CorrectionEncoder(spec, of, seed=7), CorrectionEncoder(spec, of, seed=7)
    assert first.state() == {} and first.encode(turns[0]) == second.encode(turns[0])
    broken = [turns[1][0], turns[1][1], torch.full((30, 20), float("nan"))]
    with pytest.raises(NonFiniteError):
        first.encode(broken)
    packet = second.encode(turns[1])
    assert first.encode(turns[1]) == packet
    third = CorrectionEncoder(spec, of, seed=99)
    third.load(first.state())
    assert third.encode(turns[2]) == second.encode(turns[2])
    fresh = CorrectionEncoder(spec, of, seed=7).encode(turns[1])
    assert fresh != packet  # so that the start counts


@pytest.mark.parametrize(
    "state",
    [{"start.1": torch.zeros(5, 2)}, {"start.0": torch.zeros(20, 2)}, {"start.0": torch.zeros(30, 2).double()},
     {"start.0": torch.full((30, 2), float("inf"))}, {"first.0": torch.zeros(30, 2)}],
)  # fmt: skip
def test_a_state_of_another_stage_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(SpecError, match="correction state"):
        CorrectionEncoder(CorrectionSpec("lowrank", rank=2), [(20, 30), (5,)]).load(state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_sent(form: str, bad: float) -> None:
    encoder = CorrectionEncoder(CorrectionSpec(form), SHAPES)  # type: ignore[arg-type]
    sent = [seeded(*shape) for shape in SHAPES]
    sent[0][9, 3] = sent[0][11, 0] = sent[0][11, 1] = bad
    with pytest.raises(NonFiniteError, match="correction tensor 0") as caught:
        encoder.encode(sent)
    assert (caught.value.bad_values, caught.value.bad_rows, caught.value.first_row) == (3, 2, 9)


@pytest.mark.parametrize(("form", "largest"), [("bf16", 3.4e38), ("topk", 3.4e38), ("lowrank", 3e38)])
def test_what_bf16_cannot_hold_is_not_sent(form: str, largest: float) -> None:
    with pytest.raises(NonFiniteError):
        CorrectionEncoder(CorrectionSpec(form), [(9, 9)]).encode([torch.full((9, 9), largest)])  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError):
        CorrectionEncoder(CorrectionSpec(form), [(2,)]).encode([torch.tensor([1.0, 1e39]).double() * 10])  # type: ignore[arg-type]


def test_calls_that_do_not_fit_are_refused() -> None:
    encoder = CorrectionEncoder(CorrectionSpec("bf16"), SHAPES)
    good = [seeded(*shape) for shape in SHAPES]
    for bad in (good[:2], [*good, good[0]], [good[0].T, *good[1:]], [good[0].int(), *good[1:]]):
        with pytest.raises(SpecError):
            encoder.encode(bad)
    for broken in ({"form": "int8"}, {"rank": 0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(SpecError):
            replace(CorrectionSpec("bf16"), **broken)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="section"):
        largest_bytes(CorrectionSpec("bf16"), [(1 << 16, 1 << 16)])


def packet_of(form: str) -> tuple[bytes, CorrectionSpec]:
    spec = CorrectionSpec(form, rank=2, share=0.3)  # type: ignore[arg-type]
    sent = [seeded(*shape) for shape in SHAPES]
    sent[0][[2, 5]] = 0.0
    sent[0][7, 7] = sent[1][2] = 0.0
    return CorrectionEncoder(spec, SHAPES).encode(sent), spec


def test_the_header_is_msgpack() -> None:
    packet, spec = packet_of("lowrank")
    numbers = msgpack.unpackb(packet[:HEADER_BYTES])
    assert numbers[:5] == [3, 1, 3, spec.layout(SHAPES), len(packet) - HEADER_BYTES]


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_found_and_forgery_gives_finite_tensors_or_an_error(form: str) -> None:
    packet, spec = packet_of(form)
    for mutated in mutations(packet, 400, 3):
        with pytest.raises(PacketError):
            decode(mutated, spec, SHAPES)
        try:
            arrived = decode(resealed(bytes(mutated)), spec, SHAPES)
        except PacketError:
            continue
        assert [tuple(y.shape) for y in arrived] == SHAPES and all(torch.isfinite(y).all() for y in arrived)
    for length in range(len(packet)):
        for cut in (packet[:length], resealed(packet[:length]) if length >= HEADER_BYTES else b""):
            with pytest.raises(PacketError):
                decode(cut, spec, SHAPES)
    for extra in (packet + b"\0", resealed(packet + b"\0"), resealed(packet + packet[HEADER_BYTES:])):
        with pytest.raises(PacketError):
            decode(extra, spec, SHAPES)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(FORMS), st.binary(max_size=90))
def test_arbitrary_bytes_are_refused(form: str, noise: bytes) -> None:
    packet, spec = packet_of(form)
    for each in (noise, packet[:HEADER_BYTES] + noise, resealed(packet[:HEADER_BYTES] + noise)):
        with pytest.raises(PacketError):
            decode(each, spec, SHAPES)


@pytest.mark.parametrize(
    ("form", "change", "shapes", "field"),
    [
        ("lowrank", {"rank": 3}, SHAPES, "layout"),
        ("topk", {"share": 0.2}, SHAPES, "layout"),
        ("bf16", {"form": "sign"}, SHAPES, "form"),
        ("bf16", {}, SHAPES[:2], "entries"),
        ("bf16", {}, [(24, 40), (7,), (3, 5)], "layout"),
    ],
)
def test_a_packet_of_another_stage_or_spec_is_refused(
    form: str, change: dict[str, object], shapes: list[tuple[int, ...]], field: str
) -> None:
    packet, spec = packet_of(form)
    assert len(decode(packet, replace(spec, rank=spec.rank if form == "lowrank" else 9), SHAPES)) == 3
    with pytest.raises(PacketError) as caught:
        decode(packet, replace(spec, **change), shapes)  # type: ignore[arg-type]
    assert caught.value.field == field


def crafted(form: str, section_form: int, raw: bytes, shape: tuple[int, ...], **settings: float) -> None:
    """Decode a packet whose one section has these bytes."""
    spec = CorrectionSpec(form, **settings)  # type: ignore[arg-type]
    packet = CorrectionEncoder(spec, [shape]).encode([torch.zeros(shape)])
    decode(with_sections(packet, (section_form, 0, len(raw), raw)), spec, [shape])


INFINITE, LARGE = 0x7F80, 0x7F00  # as bf16: Inf, 1.7e38


@pytest.mark.parametrize(
    ("form", "section_form", "raw", "shape", "message"),
    [
        ("bf16", 0, bytes([0x80, 0x7F]), (1,), "values"),
        ("bf16", 0, bytes([0xC1, 0xFF]), (1,), "values"),
        ("bf16", 1, bytes(2), (1,), "section"),
        ("topk", 0, bytes([255] * 10) + bytes(20), (20,), "places"),
        ("topk", 0, bytes(10) + bytes([0x80] * 10 + [0x7F] * 10), (20,), "values"),
        ("lowrank", 0, (bytes([0x00]) * 5 + bytes([0x7F]) * 5) * 2, (5, 5), "values"),
        ("sign", 4, bytes(1), (8,), "section form"),
        ("sign", 2, bytes([255]), (8,), "payload"),
        ("sign", 2, bytes([1, 255, 255]), (8,), "payload|raw_bytes"),
        ("sign", 1, bytes([0, 0]), (8,), "payload"),
    ],
)
def test_contents_that_no_sender_writes_are_refused(
    form: str, section_form: int, raw: bytes, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(PacketError, match=message):
        crafted(form, section_form, raw, shape, rank=1, share=0.5)


def test_the_crafted_packets_are_else_whole() -> None:
    crafted("topk", 0, bytes(10) + bytes([0x80] * 10 + [0x3F] * 10), (20,), share=0.5)
    crafted("lowrank", 0, (bytes([0x00]) * 5 + bytes([0x3F]) * 5) * 2, (5, 5), rank=1)
    crafted("sign", 2, bytes([1, 128]), (8,))


BIG = (512, 512)
FRAME = zstandard.ZstdCompressor(level=1).compress


@pytest.mark.parametrize(
    ("name", "packing", "raw_bytes", "stored"),
    [
        ("claims too much", 1, 2**31, FRAME(bytes(1 << 20))),
        ("states too much", 1, 2 << 18, FRAME(bytes(64 << 20))),
        ("states nothing", 1, 2 << 18, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2 << 18))),
        ("two frames", 1, 2 << 18, FRAME(bytes(2 << 18)) * 2),
        ("cut", 1, 2 << 18, FRAME(bytes(2 << 18))[:-2]),
        ("no frame", 1, 2 << 18, b"\x28\xb5\x2f\xfd nothing"),
        ("unknown packing", 2, 2 << 18, FRAME(bytes(2 << 18))),
        ("raw, but shorter", 0, 2 << 18, bytes(9)),
        ("zstd, but not smaller", 1, 3, FRAME(b"abc")),
    ],
)
def test_bombs_and_liars_are_refused_without_memory(name: str, packing: int, raw_bytes: int, stored: bytes) -> None:
    spec = CorrectionSpec("bf16")
    packet = CorrectionEncoder(spec, [BIG]).encode([torch.zeros(BIG)])
    assert not decode(with_sections(packet, (0, 1, 2 << 18, FRAME(bytes(2 << 18)))), spec, [BIG])[0].any()
    packet = with_sections(packet, (0, packing, raw_bytes, stored))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(packet, spec, [BIG])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20, name
