"""Frames <-> bytes: the fixed-size header, chunking and checksums. Pure functions and one small assembler; no sockets.

A chunk on the wire is a valid `swarm.v1.Frame` protobuf message, written by hand:

    0x0A, header length, header, 0x12, payload length as a 4-byte varint, payload

Padding the payload length to four bytes keeps the overhead one constant, FRAME_OVERHEAD, whatever the payload; and
joining the parts once is the only copy the sender makes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from google.protobuf.message import DecodeError
from swarm_proto.v1 import swarm_pb2

from swarm_core.wire.errors import BadFrame
from swarm_core.wire.messages import FrameKind, Mode

CHUNK_BYTES = 1 << 20  # one message up to here, chunks above: the fastest size measured on gRPC streams
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


def _header_bytes(header: Header, chunk: int, chunks: int, checksum: int, total_bytes: int) -> bytes:
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
        checksum=checksum,
        total_bytes=total_bytes,
    )
    setattr(proto, "pass", header.pass_)  # a Python keyword
    return proto.SerializeToString()


HEADER_BYTES = len(_header_bytes(Header(FrameKind.HELLO), 0, 1, 0, 0))
FRAME_OVERHEAD = 2 + HEADER_BYTES + 5


def message_bytes(payload_bytes: int) -> int:
    """Bytes of all gRPC messages of a frame with this payload (before HTTP/2). Pure."""
    chunks = max(1, -(-payload_bytes // CHUNK_BYTES))
    return payload_bytes + chunks * FRAME_OVERHEAD


def chunks_of(frame: Frame) -> Iterator[bytes]:
    """The gRPC messages of a frame, in order; each payload byte is copied exactly once."""
    payload = memoryview(frame.payload)
    total = payload.nbytes
    count = max(1, -(-total // CHUNK_BYTES))
    for index in range(count):
        part = payload[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        header = _header_bytes(frame.header, index, count, zlib.crc32(part), total)
        n = part.nbytes
        length = bytes((n & 0x7F | 0x80, n >> 7 & 0x7F | 0x80, n >> 14 & 0x7F | 0x80, n >> 21 & 0x7F))
        yield b"".join((b"\x0a", bytes((len(header),)), header, b"\x12", length, part))


def _split(message: bytes) -> tuple[swarm_pb2.FrameHeader, memoryview]:
    view = memoryview(message)
    if len(message) < FRAME_OVERHEAD or len(message) > MAX_MESSAGE_BYTES or message[0] != 0x0A:
        raise BadFrame(f"not a frame: {len(message)} bytes, at least {FRAME_OVERHEAD} and at most {MAX_MESSAGE_BYTES}")
    n = message[1]
    at = 2 + n
    if n != HEADER_BYTES or message[at] != 0x12:
        raise BadFrame(f"not a frame: header of {n} bytes, wanted {HEADER_BYTES}; the peer runs another version?")
    length = sum((message[at + 1 + i] & 0x7F) << 7 * i for i in range(4))
    payload = view[at + 5 :]
    if payload.nbytes != length:
        raise BadFrame(f"a frame of {payload.nbytes} payload bytes says it has {length}")
    header = swarm_pb2.FrameHeader()
    try:
        header.ParseFromString(bytes(view[2:at]))
    except DecodeError as error:
        raise BadFrame(f"a frame's header does not parse ({error})") from None
    return header, payload


class Assembler:
    """Puts the chunks of one stream together again, refusing before it allocates.

    `limits` gives the largest payload per kind; the chunks of a frame are contiguous on a stream, so at most one
    frame is under way.
    """

    def __init__(self, limits: dict[FrameKind, int], default_limit: int = MAX_MESSAGE_BYTES) -> None:
        self._limits = limits
        self._default = default_limit
        self._header: Header | None = None
        self._buffer = bytearray()
        self._filled = 0
        self._next = 0
        self._chunks = 0

    def feed(self, message: bytes) -> Frame | None:
        """Take one gRPC message; the frame when it is complete. Raises BadFrame."""
        proto, payload = _split(message)
        if zlib.crc32(payload) != proto.checksum:
            raise BadFrame(f"checksum of chunk {proto.chunk} does not match: damaged on the way")
        header = _header_of(proto)
        total = proto.total_bytes
        limit = self._limits.get(header.kind, self._default)
        if total > limit:
            raise BadFrame(f"a {header.kind.name} frame of {total} bytes; at most {limit} are expected here")
        if proto.chunks != max(1, -(-total // CHUNK_BYTES)):
            raise BadFrame(f"{proto.chunks} chunks for {total} bytes")
        if proto.chunk != self._next or (self._next and (header != self._header or total != len(self._buffer))):
            raise BadFrame(f"chunk {proto.chunk} of {header.kind.name} came where chunk {self._next} was expected")
        if proto.chunks == 1:
            if payload.nbytes != total:
                raise BadFrame(f"a chunk of {payload.nbytes} bytes where {total} were announced")
            return Frame(header, payload)
        if proto.chunk == 0:
            self._header, self._buffer, self._filled, self._chunks = header, bytearray(total), 0, proto.chunks
        end = self._filled + payload.nbytes
        if end > total or (payload.nbytes != CHUNK_BYTES and proto.chunk != proto.chunks - 1):
            raise BadFrame(f"chunk {proto.chunk} has {payload.nbytes} bytes, wanted {CHUNK_BYTES}")
        self._buffer[self._filled : end] = payload
        self._filled, self._next = end, self._next + 1
        if self._next < self._chunks:
            return None
        if self._filled != total:
            raise BadFrame(f"a frame ended after {self._filled} of {total} bytes")
        frame = Frame(header, memoryview(self._buffer))
        self._header, self._buffer, self._next = None, bytearray(), 0
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


def readdress(header: Header, kind: FrameKind) -> Header:
    """The same identity for an answer of another kind."""
    return replace(header, kind=kind)
