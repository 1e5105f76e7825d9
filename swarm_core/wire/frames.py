"""Frames <-> bytes: the fixed-size header, chunking and checksums. Pure functions and one small assembler; no sockets.

A chunk on the wire is a valid `swarm.v1.Frame` protobuf message, written by hand:

    0x0A, header length, header, 0x12, payload length as a 4-byte varint, payload

Padding the payload length to four bytes keeps the overhead one constant, FRAME_OVERHEAD, whatever the payload; and
joining the parts once is the only copy the sender makes. The receiver joins chunks once, and reads a frame of one chunk
where it arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from isal.isal_zlib import crc32  # zlib's checksum at 14 times its speed, which two ends of a fast link can feel

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import FrameKind, Mode
from swarm_proto.v1 import swarm_pb2

CHUNK_BYTES = 1 << 20  # one message up to here, chunks above: the fastest size measured on gRPC streams
CHUNK_UNIT_BYTES = 16 << 10  # smaller chunks are multiples of this; smaller still is not worth a message
MAX_MESSAGE_BYTES = 4 << 20


@dataclass(frozen=True)
class Header:
    """Identity and addressing of a frame (the fields of `FrameHeader`, without the transport's own)."""

    kind: FrameKind
    run: int = 0
    epoch: int = 0
    tick: int = 0
    attempt: int = 0
    lineage: int = 0
    mode: Mode = Mode.TRAIN
    batch: int = 0
    pass_: int = 0
    slice: int = 0
    microbatch: int = 0
    receiver: int = 0


@dataclass(frozen=True)
class Frame:
    """A header and its whole payload. `dense_bytes`: what the tensor inside would have cost in bf16 (ledger only)."""

    header: Header
    payload: bytes | bytearray | memoryview = b""
    dense_bytes: int | None = field(default=None, compare=False)


def _header_bytes(header: Header, chunk: int, chunks: int, total_bytes: int) -> bytes:
    """The header of a chunk with zeros in place of its checksum."""
    proto = swarm_pb2.FrameHeader(
        run=header.run,
        lineage=header.lineage,
        kind=header.kind,
        mode=header.mode,
        epoch=header.epoch,
        tick=header.tick,
        attempt=header.attempt,
        batch=header.batch,
        slice=header.slice,
        microbatch=header.microbatch,
        receiver=header.receiver,
        chunk=chunk,
        chunks=chunks,
        checksum=0,
        total_bytes=total_bytes,
    )
    setattr(proto, "pass", header.pass_)  # a Python keyword
    return proto.SerializeToString()


HEADER_BYTES = len(_header_bytes(Header(FrameKind.HELLO), 0, 1, 0))
FRAME_OVERHEAD = 2 + HEADER_BYTES + 5
# The checksum is the last field but one; behind it stands total_bytes, a tag of two bytes and a value of eight.
_CHECKSUM = slice(HEADER_BYTES - 14, HEADER_BYTES - 10)


def _checksum(header: bytes, payload: memoryview) -> int:
    """CRC-32 over a header, but for the checksum itself, and its chunk's payload: addressing is as precious as numbers."""
    crc = crc32(header[_CHECKSUM.stop :], crc32(header[: _CHECKSUM.start]))
    return crc32(payload, crc)


def _length_bytes(payload_bytes: int) -> bytes:
    """A payload's length as a varint padded to four bytes."""
    n = payload_bytes
    return bytes((n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14 & 0x7F | 0x80, n >> 21 & 0x7F))


def chunk_count(payload_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a payload travels as; an empty one has a chunk, too."""
    return max(1, -(-payload_bytes // chunk_bytes))


def message_bytes(payload_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Bytes of all gRPC messages of a frame with this payload (before HTTP/2). Pure."""
    return payload_bytes + chunk_count(payload_bytes, chunk_bytes) * FRAME_OVERHEAD


def chunks_of(frame: Frame, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The gRPC messages of a frame, in order; each payload byte is copied exactly once."""
    payload = memoryview(frame.payload)
    total = payload.nbytes
    count = chunk_count(total, chunk_bytes)
    for index in range(count):
        part = payload[index * chunk_bytes : (index + 1) * chunk_bytes]
        header = _header_bytes(frame.header, index, count, total)
        checksum = _checksum(header, part).to_bytes(4, "little")
        header = header[: _CHECKSUM.start] + checksum + header[_CHECKSUM.stop :]
        yield b"".join((b"\x0a", bytes((len(header),)), header, b"\x12", _length_bytes(part.nbytes), part))


def _split(message: bytes) -> tuple[swarm_pb2.FrameHeader, memoryview]:
    view = memoryview(message)
    if len(message) < FRAME_OVERHEAD or len(message) > MAX_MESSAGE_BYTES or message[0] != 0x0A:
        raise BadFrame(f"not a frame: {len(message)} bytes, at least {FRAME_OVERHEAD} and at most {MAX_MESSAGE_BYTES}")
    n = message[1]
    at = 2 + n
    if n != HEADER_BYTES or message[at] != 0x12:
        raise BadFrame(f"not a frame: header of {n} bytes, wanted {HEADER_BYTES}; the peer runs another version?")
    payload = view[at + 5 :]
    if message[at + 1 : at + 5] != _length_bytes(payload.nbytes):
        raise BadFrame(f"a frame of {payload.nbytes} payload bytes says that it has another number of them")
    raw = message[2:at]
    if int.from_bytes(raw[_CHECKSUM], "little") != _checksum(raw, payload):
        raise BadFrame("the checksum of a frame does not match: damaged on the way")
    header = swarm_pb2.FrameHeader()
    try:
        header.ParseFromString(raw)
    except DecodeError as error:
        raise BadFrame(f"a frame's header does not parse ({error})") from None
    return header, payload


class Assembler:
    """Puts the chunks of one stream together again, refusing before it allocates.

    `limits` gives the largest payload per kind; `limit` can be replaced by a function that knows more of a header. The
    chunks of a frame are contiguous on a stream, so at most one frame is under way. The first chunk tells the sender's
    chunk size; every other but the last must have it, too.
    """

    def __init__(self, limits: dict[FrameKind, int], default_limit: int = MAX_MESSAGE_BYTES) -> None:
        self.limit: Callable[[Header], int] = lambda header: limits.get(header.kind, default_limit)
        self._header: Header | None = None
        self._total = 0
        self._chunk_bytes = CHUNK_BYTES
        self._parts: list[memoryview] = []

    def feed(self, message: bytes) -> Frame | None:
        """Take one gRPC message; the frame when it is complete. Raises BadFrame."""
        proto, payload = _split(message)
        header = _header_of(proto)
        total, came = proto.total_bytes, payload.nbytes
        expected = len(self._parts)
        limit = total if expected else self.limit(header)  # later chunks must repeat header and total anyway
        if total > limit:
            raise BadFrame(f"a {header.kind.name} frame of {total} bytes; at most {limit} are expected here")
        if proto.chunk != expected or (expected and (header != self._header or total != self._total)):
            raise BadFrame(f"chunk {proto.chunk} of {header.kind.name} came where chunk {expected} was expected")
        if not expected and came < total and (came == 0 or came % CHUNK_UNIT_BYTES or came > CHUNK_BYTES):
            raise BadFrame(f"the first chunk of {total} bytes has {came}, wanted {CHUNK_BYTES} or a whole part of it")
        chunk_bytes = self._chunk_bytes if expected else came if came < total else CHUNK_BYTES
        if proto.chunks != chunk_count(total, chunk_bytes):
            raise BadFrame(f"{proto.chunks} chunks for {total} bytes in chunks of {chunk_bytes}")
        wanted = min(chunk_bytes, total - expected * chunk_bytes)
        if came != wanted:
            raise BadFrame(f"chunk {proto.chunk} of {total} bytes has {came}, wanted {wanted}")
        if proto.chunks == 1:
            return Frame(header, payload)
        self._header, self._total, self._chunk_bytes = header, total, chunk_bytes
        self._parts.append(payload)
        if len(self._parts) < proto.chunks:
            return None
        frame = Frame(header, memoryview(b"".join(self._parts)))
        self._header, self._parts = None, []
        return frame


def _header_of(proto: swarm_pb2.FrameHeader) -> Header:
    try:
        kind, mode = FrameKind(proto.kind), Mode(proto.mode)
    except ValueError as error:
        raise BadFrame(f"unknown frame: {error}; the peer runs another version?") from None
    return Header(
        kind=kind,
        run=proto.run,
        epoch=proto.epoch,
        tick=proto.tick,
        attempt=proto.attempt,
        lineage=proto.lineage,
        mode=mode,
        batch=proto.batch,
        pass_=getattr(proto, "pass"),
        slice=proto.slice,
        microbatch=proto.microbatch,
        receiver=proto.receiver,
    )


def run_id(manifest_digest: str) -> int:
    """The header's `run`: the first 8 bytes of the manifest digest."""
    return int(manifest_digest[:16], 16)


def address_of(stage: int, replica: int = 0) -> int:
    """The header's `receiver`."""
    return stage << 16 | replica
