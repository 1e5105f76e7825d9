"""The payloads of packets of format 2: quantised rows to runs of bytes and back; numpy only, no tensor, no header.

    outliers   their places (uint32, ascending), then their rows (fp32)
    bf16       the coefficients, row-major
    int8       the scales (bf16), then the integers, one coefficient of all rows after the other
    int4       the same, two rows a byte
    uniform    for whole rows, then for changes, where there are such: the count of exceptions and of their gaps' bytes
               (uint32 each) and the class of each line; the scale codes of whole rows plus 400 (uint16; all low bytes,
               then all high ones; or one for the packet); the blocks of whole rows and of changes (`entropy`)

Outliers stand as zeros among the coefficients, and their scales mean nothing: taking them out costs more time than
the bytes are worth. Everything is little-endian. Shape legend: N rows, R coefficients a row, S = R + 1: one line more
for the scale codes (`quantise`), O outliers, H width.
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.entropy import Reader, decode_matrix, encode_matrix, pack_digits, unpack_digits
from codec.errors import PacketError
from codec.header import Element
from codec.quantise import LARGEST, LARGEST_CODE, LARGEST_INTEGER, SMALLEST_CODE
from codec.reuse import References

Int16 = NDArray[np.int16]
_HEAD = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Outliers:
    """Rows that travel exactly: their places among all rows, ascending, and themselves."""

    places_O: NDArray[np.int64]
    rows_OH: NDArray[np.float32]

    def parts(self) -> list[memoryview]:
        return [view_bytes(self.places_O.astype("<u4")), view_bytes(self.rows_OH)] if len(self.places_O) else []


def read_outliers(reader: Reader, count: int, rows: int, width: int) -> Outliers:
    """Raises `PacketError` for places that are no ascending rows, or values that are not finite."""
    places_O = reader.take(4 * count).view("<u4").astype(np.int64)
    if count and (places_O[-1] >= rows or (np.diff(places_O) <= 0).any()):
        raise PacketError("outliers", places_O.tolist()[:4], f"ascending rows below {rows}")
    rows_OH = reader.take(4 * count * width).view("<f4").reshape(count, width)
    if not np.isfinite(rows_OH).all():
        raise PacketError("values", "NaN or Inf in an outlier", "finite values")
    return Outliers(places_O, rows_OH)


def integer_parts(buffer_SN: Int16, element: Element) -> list[memoryview]:
    """The int8 and int4 layouts."""
    q_RN, scale_N = buffer_SN[:-1], buffer_SN[-1]
    if element == Element.INT8:
        return [view_bytes(scale_N), view_bytes(q_RN.astype(np.int8))]
    return [view_bytes(scale_N), view_bytes(pack_digits(q_RN, LARGEST[element], 2))]


def read_integers(reader: Reader, element: Element, rank: int, rows: int) -> Int16:
    """Raises `PacketError` for integers out of range. Scales are for the caller to judge."""
    buffer_SN = np.empty((rank + 1, rows), np.int16)
    buffer_SN[-1] = reader.take(2 * rows).view("<i2")
    if element == Element.INT8:
        buffer_SN[:-1] = reader.take(rank * rows).view(np.int8).reshape(rank, rows)
        if buffer_SN[:-1].min(initial=0) < -LARGEST[element]:
            raise PacketError("values", -128, f"at least {-LARGEST[element]}")
    else:
        packed = reader.take(rank * -(-rows // 2)).reshape(rank, -1)
        buffer_SN[:-1] = unpack_digits(packed, LARGEST[element], 2, rows)
    return buffer_SN


def uniform_parts(buffer_SN: Int16, references: References | None, one_scale: bool) -> list[memoryview]:
    """The uniform layout. `references` are those of the N rows."""
    q_RN, code_N = buffer_SN[:-1], buffer_SN[-1]
    if references is None:
        matrices = [encode_matrix(q_RN)] if code_N.size else []
        whole_N = code_N
    else:
        held_N = references.held_N
        whole_N = code_N[~held_N]
        matrices = [encode_matrix(_columns(q_RN, ~held_N))] if len(whole_N) else []
        if len(whole_N) < len(code_N):
            matrices.append(encode_matrix(_columns(q_RN, held_N) - _columns(references.q_RN, held_N)))
    codes = np.maximum(whole_N[:1] if one_scale else whole_N, SMALLEST_CODE) - np.int16(SMALLEST_CODE)
    head = b"".join(_HEAD.pack(each.exceptions, each.gap_bytes) + each.classes_R.tobytes() for each in matrices)
    blocks = [block for each in matrices for block in each.blocks]
    return [memoryview(head), *map(view_bytes, [*_planes(codes), *blocks])]


def read_uniform(reader: Reader, rank: int, rows: int, references: References | None, one_scale: bool) -> Int16:
    """The integers and codes of the rows, changes applied. Raises `PacketError` for codes or integers out of range."""
    held_N = references.held_N if references is not None else np.zeros(rows, np.bool_)
    changed = int(np.count_nonzero(held_N))
    whole = rows - changed
    heads = [
        (*_HEAD.unpack(reader.take(_HEAD.size).tobytes()), reader.take(rank)) for count in (whole, changed) if count
    ]
    codes = 1 if one_scale and whole else whole
    low, high = reader.take(codes), reader.take(codes)
    code_N = (low | high.astype(np.uint16) << 8).astype(np.int32) + SMALLEST_CODE
    if code_N.max(initial=SMALLEST_CODE) > LARGEST_CODE:
        raise PacketError("scale code", int(code_N.max()), f"at most {LARGEST_CODE}")
    buffer_SN = np.empty((rank + 1, rows), np.int16)
    for count, mask_N in ((whole, ~held_N), (changed, held_N)):
        if not count:
            continue
        exceptions, gap_bytes, classes_R = heads.pop(0)
        q_RN = buffer_SN[:-1] if count == rows else np.empty((rank, count), np.int16)
        decode_matrix(reader, classes_R, exceptions, gap_bytes, q_RN)
        if references is not None and mask_N is held_N:
            _apply(q_RN, references.q_RN if count == rows else references.q_RN[:, held_N])
        if count != rows:
            buffer_SN[:-1, mask_N] = q_RN
    if changed and references is not None:
        buffer_SN[-1] = references.code_N
    buffer_SN[-1, ~held_N] = code_N
    if largest(buffer_SN[:-1]) > LARGEST_INTEGER:
        raise PacketError("values", -LARGEST_INTEGER - 1, f"at least {-LARGEST_INTEGER}")
    return buffer_SN


def changes_fit(q_RN: Int16, references: References) -> bool:
    """Whether the changes can travel: none of `q_RN` may have been cut off at the largest integer, and no sum of change
    and reference, however they are put together, may pass it."""
    return largest(q_RN) + 2 * largest(references.q_RN) < LARGEST_INTEGER


def _apply(change_RN: Int16, reference_RN: Int16) -> None:
    if (most := largest(change_RN) + largest(reference_RN)) > LARGEST_INTEGER:
        raise PacketError("changes", f"up to {most} with their references", f"at most {LARGEST_INTEGER}")
    change_RN += reference_RN


def largest(q_RN: Int16) -> int:
    """The largest |q|; 0 if there is none."""
    return max(int(q_RN.max(initial=0)), -int(q_RN.min(initial=0)))


def _columns(q_RN: Int16, mask_N: NDArray[np.bool_]) -> Int16:
    return q_RN if mask_N.all() else q_RN[:, mask_N]


def _planes(codes: Int16) -> list[NDArray[np.uint8]]:
    return [codes.astype(np.uint8), (codes >> 8).astype(np.uint8)]


def view_bytes(numbers: NDArray[Any]) -> memoryview:
    """The numbers' memory, row-major: no copy where they are contiguous."""
    view: memoryview = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data
    return view
