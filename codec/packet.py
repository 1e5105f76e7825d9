"""Packets: a header and a payload in one run of bytes, put together once and checked before anything is believed.

Knows bytes and integers; no tensor, no basis, no policy. Nothing is allocated in proportion to what a packet *claims*:
every claim is compared with what the receiver expects first.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import zstandard

from codec.errors import BasisMismatch, PacketError
from codec.header import CHECKED_BYTES, FORMAT, HEADER_BYTES, NO_BASIS, Direction, Element, Header, Kind, Packing

__all__ = ["HEADER_BYTES", "BytesLike", "Contents", "pack", "unpack"]

BytesLike: TypeAlias = bytes | bytearray | memoryview

ZSTD_MAX_WINDOW_BYTES: Final = 8 << 20  # level 1 uses 512 KiB; more is a peer asking for our memory


@dataclass(frozen=True, slots=True)
class Contents:
    """What a packet carries: the sender states it, the receiver expects it, and the two must be equal.

    `basis_version` is None where no basis is used (`identity`, `none`), or where the receiver holds none yet.
    """

    kind: Kind
    direction: Direction
    element: Element
    rows: int
    columns: int
    basis_version: int | None

    @property
    def raw_bytes(self) -> int:
        """Bytes of the payload before zstd."""
        return self.rows * self.columns * self.element.bytes


def pack(contents: Contents, raw: BytesLike, shrunk: bytes | None = None) -> bytes:
    """One packet: the header, then `shrunk` (the payload as a zstd frame) if there is one, else `raw` itself.

    The result is assembled in one allocation; the payload is copied exactly once. `raw` must have
    `contents.raw_bytes` bytes, and `shrunk` must be smaller than `raw` or it is not used.
    """
    payload = memoryview(raw).cast("B")
    packing = Packing.RAW
    if shrunk is not None and len(shrunk) < len(payload):
        payload = memoryview(shrunk)
        packing = Packing.ZSTD
    unsealed = Header(
        format=FORMAT,
        kind=contents.kind,
        direction=contents.direction,
        element=contents.element,
        packing=packing,
        rows=contents.rows,
        columns=contents.columns,
        basis_version=NO_BASIS if contents.basis_version is None else contents.basis_version,
        stored_bytes=len(payload),
        raw_bytes=contents.raw_bytes,
        crc32=0,
    )
    sealed = replace(unsealed, crc32=_checksum(unsealed.to_bytes(), payload))
    return b"".join((sealed.to_bytes(), payload))


def unpack(packet: BytesLike, expected: Contents) -> memoryview:
    """The raw payload of `packet`, of exactly `expected.raw_bytes` bytes.

    Raises `PacketError` naming the first field that is wrong, or `BasisMismatch` if all else is right. The basis
    version is judged last, behind the checksum: a mismatch makes the caller fetch a basis, a flipped bit should not.
    A raw payload is returned as a view into `packet`, without a copy.
    """
    view = memoryview(packet).cast("B")
    if len(view) < HEADER_BYTES:
        raise PacketError("length", f"{len(view)} bytes", f"at least {HEADER_BYTES}")
    header = Header.parse(view)
    if header is None:
        raise PacketError("header", bytes(view[:HEADER_BYTES]).hex(), "an array of eleven fixed-width msgpack integers")
    _check_claims(header, expected)
    payload = view[HEADER_BYTES:]
    _check_lengths(header, len(payload))
    crc32 = _checksum(view[:CHECKED_BYTES], payload)
    if header.crc32 != crc32:
        raise PacketError("crc32", f"{header.crc32:#010x}", f"{crc32:#010x}")
    _check_basis(header, expected)
    if header.packing == Packing.RAW:
        return payload
    return _expand(payload, expected.raw_bytes)


def _checksum(head: BytesLike, payload: memoryview) -> int:
    """CRC-32 over the header up to its checksum field, then the payload as it is stored."""
    return zlib.crc32(payload, zlib.crc32(memoryview(head)[:CHECKED_BYTES]))


def _check_claims(header: Header, expected: Contents) -> None:
    claims = (
        ("format", header.format, FORMAT, "both ends must run the same codec format"),
        ("kind", header.kind, expected.kind, "both ends must run the same manifest"),
        ("direction", header.direction, expected.direction, "both ends must run the same manifest"),
        ("element", header.element, expected.element, "both ends must run the same manifest"),
        ("rows", header.rows, expected.rows, "the microbatch's lengths decide them: compare its layout on both ends"),
        ("columns", header.columns, expected.columns, "both ends must run the same ranks"),
        ("raw_bytes", header.raw_bytes, expected.raw_bytes, "ask the sender for it again"),
    )
    for field, got, wanted, advice in claims:
        if got != wanted:
            raise PacketError(field, got, int(wanted), advice)


def _check_lengths(header: Header, present_bytes: int) -> None:
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


def _check_basis(header: Header, expected: Contents) -> None:
    if expected.kind == Kind.LOWRANK:
        if expected.basis_version is None or header.basis_version != expected.basis_version:
            raise BasisMismatch(header.basis_version, expected.basis_version)
    elif header.basis_version != NO_BASIS:
        raise PacketError("basis_version", header.basis_version, f"{NO_BASIS}, as this kind uses no basis")


def _expand(frame: memoryview, raw_bytes: int) -> memoryview:
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
