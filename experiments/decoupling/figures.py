"""From rows of single runs to figures of cells: means, paired differences, curves, all with t-intervals. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.codec.figures import Interval, interval
from experiments.decoupling.cells import CELLS, DENSE, EFFECTS

MARGIN = 0.03  # a cell is non-inferior when it loses less than this, with 97.5 % confidence
BIN = 8  # ticks that a point of a curve is a mean over; evaluations come as they are

Row = dict[str, Any]
Runs = Mapping[str, Sequence[Row]]  # by cell, one row a seed
Curve = list[tuple[float, float, float]]  # (tick, mean, half width)


@dataclass(frozen=True)
class Cell:
    """One line of the table. Differences are to the runs of the same seeds; None where there are none.

    `final`, `lowest`, `mean`: exact accuracy of the weights, at the end, at its lowest evaluation, and over all of them.
    `length`, `entropy`, `clip`: of the last quarter. `dose`: mean over all ticks of ||dose|| / ||merged gradient||, 0
    where none was merged; the other figures of a correction are means over the ticks that merged one, 0 without any.
    """

    name: str
    seeds: int
    overrides: dict[str, str]
    final: Interval
    lowest: Interval
    mean: Interval
    links: Interval
    less_none: Interval | None
    less_dense: Interval | None
    length: Interval
    entropy: Interval
    clip: Interval
    dose: Interval
    latency: float
    lambda_: float
    c: float
    cos: float
    form_cosine: float

    @property
    def non_inferior(self) -> bool | None:
        """Whether it ends less than MARGIN below its cell without a merger; None where that is unknown."""
        lost = self.less_none
        return None if lost is None or math.isinf(lost.half) else lost.low > -MARGIN


def final(row: Row) -> float:
    return float(row["evaluations"][-1]["expected"])


def lowest(row: Row) -> float:
    return min(float(e["expected"]) for e in row["evaluations"])


def mean_accuracy(row: Row) -> float:
    return statistics.fmean(float(e["expected"]) for e in row["evaluations"])


def dose(row: Row) -> float:
    shares = row["series"]["share"] or []
    return sum(share for share in shares if share is not None) / len(row["outcomes"])


def cell(name: str, runs: Runs) -> Cell:
    """Sum up the runs of one cell."""
    rows = runs[name]

    def over(measure: Callable[[Row], float]) -> Interval:
        return interval([measure(row) for row in rows])

    def mean(series: str) -> float:
        return statistics.fmean(_mean(row["series"][series]) for row in rows)

    def ending(series: str) -> Interval:
        return over(lambda row: _mean((row["series"][series] or [])[-len(row["outcomes"]) // 4 :]))

    like = CELLS[name.partition("+")[0]].like if name.partition("+")[0] in CELLS else ""
    return Cell(
        name=name,
        seeds=len(rows),
        overrides=rows[0]["overrides"],
        final=over(final),
        lowest=over(lowest),
        mean=over(mean_accuracy),
        links=over(lambda row: row["links"]["expected"]),
        less_none=difference(name, like, runs),
        less_dense=difference(name, DENSE, runs) if name != DENSE else None,
        length=ending("length"),
        entropy=ending("entropy"),
        clip=ending("clip"),
        dose=over(dose),
        latency=mean("K"),
        lambda_=mean("lambda"),
        c=mean("c"),
        cos=mean("cos"),
        form_cosine=statistics.fmean(_mean(row["form_cosines"]) for row in rows),
    )


def difference(name: str, other: str, runs: Runs, measure: Callable[[Row], float] = final) -> Interval | None:
    """Of two cells, `name` minus `other`, paired by seed; None without a pair."""
    baseline = {row["seed"]: row for row in runs.get(other, [])}
    pairs = [(row, baseline[row["seed"]]) for row in runs.get(name, []) if row["seed"] in baseline]
    return interval([measure(a) - measure(b) for a, b in pairs]) if pairs else None


def effects(runs: Runs) -> list[tuple[str, Interval, Interval]]:
    """(what was changed, what it did to the final accuracy, what to the mean one)."""
    found = []
    for name, changed, before in EFFECTS:
        end, over = difference(changed, before, runs), difference(changed, before, runs, mean_accuracy)
        if end is not None and over is not None:
            found.append((name, end, over))
    return found


# Curves ----------------------------------------------------------------------------------------------------------------


def accuracy_curve(rows: Sequence[Row]) -> Curve:
    points: dict[int, list[float]] = {}
    for row in rows:
        for e in row["evaluations"]:
            points.setdefault(e["tick"], []).append(e["expected"])
    return [_point(tick, values) for tick, values in sorted(points.items())]


def series_curve(rows: Sequence[Row], series: str, less: Sequence[Row] = (), width: int = BIN) -> Curve:
    """A point for every `width` ticks, in their middle. `less`: as a difference to the runs of the same seeds there."""
    points: dict[int, list[float]] = {}
    baseline = {row["seed"]: row["series"][series] or [] for row in less}
    for row in rows:
        values = row["series"][series] or []
        if less:
            pairs = zip(values, baseline.get(row["seed"], []), strict=False)
            values = [None if a is None or b is None else a - b for a, b in pairs]
        for start in range(0, len(values), width):
            known = [value for value in values[start : start + width] if value is not None]
            if known:
                points.setdefault(start, []).append(statistics.fmean(known))
    return [_point(start + (width - 1) / 2, values) for start, values in sorted(points.items())]


def refreshes(rows: Sequence[Row]) -> list[int]:
    """The first ticks on another basis than the tick before, of the first seed: all of a cell have the same."""
    versions = rows[0]["series"]["basis"] or []
    return [tick for tick in range(1, len(versions)) if versions[tick] != versions[tick - 1]]


# Pinning ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinning:
    """The second ticks of batches (in the first the ratio is 1): where a batch meets a new basis, and elsewhere.

    Clip fractions: mean over seeds of the mean over batches, and the largest of either kind.
    `overlap`: mean share of the old subspace that the new one keeps.
    """

    name: str
    seeds: int
    refreshes: int
    overlap: Interval
    after: Interval
    others: Interval
    difference: Interval
    largest: float
    others_largest: float
    final: Interval


def pinning(name: str, rows: Sequence[Row]) -> Pinning:
    """Sum up one cell of the pinning part."""
    split = [_second_ticks(row) for row in rows]
    return Pinning(
        name=name,
        seeds=len(rows),
        refreshes=sum(len(after) for after, _ in split),
        overlap=interval([_mean(share for _, share in row["overlaps"]) for row in rows]),
        after=interval([_mean(after) for after, _ in split]),
        others=interval([_mean(rest) for _, rest in split]),
        difference=interval([_mean(after) - _mean(rest) for after, rest in split]),
        largest=max((value for after, _ in split for value in after), default=0.0),
        others_largest=max((value for _, rest in split for value in rest), default=0.0),
        final=interval([final(row) for row in rows]),
    )


def second_tick_curve(rows: Sequence[Row]) -> Curve:
    """The clip fraction in the second tick of every batch."""
    points: dict[int, list[float]] = {}
    for row in rows:
        for tick in _seconds(row):
            if (value := row["series"]["clip"][tick]) is not None:
                points.setdefault(tick, []).append(value)
    return [_point(tick, values) for tick, values in sorted(points.items())]


def _second_ticks(row: Row) -> tuple[list[float], list[float]]:
    """Clip fractions: (in batches that meet a new basis, in the others)."""
    versions, values = row["series"]["basis"], row["series"]["clip"]
    after: list[float] = []
    others: list[float] = []
    for tick in _seconds(row):
        if values[tick] is not None:
            met = tick > 1 and versions[tick] != versions[tick - 2]
            (after if met else others).append(values[tick])
    return after, others


def _seconds(row: Row) -> list[int]:
    batches = row["series"]["batch"]
    return [tick for tick in range(1, len(batches)) if batches[tick] == batches[tick - 1]]


def _point(tick: float, values: Sequence[float]) -> tuple[float, float, float]:
    found = interval(values)
    return tick, found.mean, found.half


def _mean(values: Iterable[float | None] | None) -> float:
    known = [value for value in values or [] if value is not None]
    return statistics.fmean(known) if known else 0.0
