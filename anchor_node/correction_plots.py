"""The report's figures about the slow loop's gifts: corrections as they age, and what a new basis does to the clip
fraction. A figure or panel without data is left out. No files, no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from anchor_node.correction_sums import has_corrections, merges
from anchor_node.drawing import (
    BLUE,
    DASHES,
    GREEN,
    MAX_POINTS,
    MUTED,
    ORANGE,
    PURPLE,
    Plan,
    curve,
    mark_refreshes,
    percent_axis,
    points,
)
from anchor_node.record import RunRecord, ledger_summary, number
from anchor_node.refreshes import CLIP_FRACTION, Group, RefreshTick, by_place, new_basis_ticks, sort_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", RunRecord], None]


# Corrections ----------------------------------------------------------------------------------------------------------


def correction_plans(record: RunRecord) -> list[Plan]:
    """The figure of the corrections, where the run has any or should have."""
    if not has_corrections(record, ledger_summary(record.ledger)):
        return []
    merged = merges(record)
    panels = [
        panel
        for keys, panel in (
            (("K", "age"), _age_panel),
            (("share",), _share_panel),
            (("c", "lambda"), _weight_panel),
            (("cos",), _cosine_panel),
        )
        if any(number(row.get(f"correction/{key}")) is not None for row in merged for key in keys)
    ]

    def draw(axes: Sequence[Axes], record: RunRecord) -> bool:
        for ax, panel in zip(axes, panels, strict=False):
            panel(ax, record)
            ax.set_xlabel("tick")
            first, last = record.ticks[0]["tick"], record.ticks[-1]["tick"]
            if last > first:  # the whole run: also the ticks for which nothing came
                ax.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
        return bool(panels)

    caption = (
        "Of the correction that each tick merged; gaps are ticks that merged none. K is how many ticks ago the weights "
        "were those it was made from: it rises until a newer one comes. Age is what its decay is raised to. The dose is "
        "what it changed, as a share of the merged gradient’s length; c is its length before λ, as a share of the "
        "stages’ own gradient; cosine is taken between the two."
    )
    return [Plan("corrections", "Corrections", caption, draw, panels=max(1, len(panels)), height_px=250)]


def _broken(ax: Axes, record: RunRecord, name: str, color: str, label: str, dash: object = "-") -> bool:
    """A series that ends where no correction was merged: a line across the gap would invent values."""
    xs, ys = points(merges(record), f"correction/{name}")
    if not xs or len(xs) > MAX_POINTS:
        return curve(ax, xs, ys, color, label, dash)
    line_x, line_y = [xs[0]], [ys[0]]
    for i in range(1, len(xs)):
        if xs[i] - xs[i - 1] > 1:
            line_x.append(math.nan)
            line_y.append(math.nan)
        line_x.append(xs[i])
        line_y.append(ys[i])
    ax.plot(line_x, line_y, color=color, linewidth=1.7, linestyle=dash, label=label)
    known = set(xs)
    alone = [(x, y) for x, y in zip(xs, ys, strict=True) if not {x - 1, x + 1} & known]
    if alone:
        ax.plot([x for x, _ in alone], [y for _, y in alone], "o", color=color, markersize=3.5)
    return True


def _age_panel(ax: Axes, record: RunRecord) -> None:
    from matplotlib.ticker import MaxNLocator

    ks, ages = (points(merges(record), f"correction/{name}") for name in ("K", "age"))
    same = ks == ages
    _broken(ax, record, "K", BLUE, "K, also the age" if same else "K")
    if not same:
        _broken(ax, record, "age", ORANGE, "age", DASHES[1])
    most = number(record.knob("corrections", "k_max"))
    highest = max([*ks[1], *ages[1]])
    if most is not None and highest > 0 and most <= 2 * highest:
        ax.axhline(most, color=MUTED, linewidth=1.4, linestyle=DASHES[1], label=f"dropped above {most:g}")
    ax.set_ylim(0.0, 1.05 * max(1.0, ax.get_ylim()[1]))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_title("K and age")
    ax.set_ylabel("ticks")


def _share_panel(ax: Axes, record: RunRecord) -> None:
    _broken(ax, record, "share", GREEN, "")
    ax.set_ylim(bottom=0.0)
    percent_axis(ax)
    ax.set_title("Dose")
    ax.set_ylabel("of the merged gradient")


def _weight_panel(ax: Axes, record: RunRecord) -> None:
    _broken(ax, record, "c", BLUE, "c")
    _broken(ax, record, "lambda", ORANGE, "λ", DASHES[1])
    cap = number(record.knob("corrections", "lambda_cap"))
    if cap is not None and any(number(row.get("correction/lambda")) is not None for row in merges(record)):
        ax.axhline(cap, color=MUTED, linewidth=1.4, linestyle=DASHES[2], label=f"cap of λ, {cap:g}")
    ax.set_ylim(bottom=0.0)
    ax.set_title("c and its weight λ")
    ax.set_ylabel("ratio")


def _cosine_panel(ax: Axes, record: RunRecord) -> None:
    ax.axhline(0.0, color=MUTED, linewidth=1, linestyle=DASHES[1])
    _broken(ax, record, "cos", PURPLE, "")
    ax.set_title("Correction against own gradient")
    ax.set_ylabel("cosine")


# Refreshes ------------------------------------------------------------------------------------------------------------


def refresh_plans(record: RunRecord) -> list[Plan]:
    """The figure of the clip fraction around refreshes, where a run has had one."""
    if not new_basis_ticks(record):
        return []
    caption = (
        "The clip fraction compares the policy with that of the batch’s score pass. A basis that changes between the two "
        "makes them two networks; pinned, it changes only between batches and should leave no trace. First: by tick; "
        "dotted lines are first ticks of a batch on a new basis, solid lines new bases inside a batch. Second: mean and "
        "standard error at each tick of a batch, which starts at 0 because there the two policies are the same."
    )
    return [Plan("refreshes", "Basis refreshes", caption, _refresh_panels, panels=2, height_px=300)]


def _batch_means(ticks: Sequence[RefreshTick]) -> tuple[list[float], list[float]]:
    """First tick of each batch, and the mean of its values."""
    found: dict[int, list[tuple[int, float]]] = {}
    for t in ticks:
        if t.value is not None:
            found.setdefault(t.batch, []).append((t.tick, t.value))
    return [float(of[0][0]) for of in found.values()], [sum(v for _, v in of) / len(of) for of in found.values()]


def _refresh_panels(axes: Sequence[Axes], record: RunRecord) -> bool:
    by_tick, places = axes
    ticks = sort_ticks(record.ticks)
    xs, ys = points(record.ticks, CLIP_FRACTION)
    long = len(xs) > MAX_POINTS and len(ticks) > 0
    if long:  # thinned, the saw-tooth of the batches would be noise
        xs, ys = _batch_means(ticks)
    if not curve(by_tick, xs, ys, BLUE, ""):
        return False
    inside = {t.tick for t in ticks if t.refreshed and t.group == "inside"}
    marks = new_basis_ticks(record)
    mark_refreshes(by_tick, [tick for tick in marks if tick not in inside], "new basis")
    mark_refreshes(by_tick, sorted(inside), "new basis inside a batch", ORANGE, "-")
    by_tick.set_title("By tick, means of batches" if long else "By tick")
    by_tick.set_xlabel("tick")
    place_of = {place: i + 1 for i, place in enumerate(sorted({t.place for t in ticks if t.value is not None}))}
    groups: tuple[tuple[Group, str, str, str, float], ...] = (
        ("other", "other batches", BLUE, "o", -0.06),
        ("after", "batch after a refresh", ORANGE, "D", 0.06),
        ("inside", "after a refresh inside the batch", PURPLE, "s", 0.0),
    )
    for group, label, color, marker, shift in groups:
        means = by_place(ticks, group)
        if means:
            places.errorbar(
                [place_of[place] + shift for place, _ in means], [mean.mean for _, mean in means],
                yerr=[mean.error or 0.0 for _, mean in means], color=color, marker=marker, markersize=4.5, linewidth=1.4,
                elinewidth=1.2, capsize=2.5, label=label,
            )  # fmt: skip
    places.set_title("By place in the batch")
    places.set_xlabel("tick of the batch")
    from matplotlib.ticker import MaxNLocator

    places.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for ax in axes:
        ax.set_ylabel("of tokens, clipped")
        percent_axis(ax)
    return True
