"""Small integers to bytes that zstd's Huffman stage packs close to their entropy, and back; numpy only, no tensor.

A matrix q_RN holds one coefficient a line (in eigenvalue order: large ones first) and one row of the packet a column.
Huffman codes spend at least one bit a symbol and one table a block, so lines are grouped by their mean |q| in classes:
several small digits share a byte (five trits, three of five values, two of fifteen), larger ones are bytes grouped by
octave, each class in a block, and so with a table, of its own. What does not fit its class's digits, or is not zero in
a line of almost only zeros, is an exception: its place (the gap since the one before) and value in two lists beside.
Measured on activations, gradients and deltas: 1.0-1.15 of the order-0 entropy of the lines.

Shape legend: R lines, N columns, K lines of one class, X exceptions.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from codec.errors import PacketError

Int16 = NDArray[np.int16]
UInt8 = NDArray[np.uint8]


class Class(NamedTuple):
    """Lines with mean |q| <= `mean`, stored as `digits` digits -`largest`..`largest` a byte; exceptions are larger."""

    mean: float
    largest: int
    digits: int


# The means are where the next class becomes smaller on real coefficients. They also bound the exceptions, whose share
# is at most mean / (largest + 1): with three bytes for each, no class exceeds two bytes a number (`spec` counts on it).
CLASSES: Final = (
    Class(1 / 8, 0, 0),
    Class(0.3, 1, 5),
    Class(0.6, 2, 3),
    Class(2.0, 7, 2),
    *(Class(mean, 127, 1) for mean in (4.0, 8.0, 16.0, 42.0)),
    Class(float("inf"), 32767, 0),  # two planes of bytes, low and high
)
WIDE: Final = len(CLASSES) - 1
_MEANS: Final = np.array([each.mean for each in CLASSES[:-1]])
_LARGEST: Final = np.array([each.largest for each in CLASSES], dtype=np.int16)
_ESCAPE: Final = 255  # a gap of 255 or more: this many numbers without an exception, and on
_SIGNS, _BYTES, _WIDE_VALUES = range(3)  # the form of the exceptions' values; it stands above their count:
_FORM_SHIFT: Final = 30


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix as bytes: each line's class, the two counts a reader needs, and the blocks, each of one statistic."""

    classes_R: UInt8
    exceptions: int
    gap_bytes: int
    blocks: list[NDArray[np.uint8]]


