"""The figures of the report: which rows become which curve, and what the reader is told about them. No files, no HTML.

Each draw function gets its panels and the run, and returns whether there was anything to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anchor_node.correction_plots import correction_plans, refresh_plans
from anchor_node.drawing import (
    BLUE,
    CARD,
    DASHES,
    GREEN,
    GRID,
    INK,
    MANY,
    MAX_POINTS,
    MUTED,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    Drawing,
    Plan,
    bytes_axis,
    curve,
    draw,
    mark_refreshes,
    natural,
    percent_axis,
    points,
)
from anchor_node.link_plots import link_plans
from anchor_node.record import LINK_KINDS, RunRecord, kind_rank, ledger_summary, number, share_text
from anchor_node.refreshes import new_basis_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_all(record: RunRecord) -> list[Drawing]:
    """All figures of a run, in reading order. One that has no data, or fails, says so instead of ending the report."""
    return [draw(plan, record) for plan in plans(record)]


def plans(record: RunRecord) -> tuple[Plan, ...]:
    """What is drawn, in reading order; figures about links, refreshes and corrections only where they were measured."""
    return (
        Plan(
            "reward",
            "Reward and validation",
            "Mean reward of each tick’s rollouts (thin) with its running mean (bold), and validation on held-out prompts "
            "with 95 % intervals. The compressed line is the same weights seen through the compressed links. Dotted "
            "lines: the first tick on a refreshed compression basis. Marks at the foot: the tick was skipped.",
            _reward,
            height_px=360,
        ),
        Plan(
            "bytes",
            "Bytes on the network",
            "First: what bf16 would have cost (ring) and what was sent as messages (dot), summed over the run. Second: "
            "messages by tick; dense links is what activations and gradients would have cost. Logarithmic scales.",
            _bytes,
            panels=2,
            height_px=340,
        ),
        Plan(
            "dgg",
            "Gradient gate (DGG)",
            "How unusual the jump of the output layer’s squared gradient norm was, in standard deviations of the last jumps. "
            "Above τ, on a second or later pass over a batch (filled dots), the tick is discarded on all stages. First "
            "passes (rings) are never gated. The gate is silent until its window is full.",
            _dgg,
        ),
        *link_plans(record),
        *refresh_plans(record),
        *correction_plans(record),
        Plan(
            "policy",
            "Policy: entropy, clipping, length",
            "Length or entropy that runs away is the earliest sign of a collapse. Clip fractions that jump after a basis "
            "refresh (dotted lines) mean that the ratio compares two different networks.",
            _policy,
            panels=4,
            height_px=260,
        ),
        Plan(
            "signal",
            "Learning signal",
            "Groups whose completions all score the same teach nothing. A growing difference between trainer and "
            "sampler log-probabilities means the rollouts no longer come from the weights being trained.",
            _signal,
            panels=4,
            height_px=260,
        ),
        Plan(
            "time",
            "Time per tick",
            "Seconds per tick, and the part of it each stage spent waiting for its neighbours instead of computing.",
            _time,
            panels=2,
        ),
    )


def _skipped(row: dict[str, Any]) -> bool:
    return row.get("outcome") == "skip" or bool(number(row.get("dgg/gated")))


def _reward(axes: Sequence[Axes], record: RunRecord) -> bool:
    ax = axes[0]
    drawn = curve(ax, *points(record.ticks, "reward"), BLUE, "reward", smooth=True)
    styles = (
        ("eval/accuracy", "validation", ORANGE, "o", "-", ORANGE),
        ("eval/accuracy_compressed", "validation, compressed links", GREEN, "D", DASHES[1], CARD),
    )
    for key, label, color, marker, dash, face in styles:
        rows = [row for row in record.evals if number(row.get(key)) is not None]
        if rows:
            xs, ys = points(rows, key)
            # The half-width is measured for the uncompressed score; at the same prompts the other's is about the same,
            # and a second set of bars would only hide the first.
            half = [number(row.get("eval/interval95")) or 0.0 for row in rows] if key == "eval/accuracy" else None
            if len(rows) > MANY:  # single bars and markers would run into one another
                if half:
                    under, over = ([y + sign * h for y, h in zip(ys, half, strict=True)] for sign in (-1, 1))
                    ax.fill_between(xs, under, over, color=color, alpha=0.16, linewidth=0)
                ax.plot(xs, ys, color=color, linestyle=dash, linewidth=1.9, label=label, zorder=4)
            else:
                ax.errorbar(
                    xs, ys, yerr=half, color=color, marker=marker, markersize=6, markerfacecolor=face, linestyle=dash,
                    markeredgewidth=1.5, linewidth=1.6, elinewidth=1.2, capsize=3, label=label, zorder=4,
                )  # fmt: skip
            drawn = True
    if not drawn:
        return False
    mark_refreshes(ax, new_basis_ticks(record), "new basis in use")
    skipped = [row["tick"] for row in record.ticks if _skipped(row)]
    if skipped:
        ax.plot(skipped, [0.02] * len(skipped), "x" if len(skipped) <= MANY else "|", color=PURPLE, markersize=6, markeredgewidth=1.6, clip_on=False,
                transform=ax.get_xaxis_transform(), label="tick skipped", zorder=5)  # fmt: skip
    ax.set_xlabel("tick")
    ax.set_ylabel("reward  ·  share solved")
    return True


def _bytes(axes: Sequence[Axes], record: RunRecord) -> bool:
    summary = ledger_summary(record.ledger)
    if not summary.by_kind:
        return False
    totals, by_tick = axes
    kinds = list(summary.by_kind)
    for place, kind in enumerate(kinds):
        count = summary.by_kind[kind]
        y = len(kinds) - place
        if count.dense and count.message:
            totals.plot([count.message, count.dense], [y, y], color=GRID, linewidth=5, solid_capstyle="butt", zorder=1)
            rightmost = max(count.dense, count.message)
            totals.annotate(share_text(count.message_share), (rightmost, y), xytext=(9, 0), textcoords="offset points",
                            va="center", color=MUTED)  # fmt: skip
        if count.dense:
            totals.plot([count.dense], [y], "o", markerfacecolor=CARD, markeredgecolor=INK, markersize=8,
                        label="dense (bf16)" if place == 0 else None, zorder=3)  # fmt: skip
        if count.message:
            totals.plot(
                [count.message], [y], "o", color=BLUE, markersize=7, label="sent" if place == 0 else None, zorder=4
            )
    totals.set_xscale("log")
    totals.grid(True, axis="x")
    totals.grid(False, axis="y")
    totals.set_yticks(range(len(kinds), 0, -1), kinds)
    totals.set_ylim(0.4, len(kinds) + 0.6)
    totals.margins(x=0.16)
    totals.set_xlabel("bytes over the whole run")
    bytes_axis(totals.xaxis)
    _bytes_by_tick(by_tick, record, kinds)
    return True


def _bytes_by_tick(ax: Axes, record: RunRecord, kinds: Sequence[str]) -> None:
    sums: dict[str, dict[int, int]] = {}
    for row in record.ledger:
        if row.kind in LINK_KINDS:
            dense = sums.setdefault("dense links", {})
            dense[row.tick] = dense.get(row.tick, 0) + row.dense
        ticks = sums.setdefault(row.kind, {})
        ticks[row.tick] = ticks.get(row.tick, 0) + row.message
    span = max((len(ticks) for ticks in sums.values()), default=0)
    for place, kind in enumerate(sorted(sums, key=kind_rank)):
        found = sorted((tick, size) for tick, size in sums[kind].items() if size > 0)
        xs, ys = [float(tick) for tick, _ in found], [float(size) for _, size in found]
        color = INK if kind.startswith("dense") else _kind_color(kind, kinds)
        if kind.startswith("dense"):
            curve(ax, xs, ys, color, kind, DASHES[1])
        elif 2 * len(xs) < span:  # now and then: dots, a line would invent traffic between them
            ax.plot(xs, ys, "os^Dv"[place % 5], color=color, markersize=4.5 if len(xs) <= MANY else 2.5, label=kind)
        else:
            curve(ax, xs, ys, color, kind, DASHES[2] if color in (SKY, MUTED) else "-")
    ax.set_yscale("log")
    ax.set_xlabel("tick")
    ax.set_ylabel("bytes a tick")
    bytes_axis(ax.yaxis)


def _kind_color(kind: str, kinds: Sequence[str]) -> str:
    """A colour of its own for each kind of a run; control, which is never much, is grey."""
    others = [other for other in kinds if other != "control"]
    return MUTED if kind == "control" else SERIES[others.index(kind) % len(SERIES)]


def _dgg(axes: Sequence[Axes], record: RunRecord) -> bool:
    ax = axes[0]
    rows = [row for row in record.ticks if number(row.get("dgg/z")) is not None]
    if not rows:
        return False
    stride = -(-len(rows) // (3 * MAX_POINTS))  # the same for all, so that the share of gated dots stays true
    rows = rows[::stride]
    if stride > 1:
        ax.set_title(f"1 tick in {stride} is drawn")
    gated = [row for row in rows if number(row.get("dgg/gated"))]
    kept = [row for row in rows if not number(row.get("dgg/gated"))]
    later = [row for row in kept if (number(row.get("pass")) or 1) > 1]
    first = [row for row in kept if (number(row.get("pass")) or 1) <= 1]
    xs, zs = points(rows, "dgg/z")
    if stride == 1:
        ax.plot(xs, zs, color=GRID, linewidth=1.5)
    groups: tuple[tuple[list[dict[str, Any]], str, dict[str, Any]], ...] = (
        (first, "first pass, not gated", {"marker": "o", "markerfacecolor": CARD, "color": BLUE, "markersize": 5}),
        (later, "reuse pass, kept", {"marker": "o", "color": BLUE, "markersize": 4.5}),
        (gated, "gated", {"marker": "X", "color": ORANGE, "markersize": 8}),
    )
    for chosen, label, style in groups:
        if chosen:
            ax.plot(*points(chosen, "dgg/z"), linestyle="none", label=label, zorder=3, **style)
    tau = number(record.knob("dgg", "tau", "threshold"))
    if tau is not None:
        ax.axhline(tau, color=ORANGE, linewidth=1.4, linestyle=DASHES[1], label=f"threshold τ = {tau:g}", zorder=2)
    if max(abs(z) for z in zs) > 20:
        from matplotlib.ticker import FuncFormatter

        ax.set_yscale("symlog", linthresh=2)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("tick")
    ax.set_ylabel("z (standard deviations)")
    return True


def _panel(
    ax: Axes, record: RunRecord, title: str, unit: str, series: Sequence[tuple[str, str]], percent: bool = False
) -> bool:
    drawn = False
    for place, (key, label) in enumerate(series):
        drawn |= curve(ax, *points(record.ticks, key), SERIES[place], label, DASHES[place], smooth=len(series) == 1)
    ax.set_title(title)
    ax.set_xlabel("tick")
    ax.set_ylabel(unit)
    if percent:
        percent_axis(ax)
    return drawn


def _policy(axes: Sequence[Axes], record: RunRecord) -> bool:
    clips = [("clip_ratio/region_mean", "any side"), ("clip_ratio/low_mean", "low"), ("clip_ratio/high_mean", "high")]
    length, cut = [("completions/mean_length", "")], [("completions/clipped_ratio", "")]
    drawn = [
        _panel(axes[0], record, "Entropy", "nats a token", [("entropy", "")]),
        _panel(axes[1], record, "Clip fraction", "of tokens", clips, percent=True),
        _panel(axes[2], record, "Completion length", "tokens", length),
        _panel(axes[3], record, "Cut at the length limit", "of completions", cut, percent=True),
    ]
    for ax in axes:
        mark_refreshes(ax, new_basis_ticks(record))
    return any(drawn)


def _signal(axes: Sequence[Axes], record: RunRecord) -> bool:
    mismatch = [("sampling/sampling_logp_difference/mean", "")]
    zero = [("frac_reward_zero_std", "")]
    return any(
        [
            _panel(axes[0], record, "Loss (near 0 is normal)", "loss", [("loss", "")]),
            _panel(axes[1], record, "Gradient norm", "L2 norm before clipping", [("grad_norm", "")]),
            _panel(axes[2], record, "Groups without a reward difference", "of groups", zero, percent=True),
            _panel(axes[3], record, "Trainer against sampler", "|Δ log-prob|, nats a token", mismatch),
        ]
    )


def _time(axes: Sequence[Axes], record: RunRecord) -> bool:
    drawn = _panel(axes[0], record, "Tick", "seconds", [("tick_s", "")])
    stages = sorted({key for row in record.ticks for key in row if key.startswith("wait_s/")}, key=natural)
    for place, key in enumerate(stages):
        shares = [(float(row["tick"]), share) for row in record.ticks if (share := _waiting(row, key)) is not None]
        xs, ys = [x for x, _ in shares], [y for _, y in shares]
        name = key.removeprefix("wait_s/").replace("_", " ")
        dash = DASHES[place // len(SERIES) % len(DASHES)]
        drawn |= curve(axes[1], xs, ys, SERIES[place % len(SERIES)], name, dash)
    axes[1].set_title("Waiting")
    axes[1].set_xlabel("tick")
    axes[1].set_ylabel("of the stage’s time")
    if stages:
        axes[1].set_ylim(0, 1.02)
        percent_axis(axes[1])
    return drawn


def _waiting(row: dict[str, Any], key: str) -> float | None:
    """Waiting share of one stage: of waiting and computing where both are known, else of the tick."""
    wait, busy = number(row.get(key)), number(row.get(key.replace("wait_s/", "busy_s/")))
    spent = number(row.get("tick_s")) if busy is None else (wait or 0.0) + busy
    return wait / spent if wait is not None and spent else None
