"""How the report looks: its style sheet, and the way from a draw function to themed inline SVG. Knows no figure.

Every figure is drawn twice, for a wide and for a narrow column, because shrinking one drawing makes its text
unreadable on a phone. Colours are written as sentinels and replaced by CSS variables, so that one drawing serves
light and dark pages. matplotlib is imported inside the functions that draw: importing this module costs nothing.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchor_node.record import RunRecord, byte_text, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

# Sentinels: any colour that occurs nowhere else. The page gives each CSS variable a light and a dark value; the series
# follow Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies.
INK, MUTED, GRID, CARD = "#010203", "#040506", "#070809", "#0a0b0c"
BLUE, ORANGE, GREEN, PURPLE = "#0d0e0f", "#101112", "#131415", "#161718"
AMBER, SKY, BROWN = "#191a1b", "#1c1d1e", "#1f2021"
VIOLET, OLIVE, ROSE, TEAL = "#222324", "#252627", "#28292a", "#2b2c2d"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", CARD: "--card", BLUE: "--blue", ORANGE: "--orange",
    GREEN: "--green", PURPLE: "--purple", AMBER: "--amber", SKY: "--sky",
    BROWN: "--brown", VIOLET: "--violet", OLIVE: "--olive", ROSE: "--rose", TEAL: "--teal",
}  # fmt: skip
SERIES = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BROWN, VIOLET, OLIVE, ROSE, TEAL)
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

WIDE_PX, NARROW_PX = 1000, 350
#: More points than this are drawn as bucket means with their range: a phone cannot show more, and files stay small.
MAX_POINTS = 400
#: More marks than this run into one another and are drawn as lines, bands or a fringe.
MANY = 40


#: The page around the drawings; the only place that gives the variables above their values.
PAGE_CSS = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #ffffff; --ink: #21252b; --muted: #636b76; --grid: #e2e2de;
  --blue: #0072b2; --orange: #c94f00; --green: #00805c; --purple: #a8518a; --amber: #a87400; --sky: #2f8fc4;
  --brown: #7a5537; --violet: #6553b5; --olive: #6f7a12; --rose: #c0304f; --teal: #00696b; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --card: #1d2024; --ink: #e6e6e3; --muted: #9aa1ab; --grid: #363b42;
    --blue: #62b0ea; --orange: #ff8a4c; --green: #3fc79c; --purple: #de94c2; --amber: #edb72e; --sky: #9ad4f7;
    --brown: #c9a283; --violet: #a99cf5; --olive: #c3cc5c; --rose: #ff7c93; --teal: #5fd3d0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", sans-serif; }
main { max-width: 1064px; margin: 0 auto; padding: 48px 32px 80px; }
h1, h2, .lead, dd b { font-family: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, serif; }
h1 { font-size: 34px; line-height: 1.2; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 22px; line-height: 1.3; font-weight: 600; margin: 56px 0 12px; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { font-size: 20px; line-height: 1.5; margin: 20px 0 28px; max-width: 62ch; }
.quiet, figcaption, caption { color: var(--muted); font-size: 14px; line-height: 1.5; }
.state { display: inline-block; border: 1px solid var(--grid); border-radius: 99px; padding: 1px 12px; font-size: 14px; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(216px, 1fr)); gap: 1px; margin: 0;
  background: var(--grid); border: 1px solid var(--grid); border-radius: 10px; overflow: hidden; }
dl.tiles div { background: var(--card); padding: 16px 20px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 2px 0 0; font-size: 14px; line-height: 1.45; overflow-wrap: anywhere; }
dd b { display: block; font-size: 22px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 20px 24px 14px; }
figure + p { margin-top: 12px; }
figcaption { max-width: 84ch; margin-top: 10px; }
svg.plot { display: block; width: 100%; height: auto; }
svg.plot * { stroke-linejoin: round; }
svg.narrow { display: none; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.45; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 16px; border-bottom: 1px solid var(--grid); vertical-align: baseline; }
th { font-weight: 600; white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
#ledger td { white-space: nowrap; }
#ledger th, #ledger td { padding: 7px 11px; }
tr.sum > * { font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
details { margin: 0 0 10px; }
summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
aside { border-left: 3px solid var(--amber); padding: 2px 0 2px 16px; margin: 20px 0; font-size: 14px; }
aside p { margin: 4px 0; }
@media (max-width: 700px) {
  main { padding: 28px 14px 56px; } h1 { font-size: 27px; } h2 { margin-top: 44px; font-size: 20px; }
  .lead { font-size: 18px; } dl.tiles { grid-template-columns: 1fr; }
  figure { padding: 14px 10px 12px; } figcaption { padding: 0 4px; }
  svg.wide { display: none; } svg.narrow { display: block; }
  th, td { padding: 6px 10px; }
  /* Two lines or three a row: which flow, then its numbers; side by side they would lie outside the screen. */
  :is(#ledger, #bases, #refresh-clips, #corrections-made, #correction-bytes) tr { display: grid;
    grid-template-columns: repeat(60, 1fr); padding: 4px 8px; border-bottom: 1px solid var(--grid); }
  :is(#ledger, #bases, #refresh-clips, #corrections-made, #correction-bytes) tr > * { border: 0; padding: 2px;
    font-size: 13px; white-space: normal; }
  #ledger tr > :nth-child(1) { grid-column: span 24; } #ledger tr > :nth-child(2) { grid-column: span 11; }
  #ledger tr > :nth-child(3) { grid-column: span 25; } #ledger tr > :nth-child(n+4) { grid-column: span 12; }
  #ledger tr:has(:nth-child(9)) > :nth-child(n+4) { grid-column: span 10; font-size: 11.5px;
    padding: 2px 0; }
  #ledger tr.sum > :nth-child(n+4) { font-size: 11.5px; padding: 2px 0; }
  #bases tr > * { grid-column: span 30; } #bases tr > :nth-child(n+5) { grid-column: span 20; }
  :is(#refresh-clips, #correction-bytes) tr > * { grid-column: span 20; font-size: 12px; }
  #correction-bytes tr > :first-child { grid-column: span 60; font-size: 13px; }
  #refresh-clips tr > :first-child { grid-column: 1 / 46; font-size: 13px; }
  #refresh-clips tr > :nth-child(5) { grid-area: 1 / 46 / 2 / 61; }
  #corrections-made tr > * { grid-column: span 12; font-size: 11.5px; }
  #corrections-made tr > :nth-child(4n) { grid-column: span 19; } #corrections-made tr > :nth-child(7) { grid-column: span 17; }
  #corrections-made tr > :nth-child(2) { grid-column: span 15; } #corrections-made tr > :nth-child(3) { grid-column: span 14; } }
@media print { body { background: none; } main { max-width: none; padding: 0; } figure, .scroll { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Drawing:
    """One figure: `wide` and `narrow` are `<svg>` texts; an empty text means there was nothing to draw, and `caption`
    says why."""

    key: str
    title: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Plan:
    key: str
    title: str
    caption: str
    draw: Callable[[Sequence[Axes], RunRecord], bool]
    panels: int = 1
    height_px: int = 300


def draw(plan: Plan, record: RunRecord) -> Drawing:
    try:
        wide, narrow = (_render(plan, record, narrow) for narrow in (False, True))
    except ImportError as error:
        missing = f"Not drawn: {error}. Install matplotlib and run the report again; the numbers below do not need it."
        return Drawing(plan.key, plan.title, missing, "", "")
    except Exception as error:  # a strange run must still get its numbers
        log.warning("figure %s could not be drawn", plan.key, exc_info=True)
        return Drawing(plan.key, plan.title, f"Could not be drawn: {type(error).__name__}: {error}", "", "")
    if not wide:
        return Drawing(plan.key, plan.title, "Nothing recorded for this figure yet.", "", "")
    return Drawing(plan.key, plan.title, plan.caption, wide, narrow)


def _render(plan: Plan, record: RunRecord, narrow: bool) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = 1 if narrow else min(3 if plan.panels == 3 else 2, plan.panels)
    lines = -(-plan.panels // columns)
    panel_px = (300 if plan.panels == 1 else 240) if narrow else plan.height_px
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": plan.key, "text.parse_math": False, "font.size": 11 if narrow else 12,
        "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID,
        "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": GRID, "axes.grid": True, "grid.linewidth": 1,
        "axes.grid.axis": "y", "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "xtick.minor.size": 0,
        "axes.axisbelow": True, "lines.solid_capstyle": "round", "axes.unicode_minus": True, "axes.xmargin": 0.02,
        "axes.titlesize": 11 if narrow else 12, "axes.titlelocation": "left", "axes.titlecolor": INK,
        "figure.constrained_layout.h_pad": 0.1, "figure.constrained_layout.w_pad": 0.1, "legend.frameon": False, "legend.fontsize": 10.5 if narrow else 11.5, "legend.labelcolor": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        size = ((NARROW_PX if narrow else WIDE_PX) / 72, panel_px * lines / 72)  # SVG user units are 1/72 inch
        figure = Figure(figsize=size, dpi=72)
        FigureCanvasSVG(figure)  # text is measured as it will be drawn
        axes = [figure.add_subplot(lines, columns, place + 1) for place in range(plan.panels)]
        if not plan.draw(axes, record):
            return ""
        for ax in axes:
            _finish(ax, narrow, columns)
        # A figure that carried its layout would be drawn twice by savefig.
        ConstrainedLayoutEngine().execute(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    kind = "narrow" if narrow else "wide"
    return _themed(out.getvalue(), f"{plan.key}-{kind}", f"{plan.title}. {plan.caption}", kind)


def _finish(ax: Axes, narrow: bool, columns: int) -> None:
    """Legend above the drawing (it never hides data), integer ticks, or a plain word where a panel has no data."""
    from matplotlib.ticker import MaxNLocator

    if not ax.has_data():
        ax.set_axis_off()
        ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        return
    if ax.get_xlabel() == "tick":
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5 if narrow else 8, integer=True))
        low, high = ax.get_xlim()
        if high - low < 1:  # a single tick
            ax.set_xlim(low - 1, high + 1)
    low, high = ax.get_ylim()
    if ax.get_yscale() == "linear" and low < 0 <= ax.dataLim.y0 and ax.dataLim.y1 > float("-inf"):
        ax.set_ylim(-0.02 * high, high)  # no ticks below 0 for what cannot be negative; a line at 0 still shows
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        room = 46 if narrow else 130 // columns  # letters
        fits = sum(len(label) + 7 for label in labels) <= room
        across = len(labels) if fits else max(1, room // (max(len(label) for label in labels) + 6))
        ax.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0, 1, 0), borderaxespad=0.3, handlelength=1.6,
            ncols=across, columnspacing=1.4, borderpad=0,
        )  # fmt: skip
        if ax.get_title(loc="left"):
            ax.set_title(ax.get_title(loc="left"), pad=6 + 17 * -(-len(labels) // across))


def _themed(svg: str, prefix: str, description: str, kind: str) -> str:
    """matplotlib's SVG made fit for a page: no document header or outside names, ids of its own (two drawings of a page
    must not share clip paths), CSS variables for colours and the page's font for text."""
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    body = body[body.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r"font: (?:(?:\d+|bold|normal) )?([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]+;?\s*", "", body)
    for sentinel, variable in VARIABLES.items():
        body = body.replace(sentinel, f"var({variable})")
    body = re.sub(r"\s*\n\s*", " ", body)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    box = view.group(1) if view else f"0 0 {WIDE_PX} 300"
    return f'<svg class="plot {kind}" viewBox="{box}" role="img" aria-label="{label}">{body}'


