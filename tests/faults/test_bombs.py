"""Small bytes that ask for gigabytes are refused before anything is allocated; a recorded session moves nothing again."""

from __future__ import annotations

import functools
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zstandard
from frame_corpus import BATCH, STAGES, TICK, Corpus, Specimen, batch, manifest, stamp
from frame_mutator import recounted, resealed
from frame_readers import TYPED, Readers, peak_bytes

from anchor_node.replay_store import BASES
from codec import sections, weight_delta
from codec.basis import Basis
from codec.corrections import CorrectionSpec
from codec.corrections import decode as decode_correction
from codec.errors import CodecError
from codec.header import HEADER2_BYTES, HEADER_BYTES
from codec.link_codec import LinkCodec
from codec.spec import Direction, LinkSpec
from swarm_core.wire.errors import BadFrame, ManifestMismatch, StaleEpoch
from swarm_core.wire.frames import CHUNK_BYTES, Frame, Header, _header_bytes, _length_bytes, address_of, chunks_of
from swarm_core.wire.frames import HEADER_BYTES as HEADER_SIZE
from swarm_core.wire.messages import (
    BasisSet,
    BatchData,
    Decide,
    FrameKind,
    Outcome,
    Report,
    Sketch,
    Vote,
    from_bytes,
    to_bytes,
)
from swarm_worker.admission import Admission
from swarm_worker.headers import Position, key
from swarm_worker.schedule import ActivationCame, Begun, Decided, GradientCame, ProtocolError, Schedule, VoteCame

MIB = 1 << 20
LINK = LinkSpec("lowrank", 32, 8, 8, quantiser_forward="uniform", quantiser_backward="uniform")
ROWS = 64


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    torch.set_num_threads(1)
    return Corpus()


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[Readers]:
    made = Readers(tmp_path)
    yield made
    made.close()


