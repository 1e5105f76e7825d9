"""Integers as byte planes, and ascending places as the gaps between them; numpy only, no packet, no policy.

zstd packs what stands together: the high bytes of floats are nearly alike and the low ones are noise, so all first
bytes go first, then all second ones. On bf16 weights that is 0.68 of the bytes where the numbers as they stand are
0.78; on fp32 0.84 and 0.93 (measured, level 1).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.errors import PacketError

UInt8 = NDArray[np.uint8]


def split(numbers: NDArray[Any], width: int) -> list[UInt8]:
    """The low `width` bytes of unsigned integers, a plane each, lowest first."""
    return [(numbers >> numbers.dtype.type(8 * place)).astype(np.uint8) for place in range(width)]


def join(raw: UInt8, count: int, dtype: Any) -> NDArray[Any]:
    """What `split` was given: `count` integers out of planes of so many bytes that follow each other in `raw`, whose
    length is a multiple of `count`."""
    numbers = raw[:count].astype(dtype)
    for place in range(1, len(raw) // count if count else 0):
        numbers |= raw[place * count : (place + 1) * count].astype(dtype) << numbers.dtype.type(8 * place)
    return numbers


def gap_bytes(size: int) -> int:
    """Bytes that a gap between two of `size` places needs: 1..4 below 2^32."""
    return max(1, -(-(max(size, 1) - 1).bit_length() // 8))


def gaps(places: NDArray[np.intp]) -> NDArray[np.uint32]:
    """How many numbers lie between each place and the one before, of ascending places below 2^32."""
    between = np.diff(places, prepend=-1)
    between -= 1
    return between.astype(np.uint32)


def places(raw: UInt8, count: int, size: int) -> NDArray[np.intp]:
    """The `count` places below `size` whose gaps' planes are `raw`. Ascending, as no gap is negative; raises
    `PacketError` if the last is out of range."""
    found: NDArray[np.intp] = np.cumsum(join(raw, count, np.uint32), dtype=np.intp)
    found += np.arange(count)
    if count and found[-1] >= size:
        raise PacketError("places", int(found[-1]), f"below {size}")
    return found
