"""The fixed 41 bytes in front of every packet, and the numbers that stand in them; no payload, torch or zstd here.

The header is one msgpack array of eleven unsigned integers, so any msgpack reader can print it:

    [format, kind, direction, element, packing, rows, columns, basis_version, stored_bytes, raw_bytes, crc32]
     `---------- uint 8: tag 0xcc ----------'  `------------------- uint 32: tag 0xce -------------------'

msgpack would write small integers in fewer bytes. Here every field keeps one width, so the header has one length and
the size of a packet is a function of its shape alone. It is therefore written and read through one `struct` whose
constant bytes are the msgpack tags: exactly one spelling is accepted, and no parser walks over a stranger's bytes.
"""

import enum
import struct
from dataclasses import dataclass
from typing import Final


class Direction(enum.IntEnum):
    """Which way a packet goes over its boundary: activations forward, their gradients backward."""

    FORWARD = 0
    BACKWARD = 1


class Kind(enum.IntEnum):
    """What the numbers of a payload are: the rows themselves, or coefficients of a basis."""

    IDENTITY = 0
    NONE = 1
    LOWRANK = 2


class Element(enum.IntEnum):
    """The type of the payload's numbers, row-major and little-endian."""

    BF16 = 0
    FP32 = 1
    FP64 = 2

    @property
    def bytes(self) -> int:
        return (2, 4, 8)[self]


class Packing(enum.IntEnum):
    """How the payload is stored: as it is, or as one zstd frame that states its content size."""

    RAW = 0
    ZSTD = 1


FORMAT: Final = 1
UINT32_MAX: Final = 2**32 - 1
NO_BASIS: Final = UINT32_MAX  # basis versions count up from 0, so the far end is free to mean "none was used"

_UINT8: Final = 0xCC
_UINT32: Final = 0xCE
_TAGS: Final = (0x90 | 11, *[_UINT8] * 5, *[_UINT32] * 6)  # 0x9b opens a msgpack array of eleven
_LAYOUT: Final = struct.Struct(">B" + "BB" * 5 + "BI" * 6)
_CRC_FIELD_BYTES: Final = 5  # the checksum stands last and covers everything before it

HEADER_BYTES: Final = _LAYOUT.size
CHECKED_BYTES: Final = HEADER_BYTES - _CRC_FIELD_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """One header as plain integers. A parsed one is only known to be spelled right; whether it is *true* is for
    `packet.unpack` to find out."""

    format: int
    kind: int
    direction: int
    element: int
    packing: int
    rows: int
    columns: int
    basis_version: int
    stored_bytes: int
    raw_bytes: int
    crc32: int

    def to_bytes(self) -> bytes:
        """The `HEADER_BYTES` bytes. Fields must lie in their ranges: `spec` sees to that for all a link sends."""
        fields = (
            *(self.format, self.kind, self.direction, self.element, self.packing),
            *(self.rows, self.columns, self.basis_version, self.stored_bytes, self.raw_bytes, self.crc32),
        )
        tagged = [number for pair in zip(_TAGS[1:], fields, strict=True) for number in pair]
        return _LAYOUT.pack(_TAGS[0], *tagged)

    @classmethod
    def parse(cls, view: memoryview) -> "Header | None":
        """The header at the start of `view`, which holds at least `HEADER_BYTES`; None if it is not spelled as ours."""
        numbers = _LAYOUT.unpack_from(view)
        if (numbers[0], *numbers[1::2]) != _TAGS:
            return None
        return cls(*numbers[2::2])
