"""Honest frames made hostile, from a seed: bits, lengths, numbers at extremes, splices, with checksums that fit. No test.

A frame is changed where it hurts and then made whole again, so that a change reaches the reader behind the checksums:
fields of a message keep it a message, packets get the checksum and digest of what they have become, chunks their CRC.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from isal.isal_zlib import crc32

from codec import header as packet_header
from codec.sections import HEADER_BYTES as SECTIONS_HEADER_BYTES
from swarm_core.wire.corrections import digest_of
from swarm_core.wire.frames import CHUNK_UNIT_BYTES, HEADER_BYTES, Frame, chunks_of
from swarm_core.wire.messages import Copy, FrameKind, Mode, to_bytes

U32 = [
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    65535,
    65536,
    1 << 20,
    (1 << 24) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 2,
    (1 << 32) - 1,
]
U64 = [*U32, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [0.0, -0.0, -1.0, 5e-324, 1e-300, 1e30, 1e308, -1e308, 3.4e38, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    "x" * 70_000,
    "../../etc/passwd",
    "..",
    "/",
    "a\nb\x1b[2J",
    "\u202e\u0000",
    "tick-99999999",
    "0.0.0.0:99999",
    "failed",
]
MOST_ITEMS = 2000  # of a list, fewer of large ones: the mutator's memory is not to be taken for the readers'
HEADERS = ("run", "epoch", "tick", "attempt", "lineage", "batch", "pass_", "slice", "microbatch", "receiver")
CHECKSUM = slice(2 + HEADER_BYTES - 14, 2 + HEADER_BYTES - 10)  # of a chunk, behind the two bytes before its header


class Mutator:
    """An endless supply. `others` are what frames are spliced with."""

    def __init__(self, seed: int, others: Sequence[Frame]) -> None:
        self.random = random.Random(seed)
        self._others = others

    def messages(self, frame: Frame, message: object) -> list[bytes]:
        """The gRPC messages of a hostile variant of this frame."""
        r = self.random
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            which = r.random()
            if message is not None and which < 0.5:
                message = self._message(message)
                frame = replace(frame, payload=_encoded(message, frame))
            elif which < 0.75:
                frame = replace(frame, payload=self._payload(frame))
            elif which < 0.9:
                frame = replace(frame, header=self._header(frame))
            else:
                frame = self._splice(frame)
        chunks = list(chunks_of(frame, r.choice((CHUNK_UNIT_BYTES, 1 << 20))))
        return self._chunks(chunks) if r.random() < 0.25 else chunks

    # Messages ----------------------------------------------------------------------------------------------------------

    def _message(self, message: Any) -> Any:
        """One field changed; a packet inside gets its checksums, the message its digest, more often than not."""
        field = self.random.choice(fields(message))
        changed = replace(message, **{field.name: self._value(getattr(message, field.name))})
        for name in ("packet", "part"):
            if isinstance(changed, Copy):  # whatever bytes a file has; what it is to be is said beside
                continue
            if field.name == name and hasattr(changed, "digest") and self.random.random() < 0.8:
                data = resealed(getattr(changed, name))
                changed = replace(changed, **{name: data, "digest": digest_of(data)})
                if name == "part" and self.random.random() < 0.8:
                    changed = replace(changed, total_bytes=len(data))
        return changed

    def _value(self, value: Any) -> Any:
        r = self.random
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return r.choice((*U64, value + 1, max(0, value - 1)))
        if isinstance(value, float):
            return r.choice(FLOATS)
        if isinstance(value, str):
            return r.choice((*TEXTS, value[:-1], value + "0"))
        if isinstance(value, bytes):
            return self._bytes(value)
        if is_dataclass(value):
            return self._message(value)
        if isinstance(value, dict):
            return self._mapping(value)
        items = list(value)
        which = r.random()
        if which < 0.2 or not items:
            return []
        if which < 0.4:
            return (items * r.choice((2, 100, MOST_ITEMS)))[: max(2, MOST_ITEMS // (1 + len(repr(items[0])) // 50))]
        at = r.randrange(len(items))
        return items[:at] + ([] if which < 0.6 else [self._value(items[at])]) + items[at + 1 :]

    def _mapping(self, value: dict[Any, Any]) -> dict[Any, Any]:
        """One entry gone, renamed, changed or more; or none left."""
        r, which = self.random, self.random.random()
        if not value or which < 0.1:
            return {}
        name = r.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        if which < 0.35:
            return rest
        if which < 0.7:
            return rest | {name: self._value(value[name])}
        other = r.choice((*TEXTS, name + "0", name[:-1])) if isinstance(name, str) else r.choice(U32)
        return (rest if which < 0.85 else value) | {other: value[name]}

    # Bytes -------------------------------------------------------------------------------------------------------------

    def _bytes(self, data: bytes | bytearray | memoryview) -> bytes:
        r, out = self.random, bytearray(data)
        which = r.randrange(8)
        if which == 0 or not out:
            return bytes(out) + r.randbytes(r.choice((1, 3, 4, 64, 4096, 100_000)))
        if which == 1:
            return bytes(out[: r.randrange(len(out))])
        if which == 2:
            for _ in range(r.choice((1, 2, 8))):
                out[r.randrange(len(out))] ^= 1 << r.randrange(8)
        elif which == 3:  # a number at an extreme, either way round, wherever it falls
            size, order = r.choice((1, 2, 4, 8)), r.choice(("little", "big"))
            at = r.randrange(max(1, min(len(out), r.choice((64, len(out)))) - size))
            out[at : at + size] = (r.choice(U64) & (1 << 8 * size) - 1).to_bytes(size, order)
        elif which == 4:
            a, b = sorted(r.randrange(len(out) + 1) for _ in range(2))
            del out[a:b]
        elif which == 5:
            a, b = sorted(r.randrange(len(out) + 1) for _ in range(2))
            out[a:a] = out[a:b]
        elif which == 6:  # a float of a column
            form = r.choice(("<f", "<d"))
            at = r.randrange(-(-len(out) // struct.calcsize(form))) * struct.calcsize(form)
            number = r.choice([f for f in FLOATS if form == "<d" or not 3.5e38 < abs(f) < float("inf")])
            out[at : at + struct.calcsize(form)] = struct.pack(form, number)
        else:
            a = r.randrange(len(out))
            out[a : a + r.choice((4, 64))] = r.choice((b"\0", b"\xff", b"\x7f\xc0")) * 32
        return bytes(out)

    def _payload(self, frame: Frame) -> bytes:
        data = self._bytes(frame.payload)
        return resealed(data) if self.random.random() < 0.8 else data

    def _header(self, frame: Frame) -> Any:
        r, header = self.random, frame.header
        for _ in range(r.choice((1, 1, 2))):
            which = r.random()
            if which < 0.15:
                header = replace(header, kind=r.choice(list(FrameKind)))
            elif which < 0.3:
                header = replace(header, mode=r.choice(list(Mode)))
            else:
                name = r.choice(HEADERS)
                wide = name in ("run", "lineage")
                header = replace(header, **{name: r.choice(U64 if wide else U32)})
        return header

    def _splice(self, frame: Frame) -> Frame:
        r, other = self.random, self.random.choice(self._others)
        a, b = bytes(frame.payload), bytes(other.payload)
        if r.random() < 0.3:
            return replace(frame, payload=b)
        joined = a[: r.randrange(len(a) + 1)] + b[r.randrange(len(b) + 1) :]
        return replace(frame, payload=resealed(joined) if r.random() < 0.5 else joined)

    def _chunks(self, chunks: list[bytes]) -> list[bytes]:
        """Damage to the chunks themselves: some with a CRC that fits, some lost, doubled or out of order."""
        r, at = self.random, self.random.randrange(len(chunks))
        which = r.random()
        if which < 0.5:
            out = bytearray(chunks[at])
            where = r.randrange(2, 2 + HEADER_BYTES) if r.random() < 0.7 else r.randrange(len(out))
            size = min(r.choice((1, 4, 8)), len(out) - where)
            out[where : where + size] = (r.choice(U64) & (1 << 8 * size) - 1).to_bytes(size, "little")
            chunks[at] = recounted(out) if r.random() < 0.9 else bytes(out)
        elif which < 0.6:
            del chunks[at]
        elif which < 0.7:
            chunks.insert(at, chunks[at])
        elif which < 0.8:
            r.shuffle(chunks)
        else:
            chunks[at] = self._bytes(chunks[at])
        return chunks


def _encoded(message: Any, frame: Frame) -> bytes:
    try:
        return to_bytes(message)
    except (ValueError, TypeError, UnicodeError):  # a number that its field cannot hold: no sender can send it either
        return bytes(frame.payload)


def recounted(chunk: bytearray) -> bytes:
    """With the CRC that fits."""
    head = bytes(chunk[2 : 2 + HEADER_BYTES])
    crc = crc32(head[CHECKSUM.stop - 2 :], crc32(head[: CHECKSUM.start - 2]))
    chunk[CHECKSUM] = crc32(bytes(chunk[2 + HEADER_BYTES + 5 :]), crc).to_bytes(4, "little")
    return bytes(chunk)


def resealed(packet: bytes) -> bytes:
    """A codec packet with the lengths and checksums that fit what it has become; other bytes as they are."""
    seals: dict[int, Callable[[bytes], bytes]] = {0x9B: _resealed_1, 0x9C: _resealed_2, 0x96: _resealed_sections}
    return seals.get(packet[0] if packet else 0, lambda same: same)(packet)


def _resealed_1(packet: bytes) -> bytes:
    return _resealed_link(packet, packet_header.HEADER_BYTES, stored=-15)


def _resealed_2(packet: bytes) -> bytes:
    return _resealed_link(packet, packet_header.HEADER2_BYTES, stored=-15)


def _resealed_link(packet: bytes, size: int, stored: int) -> bytes:
    if len(packet) < size:
        return packet
    head = bytearray(packet[: size - 5])
    struct.pack_into(">BI", head, size + stored, 0xCE, len(packet) - size)
    crc = zlib.crc32(packet[size:], zlib.crc32(head))
    return bytes(head) + struct.pack(">BI", 0xCE, crc) + packet[size:]


def _resealed_sections(packet: bytes) -> bytes:
    size = SECTIONS_HEADER_BYTES
    if len(packet) < size:
        return packet
    head = packet[: size - 14] + struct.pack(">BQ", 0xCF, len(packet) - size)
    crc = zlib.crc32(packet[size:], zlib.crc32(head))
    return head + struct.pack(">BI", 0xCE, crc) + packet[size:]
