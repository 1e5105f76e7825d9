"""The schedule of snapshots and fires: its two directions, its draws, its size, and trace files."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_core.learning.errors import LearningError
from swarm_core.learning.latency import FireSchedule, Latency, LatencyError, read_trace


@st.composite
def latencies(draw: st.DrawFn) -> Latency:
    low = draw(st.integers(1, 30))
    return Latency(
        kind=draw(st.sampled_from(["natural", "fixed", "uniform", "lognormal", "trace"])),
        delay_k=draw(st.integers(1, 45)),
        low=low,
        high=low + draw(st.integers(0, 30)),
        sigma=draw(st.floats(0, 1.5)),
        trace=tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))),
        seed=draw(st.integers(0, 2**40)),
    )


schedules = st.builds(FireSchedule, st.integers(1, 25), latencies())


@settings(max_examples=150, deadline=None)
@given(schedule=schedules, tick=st.integers(-5, 10_000), version=st.integers(1, 10_000))
def test_versions_and_ticks_are_inverse_and_monotone(schedule: FireSchedule, tick: int, version: int) -> None:
    assert schedule.version_at(schedule.tick_of(version)) == version
    assert schedule.tick_of(version + 1) == schedule.tick_of(version) + schedule.cadence
    found = schedule.version_at(tick)
    assert found == 0 or schedule.tick_of(found) == tick
    assert (found > 0) == (tick >= 0 and tick % schedule.cadence == schedule.first)
    ticks = [t for t in range(tick) if schedule.version_at(t)] if tick < 500 else None
    if ticks is not None:
        assert schedule.count_before(tick) == len(ticks)
    assert schedule.count_before(schedule.tick_of(version)) == version - 1


@pytest.mark.parametrize(("cadence", "delay_k"), [(20, 5), (20, 20), (5, 20), (5, 7), (1, 3), (7, 1)])
def test_a_fixed_latency_fires_at_multiples_of_the_cadence(cadence: int, delay_k: int) -> None:
    schedule = FireSchedule(cadence, Latency("fixed", delay_k))
    fires = [schedule.fire_tick(version) for version in range(1, 9)]
    assert all(fire % cadence == 0 for fire in fires)
    assert [fire - schedule.tick_of(v) for v, fire in enumerate(fires, 1)] == [delay_k] * 8
    assert [t for t in range(60) if schedule.version_at(t)] == [
        t for t in range(60) if t % cadence == -delay_k % cadence
    ]


def test_other_latencies_start_at_tick_0() -> None:
    for kind in ("natural", "uniform", "lognormal"):
        schedule = FireSchedule(20, Latency(kind))
        assert [t for t in range(61) if schedule.version_at(t)] == [0, 20, 40, 60]
    natural = FireSchedule(20, Latency("natural"))
    assert natural.version_at(-40) == natural.count_before(-40) == 0
    assert [natural.fire_tick(v) for v in (1, 2, 3)] == [0, 20, 40]


@settings(max_examples=60, deadline=None)
@given(latency=latencies(), ticks=st.lists(st.integers(0, 5000), min_size=2, max_size=20), data=st.data())
def test_a_draw_depends_on_nothing_but_seed_and_tick(latency: Latency, ticks: list[int], data: st.DataObject) -> None:
    drawn = {tick: latency.draw(tick, tick) for tick in ticks}
    random.seed(data.draw(st.integers(0, 9)))  # the shared generator does not matter
    again = dataclasses.replace(latency)
    assert {tick: again.draw(tick, tick) for tick in data.draw(st.permutations(ticks))} == drawn
    assert all(0 <= k <= latency.largest for k in drawn.values())
    assert all((k == 0) == (latency.kind == "natural") for k in drawn.values())


def test_draws_are_the_same_in_every_process() -> None:
    ticks = range(0, 200, 20)
    uniform = [Latency("uniform", low=1, high=20, seed=7).draw(t) for t in ticks]
    lognormal = [Latency("lognormal", delay_k=10, sigma=0.5, seed=7).draw(t) for t in ticks]
    assert uniform == [2, 2, 15, 19, 7, 20, 15, 15, 3, 20]
    assert lognormal == [5, 4, 14, 20, 8, 24, 13, 14, 5, 42]
    assert uniform != [Latency("uniform", low=1, high=20, seed=8).draw(t) for t in ticks]


def test_uniform_reaches_both_ends_evenly() -> None:
    latency = Latency("uniform", low=3, high=7, seed=1)
    counts = [sum(latency.draw(t) == k for t in range(5000)) for k in range(3, 8)]
    assert sum(counts) == 5000
    assert all(abs(count - 1000) < 4 * math.sqrt(5000 * 0.2 * 0.8) for count in counts)
    assert {Latency("uniform", low=4, high=4).draw(t) for t in range(50)} == {4}


def test_lognormal_has_its_median_its_spread_and_an_end() -> None:
    latency = Latency("lognormal", delay_k=200, sigma=0.5, seed=2)
    logs = [math.log(latency.draw(t)) for t in range(5000)]
    assert statistics.median(logs) == pytest.approx(math.log(200), abs=4 * 0.5 * 1.2533 / math.sqrt(5000))
    assert statistics.stdev(logs) == pytest.approx(0.5, rel=0.04)
    assert latency.largest == round(200 * math.exp(1.5)) and max(logs) <= math.log(latency.largest)
    cut = Latency("lognormal", delay_k=2, sigma=0.5)
    ks = {cut.draw(t) for t in range(5000)}
    assert min(ks) == 1 and max(ks) == cut.largest == round(2 * math.exp(1.5))
    assert {Latency("lognormal", delay_k=9, sigma=0.0).draw(t) for t in range(50)} == {9}


def test_a_trace_is_read_by_snapshot_over_and_over() -> None:
    schedule = FireSchedule(10, Latency("trace", trace=(4, 25, 9)))
    assert [schedule.fire_tick(v) - schedule.tick_of(v) for v in range(1, 8)] == [4, 25, 9, 4, 25, 9, 4]
    with pytest.raises(LatencyError, match="index of a trace.*FireSchedule"):
        schedule.latency.draw(10)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules)
def test_most_pairs_bounds_those_between_snapshot_and_fire_tick(schedule: FireSchedule) -> None:
    spans = [(schedule.tick_of(v), schedule.fire_tick(v)) for v in range(1, 40)]
    alive = max(sum(s <= t <= fire for s, fire in spans) for t, _ in spans)
    assert alive <= schedule.most_pairs() - 1  # one place is for a replay that goes on past its fire tick
    if schedule.latency.kind in ("natural", "fixed") and schedule.latency.delay_k <= 30 * schedule.cadence:
        assert alive == schedule.most_pairs() - 1


def test_most_pairs_by_hand() -> None:
    assert FireSchedule(20, Latency("natural")).most_pairs() == 2
    assert FireSchedule(20, Latency("fixed", 5)).most_pairs() == 2
    assert FireSchedule(20, Latency("fixed", 20)).most_pairs() == 3
    assert FireSchedule(5, Latency("fixed", 20)).most_pairs() == 6
    assert FireSchedule(5, Latency("uniform", low=1, high=23)).most_pairs() == 6
    assert FireSchedule(5, Latency("trace", trace=(1, 31, 2))).most_pairs() == 8


def test_the_schedule_knows_nothing_of_the_basis() -> None:
    named = {name for kind in (Latency, FireSchedule) for name in inspect.signature(kind).parameters}
    assert named == {"kind", "delay_k", "low", "high", "sigma", "trace", "seed", "cadence", "latency"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kind": "gamma"}, "anchor.latency"),
        ({"kind": "fixed", "delay_k": 0}, "anchor.delay_k"),
        ({"kind": "uniform", "low": 0}, "anchor.latency_range"),
        ({"kind": "uniform", "low": 9, "high": 8}, "anchor.latency_range"),
        ({"kind": "lognormal", "sigma": math.nan}, "anchor.latency_sigma"),
        ({"kind": "trace"}, "anchor.latency_trace"),
        ({"kind": "trace", "trace": (3, 0)}, "anchor.latency_trace"),
    ],
)
def test_impossible_latencies_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(LatencyError, match=named):
        Latency(**wrong)  # type: ignore[arg-type]


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(LatencyError, match="anchor.m_cadence: got 0"):
        FireSchedule(0, Latency())
    with pytest.raises(LatencyError, match="correction version: got 0, wanted >= 1"):
        FireSchedule(5, Latency()).tick_of(0)


def test_a_trace_file_is_read() -> None:
    assert read_trace("5\n 20 \n\n# measured on a Tuesday\n7  # slow disk\r\n999999999") == (5, 20, 7, 999_999_999)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no entry"),
        ("# nothing\n\n", "no entry"),
        ("5\n0\n", "line 2: got '0'"),
        ("5\n-3\n", "line 2: got '-3'"),
        ("2.5", "line 1: got '2.5'"),
        ("3 4", "line 1: got '3 4'"),
        ("١", "line 1: got"),
        ("5\n" + "9" * 5000, "line 2: got '9999"),
        ("1_0", "line 1: got '1_0'"),
    ],
)
def test_a_broken_trace_names_its_line(text: str, said: str) -> None:
    with pytest.raises(LearningError, match="k.trace") as caught:
        read_trace(text, "k.trace")
    assert said in str(caught.value) and len(str(caught.value)) < 200
