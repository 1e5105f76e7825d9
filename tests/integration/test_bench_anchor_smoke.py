"""The bench of what the anchor costs: sides that differ in their corrections alone, turns that hold what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.bench.figures import SETTLING
from experiments.bench.sides import Tick
from experiments.bench.workload import Workload
from experiments.bench_anchor.__main__ import report, summary
from experiments.bench_anchor.figures import added_s, against, snapshot_ticks, spread, tick_s
from experiments.bench_anchor.sides import CADENCE, LINKS, OFF, OFTEN, SETTLE, SIDES, AnchorTurn, build, start
from swarm_core.config import RunConfig, load, parse_overrides

SMALL = Workload(
    "small", 18, prompts=4, group_size=4, microbatch_size=4, length=10, shortest_prompt=3, longest_prompt=6, turn=1,
    hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1,
)  # fmt: skip


def turn(seconds: list[float], first: int = SETTLE, cpu_s: float = 1.0) -> AnchorTurn:
    return AnchorTurn(first, [Tick(s, (0.8 * s, 0.6 * s)) for s in seconds], cpu_s, 0.5)


def test_sides_differ_in_their_corrections_alone(tmp_path: Path) -> None:
    setup = build(SMALL, tmp_path)

    def config(name: str) -> RunConfig:
        return load(setup.config, parse_overrides([*LINKS, *SIDES[name]]))

    off, on, often = (config(name) for name in SIDES)
    plain = load(setup.config, parse_overrides(list(LINKS)))
    assert off == plain and off.corrections.merger == "none"
    assert on.corrections == plain.corrections.model_copy(update={"merger": "held_delta"})
    assert on == plain.model_copy(update={"corrections": on.corrections})
    assert often == on.model_copy(update={"anchor": on.anchor.model_copy(update={"m_cadence": OFTEN})})


def test_every_turn_holds_as_many_snapshots_all_in_counted_ticks() -> None:
    for cadence in (CADENCE, OFTEN):
        for number in range(5):
            first = SETTLE + number * CADENCE
            places = [t - first for t in range(first, first + CADENCE) if t % cadence == 0]
            assert len(places) == CADENCE / cadence
            assert SETTLING <= min(places) and max(places) <= CADENCE - 5  # the replay fits in, too


def test_snapshots_are_of_committed_ticks() -> None:
    outcomes = ["commit", "commit", "commit", "skip", "skip", "commit", "skip", "skip", "skip"]
    rows = [{"tick": tick, "outcome": outcome} for tick, outcome in enumerate(outcomes)]
    assert snapshot_ticks(rows, 3) == {0, 5}


def test_figures_are_of_counted_ticks_in_the_same_round() -> None:
    unsettled = [90.0] * SETTLING
    off = [turn([*unsettled, 1.0, 1.0, 1.5, 1.0]), turn([*unsettled, 2.0, 2.0, 2.5, 2.0], cpu_s=2.0)]
    on = [turn([*unsettled, 1.0, 1.0, 1.75, 1.0], cpu_s=1.5), turn([*unsettled, 4.0, 4.0, 5.0, 4.0], cpu_s=3.0)]
    snapshots = {SETTLE + SETTLING + 1}  # the tick before the long one
    assert added_s(on[0], off[0], snapshots, tick_s) == 0.25  # off has half a second there as well
    assert added_s(on[0], off[0], {SETTLE + 99}, tick_s) is None
    found = against(on, off, snapshots)
    assert found["tokens_per_s"]["range"] == pytest.approx([0.5, 4.5 / 4.75])
    assert found["tokens_per_s_of_median_ticks"]["range"] == [0.5, 1.0]
    assert found["stage_cpu"]["median"] == 1.5
    assert found["added_busy_s"]["median"] == pytest.approx(0.7 * 0.375)
    assert spread([3.0, 1.0, 2.0, 9.0, 8.0]) == {"median": 3.0, "quartiles": [2.0, 8.0], "range": [1.0, 9.0]}


def test_a_side_takes_turns_and_merges(tmp_path: Path) -> None:
    side = start(SMALL, tmp_path, "on", ["anchor.m_cadence=4"])
    try:
        settling, counted = side.anchor_turn(3), side.anchor_turn(8)
    finally:
        side.kill()
    assert [settling.first, counted.first, len(counted.ticks)] == [0, 3, 8]
    assert counted.stage_cpu_s > 0 and counted.anchor_cpu_s > 0
    found = summary(side.out, [counted], [counted], SMALL.tokens)
    assert found["run"]["made"] >= 2 and found["run"]["merged_ticks"] > 0
    assert found["against"]["tokens_per_s"]["median"] == found["against"]["stage_cpu"]["median"] == 1.0
    assert found["run"]["wait_s"] in (None, 0.0)
    off = {"level": found["level"], "run": found["run"]}
    machine = dict.fromkeys(("date", "cpu", "cores", "memory_gib", "kernel", "python", "torch"), "x") | {"load": [0, 0]}
    page = report({OFF: off, "on": found}, 1, machine)
    assert "| on | " in page and "its sum is 0 s" in page
