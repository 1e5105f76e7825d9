"""The report's words and tables as escaped HTML: evaluations, skips, bytes, bases, vitals, knobs, events. No figure, no
file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from anchor_node.drawing import natural
from anchor_node.link_plots import DIRECTIONS, by_place, first_version, versions
from anchor_node.record import (
    UPKEEP,
    ByteCount,
    LedgerSummary,
    RunRecord,
    byte_text,
    mapping,
    number,
    share_text,
    whole,
)

#: Events are listed to this number, newest kept: a page of ten thousand lines helps nobody.
MAX_EVENTS = 300

# key, name, unit or percent, what a healthy run shows. The order is the order in which to look.
VITALS = (
    ("reward", "Reward", "", "rises"),
    ("frac_reward_zero_std", "Groups without a reward difference", "%", "well below 100 %; at 100 % nothing is learnt"),
    ("entropy", "Entropy", "nats", "falls slowly; a sudden rise or a fall to 0 is a collapse"),
    ("completions/mean_length", "Completion length", "tokens", "steady; it runs away before the reward falls"),
    ("completions/clipped_ratio", "Cut at the length limit", "%", "low; cut answers cannot be right"),
    ("clip_ratio/region_mean", "Clip fraction", "%", "a few percent"),
    ("grad_norm", "Gradient norm", "", "above 0 and steady, even where the loss is 0"),
    ("sampling/sampling_logp_difference/mean", "Trainer against sampler", "nats", "small and steady"),
    ("loss", "Loss", "", "near 0: says nothing about progress"),
)


def escaped(value: object) -> str:
    """Escaped, with unbreakable spaces between a number and its unit."""
    return re.sub(
        r"(?<=\d) (?=(?:%|[kMGT]?B|ms|min|h|s)(?:\W|$))|(?<=[%\d]) (?=±)|(?<=±) (?=\d)",
        "\u00a0",
        html.escape(str(value)),
    )


def duration(seconds: float) -> str:
    whole_s = round(seconds)
    hours, minutes = whole_s // 3600, whole_s // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_s % 60:02d} s" if minutes else f"{seconds:.1f} s"


def counted(things: int, name: str) -> str:
    return f"{things:,} {name}{'' if things == 1 else 's'}"


def percent(row: dict[str, Any], key: str = "eval/accuracy") -> str:
    value, half = number(row.get(key)), number(row.get("eval/interval95"))
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + (f" ± {100 * half:.1f}" if half is not None and key == "eval/accuracy" else "")


def html_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numbers_from: int, name: str) -> str:
    """A table whose columns from `numbers_from` on are right-aligned; each row is (css class, cells), escaped here."""

    def cell(tag: str, place: int, value: str) -> str:
        side = ' class="n"' if place >= numbers_from else ""
        return f"<{tag}{side}>{escaped(value)}</{tag}>"

    top = "".join(cell("th", place, value) for place, value in enumerate(head))
    body = "".join(
        f'<tr class="{css}">' + "".join(cell("td", place, value) for place, value in enumerate(cells)) + "</tr>"
        for css, cells in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, body: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{escaped(title)}</summary>{body}</details>"


def _form(row: dict[str, Any], key: str, form: str) -> str:
    value = number(row.get(key))
    return "–" if value is None else format(value, form)


def eval_table(record: RunRecord) -> str:
    rows = [
        ("", (str(row["tick"]), percent(row), percent(row, "eval/accuracy_compressed"),
              _form(row, "eval/mean_length", ".1f"), _form(row, "eval/prompts", ",.0f")))
        for row in record.evals
    ]  # fmt: skip
    if not rows:
        return ""
    head = ("tick", "validation, 95 % interval", "through compressed links", "mean length, tokens", "prompts")
    return folded(counted(len(rows), "evaluation"), html_table(head, rows, 0, "evaluations"), False)


def skip_table(record: RunRecord) -> str:
    """Which ticks were skipped and why: where NaN or Inf was caught, or how far above its threshold the gate was."""
    skips = [row for row in record.ticks if row.get("outcome") == "skip"]
    tau = number(record.knob("dgg", "tau", "threshold"))

    def why(row: dict[str, Any]) -> str:
        z = number(row.get("dgg/z"))
        if row.get("fault") or row.get("skip_reason") != "gate" or z is None:
            return str(row.get("fault") or "")
        return f"z = {z:.2f}" + ("" if tau is None else f", above τ = {tau:g}")

    rows = [("", (str(row["tick"]), str(row.get("skip_reason") or "unknown"), why(row))) for row in skips[-MAX_EVENTS:]]
    if not rows:
        return ""
    left = len(skips) - len(rows)
    title = counted(len(rows), "skipped tick") + (f", the newest of {len(skips)}" if left else "")
    table = html_table(("tick", "reason", "what happened"), rows, 3, "skips")
    return folded(title, table, any(row.get("fault") for row in skips))


def basis_table(record: RunRecord) -> str:
    """Each boundary and direction in numbers: means over the first and last tenth of the run, and the versions made."""
    part = max(1, len(record.ticks) // 10)
    made = versions(record)
    changes = [first_version(record), *made]

    def ends(name: str, direction: str, what: str) -> str:
        key = f"basis/{what}_{direction}/{name.replace(' ', '_')}"
        early, late = (
            [value for row in rows if (value := number(row.get(key))) is not None]
            for rows in (record.ticks[:part], record.ticks[-part:])
        )
        if not early or not late:
            return "–"
        return f"{100 * sum(early) / len(early):.1f} % → {100 * sum(late) / len(late):.1f} %"

    def of_versions(name: str, direction: str, what: str) -> list[float]:
        key = f"basis/{what}_{direction}/{name.replace(' ', '_')}"
        return [value for row in changes if (value := number(row.get(key))) is not None]

    def changed(values: list[float]) -> str:
        if not any(values):
            return "–"
        return f"{values[0]:.3g}" + ("" if values[0] == values[-1] else f" → {values[-1]:.3g}")

    rows = []
    for direction in DIRECTIONS:
        for name, _, _ in by_place(record.ticks, f"basis/share_{direction}/"):
            kinds = ("rank", "step", "overlap", "condition")
            rank, step, overlap, condition = (of_versions(name, direction, what) for what in kinds)
            lowest, highest = f"{min(overlap, default=0):.3f}", f"{max(condition, default=0):.3g}"
            rows.append((name, direction, ends(name, direction, "share"), ends(name, direction, "error"),
                         changed(rank), changed(step), lowest if overlap else "–",
                         highest if condition else "–"))  # fmt: skip
    if not rows:
        return ""
    head = ("boundary", "direction", "captured share", "relative error", "rank", "step", "lowest overlap",
            "highest condition")  # fmt: skip
    told = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]
    cells = [("", [row[place] for place in told]) for row in rows]
    title = f"First → last tenth of the run, {counted(len(made) + 1, 'version')}"
    return folded(title, html_table([head[place] for place in told], cells, 2, "bases"), len(rows) <= 12)


def probe_table(record: RunRecord) -> str:
    """Every probe of the fidelity in numbers, newest last."""
    probes = [row for row in record.ticks if any(key.startswith("fidelity/") for key in row)]
    stages = sorted({key for row in probes for key in row if key.startswith("fidelity/grad_cosine/")}, key=natural)
    rows = []
    for row in probes[-MAX_EVENTS:]:
        policy = [_form(row, f"fidelity/{key}", ".2g") for key in ("kl", "kl_max", "logp_diff_max")]
        if number(row.get("fidelity/poisoned")):
            policy[0] = "met NaN"
        rows.append(("", (str(row["tick"]), *policy, *(_form(row, key, ".3f") for key in stages))))
    if not rows:
        return ""
    left = len(probes) - len(rows)
    title = counted(len(rows), "probe") + (f", the newest of {len(probes)}" if left else "")
    cosines = [f"cosine, {key.rsplit('/', 1)[-1].replace('_', ' ')}" for key in stages]
    head = ("tick", "KL, nats", "largest", "log-prob difference", *cosines)
    return folded(title, html_table(head, rows, 1, "probes"), False)


def byte_table(summary: LedgerSummary) -> str:
    if not summary.by_flow:
        return ""
    measured = any(count.wire is not None for count in summary.by_flow.values())

    def cells(count: ByteCount) -> tuple[str, ...]:
        wire = (byte_text(count.wire) if count.wire is not None else "–",) if measured else ()
        dense = byte_text(count.dense) if count.dense else "–"
        sizes = (dense, byte_text(count.packet), byte_text(count.message), *wire)
        return (*sizes, share_text(count.message_share), f"{count.frames:,}")

    rows = [("", (*flow, *cells(count))) for flow, count in summary.by_flow.items()]
    rows.append(("sum", ("all links", "", "activation + gradient", *cells(summary.link))))
    if summary.full_text:
        upkeep = " + ".join(kind for kind in UPKEEP if kind in summary.by_kind)
        rows.append(("sum", ("with upkeep", "", f"+ {upkeep}", *cells(summary.full))))
    rows.append(("sum", ("everything", "", "", *cells(summary.total))))
    sizes = ("dense", "packet", "message", *(("wire",) if measured else ()), "of dense", "frames")
    table = html_table(("link", "direction", "kind", *sizes), rows, 3, "ledger")
    return folded("Every link, direction and kind", table, True)


def vital_table(record: RunRecord) -> str:
    """The note on the loss, and the numbers to look at in its place: means over the first and last tenth of the run."""
    part = max(1, len(record.ticks) // 10)

    def level(rows: Sequence[dict[str, Any]], key: str, unit: str) -> str:
        values = [value for row in rows if (value := number(row.get(key))) is not None]
        if not values:
            return "–"
        mean = sum(values) / len(values)
        return f"{100 * mean:.1f} %" if unit == "%" else f"{mean:.3g} {unit}".strip()

    rows = [
        ("", (name, level(record.ticks[:part], key, unit), level(record.ticks[-part:], key, unit), hint))
        for key, name, unit, hint in VITALS
    ]
    note = (
        "<h2>What to look at instead of the loss</h2><p>A GRPO loss near 0 is normal and does not mean that nothing is "
        "learnt. Advantages are centred within each group, so while the importance ratios are still close to 1 the terms "
        "cancel in the sum, and their gradients do not. Look at these, in this order; each is the mean "
        f"over the first and the last {counted(part, 'tick')}.</p>"
    )
    return note + html_table(("", "start", "end", "a healthy run"), rows, 4, "vitals") if record.ticks else note


def knob_table(record: RunRecord) -> str:
    config = mapping(record.manifest.get("config"))
    if not config:
        return ""
    known = _knob_texts()
    rows: list[tuple[str, Sequence[str]]] = []
    for section, knobs in config.items():
        items = knobs.items() if isinstance(knobs, dict) else [("", knobs)]
        for name, value in items:
            unit, meaning = known.get((section, name), ("", ""))
            rows.append(("", (f"{section}.{name}".rstrip("."), _knob_value(value), unit, meaning)))
    table = html_table(("knob", "value", "unit", "meaning"), rows, 4, "knobs")
    return f"<section><h2>Knobs of the run</h2>{table}</section>"


def _knob_value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _knob_texts() -> dict[tuple[str, str], tuple[str, str]]:
    """(unit, meaning) of each knob, as the run manifest documents them; a manifest of another version may know others."""
    from swarm_core.config import RunConfig

    texts = {}
    for section, table in RunConfig.model_fields.items():
        for name, about in getattr(table.annotation, "model_fields", {}).items():
            extra = about.json_schema_extra if isinstance(about.json_schema_extra, dict) else {}
            texts[section, name] = (str(extra.get("unit", "")), str(about.description or ""))
    return texts


def event_table(record: RunRecord) -> str:
    if not record.events:
        return ""
    rows = []
    for event in record.events[-MAX_EVENTS:]:
        time_s, tick = number(event.get("time_s")), whole(event.get("tick"))
        when = "–" if time_s is None else duration(time_s)
        where = "–" if tick is None else str(tick)
        rows.append(("", (when, where, str(event.get("event") or "event"), str(event.get("message") or ""))))
    left = len(record.events) - len(rows)
    title = counted(len(rows), "event") + (f", the newest of {len(record.events)}" if left else "")
    table = html_table(("time", "tick", "event", "message"), rows, 4, "events")
    return f"<section><h2>Events</h2>{folded(title, table, len(rows) <= 12)}</section>"