def points(rows: Iterable[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Ticks and values where `key` holds a finite number."""
    found = [(float(row["tick"]), value) for row in rows if (value := number(row.get(key))) is not None]
    return [x for x, _ in found], [y for _, y in found]


def natural(key: str) -> list[tuple[int, str]]:
    """Sort key by which boundary_10 comes after boundary_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the run (at least 5 points): a trailing one would show every change late."""
    half = max(2, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def curve(
    ax: Axes, xs: Sequence[float], ys: Sequence[float], color: str, label: str, dash: Any = "-", smooth: bool = False
) -> bool:
    """One series. Long ones become bucket means with their range; `smooth` adds the running mean to short ones."""
    if not xs:
        return False
    if len(xs) > MAX_POINTS:
        size = -(-len(xs) // MAX_POINTS)
        parts = [slice(start, start + size) for start in range(0, len(xs), size)]
        ax.fill_between(
            [_mean(xs[p]) for p in parts], [min(ys[p]) for p in parts], [max(ys[p]) for p in parts],
            color=color, alpha=0.16, linewidth=0,
        )  # fmt: skip
        xs, ys = [_mean(xs[p]) for p in parts], [_mean(ys[p]) for p in parts]
    if smooth and len(xs) >= 12:
        ax.plot(xs, ys, color=color, linewidth=1, alpha=0.4)
        ys = _running_mean(ys)
    marker = "o" if len(xs) == 1 else None
    ax.plot(xs, ys, color=color, linewidth=1.9, linestyle=dash, label=label, marker=marker, markersize=5)
    return True


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mark_refreshes(
    ax: Axes, ticks: Sequence[int], label: str | None = None, color: str = MUTED, dash: Any = (0, (1, 2))
) -> None:
    """Thin lines where a new basis came into use. Many of them become a fringe at the top: full lines would be a grey
    wall. Nothing in a panel without data, which must still look empty."""
    if not ax.has_data():
        return
    low = 0.0 if len(ticks) <= MANY else 0.96
    for place, tick in enumerate(ticks):
        ax.axvline(tick, low, 1, color=color, linewidth=1, alpha=0.7, linestyle=dash, zorder=1,
                   label=label if place == 0 else None)  # fmt: skip


def percent_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def bytes_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, numticks=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+ ", " ", byte_text(value))))
    axis.set_minor_formatter(NullFormatter())
