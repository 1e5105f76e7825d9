"""The replay ring's books: every pair is there when it fires, within the limit, whatever comes and goes."""

from __future__ import annotations

import dataclasses
import inspect
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.learning.errors import LearningError
from swarm_core.learning.latency import FireSchedule, Latency
from swarm_core.learning.replay_ring import MIB, Part, ReplayRing, RingError

PART_BYTES = 10


def parts_of(stages: int) -> list[Part]:
    return [*range(stages), "slice", "logprobs"]


def pair_bytes(stages: int) -> int:
    return PART_BYTES * (stages + 2)


def fill(ring: ReplayRing, *versions: int) -> list[int]:
    """All parts of the versions; what had to go for them."""
    return [gone for v in versions for part in parts_of(ring.stages) for gone in ring.part_came(v, part, PART_BYTES)]


def fixed(cadence: int, delay_k: int, stages: int = 1, pairs: int = 100) -> ReplayRing:
    return ReplayRing(FireSchedule(cadence, Latency("fixed", delay_k)), stages, pairs * pair_bytes(stages))


@dataclasses.dataclass
class World:
    """A run beside a ring: parts come late and in any order, replays take their time, ticks are skipped, the process
    restarts, bases are refreshed at a cadence of their own."""

    m_cadence: int
    q_cadence: int
    latency: Latency
    stages: int
    k_max: int
    seed: int
    replay_ticks: int
    skipped: float
    restarts: bool
    ticks: int = 120

    def run(self) -> None:
        rng = random.Random(self.seed)
        schedule = FireSchedule(self.m_cadence, self.latency)
        ring = ReplayRing(schedule, self.stages, schedule.most_pairs() * pair_bytes(self.stages))
        ring.check(pair_bytes(self.stages))
        coming: list[tuple[int, float, int, Part]] = []
        fires: dict[int, list[int]] = {}
        busy: tuple[int, int] | None = None
        came: dict[int, dict[Part, int]] = {}  # what a volume would hold, and of which there are corrections
        made: set[int] = set()
        for tick in range(self.ticks):
            version = schedule.version_at(tick)
            if version and rng.random() >= self.skipped:
                k = schedule.fire_tick(version) - tick
                late = [rng.randrange(max(k, 1)) for _ in parts_of(self.stages)]
                coming += [
                    (tick + d, rng.random(), version, p) for d, p in zip(late, parts_of(self.stages), strict=True)
                ]
                fires.setdefault(tick + k, []).append(version)
            for _, _, v, part in sorted(c for c in coming if c[0] == tick):
                came.setdefault(v, {})[part] = PART_BYTES
                for gone in ring.part_came(v, part, PART_BYTES):
                    assert tick > schedule.fire_tick(gone), "a pair made room before it fired"
                assert ring.held_bytes <= ring.limit_bytes
            if tick % self.q_cadence == 0:  # a basis refresh that looks at the ring, and tidies
                ring.next_replay(tick, self.k_max)
                ring.drop(tick, self.k_max)
            # What the criterion asks: fire f with latency K finds the pair of s = f - K.
            assert all(ring.complete(v) for v in fires.get(tick, []))
            if busy and tick >= busy[1]:
                ring.replayed(busy[0])
                made.add(busy[0])
                busy = None
            found = ring.next_replay(tick, self.k_max) if busy is None else None
            if found is not None:
                ring.start(found)
                busy = (found, tick + rng.randint(0, self.replay_ticks))
            if rng.random() < 0.7:
                ring.drop(tick, self.k_max)
            if self.restarts and rng.random() < 0.1:
                held = {v: (dict(came[v]), v in made) for v in ring.held()}
                ring = ReplayRing(schedule, self.stages, ring.limit_bytes)  # told what the volume holds
                for v, (sizes, was_replayed) in held.items():
                    for part, size in sizes.items():
                        for gone in ring.part_came(v, part, size):
                            assert tick > schedule.fire_tick(gone), "a pair made room before it fired"
                    if was_replayed and ring.complete(v):
                        ring.replayed(v)
                busy = None


@st.composite
def worlds(draw: st.DrawFn) -> World:
    low = draw(st.integers(1, 20))
    latency = Latency(
        kind=draw(st.sampled_from(["natural", "fixed", "uniform", "lognormal", "trace"])),
        delay_k=draw(st.integers(1, 25)),
        low=low,
        high=low + draw(st.integers(0, 15)),
        sigma=draw(st.floats(0, 0.8)),
        trace=tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))),
        seed=draw(st.integers(0, 999)),
    )
    return World(
        m_cadence=draw(st.integers(1, 12)),
        q_cadence=draw(st.integers(1, 30)),
        latency=latency,
        stages=draw(st.integers(1, 3)),
        k_max=draw(st.integers(0, 50)),
        seed=draw(st.integers(0, 10**6)),
        replay_ticks=draw(st.sampled_from([0, 1, 7, 60])),
        skipped=draw(st.sampled_from([0.0, 0.2, 0.6])),
        restarts=draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None)
