"""What a new basis does to the clip fraction, from a run's tick rows. Pure: rows in, numbers out; no drawing.

The importance ratio compares the policy of a tick with the log-probs of its batch's score pass. A basis that changes
between the two makes them two different networks, and the clip fraction jumps; a pinned basis changes only between
batches, where it must not. Both are measured here against the ticks that no refresh touched.

Only like is compared with like: the clip fraction grows with every step on a batch, so a tick is held against other
batches' ticks at the same place (pass, slice), and the ticks of a batch before its first step, whose ratio is 1 by
construction, are left out. It falls as a policy gets sure, so a batch is held against its neighbours: the one before
it and the one behind it that no refresh touched. The ticks of a batch belong together, so that batches are what is
counted: each gives one number. Intervals are Welch's (Biometrika 34, 1947), with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from anchor_node.record import RunRecord, number, whole

CLIP_FRACTION = "clip_ratio/region_mean"

#: Of a tick's batch: it began on a new basis; a basis changed inside it, before this tick or at it; neither; or rows
#: are missing where the basis changed, so that nobody can tell.
Group = Literal["after", "inside", "other", "unknown"]
Place = tuple[int, int]


@dataclass(frozen=True)
class RefreshTick:
    """A tick as the comparisons see it. `place` is (pass, slice), `refreshed` whether it is the first on a new basis,
    `stepped` whether a step was taken in its batch before it; `value` None: the measure was not recorded."""

    tick: int
    batch: int
    place: Place
    group: Group
    refreshed: bool
    stepped: bool
    value: float | None


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error; None where there are fewer than two numbers."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """Batches of one kind against batches without a refresh, at the places that the former passed: a batch that is cut
    short has only early ones. `passing` is the pass, None all of them.

    Means over batches, with the standard errors of what their places leave unexplained; the difference with the
    half-width of its 95 % interval, None with too few batches.
    """

    passing: int | None
    batches: Mean
    others: Mean
    difference: float
    half: float | None

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval holds 0; None where there is no interval."""
        return None if self.half is None else abs(self.difference) <= self.half


@dataclass(frozen=True)
class Jump:
    """The ticks at which a basis changed inside a batch, against the ticks before them. `rise` is the mean change,
    `usual` that between the same places of batches where no basis changed; `excess` is their difference."""

    before: Mean
    at: Mean
    rise: Mean
    rise_half: float | None
    usual: Mean | None
    excess: float | None
    excess_half: float | None


def new_basis_ticks(record: RunRecord) -> list[int]:
    """The first tick on each new basis, wherever in a batch: where the version in the tick rows changes. Without
    versions, the events, which tell when it was broadcast; it is in use from the next batch on."""
    found = [
        (row["tick"], version) for row in record.ticks if (version := number(row.get("basis/version"))) is not None
    ]
    if found:
        return [tick for (_, old), (tick, new) in pairwise(found) if new != old]
    told = (whole(event.get("tick")) for event in record.events if event.get("event") == "basis")
    return [tick for tick in told if tick is not None]


def sort_ticks(rows: Iterable[Mapping[str, Any]], key: str = CLIP_FRACTION) -> list[RefreshTick]:
    """Every tick row, in tick order, with the group that its batch gives it; rows without a batch, pass, slice or
    basis version are left out."""
    ticks: list[RefreshTick] = []
    last: tuple[int, int, int] | None = None  # tick, batch, version
    group: Group = "other"
    stepped = False
    for row in rows:
        place = tuple(whole(row.get(name)) for name in ("tick", "batch", "pass", "slice", "basis/version"))
        tick, batch, pass_, slice_, version = place
        if tick is None or batch is None or pass_ is None or slice_ is None or version is None:
            continue
        refreshed = last is not None and version != last[2]
        if last is None or batch != last[1]:
            group, stepped = "after" if refreshed else "other", False
        elif refreshed:
            group = "inside"
        if refreshed and last is not None and tick != last[0] + 1:
            group, refreshed = "unknown", False
        ticks.append(RefreshTick(tick, batch, (pass_, slice_), group, refreshed, stepped, number(row.get(key))))
        stepped = stepped or row.get("outcome") != "skip"
        last = (tick, batch, version)
    return ticks


def compare_batches(ticks: Sequence[RefreshTick], group: Group) -> list[Comparison]:
    """The batches of `group` against those without a refresh, each less its neighbours without one; pass by pass and,
    last, over all passes. Empty where either side has nothing that can be compared."""
    reference = _reference(ticks)
    usable = [t for t in ticks if t.value is not None and t.stepped and t.place in reference]
    compared = []
    for passing in (*sorted({t.place[0] for t in usable if t.group == group}), None):
        chosen = [t for t in usable if passing in (None, t.place[0])]
        ours, others = ([t for t in chosen if t.group == name] for name in (group, "other"))
        if not ours or not others:
            continue
        level = [_by_batch((t.batch, (t.value or 0.0) - reference[t.place]) for t in side) for side in (ours, others)]
        above = [_less_neighbours(side, level[1]) for side in level]
        if not all(above):
            continue
        difference, half = welch(*above)
        here = mean_of(list(_by_batch((t.batch, t.value or 0.0) for t in ours).values())).mean
        batches, rest = (
            Mean(mean, mean_of(side).error, len(side))
            for mean, side in zip((here, here - difference), above, strict=True)
        )
        compared.append(Comparison(passing, batches, rest, difference, half))
    return compared


