"""Packets: a header and a payload in one run of bytes, put together once and checked before anything is believed.

Knows bytes and integers; no tensor, no basis, no policy. Nothing is allocated in proportion to what a packet *claims*:
every claim is compared with what the receiver expects first.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import zstandard

from codec.errors import BasisMismatch, PacketError
from codec.header import (
    CRC_FIELD_BYTES,
    HEADER_BYTES,
    NO_BASIS,
    NO_REFERENCES,
    Direction,
    Element,
    Header,
    Kind,
    Packing,
)

__all__ = ["HEADER_BYTES", "BytesLike", "Contents", "Expected", "pack", "unpack"]

BytesLike: TypeAlias = bytes | bytearray | memoryview

ZSTD_MAX_WINDOW_BYTES: Final = 8 << 20  # level 1 uses 512 KiB; more is a peer asking for our memory


@dataclass(frozen=True, slots=True)
class Contents:
    """What the sender states of a packet. `basis_version` is None where no basis is used (`identity`, `none`)."""

    kind: Kind
    direction: Direction
    element: Element
    rows: int
    columns: int
    basis_version: int | None
    format: int = 1
    outliers: int = 0
    references: int = NO_REFERENCES


@dataclass(frozen=True, slots=True)
class Expected:
    """What the receiver expects of a packet.

    `columns` are those of the basis held; a packet made with another may have 1..`most_columns`. `basis_version` is
    None where no basis is used, or none is held. `payload_bytes(columns, outliers)` is the size before zstd; where not
    `exact`, the most it may be. References are not judged here: who holds them does that.
    """

    kind: Kind
    direction: Direction
    element: Element
    rows: int
    columns: int
    basis_version: int | None
    payload_bytes: Callable[[int, int], int]
    format: int = 1
    exact: bool = True
    most_columns: int = 0
    most_outliers: int = 0


def pack(contents: Contents, raw: list[memoryview] | BytesLike, shrunk: bytes | None = None) -> bytes:
    """One packet: the header, then `shrunk` (the payload as a zstd frame) if there is one, else the payload `raw`.

    `raw` is one run of bytes or several that follow each other. The result is assembled in one allocation; the payload
    is copied exactly once. `shrunk` must be smaller than `raw` or it is not used.
    """
    parts = [memoryview(part).cast("B") for part in (raw if isinstance(raw, list) else [raw])]
    raw_bytes = sum(map(len, parts))
    packing = Packing.RAW
    if shrunk is not None and len(shrunk) < raw_bytes:
        parts, packing = [memoryview(shrunk)], Packing.ZSTD
    unsealed = Header(
        format=contents.format,
        kind=contents.kind,
        direction=contents.direction,
        element=contents.element,
        packing=packing,
        rows=contents.rows,
        columns=contents.columns,
        basis_version=NO_BASIS if contents.basis_version is None else contents.basis_version,
        stored_bytes=sum(map(len, parts)),
        raw_bytes=raw_bytes,
        crc32=0,
        outliers=contents.outliers,
        references=contents.references,
    )
    crc32 = zlib.crc32(unsealed.to_bytes()[:-CRC_FIELD_BYTES])
    for part in parts:
        crc32 = zlib.crc32(part, crc32)
    return b"".join((replace(unsealed, crc32=crc32).to_bytes(), *parts))


def unpack(packet: BytesLike, expected: Expected) -> tuple[Header, memoryview]:
    """The header of `packet`, whose claims are then true, and its raw payload.

    Raises `PacketError` naming the first field that is wrong, or `BasisMismatch` if all else is right. The basis
    version is judged last, behind the checksum: a mismatch makes the caller fetch a basis, a flipped bit should not.
    A payload that is stored raw is returned as a view into `packet`, without a copy.
    """
    view = memoryview(packet).cast("B")
    if len(view) < HEADER_BYTES:
        raise PacketError("length", f"{len(view)} bytes", f"at least {HEADER_BYTES}")
    header = Header.parse(view)
    if header is None:
        raise PacketError("header", bytes(view[:HEADER_BYTES]).hex(), "an array of fixed-width msgpack integers")
    _check_claims(header, expected)
    payload = view[header.size :]
    _check_lengths(header, len(payload), expected)
    crc32 = zlib.crc32(payload, zlib.crc32(view[: header.size - CRC_FIELD_BYTES]))
    if header.crc32 != crc32:
        raise PacketError("crc32", f"{header.crc32:#010x}", f"{crc32:#010x}")
    _check_basis(header, expected)
    return header, payload if header.packing == Packing.RAW else expand(payload, header.raw_bytes)


def _check_claims(header: Header, expected: Expected) -> None:
    claims = (
        ("format", header.format, expected.format, "both ends must run the same codec format and manifest"),
        ("kind", header.kind, expected.kind, "both ends must run the same manifest"),
        ("direction", header.direction, expected.direction, "both ends must run the same manifest"),
        ("element", header.element, expected.element, "both ends must run the same manifest"),
        ("rows", header.rows, expected.rows, "the microbatch's lengths decide them: compare its layout on both ends"),
    )
    for field, got, wanted, advice in claims:
        if got != wanted:
            raise PacketError(field, got, int(wanted), advice)
    if _same_basis(header, expected):
        if header.columns != expected.columns:
            raise PacketError("columns", header.columns, expected.columns, "both ends must run the same ranks")
    elif not 1 <= header.columns <= expected.most_columns:
        raise PacketError("columns", header.columns, f"1..{expected.most_columns}", "both ends must run the same ranks")
    if header.outliers > expected.most_outliers:
        raise PacketError("outliers", header.outliers, f"at most {expected.most_outliers}")


def _check_lengths(header: Header, present_bytes: int, expected: Expected) -> None:
    most = expected.payload_bytes(header.columns, header.outliers)
    if header.raw_bytes > most or (expected.exact and header.raw_bytes != most):
        raise PacketError("raw_bytes", header.raw_bytes, most if expected.exact else f"at most {most}")
    if header.stored_bytes != present_bytes:
        raise PacketError("stored_bytes", header.stored_bytes, f"{present_bytes}, which is what follows the header")
    if header.packing == Packing.RAW:
        if header.stored_bytes != header.raw_bytes:
            raise PacketError("stored_bytes", header.stored_bytes, f"{header.raw_bytes}, as it is stored raw")
    elif header.packing == Packing.ZSTD:
        if not header.stored_bytes < header.raw_bytes:
            raise PacketError(
                "stored_bytes", header.stored_bytes, f"fewer than {header.raw_bytes}, as zstd may only save"
            )
    else:
        raise PacketError("packing", header.packing, f"{int(Packing.RAW)} (raw) or {int(Packing.ZSTD)} (zstd)")


def _same_basis(header: Header, expected: Expected) -> bool:
    if expected.kind != Kind.LOWRANK:
        return True
    return expected.basis_version is not None and header.basis_version == expected.basis_version


def _check_basis(header: Header, expected: Expected) -> None:
    if not _same_basis(header, expected):
        raise BasisMismatch(header.basis_version, expected.basis_version)
    if expected.kind != Kind.LOWRANK and header.basis_version != NO_BASIS:
        raise PacketError("basis_version", header.basis_version, f"{NO_BASIS}, as this kind uses no basis")


def expand(frame: memoryview, raw_bytes: int) -> memoryview:
    """Undo zstd. The frame must state the expected size itself: `max_output_size` alone is ignored for frames that
    state any size, and a few kilobytes of them can ask for gigabytes."""
    try:
        stated_bytes = zstandard.get_frame_parameters(frame).content_size
        if stated_bytes != raw_bytes:
            raise PacketError("zstd content size", stated_bytes, raw_bytes)
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
        raw = decompressor.decompress(frame, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PacketError("zstd frame", error, f"one whole frame of {raw_bytes} bytes") from error
    if len(raw) != raw_bytes:
        raise PacketError("zstd output", f"{len(raw)} bytes", raw_bytes)
    return memoryview(raw)
