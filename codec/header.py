"""The fixed bytes in front of every packet, and the numbers that stand in them; no payload, torch or zstd here.

The header is one msgpack array of unsigned integers, so any msgpack reader can print it. Plain numbers have format 1,
41 bytes:

    [format, kind, direction, element, packing, rows, columns, basis_version, stored_bytes, raw_bytes, crc32]
     `---------- uint 8: tag 0xcc ----------'  `------------------- uint 32: tag 0xce -------------------'

Quantised coefficients, and packets with outliers, have format 2, 47 bytes; their kind is always `lowrank`:

    [format, direction, element, packing, columns, rows, basis_version, outliers, references, stored_bytes, raw_bytes,
     `------------ uint 8 -------------'  uint 16  `------------------------- uint 32 -------------------------   crc32]

msgpack would write small integers in fewer bytes. Here every field keeps one width, so a header has one length and the
size of a packet is a function of its shape alone. It is therefore written and read through one `struct` whose constant
bytes are the msgpack tags: exactly one spelling is accepted, and no parser walks over a stranger's bytes.
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
    """The type of the payload's numbers, little-endian; the first three row-major, the others as in `layout`."""

    BF16 = 0
    FP32 = 1
    FP64 = 2
    INT8 = 3
    INT4 = 4
    UNIFORM = 5

    @property
    def bytes(self) -> int:
        """Bytes a number; for `INT4` and `UNIFORM`, which share bytes, the most."""
        return (2, 4, 8, 1, 1, 2)[self]


class Packing(enum.IntEnum):
    """How the payload is stored: as it is, or as one zstd frame that states its content size."""

    RAW = 0
    ZSTD = 1


UINT16_MAX: Final = 2**16 - 1
UINT32_MAX: Final = 2**32 - 1
NO_BASIS: Final = UINT32_MAX  # basis versions count up from 0, so the far end is free to mean "none was used"
NO_REFERENCES: Final = 0

_UINT8, _UINT16, _UINT32 = 0xCC, 0xCD, 0xCE
_FIELDS: Final = {  # by format: those of one, of two and of four bytes
    1: ("format kind direction element packing", "", "rows columns basis_version stored_bytes raw_bytes crc32"),
    2: (
        "format direction element packing",
        "columns",
        "rows basis_version outliers references stored_bytes raw_bytes crc32",
    ),
}


class _Layout:
    """One format: its fields, in order, and the struct that holds them with their tags."""

    def __init__(self, *fields: str) -> None:
        small, middle, large = (names.split() for names in fields)
        self.names = (*small, *middle, *large)
        self.tags = (0x90 | len(self.names), *[_UINT8] * len(small), *[_UINT16] * len(middle), *[_UINT32] * len(large))
        self.struct = struct.Struct(">B" + "BB" * len(small) + "BH" * len(middle) + "BI" * len(large))


_LAYOUTS: Final = {number: _Layout(*fields) for number, fields in _FIELDS.items()}
CRC_FIELD_BYTES: Final = 5  # the checksum stands last and covers everything before it
HEADER_BYTES: Final = _LAYOUTS[1].struct.size
HEADER2_BYTES: Final = _LAYOUTS[2].struct.size
CHECKED_BYTES: Final = HEADER_BYTES - CRC_FIELD_BYTES


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
    outliers: int = 0
    references: int = NO_REFERENCES

    @property
    def size(self) -> int:
        """Bytes of this header on the wire."""
        return _LAYOUTS[self.format].struct.size

    def to_bytes(self) -> bytes:
        """The `size` bytes. Fields must lie in their ranges: `spec` sees to that for all a link sends."""
        layout = _LAYOUTS[self.format]
        tagged = [
            number
            for tag, name in zip(layout.tags[1:], layout.names, strict=True)
            for number in (tag, getattr(self, name))
        ]
        return layout.struct.pack(layout.tags[0], *tagged)

    @classmethod
    def parse(cls, view: memoryview) -> "Header | None":
        """The header at the start of `view`; None if it is not spelled as one of ours."""
        for number, layout in _LAYOUTS.items():
            if len(view) >= layout.struct.size and view[0] == layout.tags[0]:
                numbers = layout.struct.unpack_from(view)
                if (numbers[0], *numbers[1::2]) == layout.tags and numbers[2] == number:
                    return cls(**({"kind": Kind.LOWRANK} | dict(zip(layout.names, numbers[2::2], strict=True))))
        return None
