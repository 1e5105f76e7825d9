"""The statistics of basis refreshes, on rows whose answer is known: which tick belongs where, what is compared with
what, and how wide the intervals are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchor_node.record import RunRecord
from anchor_node.refreshes import (
    CLIP_FRACTION,
    compare_batches,
    compare_jumps,
    mean_of,
    new_basis_ticks,
    sort_ticks,
    t_975,
    welch,
)

SLICES, PASSES = 2, 3
BATCH = SLICES * PASSES


def run_rows(
    batches: int, version_of: Callable[[int], int], clip_of: Callable[[int, int], float], **changes: Any
) -> list[dict[str, Any]]:
    """`version_of(tick)` and `clip_of(tick, place in the batch)` for runs of 3 passes over 2 slices."""
    return [
        {
            "tick": tick, "batch": tick // BATCH, "pass": 1 + tick % BATCH // SLICES, "slice": tick % SLICES,
            "outcome": "commit", "basis/version": version_of(tick), CLIP_FRACTION: clip_of(tick, tick % BATCH),
        } | changes
        for tick in range(batches * BATCH)
    ]  # fmt: skip


def pinned(tick: int) -> int:
    """A new basis with every third batch."""
    return tick // (3 * BATCH)


def unpinned(tick: int) -> int:
    """A new basis in the middle of every third batch, at its fourth tick."""
    return (tick + BATCH // 2) // (3 * BATCH)


def test_each_tick_is_of_the_kind_that_its_batch_makes_it() -> None:
    ticks = sort_ticks(run_rows(9, pinned, lambda tick, place: 0.01 * place))
    assert [t.tick for t in ticks if t.refreshed] == [18, 36]
    assert {t.batch for t in ticks if t.group == "after"} == {3, 6}
    assert {t.group for t in ticks} == {"after", "other"}
    assert [t.stepped for t in ticks[:7]] == [False, True, True, True, True, True, False]

    ticks = sort_ticks(run_rows(9, unpinned, lambda tick, place: 0.01 * place))
    assert [t.tick for t in ticks if t.refreshed] == [15, 33, 51]
    assert [t.group for t in ticks if t.batch == 2] == ["other"] * 3 + ["inside"] * 3
    assert {t.group for t in ticks if t.batch == 3} == {"other"}, "the basis did not change with this batch"


def test_nobody_can_tell_where_a_basis_changed_that_no_row_tells() -> None:
    rows = [row for row in run_rows(6, pinned, lambda tick, place: 0.0) if row["tick"] not in (16, 17, 18)]
    ticks = sort_ticks(rows)
    assert not [t for t in ticks if t.refreshed]
    assert {t.batch for t in ticks if t.group == "unknown"} == {3}
    assert {t.group for t in ticks if t.batch > 3} == {"other"}


@pytest.mark.parametrize("name", ["batch", "pass", "slice", "basis/version"])
def test_rows_that_do_not_say_where_they_belong_are_left_out(name: str) -> None:
    rows = run_rows(3, pinned, lambda tick, place: 0.0)
    del rows[4][name]
    assert [t.tick for t in sort_ticks(rows)] == [tick for tick in range(18) if tick != 4]
    assert sort_ticks([{}, {"tick": None}, {"tick": "x", "batch": []}]) == []


def test_only_equal_places_are_compared() -> None:
    """The clip fraction depends on the place alone, and the batches after a refresh are cut short: a plain mean over
    ticks would call them better."""
    rows = run_rows(12, pinned, lambda tick, place: 0.01 * place)
    rows = [row for row in rows if not (row["tick"] // BATCH in (3, 6, 9) and row["pass"] > 1)]
    only_pass, everything = compare_batches(sort_ticks(rows), "after")
    assert (only_pass.passing, everything.passing) == (1, None)
    assert everything.batches.mean == everything.others.mean == pytest.approx(0.01)
    assert everything.difference == pytest.approx(0.0) and everything.half == pytest.approx(0.0)
    assert (everything.batches.count, everything.others.count) == (3, 7)  # the first and the last have one neighbour


def test_a_trend_over_the_run_is_not_taken_for_an_effect_of_the_refreshes() -> None:
    rows = run_rows(18, pinned, lambda tick, place: 0.2 * 0.93 ** (tick // BATCH) + 0.01 * place)
    last = compare_batches(sort_ticks(rows), "after")[-1]
    assert abs(last.difference) < 0.001


def test_ticks_before_the_first_step_are_left_out() -> None:
    ticks = sort_ticks(run_rows(6, pinned, lambda tick, place: 1.0 if place == 0 else 0.0))
    assert all(c.batches.mean == c.others.mean == 0.0 for c in compare_batches(ticks, "after"))
    skipped = run_rows(6, pinned, lambda tick, place: 0.0, outcome="skip")
    assert compare_batches(sort_ticks(skipped), "after") == []


def test_a_shift_is_found_pass_by_pass() -> None:
    """0.05 more, in the second pass of batches after a refresh only."""

    def clip(tick: int, place: int) -> float:
        shifted = tick // BATCH % 3 == 0 and tick >= BATCH and place // SLICES == 1
        return 0.01 * place + 0.001 * (tick // BATCH % 2) + 0.05 * shifted

    compared = compare_batches(sort_ticks(run_rows(20, pinned, clip)), "after")
    assert [c.passing for c in compared] == [1, 2, 3, None]
    assert [c.within_noise for c in compared] == [True, False, True, False]
    assert compared[1].difference == pytest.approx(0.05, abs=0.0005)
    assert compared[3].difference == pytest.approx(0.05 * 2 / 5, abs=0.0005), "two of the five places that count"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Batches differ as wholes: the ticks of one are not independent, and intervals that took them so would be too
    narrow. Of 200 runs without an effect, 95 % +- 4 % must be called noise."""
    random_ = random.Random(3)
    within = 0
    for _ in range(200):
        level = [random_.gauss(0.05, 0.01) for _ in range(12)]
        rows = run_rows(12, pinned, lambda tick, _, of=level: of[tick // BATCH] + random_.gauss(0, 0.001))  # type: ignore
        within += bool(compare_batches(sort_ticks(rows), "after")[-1].within_noise)
    assert 0.91 <= within / 200 <= 0.99


def test_one_batch_on_a_side_has_no_interval() -> None:
    (*_, everything) = compare_batches(sort_ticks(run_rows(5, pinned, lambda tick, place: 0.01)), "after")
    assert everything.batches.count == 1 and everything.half is None and everything.within_noise is None
    assert compare_batches(sort_ticks(run_rows(2, pinned, lambda tick, place: 0.01)), "after") == []


def test_a_jump_inside_a_batch_is_told_from_the_usual_rise() -> None:
    def clip(tick: int, place: int) -> float:
        jumped = unpinned(tick) > unpinned(tick - tick % BATCH)
        return 0.01 * place + 0.002 * (tick // BATCH % 2) * place + 0.3 * jumped

    ticks = sort_ticks(run_rows(18, unpinned, clip))
    jump = compare_jumps(ticks)
    assert jump is not None and jump.at.count == 6
    assert jump.at.mean - jump.before.mean == pytest.approx(jump.rise.mean)
    assert jump.rise.mean == pytest.approx(0.3 + 0.011, abs=0.001)
    assert jump.usual is not None and jump.usual.mean == pytest.approx(0.011, abs=0.001) and jump.usual.count == 12
    assert jump.excess == pytest.approx(0.3, abs=0.001)
    assert jump.excess_half is not None and 0.0 < jump.excess_half < 0.01
    inside = compare_batches(ticks, "inside")
    assert [c.passing for c in inside] == [2, 3, None] and inside[-1].difference == pytest.approx(0.3, abs=0.01)
    assert inside[-1].batches.count == 5  # the last one has a neighbour on one side alone
    assert compare_jumps(sort_ticks(run_rows(9, pinned, clip))) is None


def test_a_jump_in_every_batch_has_nothing_to_be_held_against() -> None:
    rows = run_rows(4, lambda tick: (tick + 3) // BATCH, lambda tick, place: 0.2 if place >= 3 else 0.0)
    jump = compare_jumps(sort_ticks(rows))
    assert jump is not None and jump.usual is None and jump.excess is None and jump.excess_half is None
    assert jump.rise.mean == pytest.approx(0.2) and jump.rise_half == pytest.approx(0.0)


def test_marks_are_where_a_version_came_into_use() -> None:
    def run(rows: list[dict[str, Any]], *events: dict[str, Any]) -> RunRecord:
        return RunRecord(Path("run"), rows, [], list(events), {}, [], 1.0, [])

    told = {"event": "basis", "tick": 5}
    assert new_basis_ticks(run(run_rows(6, unpinned, lambda tick, place: 0.0), told)) == [15, 33]
    assert new_basis_ticks(
        run([{"tick": 0}, {"tick": 1}], told, {"event": "basis"}, {"event": "start", "tick": 1})
    ) == [5]


# Values of Student's t from any table; the last is the normal distribution's.
@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4.5, 2.65891), (10, 2.22814), (30, 2.04227),
                              (1e6, 1.959966)]
)  # fmt: skip
def test_quantiles_of_student_t(freedom: float, quantile: float) -> None:
    assert t_975(freedom) == pytest.approx(quantile, rel=2e-5)


def test_welch_of_numbers_done_by_hand() -> None:
    difference, half = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])
    # Variances 1 / 3 and (20 / 3) / 4, freedom 2 ** 2 / ((1 / 9) / 2 + (25 / 9) / 3).
    assert difference == -3.0 and half == pytest.approx(2.0**0.5 * t_975(4 / (1 / 18 + 25 / 27)))
    assert welch([1.0], [1.0, 2.0]) == (-0.5, None)
    assert mean_of([1.0, 3.0]).error == 1.0 and mean_of([1.0]).error is None
