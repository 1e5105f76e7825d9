"""The wire format: readable as msgpack, one spelling only, and nothing claimed in a packet is believed unchecked."""

import struct
import tracemalloc
import zlib

import msgpack
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.errors import BasisMismatch, CodecError, PacketError
from codec.header import CHECKED_BYTES, CRC_FIELD_BYTES, HEADER2_BYTES, NO_BASIS, Direction, Element, Kind
from codec.packet import HEADER_BYTES, Contents, Expected, pack
from codec.packet import unpack as unpack_expected

LOWRANK = Contents(Kind.LOWRANK, Direction.FORWARD, Element.BF16, rows=3, columns=4, basis_version=7)
DENSE = Contents(Kind.NONE, Direction.BACKWARD, Element.BF16, rows=3, columns=4, basis_version=None)
RAW = bytes(range(24))
BIG = Contents(Kind.IDENTITY, Direction.FORWARD, Element.FP32, rows=64, columns=64, basis_version=None)


def size_of(contents: Contents) -> int:
    return contents.rows * contents.columns * contents.element.bytes


def unpack(packet: bytes | bytearray | memoryview, contents: Contents) -> memoryview:
    """The payload of a packet that a receiver expects to hold `contents`."""
    expected = Expected(
        *(getattr(contents, name) for name in ("kind", "direction", "element", "rows", "columns", "basis_version")),
        payload_bytes=lambda columns, outliers: contents.rows * columns * contents.element.bytes,
        most_columns=contents.columns,
    )
    return unpack_expected(packet, expected)[1]


BIG_RAW = bytes(size_of(BIG))


def frame_of(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(raw)


SAMPLES = [(pack(LOWRANK, RAW), LOWRANK), (pack(DENSE, RAW), DENSE), (pack(BIG, BIG_RAW, frame_of(BIG_RAW)), BIG)]


def resealed(packet: bytes) -> bytes:
    """The packet with a checksum that fits: what a hostile peer sends, rather than a noisy line."""
    crc = zlib.crc32(packet[HEADER_BYTES:], zlib.crc32(packet[:CHECKED_BYTES]))
    return packet[:CHECKED_BYTES] + struct.pack(">BI", 0xCE, crc) + packet[HEADER_BYTES:]


def with_payload(contents: Contents, payload: bytes) -> bytes:
    """A sealed packet around any bytes that claims to hold `contents` as a zstd frame."""
    packet = bytearray(pack(contents, bytes(size_of(contents)), b""))
    assert packet[10] == 1  # says zstd
    packet[26:31] = struct.pack(">BI", 0xCE, len(payload))
    return resealed(bytes(packet[:HEADER_BYTES]) + payload)


def test_the_header_is_msgpack() -> None:
    packet = pack(LOWRANK, RAW)
    header = msgpack.unpackb(packet[:HEADER_BYTES])
    assert header == [1, 2, 0, 0, 0, 3, 4, 7, 24, 24, header[-1]]
    dense = msgpack.unpackb(pack(DENSE, RAW)[:HEADER_BYTES])
    assert dense[:10] == [1, 1, 1, 0, 0, 3, 4, NO_BASIS, 24, 24]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_round_trip_and_size(wrap: type) -> None:
    packet = pack(LOWRANK, RAW)
    assert len(packet) == HEADER_BYTES + 24
    assert bytes(unpack(wrap(packet), LOWRANK)) == RAW


def test_a_raw_payload_is_not_copied() -> None:
    packet = bytearray(pack(LOWRANK, RAW))
    payload = unpack(packet, LOWRANK)
    packet[-1] = 99
    assert payload[-1] == 99


def test_zstd_is_used_only_when_smaller() -> None:
    frame = frame_of(BIG_RAW)
    packet = pack(BIG, BIG_RAW, frame)
    assert len(packet) == HEADER_BYTES + len(frame) < 100
    assert bytes(unpack(packet, BIG)) == BIG_RAW
    assert pack(LOWRANK, RAW, frame_of(RAW)) == pack(LOWRANK, RAW)


def test_a_payload_beyond_the_window_limit_still_travels() -> None:
    contents = Contents(Kind.IDENTITY, Direction.FORWARD, Element.FP32, 5 << 10, 1 << 9, None)
    raw = bytes(range(256)) * (size_of(contents) // 256)
    assert len(raw) > 8 << 20
    assert unpack(pack(contents, raw, frame_of(raw)), contents) == raw


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": Kind.NONE}, "kind"),
        ({"direction": Direction.BACKWARD}, "direction"),
        ({"element": Element.FP32}, "element"),
        ({"rows": 4}, "rows"),
        ({"columns": 3}, "columns"),
    ],
)
def test_every_expectation_is_checked_and_named(change: dict[str, int], field: str) -> None:
    expected = Contents(**{name: getattr(LOWRANK, name) for name in LOWRANK.__dataclass_fields__} | change)
    with pytest.raises(PacketError) as caught:
        unpack(pack(LOWRANK, RAW), expected)
    assert caught.value.field == field
    assert caught.value.got == int(getattr(LOWRANK, field))
    assert caught.value.wanted == int(getattr(expected, field))