def most_bytes(work: Callable[[], object], error: type[Exception] | tuple[type[Exception], ...]) -> int:
    """The most that Python and numpy had allocated at a time while `work` was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(error):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@functools.cache
def zstd_bombs(declared: int) -> dict[str, bytes]:
    """Frames of zeros: with their true size, that of the packet (a lie), none at all, and several one after the other."""
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(256 * MIB))
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    unsized = stream.compress(bytes(64 * MIB)) + stream.flush()
    honest = zstandard.ZstdCompressor().compress(bytes(declared))
    lying = bytearray(zeros)
    assert zstandard.get_frame_parameters(zeros).content_size == 256 * MIB
    at = lying.index((256 * MIB).to_bytes(4, "little"))
    lying[at : at + 4] = declared.to_bytes(4, "little")
    return {"sized": zeros, "lying": bytes(lying), "unsized": unsized, "several": honest + zeros, "empty": b""}


def link_packet(frame: bytes, raw_bytes: int) -> bytes:
    """A sound header in front of it, with the length and the raw size said."""
    basis = Basis.orthonormal(1, torch.eye(32)[:, :8], 0.25)
    whole = LinkCodec(LINK).encode(torch.randn(ROWS, 32), Direction.FORWARD, basis)
    head = bytearray(whole[:HEADER2_BYTES])
    head[3 * 2 + 2] = 1  # packing: zstd
    struct.pack_into(">BI", head, HEADER2_BYTES - 10, 0xCE, raw_bytes)
    return resealed(bytes(head) + frame)


@pytest.mark.parametrize("which", ["sized", "lying", "unsized", "several", "empty"])
@pytest.mark.parametrize("raw_bytes", [500, 256 * MIB, (1 << 32) - 1])
def test_a_zstd_bomb_in_a_link_packet(which: str, raw_bytes: int) -> None:
    packet = link_packet(zstd_bombs(500)[which], raw_bytes)
    assert len(packet) < MIB // 4
    basis = Basis.orthonormal(1, torch.eye(32)[:, :8], 0.25)
    work = lambda: LinkCodec(LINK).decode(packet, ROWS, Direction.FORWARD, basis)
    assert most_bytes(work, CodecError) < MIB


@pytest.mark.parametrize("which", ["sized", "lying", "unsized", "several", "empty"])
@pytest.mark.parametrize("raw_bytes", [200, 256 * MIB, (1 << 32) - 1])
def test_a_zstd_bomb_in_a_section(which: str, raw_bytes: int) -> None:
    bomb = zstd_bombs(200)[which]
    section = struct.pack("<BBII", 0, 1, raw_bytes, len(bomb)) + bomb
    spec, shapes = CorrectionSpec("bf16"), [(10, 10)]
    writer = sections.SectionWriter(3, spec.number, 1, spec.layout(shapes))
    correction = resealed(writer.close() + section)
    assert most_bytes(lambda: decode_correction(correction, spec, shapes), CodecError) < MIB
    empty = weight_delta.encode([torch.zeros(100)], None)
    weights = resealed(empty[: sections.HEADER_BYTES] + section)
    assert most_bytes(lambda: weight_delta.decode(weights, None, [(100,)], torch.float32), CodecError) < MIB


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an ext type
        b"\x91" * 100_000,  # arrays in arrays
        msgpack.packb([1] * 11) * 50,
        msgpack.packb({"format": 1}) + bytes(64),
    ],
)
def test_a_msgpack_bomb_where_a_header_should_be(bomb: bytes) -> None:
    packet = bomb + bytes(HEADER_BYTES)
    basis = Basis.orthonormal(1, torch.eye(32)[:, :8], 0.25)
    for work in (
        lambda: LinkCodec(LINK).decode(packet, ROWS, Direction.FORWARD, basis),
        lambda: weight_delta.decode(packet, None, [(100,)], torch.float32),
        lambda: decode_correction(packet, CorrectionSpec("bf16"), [(10, 10)]),
    ):
        assert most_bytes(work, CodecError) < MIB


@pytest.mark.parametrize(
    ("kind", "element"),
    [
        (Vote, b"\x0a\x00"),
        (Report, b"\x2a\x00"),
        (BasisSet, b"\x1a\x00"),
        (Report, b"\x1a\x00"),
        (Vote, b"\x0a\x02\x22\x00"),
    ],
)
def test_a_protobuf_bomb_of_empty_elements(kind: type[Any], element: bytes) -> None:
    """Four MiB of them would be two million objects of half a kilobyte each."""
    data = element * (4 * MIB // len(element))
    if element == b"\x0a\x02\x22\x00":  # packed numbers, none of them: a vote each all the same
        assert len(data) == 4 * MIB
    assert most_bytes(lambda: from_bytes(kind, data), BadFrame) < MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux' own counters")
def test_lengths_that_ask_for_more_than_there_is(corpus: Corpus, readers: Readers) -> None:
    """Sequences of 2^32 - 1 tokens, in a batch of a few bytes: the index tensors of their rows would have 100 GiB."""
    specimen = next(s for s in corpus.specimens if s.frame.header.kind is FrameKind.BATCH)
    start = peak_bytes(reset=True)
    for name in ("prompt_lengths", "completion_lengths"):
        for length in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x00", b"\x01\x00\x04\x00"):
            data = from_bytes(BatchData, specimen.frame.payload)
            setattr(data, name, length * (len(data.prompt_lengths) // 4))
            with pytest.raises(BadFrame):
                readers.take(specimen.to, chunks_of(Frame(specimen.frame.header, to_bytes(data))))
    assert peak_bytes() - start < 8 * MIB


def test_a_frame_that_says_it_has_a_terabyte(corpus: Corpus, readers: Readers) -> None:
    """Every kind: refused with its first chunk, and not gathered."""
    for specimen in corpus.specimens:
        head = bytes((HEADER_SIZE,)) + _header_bytes(specimen.frame.header, 0, 1 << 20, 1 << 40)
        payload = bytes(CHUNK_BYTES)
        chunk = recounted(bytearray(b"\x0a" + head + b"\x12" + _length_bytes(CHUNK_BYTES) + payload))
        with pytest.raises(BadFrame, match=str(1 << 40)):
            readers.take(specimen.to, [chunk])


# Replays ------------------------------------------------------------------------------------------------------------


def state(readers: Readers) -> dict[str, Any]:
    """What a session moves at the anchor."""
    service = readers.anchor.service
    assert service.slow.keeper is not None
    return {
        "booked": dict(service.memory.booked),
        "totals": dict(service.books.totals),
        "metrics": service.memory.metrics_bytes,
        "ledger": service.memory.ledger_bytes,
        "basis": service.slow.keeper.version,
        "members": {n: (m.stage, m.address, m.ready) for n, m in service.roster.members.items()},
        "saved": {name: dict(of) for name, of in service.roster._saved.items()},
        "tick": service.tick,
    }


def test_a_recorded_session_with_the_anchor_is_stale_when_it_comes_again(corpus: Corpus, readers: Readers) -> None:
    """READY, reports, sketches, snapshots and slices: refused, or booked already; STOP apart, which asks for the end."""
    session = [s for s in corpus.specimens if s.to.startswith("anchor") and s.frame.header.kind is not FrameKind.STOP]
    session = [s for s in session if (getattr(s.message, "words", None) or {}).get("event") != "finished"]
    for specimen in session:
        readers.take(specimen.to, chunks_of(specimen.frame))
    before, files = state(readers), volume(readers)
    outcomes = {s.name: outcome(readers, s) for s in session}
    after = state(readers)
    moved = {name for name in before if before[name] != after[name]}
    assert not moved - {"metrics"}, {name: (before[name], after[name]) for name in moved}
    assert volume(readers) == files, "a file of the volume is another one"
    assert outcomes["anchor READY"] == "BadFrame"
    assert outcomes["anchor REPORT"] == outcomes["anchor SNAPSHOT"] == "taken", "said to be here already"


def volume(readers: Readers) -> dict[str, int]:
    root = readers.anchor.service.out / "replay"
    files = [f for f in root.rglob("*") if f.is_file()]  # safetensors puts metadata in another order every time
    return {str(f.relative_to(root)): 0 if f.name == BASES else zlib.crc32(f.read_bytes()) for f in files}


def outcome(readers: Readers, specimen: Specimen) -> str:
    try:
        readers.take(specimen.to, chunks_of(specimen.frame))
    except TYPED as error:
        return type(error).__name__
    return "taken"


def test_recorded_frames_of_a_link_are_of_a_round_that_is_over(corpus: Corpus) -> None:
    of = manifest("uniform")
    schedule, later = Schedule(1, STAGES), replace(stamp(of), tick=TICK + 1)
    schedule.handle(Begun(later))
    for specimen in corpus.specimens:
        header = specimen.frame.header
        events = {
            FrameKind.ACTIVATION: ActivationCame(key(header), header.microbatch),
            FrameKind.GRADIENT: GradientCame(key(header), header.microbatch),
            FrameKind.VOTE: VoteCame(key(header)),
            FrameKind.DECIDE: Decided(Decide(Outcome.COMMIT, 0.5), key(header)),
        }
        if header.kind in events:
            with pytest.raises(ProtocolError):
                schedule.handle(events[header.kind])
    assert not schedule._rounds[0].activations and not schedule._rounds[0].gradients and len(schedule._rounds) == 1
    admission = Admission(1, 7, of.link(), of.config.links, Position(TICK + 1, 10, 2), {BATCH: batch(of.vocab)})
    for epoch, error in ((1, StaleEpoch), (3, StaleEpoch)):
        with pytest.raises(error):
            admission.check(Header(FrameKind.ACTIVATION, 7, epoch, TICK, receiver=address_of(1)))
    with pytest.raises(ManifestMismatch, match="do not share a history"):
        begin = next(s for s in corpus.specimens if s.frame.header.kind is FrameKind.BEGIN)
        admission.stamp(begin.frame)


def test_a_sketch_is_its_senders_own_and_of_a_tick_that_the_run_comes_to(corpus: Corpus, readers: Readers) -> None:
    specimen = next(s for s in corpus.specimens if s.frame.header.kind is FrameKind.SKETCH)
    for stage in (0, 2):
        with pytest.raises(BadFrame, match="that is not its own"):
            readers.take(f"anchor, of stage {stage}", chunks_of(specimen.frame))
    for tick in (100, 2**32 - 1):
        late = replace(from_bytes(Sketch, specimen.frame.payload), tick=tick)
        with pytest.raises(BadFrame, match="the run ends with tick 99"):
            readers.take(specimen.to, chunks_of(replace(specimen.frame, payload=to_bytes(late))))
    assert readers.anchor.service.slow.keeper is not None
    assert not readers.anchor.service.slow.keeper._seen
    readers.take(specimen.to, chunks_of(specimen.frame))
    assert readers.anchor.service.slow.keeper._seen