def compare_jumps(ticks: Sequence[RefreshTick]) -> Jump | None:
    """The ticks of a refresh inside a batch against the ticks just before them; None where there are none."""
    pairs = [
        (old, new, new.value - old.value)
        for old, new in pairwise(ticks)
        if new.batch == old.batch and new.tick == old.tick + 1 and new.value is not None and old.value is not None
    ]
    jumps = [(old, new, rise) for old, new, rise in pairs if new.refreshed]
    if not jumps:
        return None
    rises = [rise for _, _, rise in jumps]
    rise = mean_of(rises)
    usual: dict[tuple[Place, Place], list[tuple[int, float]]] = {}
    for old, new, change in pairs:
        if new.group in ("after", "other"):
            usual.setdefault((old.place, new.place), []).append((new.batch, change))
    norm = {places: mean_of([change for _, change in changes]).mean for places, changes in usual.items()}
    above = [change - norm[old.place, new.place] for old, new, change in jumps if (old.place, new.place) in norm]
    met = {(old.place, new.place) for old, new, _ in jumps} & set(norm)
    level = list(_by_batch(change for places in met for change in usual[places]).values())
    spread = list(
        _by_batch((batch, change - norm[places]) for places in met for batch, change in usual[places]).values()
    )
    excess, excess_half = welch(above, spread) if above else (None, None)
    return Jump(
        before=mean_of([old.value or 0.0 for old, _, _ in jumps]),
        at=mean_of([new.value or 0.0 for _, new, _ in jumps]),
        rise=rise,
        rise_half=None if rise.error is None else t_975(rise.count - 1) * rise.error,
        usual=mean_of(level) if level else None,
        excess=excess,
        excess_half=excess_half,
    )


def by_place(ticks: Sequence[RefreshTick], group: Group) -> list[tuple[Place, Mean]]:
    """Mean over the ticks of a group at each place of a batch, in the order in which a batch passes them."""
    found: dict[Place, list[float]] = {}
    for t in ticks:
        if t.group == group and t.value is not None:
            found.setdefault(t.place, []).append(t.value)
    return [(place, mean_of(found[place])) for place in sorted(found)]


def _reference(ticks: Iterable[RefreshTick]) -> dict[Place, float]:
    """The mean at each place of the batches without a refresh."""
    return {place: mean.mean for place, mean in by_place([t for t in ticks if t.stepped], "other")}


def _less_neighbours(levels: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Each batch less the mean of the nearest ones of `others` on both sides. Those at an end of the run are left out:
    with a neighbour on one side alone a trend would be taken for an effect."""
    found = []
    for batch, level in levels.items():
        before, behind = (
            max((b for b in others if b < batch), default=None),
            min((b for b in others if b > batch), default=None),
        )
        if before is not None and behind is not None:
            found.append(level - (others[before] + others[behind]) / 2)
    return found


def _by_batch(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """One number a batch: the mean of its own."""
    found: dict[int, list[float]] = {}
    for batch, value in values:
        found.setdefault(batch, []).append(value)
    return {batch: sum(of) / len(of) for batch, of in found.items()}


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error; at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count), count)


def welch(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Difference of the means and the half-width of its 95 % interval, for unequal spreads; None with fewer than two
    values on a side."""
    a, b = mean_of(ours), mean_of(others)
    if a.error is None or b.error is None:
        return a.mean - b.mean, None
    variance = a.error**2 + b.error**2
    if variance == 0.0:
        return a.mean - b.mean, 0.0
    freedom = variance**2 / (a.error**4 / (a.count - 1) + b.error**4 / (b.count - 1))
    return a.mean - b.mean, t_975(freedom) * math.sqrt(variance)


def t_975(freedom: float) -> float:
    """The 97.5 % quantile of Student's t for `freedom` >= 1 degrees of freedom, fractions allowed, to 5 digits.

    With x = sqrt(freedom) tan(a), half the distribution is an integral of cos(u)^(freedom - 1) over u from 0 to a:
    smooth and finite, so that Simpson's rule and a bisection of the angle will do.
    """
    scale: float = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def below(angle: float) -> float:
        parts = 64
        weights = (1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1))
        heights = (math.pow(math.cos(angle * i / parts), freedom - 1) for i in range(parts + 1))
        return 0.5 + scale * angle / parts / 3 * sum(w * h for w, h in zip(weights, heights, strict=True))

    # The quantile is at most 13, and at most 4.31 from two degrees of freedom on.
    low, high = 0.0, math.atan((13.0 if freedom < 2 else 4.31) / math.sqrt(freedom))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.975 else (low, middle)
    return math.sqrt(freedom) * math.tan(high)
