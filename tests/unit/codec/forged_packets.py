"""What tests of packets in sections do to them: damage, and forgery with a checksum that fits. No test is here."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from codec.sections import HEADER_BYTES


def resealed(packet: bytes) -> bytes:
    """With the length and the checksum that fit what it has become."""
    head = packet[: HEADER_BYTES - 14] + struct.pack(">BQ", 0xCF, len(packet) - HEADER_BYTES)
    crc = zlib.crc32(packet[HEADER_BYTES:], zlib.crc32(head))
    return head + struct.pack(">BI", 0xCE, crc) + packet[HEADER_BYTES:]


def mutations(packet: bytes, count: int, seed: int) -> Iterator[bytearray]:
    """Copies with one to three bytes changed."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        mutated = bytearray(packet)
        for at in generator.integers(0, len(packet), generator.integers(1, 4)):
            mutated[at] ^= int(generator.integers(1, 256))
        if mutated != packet:
            yield mutated