@given(world=worlds())
def test_every_fire_finds_its_pair_and_the_limit_holds(world: World) -> None:
    world.run()


def test_the_cadence_of_the_basis_cannot_even_be_given() -> None:
    methods = [member for name, member in inspect.getmembers(ReplayRing, callable) if not name.startswith("__")]
    names = {n for member in [ReplayRing, *methods] for n in inspect.signature(member).parameters}
    assert {n for n in names if "cadence" in n or n.startswith("q")} == set()
    assert list(inspect.signature(ReplayRing).parameters) == ["schedule", "stages", "limit_bytes"]


@pytest.mark.parametrize(("cadence", "delay_k"), [(1, 1), (1, 5), (5, 5), (5, 7), (5, 20), (20, 5), (7, 20), (3, 1)])
def test_most_pairs_is_reached_and_one_byte_less_loses_a_pair(cadence: int, delay_k: int) -> None:
    schedule = FireSchedule(cadence, Latency("fixed", delay_k))
    most, needed = schedule.most_pairs(), schedule.most_pairs() * pair_bytes(1)
    for limit, lost in ((needed, False), (needed - 1, True)):
        ring = ReplayRing(schedule, 1, limit)
        early, held = 0, 0
        for tick in range(8 * (cadence + delay_k)):
            version = schedule.version_at(tick)
            gone = fill(ring, version) if version else []
            early += sum(tick <= schedule.fire_tick(v) for v in gone)
            held = max(held, len(ring.held()))
            if version == 1:
                ring.start(1)  # a replay that never ends
            ring.drop(tick, k_max=10**6)
        assert (early > 0) == lost
        assert held == most - lost
        assert 1 in ring.held()  # the replay under way kept its pair


def test_prompt_replays_hold_what_lies_between_snapshot_and_fire_tick() -> None:
    for cadence, delay_k in [(1, 5), (5, 5), (5, 20), (20, 5), (7, 20)]:
        ring, most = fixed(cadence, delay_k), 0
        for tick in range(200):
            ring.drop(tick, k_max=40)
            if version := ring.schedule.version_at(tick):
                fill(ring, version)
                assert ring.next_replay(tick, k_max=40) == version
                ring.start(version)
                ring.replayed(version)
            most = max(most, len(ring.held()))
        assert most == delay_k // cadence + 1 == ring.schedule.most_pairs() - 1


def test_a_ring_too_small_is_refused_with_the_size_needed() -> None:
    schedule = FireSchedule(20, Latency("natural"))
    ring = ReplayRing(schedule, 3, 4096 * MIB)
    assert ring.needed_bytes(2048 * MIB) == 4096 * MIB
    ring.check(2048 * MIB)
    with pytest.raises(LearningError, match=r"anchor.ring_mb: got 4096, wanted >= 4097 MiB \(2 pairs of") as caught:
        ring.check(2048 * MIB + 1)
    assert isinstance(caught.value, RingError) and caught.value.got == 4096


def test_a_pair_is_complete_with_all_its_parts_in_any_order() -> None:
    ring = fixed(5, 5, stages=2)
    for part in ("logprobs", 1, "slice"):
        ring.part_came(1, part, 0 if part == "logprobs" else 7)
        assert not ring.complete(1) and ring.next_replay(0, 40) is None
    ring.part_came(1, 0, 7)
    ring.part_came(1, 0, 9)  # once more: replaced
    assert ring.complete(1) and ring.held_bytes == 23
    assert ring.next_replay(0, 40) == 1


def test_the_newest_complete_pair_that_matters_is_next() -> None:
    ring = fixed(10, 10)  # s = 0, 10, 20, ... fire at s + 10
    fill(ring, 1, 2, 3)
    ring.part_came(4, 0, PART_BYTES)
    assert ring.next_replay(31, k_max=40) == 3
    ring.start(3)
    assert ring.next_replay(31, k_max=40) == 2  # 3 is under replay and fires at 30 only
    ring.start(2)
    assert ring.next_replay(31, k_max=40) == 3  # the one before is under replay no more
    assert ring.next_replay(41, k_max=20) is None  # 3 is 21 old
    assert ring.next_replay(40, k_max=20) == 3
    assert ring.next_replay(20, k_max=9) is None  # due at 10 at the earliest: never young enough


def test_what_a_newer_due_correction_overtakes_is_not_replayed() -> None:
    schedule = FireSchedule(10, Latency("trace", trace=(25, 15)))
    ring = ReplayRing(schedule, 1, 1000)
    fill(ring, 1, 2)  # due at 25 both
    ring.replayed(2)
    assert ring.next_replay(24, 40) == 1  # nothing else could be merged sooner; 2 is not due yet
    assert ring.next_replay(25, 40) is None
    assert ring.drop(25, 40) == []
    assert ring.drop(26, 40) == [1, 2]
    assert fill(ring, 1, 2) == [1] * 3 + [2] * 3 and ring.held() == []  # late copies are not taken again


