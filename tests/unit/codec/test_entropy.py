"""Matrices of small integers come back as they were, in no more bytes than promised and in not many more than they hold."""

import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codec.entropy import CLASSES, WIDE, Reader, decode_matrix, encode_matrix, pack_digits, unpack_digits
from codec.errors import PacketError


def round_trip(q_RN: NDArray[np.int16]) -> bytes:
    """Asserts that the matrix comes back and keeps the bound; returns its bytes."""
    coded = encode_matrix(q_RN)
    raw = b"".join(block.tobytes() for block in coded.blocks)
    assert len(raw) <= 2 * q_RN.size + q_RN.size // 255
    reader = Reader(memoryview(raw))
    back_RN = np.empty_like(q_RN)
    decode_matrix(reader, coded.classes_R, coded.exceptions, coded.gap_bytes, back_RN)
    reader.close()
    assert np.array_equal(back_RN, q_RN) and back_RN.dtype == np.int16
    return raw


def laplace(lines: int, columns: int, mean: float, seed: int = 0) -> NDArray[np.int16]:
    drawn = np.random.default_rng(seed).laplace(scale=mean, size=(lines, columns))
    return np.rint(drawn).clip(-32767, 32767).astype(np.int16)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 255, 256, 1000])
@pytest.mark.parametrize("mean", [0.001, 0.1, 0.3, 0.7, 2.0, 6.0, 30.0, 90.0, 5000.0])
def test_every_class_comes_back(mean: float, columns: int) -> None:
    round_trip(laplace(7, columns, mean))


def test_all_classes_in_one_matrix() -> None:
    q_RN = np.concatenate(
        [laplace(2, 400, mean, seed) for seed, mean in enumerate((500.0, 30, 12, 6, 3, 1, 0.6, 0.3, 0.02))]
    )
    assert set(encode_matrix(q_RN).classes_R & 127) == set(range(len(CLASSES)))
    round_trip(q_RN)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(0, 70), st.floats(0.0, 200.0), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_any_matrix_comes_back(lines: int, columns: int, mean: float, spikes: int, seed: int) -> None:
    q_RN = laplace(lines, columns, mean, seed)
    generator = np.random.default_rng(seed)
    if q_RN.size:
        places = generator.integers(0, q_RN.size, spikes)
        q_RN.reshape(-1)[places] = generator.integers(-32767, 32768, spikes)
    round_trip(q_RN)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 5000])
def test_gaps_around_the_escape(gap: int) -> None:
    q_RN = np.zeros((1, 6000), np.int16)
    q_RN[0, [3, 3 + gap + 1]] = 1, -1
    assert len(round_trip(q_RN)) == 3 + gap // 255  # two gaps, their escapes, one byte of signs
    q_RN[0, 3] = -300
    assert len(round_trip(q_RN)) == 6 + gap // 255


def test_nothing_costs_nothing() -> None:
    assert round_trip(np.zeros((9, 1000), np.int16)) == b""
    assert round_trip(np.zeros((9, 0), np.int16)) == round_trip(np.zeros((0, 9), np.int16)) == b""


@pytest.mark.parametrize(
    ("mean", "ratio"), [(0.02, 1.15), (0.2, 1.25), (0.4, 1.1), (1.5, 1.1), (10.0, 1.06), (60.0, 1.15)]
)
def test_close_to_the_entropy_of_the_lines(mean: float, ratio: float) -> None:
    """One frame of zstd, a block for each part, on lines of one distribution: the worst places between two classes."""
    q_RN = laplace(20, 4000, mean)
    bits = 0.0
    for line in q_RN:
        _, counts = np.unique(line, return_counts=True)
        bits -= (counts * np.log2(counts / len(line))).sum()
    frames = [zstandard.ZstdCompressor(level=1).compress(block.tobytes()) for block in encode_matrix(q_RN).blocks]
    assert sum(map(len, frames)) < ratio * bits / 8 + 50


@pytest.mark.parametrize(("largest", "digits"), [(1, 5), (2, 3), (7, 2)])
@pytest.mark.parametrize("columns", range(1, 13))
def test_digits_share_bytes(largest: int, digits: int, columns: int) -> None:
    v_KN = np.random.default_rng(columns).integers(-largest, largest + 1, (3, columns)).astype(np.int16)
    packed_KM = pack_digits(v_KN, largest, digits)
    assert packed_KM.shape == (3, -(-columns // digits))
    assert np.array_equal(unpack_digits(packed_KM, largest, digits, columns), v_KN)
    packed_KM[1, 0] = (2 * largest + 1) ** digits
    with pytest.raises(PacketError, match="packed digits"):
        unpack_digits(packed_KM, largest, digits, columns)


def test_a_strangers_counts_are_checked() -> None:
    one = np.zeros(1, np.uint8)
    exceeding = np.full(1, 128, np.uint8)
    for classes_R, exceptions, gap_bytes, raw, complaint in (
        (one + WIDE + 1, 0, 0, b"", "line class"),
        (one + 1, 0, 0, b"", "payload"),
        (one, 0, 3, bytes(3), "exceptions"),
        (exceeding, 2, 2, b"\x00\xff\x00", "exceptions"),
        (exceeding, 2, 3, b"\x00\x00\x00\x00", "exceptions"),
        (exceeding, 1, 1, b"\x09\x00", "place 9"),
        (one, 1, 1, b"\x00\x00", "place 0"),
        (exceeding, 1 | 3 << 30, 1, b"\x00\x00", "form 3"),
        (exceeding, 2**29, 1, b"\x00\x00", "exceptions"),
        (exceeding, 1, 2**32 - 1, b"\x00\x00", "payload"),
        (exceeding, 1 << 30, 0, b"", "exceptions"),
    ):
        with pytest.raises(PacketError, match=complaint):
            decode_matrix(Reader(memoryview(raw)), classes_R, exceptions, gap_bytes, np.empty((1, 9), np.int16))
    reader = Reader(memoryview(b"12"))
    with pytest.raises(PacketError, match="none after"):
        reader.close()


def test_a_strangers_gaps_ask_for_no_memory_before_they_are_judged() -> None:
    """A million places in a matrix of nine numbers; and as many bytes of gaps as a payload may have."""
    for exceptions, gap_bytes in ((1 << 20, 1 << 20), (2, 1 << 20)):
        reader = Reader(memoryview(bytes(1 << 20)))
        tracemalloc.start()
        try:
            with pytest.raises(PacketError, match="a third of 9 numbers"):
                decode_matrix(reader, np.full(1, 128, np.uint8), exceptions, gap_bytes, np.empty((1, 9), np.int16))
            assert tracemalloc.get_traced_memory()[1] < 64 << 10
        finally:
            tracemalloc.stop()
