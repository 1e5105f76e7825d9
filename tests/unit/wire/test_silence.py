"""The judge of a peer's silence under a virtual clock: what it allows, what it fires on, and what it must not count."""

from __future__ import annotations

import random

import pytest

from swarm_core.wire.frames import CHUNK_BYTES
from swarm_core.wire.silence import LEAST_S, MOST_S, NOTICEABLE, Silence


class Line:
    """A peer, its reader and a clock."""

    def __init__(self, *, far: bool = False) -> None:
        self.now = 100.0
        self.judge = Silence("stage 2", far=far)
        self.judge.arm()

    def hear(self, gap_s: float, times: int = 1, size: int = 100) -> Line:
        """Messages that come so far apart to a reader that waits for them."""
        for _ in range(times):
            self.judge.wait(self.now)
            self.now += gap_s
            self.judge.came(self.now, size)
        return self

    def silent(self, seconds: float) -> str:
        self.judge.wait(self.now)
        self.now += seconds
        return self.judge.verdict(self.now)


def test_a_peer_that_is_not_known_yet_has_the_longest_limit() -> None:
    line = Line().hear(0.1, times=3)
    assert line.judge.limit_s == MOST_S and line.judge.news() == ""
    assert not line.silent(MOST_S - 0.1) and line.silent(MOST_S + 0.1)


def test_the_limit_follows_the_longest_gap_between_its_bounds_and_is_said() -> None:
    line = Line().hear(1.0, times=15)
    assert LEAST_S < line.judge.limit_s < 5.0
    said = line.judge.news()
    assert "stage 2 may be silent for 4.0 s" in said and "at most 1.0 s apart" in said
    line.hear(1.05, times=5)
    assert line.judge.news() == "", "a change that nobody would notice is not said"
    line.hear(2.0)
    assert line.judge.limit_s >= 4.0 * NOTICEABLE and "at most 2.0 s apart" in line.judge.news()
    assert line.hear(9.0).judge.limit_s == MOST_S
    line.hear(1.0, times=150)
    assert line.judge.limit_s < 5.0, "what lies minutes back is forgotten"


def test_a_line_in_between_gives_its_round_trip_and_room_for_the_first_chunk() -> None:
    near, far = Line().hear(0.2, times=60).judge.limit_s, Line(far=True).hear(0.2, times=60)
    assert far.judge.limit_s > near + 3.0
    far.hear(0.4, size=CHUNK_BYTES)
    assert far.judge.limit_s < near + 1.0, "a chunk has come, and what it took is known"
    before = far.judge.limit_s
    for trip_s in (6.0, 0.3, 0.25, -1.0, float("nan"), float("inf")):
        far.judge.round_trip(trip_s)
    assert far.judge.round_trip_s == 0.25 and far.judge.limit_s == pytest.approx(before + 1.0)


def test_the_verdict_names_peer_silence_and_what_was_usual() -> None:
    line = Line().hear(0.4, times=30)
    words = line.silent(6.1)
    assert words == (
        "stage 2 has been silent for 6.1 s; its frames came at most 0.4 s apart until now: taken as frozen or cut off"
    )


def test_only_a_reader_that_waits_finds_somebody_silent() -> None:
    line = Line().hear(1.0, times=15)
    line.now += 60.0  # the reader computes; messages wait in its buffers
    assert not line.judge.verdict(line.now)
    assert not line.silent(1.0)
    line.judge.came(line.now)
    assert line.judge.longest_gap_s == 1.0


def test_the_time_in_which_our_own_loop_stood_still_is_not_the_peers() -> None:
    line = Line().hear(1.0, times=15)
    line.judge.wait(line.now)
    line.now += 30.0
    line.judge.late(29.5)
    assert not line.judge.verdict(line.now) and line.judge.silent_s(line.now) == pytest.approx(0.5)
    line.judge.came(line.now)
    assert line.judge.longest_gap_s == 1.0
    assert line.silent(5.0), "and excuses nothing later"


def test_a_peer_that_does_not_beat_is_not_judged() -> None:
    judge = Silence("stage 2", far=False)
    judge.wait(0.0)
    assert not judge.verdict(1e6)


def test_whatever_comes_the_limit_stays_within_its_bounds_and_silence_is_noticed() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    line = Line(far=rng.random() < 0.5)
    for _ in range(2000):
        line.hear(rng.expovariate(1.0) if rng.random() < 0.1 else rng.random(), size=rng.choice((100, CHUNK_BYTES)))
        line.judge.round_trip(rng.expovariate(3.0))
        assert LEAST_S <= line.judge.limit_s <= MOST_S, seed
        assert not line.judge.verdict(line.now), seed
    assert line.silent(10.0), seed