def test_a_pair_waits_for_its_fire_tick_and_its_replay() -> None:
    ring = fixed(10, 10)
    fill(ring, 1, 2)
    ring.replayed(1)
    assert ring.drop(10, 40) == []  # its fire tick has not passed
    assert ring.drop(11, 40) == [1]
    assert ring.drop(50, 40) == []  # 2: past its fire tick, not replayed, 40 old
    assert ring.drop(51, 40) == [2] and ring.held() == []


def test_given_up_before_the_fire_tick_still_waits_for_it() -> None:
    ring = fixed(10, 20)
    fill(ring, 1)
    assert ring.next_replay(12, k_max=15) is None
    assert ring.drop(20, k_max=15) == []
    assert ring.drop(21, k_max=15) == [1]


def test_incomplete_pairs_go_beside_a_newer_complete_one_or_with_age() -> None:
    ring = fixed(10, 10)
    ring.part_came(1, 0, PART_BYTES)
    assert ring.drop(30, 40) == []  # the newest there is
    fill(ring, 3)
    assert ring.drop(10, 40) == [] and ring.drop(11, 40) == [1]
    ring.part_came(5, "slice", PART_BYTES)  # s = 40
    assert ring.drop(80, 40) == [3] and ring.drop(81, 40) == [5]


def test_a_pair_under_replay_stays() -> None:
    ring = fixed(10, 10, pairs=2)
    fill(ring, 1, 2)
    ring.start(1)
    assert ring.drop(500, 40) == [2] and ring.held() == [1]
    assert fill(ring, 50) == []
    assert fill(ring, 51) == [50] and ring.held() == [1, 51]
    ring.replayed(1)
    assert ring.drop(500, 40) == [1]


def test_over_the_limit_the_oldest_replayed_goes_first() -> None:
    ring = fixed(10, 1, pairs=3)
    fill(ring, 1, 2, 3)
    ring.replayed(2)
    assert fill(ring, 4) == [2]
    assert ring.part_came(2, 0, PART_BYTES) == [2]  # a late copy drives nothing else out
    assert fill(ring, 5) == [1]
    assert ring.held_bytes == ring.limit_bytes
    assert ring.part_came(6, 0, 10 * ring.limit_bytes) == [3, 4, 5, 6]  # larger than all of it: not kept either
    assert ring.held() == [] and ring.held_bytes == 0


def test_what_has_not_fired_makes_room_last_even_when_replayed() -> None:
    ring = ReplayRing(FireSchedule(10, Latency("trace", trace=(90, 1))), 1, 3 * pair_bytes(1))
    fill(ring, 1, 2, 3)
    ring.replayed(1)
    assert fill(ring, 4) == [2]  # fired in tick 11, never replayed
    assert fill(ring, 5) == [4]
    assert ring.held() == [1, 3, 5]


def test_a_copy_of_a_part_under_replay_does_not_delete_it() -> None:
    ring = ReplayRing(FireSchedule(10, Latency("trace", trace=(25, 15))), 1, 1000)
    fill(ring, 1, 2)
    ring.replayed(2)
    ring.start(1)
    assert ring.drop(26, 40) == [2]
    assert fill(ring, 1) == [] and ring.complete(1)
    ring.replayed(1)
    assert ring.drop(26, 40) == [1] and fill(ring, 1) == [1, 1, 1]


def test_forgotten_pairs_may_come_again() -> None:
    ring = fixed(10, 10)
    fill(ring, 1)
    ring.start(1)
    assert ring.replaying == 1
    ring.forget(1)
    assert ring.replaying is None and ring.held() == [] and not ring.complete(1)
    with pytest.raises(RingError, match="replayed: got pair 1"):
        ring.replayed(1)
    fill(ring, 1)
    assert ring.next_replay(5, 40) == 1


def test_what_is_not_of_this_run_is_refused() -> None:
    ring = fixed(10, 10, stages=2)
    wrong: list[Any] = [2, -1, "weights", True, None]
    for part in wrong:
        with pytest.raises(RingError, match="part of pair 1"):
            ring.part_came(1, part, 5)
    with pytest.raises(RingError, match="-1 bytes"):
        ring.part_came(1, 0, -1)
    with pytest.raises(LearningError, match="version: got 0"):
        ring.part_came(0, 0, 5)
    with pytest.raises(RingError, match="replay: got pair 1"):
        ring.start(1)
    with pytest.raises(RingError, match="1 of both|>= 1"):
        ReplayRing(ring.schedule, 0, 100)
    assert ring.held() == []
