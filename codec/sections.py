"""Packets of many sections, each a tensor's or a block's bytes, written and read one at a time; no tensor, no policy.

Formats 1 and 2 (`header`) are packets of a link, small enough to be one payload. What the slow anchor exchanges is as
large as a stage, so formats 3 (`corrections`) and 4 (`weight_delta`) are a header and sections, of which neither end
ever unpacks more than one. The header is one msgpack array of fixed-width unsigned integers, 29 bytes:

    [format, form, entries, layout, stored_bytes, crc32]
     `- uint 8 -'  `- uint 32 ---'    uint 64     uint 32

`entries` are tensors; `layout` is a checksum over all that both ends must agree on to read the sections; `crc32` covers
everything but itself. A section is its form, packing (0 raw, 1 one zstd frame), raw_bytes and stored_bytes (uint8 twice,
uint32 twice, little-endian), then the bytes. Nothing is allocated in proportion to what a packet *claims*: every claim
is compared with what the receiver expects first.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import zstandard
from numpy.typing import NDArray

from codec.errors import PacketError, SpecError
from codec.header import UINT32_MAX, Packing
from codec.layout import view_bytes
from codec.packet import BytesLike, expand
from codec.zstd_auto import LEVEL

__all__ = [
    "HEADER_BYTES",
    "HEAD_BYTES",
    "Packed",
    "SectionReader",
    "SectionWriter",
    "checksum",
    "largest_bytes",
    "pack",
]

_HEADER: Final = struct.Struct(">B BB BB BI BI BQ BI")
_TAGS: Final = (
    0x96,
    0xCC,
    0xCC,
    0xCE,
    0xCE,
    0xCF,
    0xCE,
)  # an array of 6: uint 8 twice, uint 32 twice, uint 64, uint 32
_NAMES: Final = ("format", "form", "entries", "layout", "stored_bytes", "crc32")
_CRC_FIELD_BYTES: Final = 5
_HEAD: Final = struct.Struct("<BBII")
HEADER_BYTES: Final = _HEADER.size
HEAD_BYTES: Final = _HEAD.size


@dataclass(frozen=True, slots=True)
class Packed:
    """One section, ready to be written."""

    form: int
    packing: Packing
    raw_bytes: int
    parts: Sequence[memoryview]

    @property
    def stored_bytes(self) -> int:
        return sum(map(len, self.parts))


def pack(arrays: Sequence[NDArray[Any]], form: int = 0) -> Packed:
    """The arrays' bytes as a section, through zstd if that makes it smaller. Raises `SpecError` above 4 GiB.

    Each array gets zstd blocks, and so Huffman tables, of its own: they are of different statistics.
    """
    parts = [view_bytes(array) for array in arrays if array.size]
    raw_bytes = sum(map(len, parts))
    if raw_bytes > UINT32_MAX:
        raise SpecError("section", f"{raw_bytes} bytes", f"at most {UINT32_MAX}", "cut the model into more stages")
    if raw_bytes:
        stream = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=raw_bytes)
        blocks = []
        for part in parts[:-1]:
            blocks += [stream.compress(part), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        blocks += [stream.compress(parts[-1]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)]
        if sum(map(len, blocks)) < raw_bytes:
            return Packed(form, Packing.ZSTD, raw_bytes, [memoryview(block) for block in blocks])
    return Packed(form, Packing.RAW, raw_bytes, parts)


def checksum(*facts: object) -> int:
    """The `layout` of a header: of shapes, types, ranks, as Python prints them."""
    return zlib.crc32(repr(facts).encode())


class SectionWriter:
    """Puts one packet together; at no time is there a second copy of it."""

    def __init__(self, format: int, form: int, entries: int, layout: int) -> None:
        self._fields = (format, form, entries, layout)
        self._out = io.BytesIO()
        self._out.write(bytes(HEADER_BYTES))

    def add(self, packed: Packed) -> None:
        self._out.write(_HEAD.pack(packed.form, packed.packing, packed.raw_bytes, packed.stored_bytes))
        for part in packed.parts:
            self._out.write(part)

    def close(self) -> bytes:
        """The packet."""
        numbers = (*self._fields, self._out.tell() - HEADER_BYTES)
        with self._out.getbuffer() as view:
            crc32 = zlib.crc32(view[HEADER_BYTES:], zlib.crc32(_header(*numbers, 0)[:-_CRC_FIELD_BYTES]))
        self._out.seek(0)
        self._out.write(_header(*numbers, crc32))
        return self._out.getvalue()


class SectionReader:
    """Reads the sections of one packet, in order. `form` is the header's."""

    def __init__(self, packet: BytesLike, format: int, forms: Sequence[int], entries: int, layout: int) -> None:
        """Raises `PacketError` naming the first field that is wrong; from then on the header is true."""
        self._view = memoryview(packet).cast("B")
        if len(self._view) < HEADER_BYTES:
            raise PacketError("length", f"{len(self._view)} bytes", f"at least {HEADER_BYTES}")
        numbers = _HEADER.unpack_from(self._view)
        if (numbers[0], *numbers[1::2]) != _TAGS:
            raise PacketError("header", bytes(self._view[:HEADER_BYTES]).hex(), "an array of fixed-width integers")
        fields = dict(zip(_NAMES, numbers[2::2], strict=True))
        same_run = "both ends must run the same version and manifest"
        if fields["format"] != format:
            raise PacketError("format", fields["format"], format, same_run)
        if fields["form"] not in forms:
            raise PacketError("form", fields["form"], " or ".join(map(str, forms)), same_run)
        if fields["entries"] != entries:
            raise PacketError("entries", fields["entries"], f"{entries} tensors", "both ends must hold the same stage")
        if fields["layout"] != layout:
            raise PacketError("layout", f"{fields['layout']:#010x}", f"{layout:#010x}, a checksum over shapes and "
                              "settings", "both ends must hold the same stage and run the same manifest")  # fmt: skip
        present = len(self._view) - HEADER_BYTES
        if fields["stored_bytes"] != present:
            raise PacketError("stored_bytes", fields["stored_bytes"], f"{present}, which is what follows the header")
        crc32 = zlib.crc32(self._view[HEADER_BYTES:], zlib.crc32(self._view[: HEADER_BYTES - _CRC_FIELD_BYTES]))
        if fields["crc32"] != crc32:
            raise PacketError("crc32", f"{fields['crc32']:#010x}", f"{crc32:#010x}")
        self.form: int = fields["form"]
        self._at = HEADER_BYTES

    def take(self, most_bytes: int) -> tuple[int, memoryview]:
        """The next section's form and raw bytes: no copy where they are stored raw. Raises `PacketError` for a section
        that would have more than `most_bytes`."""
        left = len(self._view) - self._at
        if left < HEAD_BYTES:
            raise PacketError("section", f"{left} bytes left", f"{HEAD_BYTES} for its head")
        form, packing, raw_bytes, stored_bytes = _HEAD.unpack_from(self._view, self._at)
        if raw_bytes > most_bytes:
            raise PacketError("section raw_bytes", raw_bytes, f"at most {most_bytes}")
        if stored_bytes > left - HEAD_BYTES:
            raise PacketError("section stored_bytes", stored_bytes, f"at most {left - HEAD_BYTES}, which are left")
        if packing not in (Packing.RAW, Packing.ZSTD):
            raise PacketError("section packing", packing, f"{int(Packing.RAW)} (raw) or {int(Packing.ZSTD)} (zstd)")
        if stored_bytes != raw_bytes if packing == Packing.RAW else stored_bytes >= raw_bytes:
            raise PacketError("section stored_bytes", stored_bytes, f"{raw_bytes} if raw, fewer if zstd")
        start = self._at + HEAD_BYTES
        self._at = start + stored_bytes
        stored = self._view[start : self._at]
        return form, stored if packing == Packing.RAW else expand(stored, raw_bytes)

    def close(self) -> None:
        """Refuses bytes after the last section."""
        if self._at != len(self._view):
            raise PacketError("length", f"{len(self._view) - self._at} bytes more", "none after the last section")


def _header(*numbers: int) -> bytes:
    return _HEADER.pack(_TAGS[0], *[each for pair in zip(_TAGS[1:], numbers, strict=True) for each in pair])


def largest_bytes(raw_bytes: Sequence[int]) -> int:
    """Bytes of a packet whose sections have at most so many raw bytes each. Raises `SpecError` above 4 GiB a section."""
    if (most := max(raw_bytes, default=0)) > UINT32_MAX:
        raise SpecError("section", f"{most} bytes", f"at most {UINT32_MAX}", "cut the model into more stages")
    return HEADER_BYTES + sum(raw_bytes) + HEAD_BYTES * len(raw_bytes)
