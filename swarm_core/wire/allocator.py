"""glibc's allocator, told to keep large blocks. One call at the start of a process; elsewhere it does nothing."""

from __future__ import annotations

import ctypes
import sys

# Parameter numbers of <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

# All three or none: with one of them alone, messages of 1 to 10 MB moved slower than with glibc's own settings.
SETTINGS = {
    M_MMAP_THRESHOLD: 1 << 30,  # blocks below it come from the heap, whose pages stay mapped between messages
    M_TRIM_THRESHOLD: (1 << 31) - 1,  # do not give the top of the heap back after each free; the largest int
    M_TOP_PAD: 64 << 20,  # grow in steps that several messages fit in
}


def keep_large_blocks() -> bool:
    """Serve message-sized blocks from memory that the process already has; True where that could be set.

    Otherwise glibc maps a large block afresh, the kernel clears its pages one fault at a time, and the free unmaps it:
    on messages of 1 to 10 MB that is most of the time. The price: resident memory stays near its peak. Call it before
    the first large message.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    except (OSError, AttributeError):
        return False  # another C library (musl has no mallopt)
    taken = [mallopt(parameter, value) for parameter, value in SETTINGS.items()]  # all of them, also after a refusal
    return all(result == 1 for result in taken)
