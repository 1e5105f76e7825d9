"""The plots of the decoupling experiment: curves over ticks with their bands. Draws what figures.py made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.decoupling.cells import DENSE, HELD, PINNING, A, B, C, D
from experiments.decoupling.figures import Curve, Runs, accuracy_curve, refreshes, second_tick_curve, series_curve

NONE = "none, cadence 20"
COLOURS = {
    DENSE: "black",
    NONE: "tab:grey",
    A: "tab:blue",
    B: "tab:orange",
    C: "tab:green",
    D: "tab:red",
    HELD[5]: "tab:blue",
    HELD[20]: "tab:red",
}
COLUMNS = {
    "signed_ema": (DENSE, NONE, A, B, C, D),
    "held_delta": (DENSE, NONE, *HELD.values()),
}
# Whoever draws the prompts decides most of a batch's length: by seed they are the same ones in every cell.
PANELS: dict[str, Callable[[Runs, str], Curve]] = {
    "validation accuracy": lambda runs, name: accuracy_curve(runs[name]),
    f"length over {NONE}, tokens": lambda runs, name: series_curve(runs[name], "length", runs.get(NONE, [])),
    "entropy, nats": lambda runs, name: series_curve(runs[name], "entropy"),
    "clip fraction": lambda runs, name: series_curve(runs[name], "clip"),
}


def by_tick(runs: Runs, file: Path) -> None:
    """Validation, length, entropy and clip fraction; refreshes of the cells with cadence 20 as dotted lines."""
    plt = _pyplot()
    size = (12, 2.7 * len(PANELS))
    figure, axes = plt.subplots(len(PANELS), 2, figsize=size, sharex=True, sharey="row", layout="constrained")
    for column, (merger, names) in enumerate(COLUMNS.items()):
        for line, (title, curve) in enumerate(PANELS.items()):
            axis = axes[line][column]
            for name in names:
                if name in runs:
                    _band(axis, curve(runs, name), COLOURS[name], name)
            for tick in refreshes(runs[NONE]) if NONE in runs else []:
                axis.axvline(tick, linestyle=":", color="lightgrey", linewidth=1, zorder=0)
            axis.set_ylabel(title if column == 0 else "")
        axes[0][column].set_title(merger)
        axes[0][column].legend(fontsize=7, loc="lower left")
        axes[-1][column].set_xlabel("tick")
    for line in axes:
        _look_at_means(line)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def clip_fractions(runs: Runs, file: Path) -> None:
    """The clip fraction in the second tick of every batch, pinned and not, by how far the basis jumps."""
    plt = _pyplot()
    jumps = list(dict.fromkeys(name.partition(",")[0] for name in PINNING if name in runs))
    lines = max(1, -(-len(jumps) // 2))
    figure, axes = plt.subplots(
        lines, 2, figsize=(12, 3.2 * lines), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, jump in zip(axes.flat, jumps, strict=False):
        for how, colour in (("unpinned", "tab:red"), ("pinned", "tab:blue")):
            rows = runs.get(f"{jump}, {how}", [])
            if not rows:
                continue
            _band(axis, second_tick_curve(rows), colour, how)
            for tick in refreshes(rows):
                axis.axvline(tick, linestyle=":", color="lightgrey", linewidth=1, zorder=0)
        axis.set(title=jump, xlabel="tick", ylabel="clip fraction")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _band(axis: Any, curve: Curve, colour: str, label: str) -> None:
    x, mean, half = zip(*curve, strict=True) if curve else ((), (), ())
    widths = [0.0 if math.isinf(h) else h for h in half]
    axis.plot(x, mean, color=colour, linewidth=1.3, label=label)
    low, high = ([m + sign * w for m, w in zip(mean, widths, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _look_at_means(axes: Any) -> None:
    """Leave the common view of these axes to their curves: a band over two seeds is wider than all there is to see."""
    curves = [line.get_ydata() for axis in axes for line in axis.get_lines() if line.get_linestyle() == "-"]
    seen = [value for y in curves for value in y]
    if seen:
        room = 0.15 * (max(seen) - min(seen)) or 1.0
        axes[0].set_ylim(min(seen) - room, max(seen) + room)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
