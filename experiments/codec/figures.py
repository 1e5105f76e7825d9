"""From rows of single runs to figures of cells: means over seeds, paired differences to dense, t-intervals. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 0.01  # a cell is non-inferior when it loses less than this, with 97.5 % confidence
# Student's t, 97.5 % point, by degrees of freedom from 1 on; more than 15 seeds are taken as 15, which is wider.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its two-sided 95 % t-interval (infinite for a single value)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Over independent values, one a seed; at least one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.inf)
    t = T975[min(len(values) - 1, len(T975)) - 1]
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(len(values)))


def signed(found: Interval | None) -> str:
    """A difference with its interval, where it has one."""
    if found is None:
        return ""
    half = "" if math.isinf(found.half) else f" ± {found.half:.4f}"
    return f"{found.mean:+.4f}{half}"


@dataclass(frozen=True)
class Cell:
    """One line of the table. Differences are to dense runs of the same seeds; None where there are none.

    `weights`: accuracy of the trained weights without links, which is what a run exports; `links`: through the links.
    `cosine` is that of the worst stage.
    """

    name: str
    seeds: int
    overrides: dict[str, str]
    weights: Interval
    links: Interval
    greedy: float
    weights_less_dense: Interval | None
    links_less_dense: Interval | None
    share_of_dense: float
    forward_bytes: float
    backward_bytes: float
    overhead_share: float
    start_links: float
    start_kl: float
    end_kl: float
    end_logp_shift: float
    start_cosine: float
    end_cosine: float
    gated: float
    cpu_s: float

    @property
    def non_inferior(self) -> bool | None:
        """Whether the trained weights lose less than MARGIN; None where it is unknown (no pair, or one alone)."""
        difference = self.weights_less_dense
        return None if difference is None or math.isinf(difference.half) else difference.low > -MARGIN


def cell(rows: Sequence[Row], dense: Iterable[Row]) -> Cell:
    """Sum up the runs of one cell, one row a seed."""
    baseline = {row["seed"]: row for row in dense}
    pairs = [(row, baseline[row["seed"]]) for row in rows if row["seed"] in baseline]

    def difference(what: str) -> Interval | None:
        # Dense links lose nothing that shows, so a cell through its links is set against dense weights as well.
        values = [r["end"][what]["expected"] - d["end"]["weights"]["expected"] for r, d in pairs]
        return interval(values) if values else None

    def mean(*path: str) -> float:
        return statistics.fmean(_at(row, path) for row in rows)

    return Cell(
        name=rows[0]["cell"],
        seeds=len(rows),
        overrides=rows[0]["overrides"],
        weights=interval([row["end"]["weights"]["expected"] for row in rows]),
        links=interval([row["end"]["links"]["expected"] for row in rows]),
        greedy=mean("end", "weights", "greedy"),
        weights_less_dense=difference("weights"),
        links_less_dense=difference("links"),
        share_of_dense=mean("bytes", "share_of_dense"),
        forward_bytes=mean("bytes", "forward_per_token"),
        backward_bytes=mean("bytes", "backward_per_token"),
        overhead_share=mean("bytes", "basis_and_sketch_share"),
        start_links=mean("start", "links", "expected"),
        start_kl=mean("start", "fidelity", "kl"),
        end_kl=mean("end", "fidelity", "kl"),
        end_logp_shift=max(row["end"]["fidelity"]["largest_logp_shift"] for row in rows),
        start_cosine=statistics.fmean(min(row["start"]["fidelity"]["gradient_cosine"]) for row in rows),
        end_cosine=statistics.fmean(min(row["end"]["fidelity"]["gradient_cosine"]) for row in rows),
        gated=mean("gated"),
        cpu_s=mean("cpu_s"),
    )


def _at(row: Row, path: Sequence[str]) -> float:
    value: Any = row
    for key in path:
        value = value[key]
    return float(value)
