"""Sizes of framing: by hand where the protocols say them exactly, within bounds where kernels decide."""

from __future__ import annotations

import random

import pytest

from swarm_core.wire.frames import CHUNK_BYTES, FRAME_OVERHEAD, message_bytes
from swarm_core.wire.framing import SEGMENT_BYTES, SEGMENT_HEADER_BYTES, Wire, frame_wire, segments, tcp_bytes


@pytest.mark.parametrize(
    ("message", "tls", "tcp", "wire"),
    [
        (0, False, 14, 80),  # 9 of HTTP/2, 5 of gRPC, one segment
        (1434, False, 1448, 1514),  # the largest that one segment holds
        (1435, False, 1449, 1581),
        (100 + 8192, False, 8306, 8306 + 6 * 66),
        (100, True, 136, 202),
        (16270, True, 16284 + 22, 16306 + 12 * 66),  # the largest that one record holds
        (16271, True, 16285 + 44, 16329 + 12 * 66),
        (CHUNK_BYTES + 100, False, 1048690, 1048690 + 725 * 66),
        (CHUNK_BYTES + 100, True, 1048690 + 65 * 22, 1050120 + 726 * 66),
    ],
)
def test_what_the_sender_sends_is_what_the_protocols_say(message: int, tls: bool, tcp: int, wire: int) -> None:
    assert tcp_bytes(message, tls) == tcp
    assert frame_wire(message, tls=tls).sent == wire


def test_segments_have_no_gaps() -> None:
    assert [segments(n) for n in (1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 10 * SEGMENT_BYTES)] == [1, 1, 2, 10]


@pytest.mark.parametrize("tls", [False, True])
def test_equal_messages_are_as_good_as_the_real_ones(tls: bool) -> None:
    """A frame's last message is smaller than the others; taking all as equal costs at most a header each."""
    rng = random.Random(5)
    for _ in range(200):
        payload = rng.randrange(8 * CHUNK_BYTES)
        whole, rest = divmod(payload, CHUNK_BYTES)
        parts = [CHUNK_BYTES] * whole + ([rest] if rest or not whole else [])
        real = sum(frame_wire(part + FRAME_OVERHEAD, tls=tls).sent for part in parts)
        taken = frame_wire(message_bytes(payload), len(parts), tls).sent
        assert abs(real - taken) <= len(parts) * (SEGMENT_HEADER_BYTES + (23 if tls else 1))


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("size", [100, 1124, 8292, 65636, CHUNK_BYTES + 100])
def test_the_answer_lies_between_silence_and_every_second_segment(size: int, tls: bool) -> None:
    count = segments(tcp_bytes(size, tls))
    most = 66 * -(-count // 2)
    assert 0 < frame_wire(size, tls=tls).answered <= most
    quick = min(count, 16)
    assert quick * 66 < frame_wire(size, tls=tls, alone=True).answered <= quick * 66 + most + 33
    if count > 100:  # bulk: on a slow link at most 0.5 % of what is sent is missing
        assert 0 < most - frame_wire(size, tls=tls).answered < 0.005 * frame_wire(size, tls=tls).sent


def test_messages_add_up() -> None:
    one = frame_wire(1000)
    assert frame_wire(3000, 3) == Wire(3 * one.sent, 3 * one.answered) == one.plus(one).plus(one)
