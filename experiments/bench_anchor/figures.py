"""From turns to what corrections cost: ratios with their spread, what a snapshot adds to a tick, the table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.bench.figures import SETTLING
from experiments.bench.sides import Tick
from experiments.bench_anchor.sides import AnchorTurn

Measure = Callable[[AnchorTurn], float]


def tick_s(tick: Tick) -> float:
    return tick.tick_s


def busy_s(tick: Tick) -> float:
    """Of a stage, the mean over both."""
    return statistics.mean(tick.busy_s)


# A side's turn over the turn of `off` in the same round; tokens/s is the one where less than 1 is a loss.
RATIOS: dict[str, Measure] = {
    "tokens_per_s": lambda turn: 1 / statistics.mean(map(tick_s, turn.counted)),
    "tokens_per_s_of_median_ticks": lambda turn: 1 / statistics.median(map(tick_s, turn.counted)),
    "stage_cpu": lambda turn: turn.stage_cpu_s / len(turn.ticks),
    "busy": lambda turn: statistics.mean(map(busy_s, turn.counted)),
}


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, quartiles and range, as the other benches have them."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    quartiles, ends = [ordered[quarter], ordered[-1 - quarter]], [ordered[0], ordered[-1]]
    return {"median": statistics.median(ordered), "quartiles": quartiles, "range": ends}


def snapshot_ticks(rows: Sequence[Mapping[str, Any]], cadence: int) -> set[int]:
    """The ticks that left a snapshot: of each cadence the first that was committed. `rows` in tick order."""
    found: dict[int, int] = {}
    for row in rows:
        if row["outcome"] == "commit":
            found.setdefault(row["tick"] // cadence, row["tick"])
    return set(found.values())


def added_s(on: AnchorTurn, off: AnchorTurn, snapshots: set[int], of: Callable[[Tick], float]) -> float | None:
    """By how much the ticks after snapshots are longer than a turn's other ticks, over the same difference of `off`.

    A snapshot is copied between the decisions of its tick and of the next, so the next tick's time has it. None where
    the counted ticks hold no snapshot. Both turns are from the same round, so they begin with the same tick.
    """

    def difference(turn: AnchorTurn) -> float:
        after = [of(turn.ticks[i]) for i in which]
        others = [of(tick) for i, tick in enumerate(turn.ticks[SETTLING:], SETTLING) if i not in which]
        return statistics.mean(after) - statistics.median(others)

    which = {s + 1 - on.first for s in snapshots} & set(range(SETTLING, len(on.ticks)))
    return difference(on) - difference(off) if which else None


def against(on: Sequence[AnchorTurn], off: Sequence[AnchorTurn], snapshots: set[int]) -> dict[str, Any]:
    """A side's turns against those of `off`, round by round: neighbours in time, so that load cancels."""
    found: dict[str, Any] = {
        name: spread(measure(a) / measure(b) for a, b in zip(on, off, strict=True)) for name, measure in RATIOS.items()
    }
    for name, of in (("added_tick_s", tick_s), ("added_busy_s", busy_s)):
        added = [added_s(a, b, snapshots, of) for a, b in zip(on, off, strict=True)]
        found[name] = spread(s for s in added if s is not None)
    return found


def level(turns: Sequence[AnchorTurn], tokens: int) -> dict[str, float]:
    """A side by itself: medians over turns; CPU in seconds a tick."""
    return {
        "tokens_per_s": tokens * statistics.median(map(RATIOS["tokens_per_s"], turns)),
        "stage_cpu_s": statistics.median(map(RATIOS["stage_cpu"], turns)),
        "anchor_cpu_s": statistics.median(turn.anchor_cpu_s / len(turn.ticks) for turn in turns),
    }


COLUMNS = (
    "corrections", "tok/s", "ratio", "quartiles", "range", "median ticks", "stages' CPU", "quartiles", "busy",
    "after a snapshot, tick / busy", "anchor's CPU a tick", "corrections made", "ticks that merged",
)  # fmt: skip


def cells(name: str, side: Mapping[str, Any]) -> list[str]:
    """One row of the table, in the order of COLUMNS. `side` has `level`, `run` and, unless it is off, `against`."""

    def pair(values: Sequence[float]) -> str:
        return "{:.3f} .. {:.3f}".format(*values)

    ratios, run = side.get("against"), side["run"]
    compared = ["1", "", "", "1", "1", "", "1", ""]
    if ratios:
        speed, cpu = ratios["tokens_per_s"], ratios["stage_cpu"]
        compared = [f"{speed['median']:.3f}", pair(speed["quartiles"]), pair(speed["range"])]
        compared += [f"{ratios['tokens_per_s_of_median_ticks']['median']:.3f}"]
        compared += [f"{cpu['median']:.3f}", pair(cpu["quartiles"]), f"{ratios['busy']['median']:.3f}"]
        compared += [" / ".join(f"{1e3 * ratios[n]['median']:+.0f} ms" for n in ("added_tick_s", "added_busy_s"))]
    own = side["level"]
    ends = [f"{1e3 * own['anchor_cpu_s']:.0f} ms", str(run["made"]), f"{run['merged_ticks']} of {run['ticks']}"]
    return [name, f"{own['tokens_per_s']:,.0f}", *compared, *ends]