def encode_matrix(q_RN: Int16) -> Coded:
    """The blocks of `q_RN`, |q| <= 32767. At most 2 N bytes a line and one more byte in 255 numbers."""
    lines, columns = q_RN.shape
    if not q_RN.size:
        return Coded(np.zeros(lines, np.uint8), 0, 0, [])
    size_RN = np.abs(q_RN)
    mean_R = size_RN.sum(axis=1, dtype=np.int32 if columns < 1 << 16 else np.int64) / columns
    classes_R = np.searchsorted(_MEANS, mean_R).astype(np.uint8)
    exceeding_R = size_RN.max(axis=1) > _LARGEST[classes_R]
    gaps, count = np.empty(0, np.uint8), 0
    values: list[UInt8] = []
    if exceeding_R.any():
        places_X = np.flatnonzero(size_RN > np.where(exceeding_R, _LARGEST[classes_R], _LARGEST[-1])[:, None])
        values, form = _from_values(np.take(q_RN, places_X))
        places_X -= np.cumsum(~exceeding_R)[places_X // columns] * columns  # among the exceeding lines alone
        gaps, count = _gaps(places_X), len(places_X) | form << _FORM_SHIFT
    blocks = []
    for number in map(int, np.flatnonzero(np.bincount(classes_R))):
        if (each := CLASSES[number]).largest:
            where = _lines(classes_R == number)
            fits_KN = size_RN[where] <= each.largest if exceeding_R[where].any() else None
            blocks += _dense(q_RN[where], fits_KN, number)
    classes_R |= exceeding_R.astype(np.uint8) << 7
    return Coded(classes_R, count, len(gaps), [*blocks, gaps, *values])


def decode_matrix(reader: "Reader", classes_R: UInt8, exceptions: int, gap_bytes: int, out_RN: Int16) -> None:
    """Fills `out_RN` with the matrix whose blocks `reader` stands before. Raises `PacketError` for what `encode_matrix`
    cannot write."""
    exceeding_R = classes_R >= 128
    classes_R = classes_R & np.uint8(127)
    if classes_R.max(initial=0) > WIDE:
        raise PacketError("line class", int(classes_R.max()), f"0..{WIDE}")
    columns = out_RN.shape[1]
    for number in map(int, np.flatnonzero(np.bincount(classes_R))):
        members_R = classes_R == number
        dense = _from_dense(reader, number, int(members_R.sum()), columns) if CLASSES[number].largest else 0
        out_RN[_lines(members_R)] = dense
    if exceptions:
        form, count = exceptions >> _FORM_SHIFT, exceptions & (1 << _FORM_SHIFT) - 1
        places_X = _places(reader.take(gap_bytes), count, int(exceeding_R.sum()) * columns)
        line_X, column_X = np.divmod(places_X, columns)
        out_RN[np.flatnonzero(exceeding_R)[line_X], column_X] = _to_values(reader, count, form)
    elif gap_bytes:
        raise PacketError("exceptions", f"{gap_bytes} bytes of gaps", "none without exceptions")


def _lines(members_R: NDArray[np.bool_]) -> slice | NDArray[np.intp]:
    """An index of the members (there is one): a slice, which copies nothing, if they stand together."""
    lines_K = np.flatnonzero(members_R)
    first, last = int(lines_K[0]), int(lines_K[-1])
    return slice(first, last + 1) if last - first + 1 == len(lines_K) else lines_K


class Reader:
    """Walks over a payload that is already in memory; a stranger's counts can ask for no more than is there."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = np.frombuffer(raw, np.uint8)
        self._at = 0

    def take(self, size: int) -> UInt8:
        """The next `size` bytes, without a copy."""
        if not 0 <= size <= len(self._raw) - self._at:
            raise PacketError("payload", f"{len(self._raw) - self._at} bytes left", f"{size} bytes for the next block")
        self._at += size
        return self._raw[self._at - size : self._at]

    def close(self) -> None:
        """Refuses bytes after the last block."""
        if self._at != len(self._raw):
            raise PacketError("payload", f"{len(self._raw) - self._at} bytes more", "none after the last block")


def pack_digits(v_KN: Int16 | NDArray[np.int8], largest: int, digits: int) -> UInt8:
    """Numbers -largest..largest, `digits` of them a byte, each line on its own: [K, ceil(N / digits)].

    A byte takes its digits from `digits` equal stretches of the line, so that all work is on contiguous memory.
    """
    base, stretch = 2 * largest + 1, -(-v_KN.shape[1] // digits)
    digits_KN = (v_KN.astype(np.int8, copy=False) + np.int8(largest)).view(np.uint8)
    packed_KM = digits_KN[:, :stretch].copy()
    for place in range(1, digits):
        part = digits_KN[:, place * stretch : (place + 1) * stretch]
        packed_KM[:, : part.shape[1]] += part * np.uint8(base**place)
    return packed_KM


def unpack_digits(packed_KM: UInt8, largest: int, digits: int, columns: int) -> Int16:
    """The numbers that `pack_digits` was given. Raises `PacketError` for a byte that it cannot have written."""
    base, stretch = 2 * largest + 1, packed_KM.shape[1]
    if packed_KM.max(initial=0) >= base**digits:
        raise PacketError("packed digits", int(packed_KM.max()), f"below {base**digits}")
    v_KN = np.empty((len(packed_KM), columns), np.int16)
    rest_KM = packed_KM
    for place in range(digits):
        part = v_KN[:, place * stretch : (place + 1) * stretch]
        higher_KM = rest_KM // np.uint8(base)
        part[:] = (rest_KM - higher_KM * np.uint8(base))[:, : part.shape[1]]
        rest_KM = higher_KM
    v_KN -= largest
    return v_KN


def _dense(q_KN: Int16, fits_KN: NDArray[np.bool_] | None, number: int) -> list[UInt8]:
    """The lines of one class, with zeros where their exceptions are."""
    each = CLASSES[number]
    if number == WIDE:
        q_KN = q_KN + np.int16(128)  # so that the high plane is zero, and not a sign, for a number that fits a byte
        return [q_KN.astype(np.uint8), (q_KN >> 8).astype(np.uint8)]
    small_KN = q_KN.astype(np.int8)
    if fits_KN is not None:
        small_KN *= fits_KN
    return [small_KN.view(np.uint8) if each.digits == 1 else pack_digits(small_KN, each.largest, each.digits)]


def _from_dense(reader: Reader, number: int, lines: int, columns: int) -> Int16 | NDArray[np.int8]:
    each = CLASSES[number]
    if number == WIDE:
        low, high = reader.take(lines * columns), reader.take(lines * columns)
        return (low | high.astype(np.uint16) << 8).view(np.int16).reshape(lines, columns) - np.int16(128)
    if each.digits == 1:
        return reader.take(lines * columns).view(np.int8).reshape(lines, columns)
    packed = reader.take(lines * -(-columns // each.digits)).reshape(lines, -1)
    return unpack_digits(packed, each.largest, each.digits, columns)


def _gaps(places_X: NDArray[np.intp]) -> UInt8:
    """How many numbers lie between one exception and the next: whole 255s as escapes, then the rest as a byte."""
    gaps_X = np.diff(places_X, prepend=-1) - 1
    escapes_X = gaps_X // _ESCAPE
    ends_X = np.cumsum(escapes_X + 1) - 1
    gaps = np.full(ends_X[-1] + 1, _ESCAPE, np.uint8)
    gaps[ends_X] = gaps_X % _ESCAPE
    return gaps


def _places(gaps: UInt8, count: int, size: int) -> NDArray[np.intp]:
    if count > size // 3 + 1 or len(gaps) > count + size // _ESCAPE:  # before anything is made of them
        raise PacketError("exceptions", f"{count} in {len(gaps)} bytes", f"at most a third of {size} numbers")
    ends = gaps != _ESCAPE
    if np.count_nonzero(ends) != count or not len(gaps) or gaps[-1] == _ESCAPE:
        raise PacketError("exceptions", f"{np.count_nonzero(ends)} places", count)
    places_X: NDArray[np.intp] = np.cumsum(gaps, dtype=np.intp)[ends] + np.arange(count)
    if places_X[-1] >= size:
        raise PacketError("exceptions", f"place {places_X[-1]}", f"below {size}")
    return places_X


def _from_values(values_X: Int16) -> tuple[list[UInt8], int]:
    """Signs as bits where all are -1 or 1; else 0, -1, 1, -2 ... as 0, 1, 2, 3 ... in one plane of bytes or two."""
    if np.abs(values_X).max() == 1:
        return [np.packbits(values_X < 0)], _SIGNS
    folded_X = (values_X << 1 ^ values_X >> 15).view(np.uint16)
    if folded_X.max() < 256:
        return [folded_X.astype(np.uint8)], _BYTES
    return [folded_X.astype(np.uint8), (folded_X >> 8).astype(np.uint8)], _WIDE_VALUES


def _to_values(reader: Reader, count: int, form: int) -> Int16:
    if form == _SIGNS:
        bits_X = np.unpackbits(reader.take(-(-count // 8)), count=count)
        return 1 - 2 * bits_X.astype(np.int16)
    if form > _WIDE_VALUES:
        raise PacketError("exceptions", f"form {form}", f"0..{_WIDE_VALUES}")
    folded_X = reader.take(count).astype(np.uint16)
    if form == _WIDE_VALUES:
        folded_X |= reader.take(count).astype(np.uint16) << 8
    return (folded_X >> 1).astype(np.int16) ^ -(folded_X & 1).astype(np.int16)
