"""Where the largest numbers of a tensor are: selection alone, numpy only; no bytes, no packet.

By counting, not by partition: the bits of |x| of a float are ordered as |x| is, so the counts of their upper 16 and then
of their lower 16 lead to the smallest number that is kept. That takes no copy of the tensor, and 0.04-0.2 s for 20 M
numbers, whatever they are; `numpy.partition` takes 0.3 s, and 2.8 s where most are zeros (measured).
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

_PART: Final = 1 << 20  # numbers looked at at a time: their 4 MB stay in the cache
_DIGIT: Final = 16


def largest_places(x: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The places, ascending, of the 1 <= count <= n largest |x| of n finite numbers; of equal ones the first."""
    if count == len(x):
        return np.arange(count)
    least, equal = _least_kept(x, count)
    found = []
    for start, bits in _magnitudes(x):
        larger, same = np.flatnonzero(bits > least), np.flatnonzero(bits == least)[:equal]
        equal -= len(same)
        found.append(np.sort(np.concatenate((larger, same))) + start)
    return np.concatenate(found)


def _least_kept(x: NDArray[np.float32], count: int) -> tuple[np.uint32, int]:
    """The bits of the count-th largest |x|, and how many of its equals are among the `count`."""
    prefix, left = 0, count
    for shift in (_DIGIT, 0):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for _, bits in _magnitudes(x):
            if not shift:
                bits = bits[np.flatnonzero(bits >> np.uint32(_DIGIT) == prefix)]
            digits = bits >> np.uint32(shift) & np.uint32((1 << _DIGIT) - 1)
            counts += np.bincount(digits, minlength=1 << _DIGIT)
        down = np.cumsum(counts[::-1])  # numbers with this digit or a larger one, largest digit first
        at = int(np.searchsorted(down, left))
        left -= int(down[at - 1]) if at else 0
        prefix = prefix << _DIGIT | (1 << _DIGIT) - 1 - at
    return np.uint32(prefix), left


def _magnitudes(x: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    for start in range(0, len(x), _PART):
        yield start, x[start : start + _PART].view(np.uint32) & np.uint32(0x7FFFFFFF)
