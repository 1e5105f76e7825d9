"""When a peer that says nothing is taken as frozen or cut off. Pure: the caller brings the time; no socket, no clock.

A peer that is at work says something at least every second (beats.py). How long it may be silent follows from what was
seen of it: the longest gap between its messages in the last minutes, and the round trip. Only time counts in which
somebody waited for a message, and in which this process itself was running: a reader that computes, a loop that was
held up or a process that was stopped must not find everybody else dead.
"""

from __future__ import annotations

from collections import deque

from swarm_core.wire.frames import CHUNK_BYTES

LEAST_S, MOST_S = 3.0, 9.5  # a hiccup must not count as death; within ten seconds a death must be noticed
GAPS = 3.0  # on top of the longest gap, so many of it: five busy processes on two cores came to 1.7 s after 1.0
ROUND_TRIPS = 4.0  # a segment that is lost twice comes after about so many
KNOWN_S, KNOWN_GAPS = 10.0, 5  # before so much was seen of a peer, it has MOST_S
TRIPS = 8  # the least of so many round trips counts: a beat that waited for its reader seems to have travelled long
WINDOW_S = 60.0  # gaps are remembered for one to two of these
ROOM_S = 4.2  # a chunk on a line of 2 Mbit/s, while none has come that would show how long one takes
NOTICEABLE = 1.5  # a limit that changes by this factor is said again


class Silence:
    """The judge of one peer, from what `who` (a name for people) lets be heard.

    Nothing is judged before `arm`: a peer that does not beat promises nothing. `far`: there is a line in between.
    """

    def __init__(self, who: str, *, far: bool) -> None:
        self.who = who
        self.armed = False
        self._trips: deque[float] = deque(maxlen=TRIPS)
        self._room_s = ROOM_S if far else 0.0
        self._waits_since: float | None = None
        self._known_at: float | None = None
        self._known = False
        self._excused_s = 0.0  # of the present wait: our own loop was not running
        self._gaps = 0
        self._longest = [0.0, 0.0]  # of the present window and of the one before
        self._window_ends: float | None = None
        self._told_s = 0.0

    def arm(self) -> None:
        """It beats: from now on its silence means something."""
        self.armed = True

    def wait(self, now_s: float) -> None:
        """Somebody begins to wait for a message."""
        self._waits_since, self._excused_s = now_s, 0.0

    def leave(self) -> None:
        """Nobody waits any more; nothing came."""
        self._waits_since = None

    def late(self, by_s: float) -> None:
        """Our own loop was not running for so long."""
        self._excused_s += max(0.0, by_s)

    def came(self, now_s: float, size: int = 0) -> None:
        """A message of `size` bytes came to whoever waited."""
        gap_s = self.silent_s(now_s)
        self._waits_since = None
        if size >= CHUNK_BYTES // 2:
            self._room_s = 0.0  # from now on the gap before such a one is in the longest
        if self._window_ends is None or now_s >= self._window_ends:
            self._longest = [0.0, self._longest[0]]
            self._window_ends = now_s + WINDOW_S
            self._known_at = self._known_at or now_s + KNOWN_S
        self._longest[0] = max(self._longest[0], gap_s)
        self._gaps += 1
        assert self._known_at is not None
        self._known = self._gaps >= KNOWN_GAPS and now_s >= self._known_at

    def round_trip(self, seconds: float) -> None:
        """A round trip was seen."""
        if 0.0 <= seconds < WINDOW_S:  # what a peer makes of it cannot lead beyond MOST_S anyway
            self._trips.append(seconds)

    @property
    def round_trip_s(self) -> float:
        """Of the newest beats; 0 before there were any."""
        return min(self._trips, default=0.0)

    @property
    def longest_gap_s(self) -> float:
        """The longest that was waited for a message, in the last one or two minutes."""
        return max(self._longest)

    @property
    def limit_s(self) -> float:
        """How long it may be silent."""
        if not self._known:
            return MOST_S
        gap_s = self.longest_gap_s
        return min(MOST_S, gap_s + max(LEAST_S, GAPS * gap_s) + ROUND_TRIPS * self.round_trip_s + self._room_s)

    def silent_s(self, now_s: float) -> float:
        """How long somebody has waited in vain."""
        return 0.0 if self._waits_since is None else max(0.0, now_s - self._waits_since - self._excused_s)

    def verdict(self, now_s: float) -> str:
        """Why the peer is taken as lost, in words; empty while it is not."""
        silent_s = self.silent_s(now_s)
        if not self.armed or silent_s <= self.limit_s:
            return ""
        before = f"came at most {self.longest_gap_s:.1f} s apart until now" if self._gaps else "never came"
        return f"{self.who} has been silent for {silent_s:.1f} s; its frames {before}: taken as frozen or cut off"

    def news(self) -> str:
        """The limit in words, when it was derived first or has changed noticeably since this was asked; else empty."""
        limit_s = self.limit_s
        if not self.armed or not self._known:
            return ""
        if self._told_s and max(limit_s, self._told_s) < NOTICEABLE * min(limit_s, self._told_s):
            return ""
        self._told_s = limit_s
        return (
            f"{self.who} may be silent for {limit_s:.1f} s: its frames come at most {self.longest_gap_s:.1f} s apart, "
            f"round trip {self.round_trip_s * 1e3:.0f} ms"
        )
