"""The report's figures about the links: what they lose, what that does to a training step, and how their bases change.
A figure or panel without data is left out. No files, no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from anchor_node.drawing import (
    BLUE,
    DASHES,
    MANY,
    MAX_POINTS,
    MUTED,
    ORANGE,
    PURPLE,
    SERIES,
    Plan,
    curve,
    natural,
    percent_axis,
    points,
)
from anchor_node.record import RunRecord, mapping, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS = ("forward", "backward")
#: Fewer versions than this are a table, not a curve.
FEW_VERSIONS = 3

Panel = Callable[["Axes"], None]
Line = tuple[str, list[float], list[float]]


def link_plans(record: RunRecord) -> list[Plan]:
    """The figures that this run has something for."""
    pinned = record.knob("anchor", "pin_basis") is not False
    in_use = "from the next rollout batch on" if pinned else "as soon as all stages hold it, also inside a batch"
    figures = (
        (
            "basis",
            "What the links lose",
            (
                "Share of the rows’ energy that does not come through, by boundary; forward are activations, each row "
                "weighted by its rms, backward are gradients. Solid: lost in all, the relative error. Dotted: what lies "
                "outside the basis, 1 − captured share. The gap between them is rounding. Energy is not yet harm: the "
                "sampled fidelity and the compressed validation line are the real test."
            ),
            _loss_panels(record),
        ),
        (
            "fidelity",
            "Sampled fidelity: links against exact ones",
            (
                "Every few ticks some sequences run forward and backward twice, over the links as they are and over "
                "exact ones. KL: exact against compressed next-token distributions, mean and largest of the completion tokens; "
                "grey is what the updates on a batch do to the policy (kl_old). Log-prob difference: the largest on a sampled token. Cosine and norm ratio "
                "compare each stage’s gradients; 1 is the same direction and the same length."
            ),
            _fidelity_panels(record),
        ),
        (
            "versions",
            "Versions of the bases",
            (
                f"Each refresh, at the tick it was made; it is in use {in_use}. Overlap of "
                "the encoder’s subspace with the one before: 1 is the same. Condition: how many times larger a change of a "
                "row may be than that of its coefficients; hundreds are a broken basis. Rank and step of the quantiser are drawn where "
                "they changed."
            ),
            _version_panels(record),
        ),
    )
    return [
        Plan(key, title, caption, _all(panels), panels=len(panels), height_px=300 if key == "basis" else 250)
        for key, title, caption, panels in figures
        if panels
    ]


def _all(panels: Sequence[Panel]) -> Callable[[Sequence[Axes], RunRecord], bool]:
    def draw(axes: Sequence[Axes], record: RunRecord) -> bool:
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax)
        return True

    return draw


def by_place(rows: Sequence[dict[str, Any]], prefix: str) -> list[Line]:
    """(name, ticks, values) of every key below `prefix` that has a number, in natural order: boundary 0, boundary 1."""
    keys = sorted({key for row in rows for key in row if key.startswith(prefix)}, key=natural)
    lines = ((key.removeprefix(prefix).replace("_", " "), *points(rows, key)) for key in keys)
    return [line for line in lines if line[1]]


def _style(place: int) -> tuple[str, Any]:
    return SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)]


def _sparse(ax: Axes, xs: list[float], ys: list[float], color: str, label: str, dash: Any = "-") -> None:
    """A series that has a value now and then: a dot each, until they would run into one another."""
    if not xs:
        return
    stride = -(-len(xs) // MAX_POINTS)
    marker = "o" if len(xs) <= MANY else None
    ax.plot(xs[::stride], ys[::stride], color=color, linewidth=1.6, linestyle=dash, marker=marker, markersize=4,
            label=label)  # fmt: skip


def _named(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("tick")
    ax.set_ylabel(unit)


# What is lost ---------------------------------------------------------------------------------------------------------


def _loss_panels(record: RunRecord) -> list[Panel]:
    return [_loss_panel(record, d) for d in DIRECTIONS if by_place(record.ticks, f"basis/share_{d}/")]


def _loss_panel(record: RunRecord, direction: str) -> Panel:
    outside = [
        (name, xs, [1.0 - y for y in ys]) for name, xs, ys in by_place(record.ticks, f"basis/share_{direction}/")
    ]
    error = by_place(record.ticks, f"basis/error_{direction}/")
    rank = number(mapping(record.manifest.get("ranks")).get(direction))
    steered = any(y != rank for _, _, ys in by_place(versions(record), f"basis/rank_{direction}/") for y in ys)
    title = f"{direction}, {'up to ' if steered else ''}rank {rank:.0f}" if rank else direction

    def panel(ax: Axes) -> None:
        for place, (name, xs, ys) in enumerate(error):
            curve(ax, xs, ys, _style(place)[0], name, _style(place)[1])
        for place, (name, xs, ys) in enumerate(outside):
            curve(ax, xs, ys, _style(place)[0], "_" if error else name, DASHES[2])
        if error:
            ax.plot([], [], color=MUTED, linewidth=1.4, linestyle=DASHES[2], label="outside the basis")
        _named(ax, title, "of the energy, lost")
        ax.set_ylim(bottom=0.0)
        percent_axis(ax)

    return panel


# What it does to a step -----------------------------------------------------------------------------------------------


def _fidelity_panels(record: RunRecord) -> list[Panel]:
    panels = []
    if any(number(row.get("fidelity/kl")) is not None or number(row.get("fidelity/poisoned")) for row in record.ticks):
        panels.append(_kl_panel(record))
    if any(number(row.get("fidelity/logp_diff_max")) is not None for row in record.ticks):
        panels.append(_difference_panel(record))
    for key, title, unit in (
        ("fidelity/grad_cosine/", "Gradient cosine", "cosine"),
        ("fidelity/grad_norm_ratio/", "Gradient norm ratio", "compressed / exact"),
    ):
        lines = by_place(record.ticks, key)
        if lines:
            panels.append(_stage_panel(lines, title, unit))
    return panels


def _kl_panel(record: RunRecord) -> Panel:
    updates = [value for row in record.ticks if (value := number(row.get("policy/kl_old")))]
    poisoned = [row["tick"] for row in record.ticks if number(row.get("fidelity/poisoned"))]

    def panel(ax: Axes) -> None:
        from matplotlib.ticker import LogLocator

        positive = False
        for key, label, color in (("fidelity/kl_max", "largest", ORANGE), ("fidelity/kl", "mean", BLUE)):
            xs, ys = points(record.ticks, key)
            positive |= any(y > 0 for y in ys)
            _sparse(ax, xs, ys, color, label)
        if positive and updates:
            ax.axhline(sum(updates) / len(updates), color=MUTED, linewidth=1.4, linestyle=DASHES[1],
                       label="own updates, mean")  # fmt: skip
        if poisoned:
            ax.plot(poisoned, [0.04] * len(poisoned), "x", color=PURPLE, markersize=6, markeredgewidth=1.6,
                    transform=ax.get_xaxis_transform(), label="met NaN", clip_on=False)  # fmt: skip
        if positive:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=9))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(lambda value, _: "")
        _named(ax, "KL of the policy", "nats a token")

    return panel


def _difference_panel(record: RunRecord) -> Panel:
    cap = number(record.knob("grpo", "sampler_correction_cap"))

    def panel(ax: Axes) -> None:
        _sparse(ax, *points(record.ticks, "fidelity/logp_diff_max"), ORANGE, "largest")
        if cap is not None and cap > 1.0:
            ax.axhline(math.log(cap), color=MUTED, linewidth=1.4, linestyle=DASHES[1],
                       label=f"sampler correction’s cap of {cap:g}")  # fmt: skip
        ax.set_ylim(0.0, 1.05 * ax.get_ylim()[1])
        _named(ax, "Log-prob difference", "nats")

    return panel


def _stage_panel(lines: list[Line], title: str, unit: str) -> Panel:
    def panel(ax: Axes) -> None:
        ax.axhline(1.0, color=MUTED, linewidth=1, linestyle=DASHES[1])
        for place, (name, xs, ys) in enumerate(lines):
            _sparse(ax, xs, ys, _style(place)[0], name, _style(place)[1])
        _named(ax, title, unit)

    return panel


# How the bases change -------------------------------------------------------------------------------------------------


def versions(record: RunRecord) -> list[dict[str, Any]]:
    """The events that made a version, by tick."""
    made = [row for row in record.events if row.get("event") == "basis" and number(row.get("tick")) is not None]
    return sorted(made, key=lambda row: int(row["tick"]))


def _version_panels(record: RunRecord) -> list[Panel]:
    made = versions(record)
    panels = []
    for what, title, unit in (
        ("overlap", "Overlap with the version before", "1 = the same"),
        ("condition", "Condition", "‖E‖ ‖D‖; 1 = orthonormal"),
    ):
        lines = _by_direction(made, what)
        if len(made) >= FEW_VERSIONS and lines:
            panels.append(_version_panel(lines, title, unit, "default"))
    for what, title, unit in (("rank", "Rank", "columns"), ("step", "Quantiser step", "for rows of rms 1")):
        lines = _by_direction([first_version(record), *made], what)
        if any(len(set(ys)) > 1 for _, _, (_, _, ys) in lines):
            panels.append(_version_panel(lines, title, unit, "steps-post"))
    return panels


def first_version(record: RunRecord) -> dict[str, Any]:
    """Rank and step of version 0, which no event tells, for the places that a later version names."""
    start: dict[str, Any] = {"tick": 0}
    for direction in DIRECTIONS:
        for what, value in (
            ("rank", number(mapping(record.manifest.get("ranks")).get(direction))),
            ("step", number(record.knob("links", f"step_{direction}"))),
        ):
            for name, _, ys in by_place(versions(record), f"basis/{what}_{direction}/"):
                if value is not None and any(ys):  # a step of 0: another quantiser, which the knob says nothing about
                    start[f"basis/{what}_{direction}/{name.replace(' ', '_')}"] = value
    return start


def _by_direction(made: Sequence[dict[str, Any]], what: str) -> list[tuple[str, int, Line]]:
    return [
        (direction, place, line)
        for direction in DIRECTIONS
        for place, line in enumerate(by_place(made, f"basis/{what}_{direction}/"))
    ]


def _version_panel(lines: Sequence[tuple[str, int, Line]], title: str, unit: str, drawstyle: Any) -> Panel:
    """Forward solid with the boundaries' names, backward dashed in their colours."""

    def panel(ax: Axes) -> None:
        for direction, place, (name, xs, ys) in lines:
            forward = direction == "forward"
            ax.plot(xs, ys, color=_style(place)[0], linewidth=1.6, linestyle="-" if forward else DASHES[1], marker="o",
                    markersize=3.5, drawstyle=drawstyle, label=name if forward else "_")  # fmt: skip
        if any(direction == "backward" for direction, _, _ in lines):
            ax.plot([], [], color=MUTED, linewidth=1.6, linestyle=DASHES[1], label="backward")
        _named(ax, title, unit)

    return panel
