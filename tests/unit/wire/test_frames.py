"""Frames: what comes out is what went in, at a size known beforehand, and nothing else gets through."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.frames import (
    CHUNK_BYTES,
    CHUNK_UNIT_BYTES,
    FRAME_OVERHEAD,
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    Assembler,
    Frame,
    Header,
    address_of,
    chunks_of,
    message_bytes,
    run_id,
)
from swarm_core.wire.messages import FrameKind, Mode
from swarm_proto.v1 import swarm_pb2

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from(FrameKind),
    run=U64,
    epoch=U32,
    tick=U32,
    attempt=U32,
    lineage=U64,
    mode=st.sampled_from(Mode),
    batch=U32,
    pass_=U32,
    slice=U32,
    microbatch=U32,
    receiver=U32,
)
FULL = Header(FrameKind.ACTIVATION, 2**63 + 5, 1, 2, 3, 2**64 - 1, Mode.SCORE, 4, 5, 6, 7, 1 << 16)
LARGE = {kind: 1 << 24 for kind in FrameKind}
GOLDEN_CRC, GOLDEN_CHUNK_CRCS = 0xFD782727, [0xD7797532, 0x243FB35B, 0x8147A605]
SIZES = [0, 1, 2, 127, 128, 16_383, 16_384, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 << 20]


def payload(size: int) -> bytes:
    pattern = bytes(range(251))  # a prime length: chunks differ from each other
    return (pattern * (size // 251 + 1))[:size]


def assembled(messages: list[bytes], assembler: Assembler | None = None) -> Frame:
    assembler = assembler or Assembler(LARGE)
    for message in messages[:-1]:
        assert assembler.feed(message) is None
    frame = assembler.feed(messages[-1])
    assert frame is not None
    return frame


def forged(message: bytes, **fields: int) -> bytes:
    """The message with other header fields and a checksum that fits them: what a hostile peer sends."""
    header = swarm_pb2.FrameHeader.FromString(message[2 : 2 + HEADER_BYTES])
    for name, value in fields.items():
        setattr(header, name, value)
    header.checksum = 0
    text, body = header.SerializeToString(), message[2 + HEADER_BYTES + 5 :]
    header.checksum = zlib.crc32(body, zlib.crc32(text[:79] + text[83:]))
    return message[:2] + header.SerializeToString() + message[2 + HEADER_BYTES :]


def resized(message: bytes, body: bytes) -> bytes:
    """The message with another payload of its chunk, and everything fitting it but the announced total."""
    head = message[: 2 + HEADER_BYTES]
    n = len(body)
    length = bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21))
    return forged(head + b"\x12" + length + body)


@pytest.mark.parametrize("size", SIZES)
def test_any_size_comes_back_at_the_size_foretold(size: int) -> None:
    frame = Frame(FULL, payload(size))
    messages = list(chunks_of(frame))
    assert sum(map(len, messages)) == message_bytes(size)
    assert [len(m) - FRAME_OVERHEAD for m in messages[:-1]] == [CHUNK_BYTES] * (len(messages) - 1)
    assert all(len(m) <= MAX_MESSAGE_BYTES for m in messages)
    back = assembled(messages)
    assert back.header == FULL
    assert bytes(back.payload) == payload(size)


@settings(derandomize=True)
@given(HEADERS, st.binary(max_size=300))
def test_any_header_comes_back_and_costs_the_same(header: Header, body: bytes) -> None:
    (message,) = chunks_of(Frame(header, body))
    assert len(message) == FRAME_OVERHEAD + len(body) == message_bytes(len(body))
    back = assembled([message])
    assert (back.header, bytes(back.payload)) == (header, body)


@settings(derandomize=True)
@given(HEADERS, st.binary(max_size=300))
def test_a_message_is_valid_protobuf(header: Header, body: bytes) -> None:
    (message,) = chunks_of(Frame(header, body))
    parsed = swarm_pb2.Frame.FromString(message)
    assert parsed.payload == body
    names = ("run", "epoch", "tick", "attempt", "lineage", "batch", "slice", "microbatch", "receiver", "kind", "mode")
    assert all(getattr(parsed.header, name) == getattr(header, name) for name in names)
    assert getattr(parsed.header, "pass") == header.pass_
    assert (parsed.header.chunk, parsed.header.chunks, parsed.header.total_bytes) == (0, 1, len(body))
    assert all(parsed.header.HasField(name.name) for name in parsed.header.DESCRIPTOR.fields)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_payloads_of_any_bytes_like_kind(kind: type) -> None:
    assert bytes(assembled(list(chunks_of(Frame(FULL, kind(b"abc"))))).payload) == b"abc"


def test_many_frames_through_one_assembler() -> None:
    assembler = Assembler(LARGE)
    for size in (5, CHUNK_BYTES + 7, 0, 3 * CHUNK_BYTES, CHUNK_BYTES + 1):
        header = replace(FULL, tick=size)
        back = assembled(list(chunks_of(Frame(header, payload(size)))), assembler)
        assert (back.header, bytes(back.payload)) == (header, payload(size))


def test_every_changed_byte_of_the_envelope_is_refused() -> None:
    (message,) = chunks_of(Frame(FULL, b"payload"))
    for at in range(len(message)):
        for value in range(256):
            if value == message[at]:
                continue
            with pytest.raises(BadFrame):
                Assembler(LARGE).feed(message[:at] + bytes((value,)) + message[at + 1 :])


def test_every_changed_header_byte_of_a_later_chunk_is_refused() -> None:
    first, second = chunks_of(Frame(FULL, payload(CHUNK_BYTES + 40)))
    assembler = Assembler(LARGE)
    assembler.feed(first)
    for at in range(len(second)):
        for flip in (1, 128):
            with pytest.raises(BadFrame):
                assembler.feed(second[:at] + bytes((second[at] ^ flip,)) + second[at + 1 :])
    frame = assembler.feed(second)  # and what was refused has left no trace
    assert frame is not None and bytes(frame.payload) == payload(CHUNK_BYTES + 40)


def test_every_truncation_and_extension_is_refused() -> None:
    (message,) = chunks_of(Frame(FULL, b"payload"))
    for end in range(len(message)):
        with pytest.raises(BadFrame):
            Assembler(LARGE).feed(message[:end])
    with pytest.raises(BadFrame):
        Assembler(LARGE).feed(message + b"\0")


@settings(max_examples=300, derandomize=True)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadFrame):
        Assembler(LARGE).feed(noise)
    with pytest.raises(BadFrame):
        Assembler(LARGE).feed(bytes((0x0A, HEADER_BYTES)) + noise)


def test_a_message_over_the_grpc_limit_is_refused() -> None:
    with pytest.raises(BadFrame, match="not a frame"):
        Assembler(LARGE).feed(b"\x0a" + bytes(MAX_MESSAGE_BYTES))


@pytest.mark.parametrize(
    "fields", [{"kind": 0}, {"kind": max(FrameKind) + 1}, {"kind": 2**32 - 1}, {"mode": max(Mode) + 1}]
)
def test_an_unknown_kind_or_mode_is_refused(fields: dict[str, int]) -> None:
    (message,) = chunks_of(Frame(FULL, b"x"))
    with pytest.raises(BadFrame, match="another version"):
        Assembler(LARGE).feed(forged(message, **fields))


def test_chunks_out_of_order_twice_or_left_out_are_refused() -> None:
    chunks = list(chunks_of(Frame(FULL, payload(3 * CHUNK_BYTES))))
    for order in ((1,), (2,), (0, 0), (0, 2), (0, 1, 1), (0, 1, 0)):
        assembler = Assembler(LARGE)
        for index in order[:-1]:
            assert assembler.feed(chunks[index]) is None
        with pytest.raises(BadFrame, match="expected"):
            assembler.feed(chunks[order[-1]])


@pytest.mark.parametrize("change", [{"tick": 9}, {"microbatch": 0}, {"kind": 11}, {"run": 1}])
def test_chunks_of_two_frames_do_not_mix(change: dict[str, int]) -> None:
    first, second = chunks_of(Frame(FULL, payload(CHUNK_BYTES + 5)))
    assembler = Assembler(LARGE)
    assembler.feed(first)
    with pytest.raises(BadFrame, match="expected"):
        assembler.feed(forged(second, **change))


@pytest.mark.parametrize(
    "fields",
    [
        {"chunks": 0},
        {"chunks": 3},
        {"chunks": 2**32 - 1},
        {"total_bytes": 1},
        {"total_bytes": CHUNK_BYTES},
        {"total_bytes": 2 * CHUNK_BYTES + 1},
        {"chunk": 1},
        {"chunk": 2},
        {"chunk": 2**32 - 1},
    ],
)
def test_lies_about_chunks_and_total_are_refused(fields: dict[str, int]) -> None:
    first, _ = chunks_of(Frame(FULL, payload(CHUNK_BYTES + 5)))
    with pytest.raises(BadFrame):
        Assembler(LARGE).feed(forged(first, **fields))


def test_a_total_that_changes_on_the_way_is_refused() -> None:
    first, second = chunks_of(Frame(FULL, payload(CHUNK_BYTES + 5)))
    for total in (CHUNK_BYTES + 4, CHUNK_BYTES + 6):
        assembler = Assembler(LARGE)
        assembler.feed(first)
        with pytest.raises(BadFrame):
            assembler.feed(forged(second, total_bytes=total))


def test_chunks_of_another_size_than_announced_are_refused() -> None:
    first, second = chunks_of(Frame(FULL, payload(CHUNK_BYTES + 5)))
    for body in (b"", payload(CHUNK_BYTES - 1), payload(CHUNK_BYTES + 1)):
        with pytest.raises(BadFrame, match="wanted"):
            Assembler(LARGE).feed(resized(first, body))
    for body in (b"", payload(4), payload(6)):
        assembler = Assembler(LARGE)
        assembler.feed(first)
        with pytest.raises(BadFrame, match="wanted"):
            assembler.feed(resized(second, body))
    (single,) = chunks_of(Frame(FULL, b"12345"))
    with pytest.raises(BadFrame, match="wanted"):
        Assembler(LARGE).feed(resized(single, b"1234"))


@pytest.mark.parametrize("chunk_bytes", [CHUNK_UNIT_BYTES, 3 * CHUNK_UNIT_BYTES, CHUNK_BYTES // 2])
def test_a_sender_may_choose_smaller_chunks(chunk_bytes: int) -> None:
    assembler = Assembler(LARGE)
    for size in (0, 1, chunk_bytes - 1, chunk_bytes, chunk_bytes + 1, 7 * chunk_bytes, CHUNK_BYTES + 5):
        messages = list(chunks_of(Frame(FULL, payload(size)), chunk_bytes))
        assert sum(map(len, messages)) == message_bytes(size, chunk_bytes)
        assert max(map(len, messages)) <= chunk_bytes + FRAME_OVERHEAD
        back = assembled(messages, assembler)
        assert (back.header, bytes(back.payload)) == (FULL, payload(size))


def test_smaller_chunks_are_of_one_size_and_not_tiny() -> None:
    whole = Frame(FULL, payload(5 * CHUNK_UNIT_BYTES))
    one, two = CHUNK_UNIT_BYTES, 2 * CHUNK_UNIT_BYTES
    for chunk_bytes in (1, one - 1, one + 1, one // 2):
        with pytest.raises(BadFrame, match="wanted"):
            Assembler(LARGE).feed(next(chunks_of(whole, chunk_bytes)))
    (_, small, *_), (first, large, _) = chunks_of(whole, one), chunks_of(whole, two)
    assembler = Assembler(LARGE)
    assembler.feed(first)
    for other in (small, forged(small, chunks=3), resized(large, payload(two - 1))):
        with pytest.raises(BadFrame):
            assembler.feed(other)
    assert assembler.feed(large) is None
    above = Frame(FULL, payload(3 * CHUNK_BYTES))
    with pytest.raises(BadFrame, match="wanted"):
        Assembler(LARGE).feed(next(chunks_of(above, CHUNK_BYTES + one)))


def test_the_wire_form_has_not_changed() -> None:
    """A frame of the first version of the protocol, byte for byte."""
    (message,) = chunks_of(Frame(FULL, b"payload"))
    assert zlib.crc32(message) == GOLDEN_CRC and len(message) == FRAME_OVERHEAD + 7
    chunks = list(chunks_of(Frame(FULL, payload(2 * CHUNK_BYTES + 9))))
    assert [zlib.crc32(chunk) for chunk in chunks] == GOLDEN_CHUNK_CRCS


def test_limits_are_by_kind_and_the_default_is_one_message() -> None:
    assembler = Assembler({FrameKind.ACTIVATION: 10})
    assert assembled(list(chunks_of(Frame(FULL, payload(10)))), assembler)
    with pytest.raises(BadFrame, match="at most 10"):
        assembler.feed(next(chunks_of(Frame(FULL, payload(11)))))
    vote = Header(FrameKind.VOTE)
    assert assembled(list(chunks_of(Frame(vote, payload(MAX_MESSAGE_BYTES)))), Assembler({}))
    with pytest.raises(BadFrame, match="VOTE frame"):
        Assembler({}).feed(next(chunks_of(Frame(vote, payload(MAX_MESSAGE_BYTES + 1)))))


def test_refused_before_anything_is_allocated() -> None:
    (small,) = chunks_of(Frame(FULL, b"12345"))
    huge = 1 << 40
    announced = forged(small, total_bytes=huge, chunks=huge // CHUNK_BYTES)
    within = forged(small, total_bytes=1 << 30, chunks=1 << 10)  # the limit allows it, the first chunk gives it away
    tracemalloc.start()
    try:
        for message, limit in ((announced, 1 << 24), (within, 1 << 30)):
            with pytest.raises(BadFrame):
                Assembler({FrameKind.ACTIVATION: limit}).feed(message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_addresses() -> None:
    assert run_id("ff" * 8 + "00" * 24) == 2**64 - 1
    assert (address_of(3), address_of(3, 2)) == (3 << 16, 3 << 16 | 2)


def test_a_limit_may_look_at_the_whole_header() -> None:
    assembler = Assembler({})
    assembler.limit = lambda header: header.microbatch
    assert assembled(list(chunks_of(Frame(replace(FULL, microbatch=5), b"12345"))), assembler)
    with pytest.raises(BadFrame, match="at most 4"):
        assembler.feed(next(chunks_of(Frame(replace(FULL, microbatch=4), b"12345"))))