@pytest.mark.parametrize("held", [6, None, 0, NO_BASIS - 1])
def test_another_basis_version_is_a_mismatch(held: int | None) -> None:
    expected = Contents(Kind.LOWRANK, Direction.FORWARD, Element.BF16, 3, 4, held)
    with pytest.raises(BasisMismatch) as caught:
        unpack(pack(LOWRANK, RAW), expected)
    assert (caught.value.needed, caught.value.held) == (7, held)


def test_no_basis_is_not_a_version() -> None:
    """A low-rank packet that claims 'no basis' must not fit a receiver that has none."""
    nothing = Contents(Kind.LOWRANK, Direction.FORWARD, Element.BF16, 3, 4, None)
    with pytest.raises(BasisMismatch):
        unpack(pack(nothing, RAW), nothing)
    with pytest.raises(PacketError, match="basis_version"):
        unpack(resealed(pack(DENSE, RAW)[:21] + struct.pack(">BI", 0xCE, 7) + pack(DENSE, RAW)[26:]), DENSE)


def test_a_damaged_version_is_damage_and_not_a_mismatch() -> None:
    packet = bytearray(pack(LOWRANK, RAW))
    packet[25] ^= 1
    with pytest.raises(PacketError, match="crc32"):
        unpack(packet, LOWRANK)


@pytest.mark.parametrize(("packet", "expected"), SAMPLES, ids=["lowrank", "none", "zstd"])
def test_every_damaged_byte_is_caught(packet: bytes, expected: Contents) -> None:
    assert len(unpack(packet, expected)) == size_of(expected)
    for position in range(len(packet)):
        for flip in range(1, 256):
            damaged = bytearray(packet)
            damaged[position] ^= flip
            with pytest.raises(CodecError):
                unpack(damaged, expected)
    for length in range(len(packet)):
        with pytest.raises(PacketError):
            unpack(packet[:length], expected)
    for extra in (b"\0", b"\xff" * 9, packet):
        with pytest.raises(PacketError):
            unpack(packet + extra, expected)


@pytest.mark.parametrize(("packet", "expected"), SAMPLES, ids=["lowrank", "none", "zstd"])
def test_every_forged_byte_gives_the_right_length_or_a_codec_error(packet: bytes, expected: Contents) -> None:
    """A hostile peer also forges the checksum. It may change the numbers, which are its own; never our behaviour."""
    refused = 0
    for position in range(len(packet)):
        for flip in range(1, 256):
            forged = bytearray(packet)
            forged[position] ^= flip
            try:
                assert len(unpack(resealed(bytes(forged)), expected)) == size_of(expected)
            except CodecError:
                refused += 1
    assert refused >= 255 * (CHECKED_BYTES - 5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(PacketError):
        unpack(noise, LOWRANK)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(min_size=1, max_size=200))
def test_arbitrary_zstd_payloads_are_refused(noise: bytes) -> None:
    for payload in (noise, b"\x28\xb5\x2f\xfd" + noise):
        with pytest.raises(PacketError):
            unpack(with_payload(BIG, payload), BIG)


def rle_frame(stated_bytes: int, real_bytes: int) -> bytes:
    """A zstd frame of one run-length block; it states one size and yields another."""
    return (
        b"\x28\xb5\x2f\xfd"
        + b"\xa0"  # single segment, content size in four bytes
        + struct.pack("<I", stated_bytes)
        + struct.pack("<I", 1 | 1 << 1 | real_bytes << 3)[:3]  # last block, run length
        + b"\0"
    )


