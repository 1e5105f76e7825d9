"""How fast a host may use its line: a token bucket each way, shared by all links of a process. The bucket knows no clock.

Bytes are those on an Ethernet line, so that a limit can be compared with what the provider sells and with interface counters.
Up: a chunk waits for its tokens before it is written. Down: after a chunk was read, the next read waits; gRPC's windows
then fill and HTTP/2 flow control holds the sender back, so the limit holds on average, and a burst of up to a window
(some 64 KiB at first, a few MB on a long fast path) still comes in at line speed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from swarm_core.errors import UserError
from swarm_core.wire.frames import CHUNK_BYTES, CHUNK_UNIT_BYTES
from swarm_core.wire.framing import frame_wire

# A chunk takes at most this long at the limit: as long as a small frame of another link may have to wait for it.
CHUNK_S = 0.02


def line_bytes(message_bytes: int) -> int:
    """What a gRPC message of a stream costs on the line, headers below it included (TLS is 0.1 % more). Pure."""
    return frame_wire(message_bytes).sent


class TokenBucket:
    """At most `bytes_per_s x t + burst_bytes` go through in any time t. Sans-I/O: the caller brings the time and waits.

    Whoever reserves goes into debt at once, so waiters are served in the order they came, however large their pieces are.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = burst_bytes
        self._tokens = burst_bytes
        self._at: float | None = None

    def reserve(self, n: int, now_s: float) -> float:
        """Take n bytes at the time `now_s`; the seconds to wait before they may go. Times must not run backwards."""
        earned = 0.0 if self._at is None else (now_s - self._at) * self.bytes_per_s
        self._at = now_s
        self._tokens = min(self.burst_bytes, self._tokens + earned) - n
        return max(0.0, -self._tokens / self.bytes_per_s)


class Pace:
    """One direction of the line. `take` waits for its turn."""

    def __init__(self, mbps: float) -> None:
        bytes_per_s = mbps * 1e6 / 8
        units = int(bytes_per_s * CHUNK_S) // CHUNK_UNIT_BYTES
        self.chunk_bytes = min(CHUNK_BYTES, max(1, units) * CHUNK_UNIT_BYTES)
        # One chunk of burst: enough that a timer that wakes late loses nothing, and no more, so that pacing is smooth.
        self.bucket = TokenBucket(bytes_per_s, line_bytes(self.chunk_bytes))

    async def take(self, message_bytes: int) -> None:
        """Wait until a message of this size may go."""
        wait_s = self.bucket.reserve(line_bytes(message_bytes), time.monotonic())
        if wait_s > 0:
            await asyncio.sleep(wait_s)


@dataclass(frozen=True)
class Limits:
    """What this host may send (up) and receive (down); None: as fast as it goes."""

    up: Pace | None = None
    down: Pace | None = None


NO_LIMITS = Limits()


def read_limits(text: str | None) -> Limits:
    """`--limit-mbps`: "50" for both ways or "50:200" for up and down, in Mbit/s. Raises UserError.

    Call it once a process: its links share what it returns.
    """
    if text is None:
        return NO_LIMITS
    up, colon, down = text.partition(":")
    return Limits(_pace(up, text), _pace(down if colon else up, text))


def _pace(number: str, text: str) -> Pace:
    try:
        mbps = float(number)
    except ValueError:
        mbps = 0.0
    if not 0.01 <= mbps <= 1e6:  # also not a number; 10 kbit/s is one 16 KiB chunk in 13 s
        wanted = "wanted Mbit/s from 0.01 to 1000000, such as 50 for both ways or 50:200 for up:down"
        raise UserError(f"--limit-mbps {text!r} is no limit: {wanted}")
    return Pace(mbps)
