"""From turns to figures: medians, the ratio with its spread, waiting shares, and the words they are shown in. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments import record
from experiments.bench.sides import Turn

SETTLING = (
    2  # ticks left out at the start of each turn: caches are cold and the swarm's first batch is still on its way
)


@dataclass(frozen=True)
class Pair:
    """A turn of each side, one right after the other."""

    swarm: Turn
    torch: Turn


def median_tick_s(turn: Turn) -> float:
    return statistics.median(tick.tick_s for tick in turn.ticks[SETTLING:])


def waiting(turns: Sequence[Turn]) -> list[float]:
    """Per stage, the median share of a tick in which its compute thread had nothing to do: bubble and links together."""
    ticks = [tick for turn in turns for tick in turn.ticks[SETTLING:]]
    stages = range(len(ticks[0].busy_s))
    return [statistics.median(max(0.0, 1 - tick.busy_s[i] / tick.tick_s) for tick in ticks) for i in stages]


def bubble(microbatches: int, stages: int) -> float:
    """The share of a tick that 1F1B leaves every stage idle when stages are equal and links cost nothing."""
    return (stages - 1) / (microbatches + stages - 1)


def summary(pairs: Sequence[Pair], tokens: int, microbatches: int) -> dict[str, Any]:
    """Everything the report says of one workload. A pair's ratio compares neighbours in time, so load cancels."""
    ratios = sorted(median_tick_s(pair.torch) / median_tick_s(pair.swarm) for pair in pairs)
    cpu = sorted(sum(pair.torch.cpu_s) / sum(pair.swarm.cpu_s) for pair in pairs)
    quarter = len(ratios) // 4
    sides = {}
    for name, turns in (("swarm", [p.swarm for p in pairs]), ("torch", [p.torch for p in pairs])):
        tick_s = statistics.median(median_tick_s(turn) for turn in turns)
        sides[name] = {
            "tick_s": tick_s,
            "tokens_per_s": tokens / tick_s,
            "fastest_tick_s": min(tick.tick_s for turn in turns for tick in turn.ticks[SETTLING:]),
            "waiting_share": waiting(turns),
            "cpu_s_per_tick": statistics.median(sum(turn.cpu_s) for turn in turns),
        }
    return {
        "pairs": len(pairs),
        "ticks_a_turn": len(pairs[0].swarm.ticks) - SETTLING,
        "tokens_a_tick": tokens,
        "microbatches": microbatches,
        "bubble_share": bubble(microbatches, len(pairs[0].swarm.ticks[0].busy_s)),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "ratio_range": [ratios[0], ratios[-1]],
        "ratio_of_fastest": sides["torch"]["fastest_tick_s"] / sides["swarm"]["fastest_tick_s"],
        "cpu_ratio": statistics.median(cpu),
        **sides,
    }


COLUMNS = (
    ("workload", "left"), ("swarm tok/s", "right"), ("torch tok/s", "right"), ("ratio", "right"), ("quartiles", "right"),
    ("range", "right"), ("fastest ticks", "right"), ("CPU", "right"), ("swarm waits, stage 0 / 1", "right"),
    ("torch waits", "right"), ("bubble", "right"),
)  # fmt: skip


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """One row of the table, in the order of COLUMNS."""

    def shares(values: Sequence[float]) -> str:
        return " / ".join(f"{100 * value:.1f} %" for value in values)

    return [
        name,
        f"{found['swarm']['tokens_per_s']:,.0f}",
        f"{found['torch']['tokens_per_s']:,.0f}",
        f"{found['ratio']:.3f}",
        "{:.3f} .. {:.3f}".format(*found["ratio_quartiles"]),
        "{:.3f} .. {:.3f}".format(*found["ratio_range"]),
        f"{found['ratio_of_fastest']:.3f}",
        f"{found['cpu_ratio']:.3f}",
        shares(found["swarm"]["waiting_share"]),
        shares(found["torch"]["waiting_share"]),
        f"{100 * found['bubble_share']:.1f} %",
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same cells as a markdown table."""
    left = [column for column, (_, side) in enumerate(COLUMNS) if side == "left"]
    return record.table([title for title, _ in COLUMNS], rows, left)
