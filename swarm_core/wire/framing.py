"""What a message costs on the wire, HTTP/2, TLS, TCP, IP and Ethernet. Pure sizes in bytes; sends and measures nothing.

The sending side is exact: gRPC writes each message for itself, so it begins a segment of its own and no two share one.
What comes back is an expectation, because when a kernel acknowledges depends on how fast segments arrive. Both are
held against the kernel's counters by `make bench-wire` (benchmarks/wire.md, docs/decisions/0006).
"""

from __future__ import annotations

from typing import NamedTuple

MESSAGE_PREFIX_BYTES = 9 + 5  # one HTTP/2 DATA header (peers agree on frames above our chunks) and gRPC's length prefix
SEGMENT_BYTES = 1448  # TCP payload at Ethernet's MTU of 1500: less 20 (IPv4), 20 (TCP), 12 (its timestamps)
SEGMENT_HEADER_BYTES = 14 + 20 + 32  # Ethernet as interfaces count it (no preamble, no checksum), IPv4, TCP
TLS_RECORD_BYTES = 16384 - 100  # plaintext of a full record as gRPC fills it
TLS_RECORD_OVERHEAD_BYTES = 5 + 1 + 16  # record header, content type, AEAD tag (TLS 1.3)
# Two WINDOW_UPDATEs of 13 bytes ride on the next message the other way, if there is one: half of that is expected.
WINDOW_UPDATE_BYTES = 13
# A receiver acknowledges every second segment of a slow link (RFC 5681) and next to none of a fast burst. Two in five
# lean to the slow: bulk data is then at most 0.5 % low there, and at most 1.8 % high where nothing is acknowledged. A
# message's first segment is acknowledged alone half of the time.
SEGMENTS_PER_ACK = 2.5
# After a pause Linux acknowledges segments one by one, up to this many; gRPC probes the line with a ping now and then.
QUICK_ACKS = 16


class Wire(NamedTuple):
    """Bytes on the interface of whoever sends, and bytes that come back for them."""

    sent: int
    answered: int

    def plus(self, other: Wire) -> Wire:
        return Wire(self.sent + other.sent, self.answered + other.answered)


# A connection and its stream, opened and closed: TCP and TLS handshakes, SETTINGS, HEADERS, pings, trailers. Measured.
OPENING = Wire(1_180, 880)
OPENING_TLS = Wire(3_560, 4_220)  # both ends with a certificate of 0.4 KB


def segments(tcp_bytes: int) -> int:
    """Segments that one write of this many bytes needs."""
    return -(-tcp_bytes // SEGMENT_BYTES)


def tcp_bytes(message_bytes: int, tls: bool) -> int:
    """What a gRPC message of this size hands to TCP."""
    plain = message_bytes + MESSAGE_PREFIX_BYTES
    return plain + TLS_RECORD_OVERHEAD_BYTES * -(-plain // TLS_RECORD_BYTES) if tls else plain


def frame_wire(message_bytes: int, messages: int = 1, tls: bool = False, alone: bool = False) -> Wire:
    """The gRPC messages of one frame on Ethernet, `message_bytes` together.

    They are taken to be equally large, which the last is not: that is at most one segment's header a message off.
    `alone` says that the stream is idle otherwise, both ways: nothing can carry an acknowledgement, none is delayed.
    """
    tcp = tcp_bytes(-(-message_bytes // messages), tls)
    count = segments(tcp)
    quick = min(count, QUICK_ACKS) if alone else 0
    halves = 1 + 2 * quick + int(2 * (count - max(1, quick)) / SEGMENTS_PER_ACK)  # of an acknowledgement
    update = 0 if alone else WINDOW_UPDATE_BYTES + (TLS_RECORD_OVERHEAD_BYTES // 2 if tls else 0)
    answered = update + halves * SEGMENT_HEADER_BYTES // 2
    return Wire(messages * (tcp + count * SEGMENT_HEADER_BYTES), messages * answered)