def test_the_handmade_frame_is_a_frame() -> None:
    assert bytes(unpack(with_payload(BIG, rle_frame(size_of(BIG), size_of(BIG))), BIG)) == BIG_RAW


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("bomb", frame_of(bytes(256 << 20))[: size_of(BIG) - 1]),
        ("states too much", rle_frame(2**32 - 1, size_of(BIG))),
        ("states less", rle_frame(size_of(BIG) - 1, size_of(BIG))),
        ("states right, yields more", rle_frame(size_of(BIG), 100_000)),
        ("states right, yields less", rle_frame(size_of(BIG), 100)),
        ("states nothing", zstandard.ZstdCompressor(write_content_size=False).compress(BIG_RAW)),
        ("two frames", rle_frame(size_of(BIG), size_of(BIG)) * 2),
        ("cut", frame_of(BIG_RAW)[:-2]),
        ("skippable", struct.pack("<II", 0x184D2A50, 8) + bytes(8)),
        ("empty", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bombs_and_liars_are_refused_without_memory(name: str, frame: bytes) -> None:
    packet = with_payload(BIG, frame)
    tracemalloc.start()
    try:
        with pytest.raises(PacketError, match="zstd"):
            unpack(packet, BIG)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 256 << 10, name


UNIFORM = Contents(Kind.LOWRANK, Direction.FORWARD, Element.UNIFORM, 64, 64, basis_version=7, format=2)
UNIFORM_MOST_BYTES = 3 * 64 * 64
STORED_AT, RAW_AT = 33, 38  # of format 2's stored_bytes and raw_bytes


def uniform_packet(payload: bytes, raw_bytes: int) -> bytes:
    """A sealed packet of format 2 that claims to be `raw_bytes` as a zstd frame, around any bytes."""
    packet = bytearray(pack(UNIFORM, bytes(64), b""))
    packet[8], packet[STORED_AT : STORED_AT + 4] = 1, struct.pack(">I", len(payload))
    packet[RAW_AT : RAW_AT + 4] = struct.pack(">I", raw_bytes)
    checked = bytes(packet[: HEADER2_BYTES - CRC_FIELD_BYTES])
    crc = zlib.crc32(payload, zlib.crc32(checked))
    return checked + struct.pack(">BI", 0xCE, crc) + payload


def unpack_uniform(packet: bytes) -> memoryview:
    """What a receiver does whose payloads have at most `UNIFORM_MOST_BYTES`."""
    names = ("kind", "direction", "element", "rows", "columns", "basis_version", "format")
    expected = Expected(
        **{name: getattr(UNIFORM, name) for name in names},
        payload_bytes=lambda columns, outliers: UNIFORM_MOST_BYTES,
        exact=False,
        most_columns=64,
    )
    return unpack_expected(packet, expected)[1]


def test_the_handmade_packet_of_format_2_is_one() -> None:
    assert unpack_uniform(uniform_packet(rle_frame(1000, 1000), 1000)) == bytes(1000)


@pytest.mark.parametrize(
    ("name", "frame", "raw_bytes", "field"),
    [
        ("claims too much", rle_frame(2**30, 2**17), 2**30, "raw_bytes"),
        ("claims one byte too much", rle_frame(UNIFORM_MOST_BYTES + 1, 5), UNIFORM_MOST_BYTES + 1, "raw_bytes"),
        ("states more than it claims", rle_frame(2**31, 2**17), 1000, "zstd content size"),
        ("yields more than it claims", rle_frame(1000, 2**20), 1000, "zstd frame"),
        ("bomb", frame_of(bytes(256 << 20))[: UNIFORM_MOST_BYTES - 1], UNIFORM_MOST_BYTES, "zstd content size"),
        ("two frames", rle_frame(900, 900) * 2, 900, "zstd frame"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bombs_of_format_2_are_refused_without_memory(name: str, frame: bytes, raw_bytes: int, field: str) -> None:
    packet = uniform_packet(frame, raw_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(PacketError) as caught:
            unpack_uniform(packet)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.field == field and peak_bytes < 64 << 10, name
