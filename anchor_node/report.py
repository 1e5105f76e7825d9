"""One self-contained page about a run, from its folder. Composes text, tables and figures; draws and sums nothing itself.

    python -m anchor_node.report RUN_DIR

The page has no script, no outside reference and its figures inside, so that it can be mailed and read offline. A run
that is still going gives the same page about what there is so far.
"""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from anchor_node.drawing import PAGE_CSS
from anchor_node.plots import draw_all
from anchor_node.record import (
    ByteCount,
    LedgerSummary,
    RunRecord,
    byte_text,
    ledger_summary,
    mapping,
    number,
    print_ledger,
    read_run,
    share_text,
    whole,
)

__all__ = ["ByteCount", "LedgerSummary", "ledger_summary", "main", "print_ledger", "write_report"]

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


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the run folder and returns its path; an older one is replaced in one step, so that a
    reader never sees half a page. FileNotFoundError when the folder does not exist; anything less is reported in it."""
    record = read_run(run_dir)
    page = _page(record, ledger_summary(record.ledger))
    target = record.folder / "report.html"
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, target)
    return target


def _page(record: RunRecord, summary: LedgerSummary) -> str:
    name = str(record.knob("run", "name") or record.folder.resolve().name)
    drawings = draw_all(record)
    figures = "".join(
        f'<section id="{d.key}"><h2>{_text(d.title)}</h2>'
        + (f"<figure>{d.wide}{d.narrow}<figcaption>{_text(d.caption)}</figcaption></figure>" if d.wide else "")
        + ("" if d.wide else f'<p class="quiet">{_text(d.caption)}</p>')
        + (_eval_table(record) if d.key == "reward" else "")
        + (_byte_table(summary) if d.key == "bytes" else "")
        + (_vitals(record) if d.key == "signal" else "")
        + "</section>"
        for d in drawings
    )
    digest = str(record.manifest.get("digest") or "")
    stamp = f" · manifest <code>{_text(digest[:12])}</code>" if digest else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_text(name)} · Kedge run</title><style>{PAGE_CSS}</style></head><body><main>"
        f'<header><p class="quiet">Kedge run{stamp}</p><h1>{_text(name)}</h1>'
        f'<p><span class="state" id="state">{_text(_state(record))}</span></p>'
        f'<p class="lead">{_lead(record, summary)}</p></header>{_tiles(record, summary)}{_problems(record)}'
        f"{figures}{_knobs(record)}{_events(record)}"
        '<p class="quiet" style="margin-top:56px">Sizes are decimal: 1 MB is 1,000,000 bytes. Dense is what bf16 would '
        "have cost for the same rows. Packet is the encoded tensor with its header, message adds the wire contract’s "
        "fields, wire is what was measured on the socket. Down is towards the last stage.</p></main></body></html>\n"
    )


def _text(value: object) -> str:
    """Escaped, with unbreakable spaces between a number and its unit."""
    return re.sub(
        r"(?<=\d) (?=(?:%|[kMGT]?B|ms|min|h|s)(?:\W|$))|(?<=%) (?=±)|(?<=±) (?=\d)", "\u00a0", html.escape(str(value))
    )


def _duration(seconds: float) -> str:
    whole_s = round(seconds)
    hours, minutes = whole_s // 3600, whole_s // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_s % 60:02d} s" if minutes else f"{seconds:.1f} s"


def _count(things: int, name: str) -> str:
    return f"{things:,} {name}{'' if things == 1 else 's'}"


def _scored(record: RunRecord) -> list[dict[str, Any]]:
    return [row for row in record.evals if number(row.get("eval/accuracy")) is not None]


def _percent(row: dict[str, Any], key: str = "eval/accuracy") -> str:
    value, half = number(row.get(key)), number(row.get("eval/interval95"))
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" + (f" ± {100 * half:.1f}" if half is not None and key == "eval/accuracy" else "")


def _state(record: RunRecord) -> str:
    done, target = len(record.ticks), whole(record.knob("run", "ticks"))
    count = f"{done:,} of {_count(target, 'tick')}" if target else _count(done, "tick")
    if target and record.ticks and record.ticks[-1]["tick"] + 1 >= target:
        return f"finished, {count}"
    ends = [event for event in record.events if event.get("event") in ("start", "stop")]
    if ends and ends[-1]["event"] == "stop":  # a stop before a later start was resumed
        why = str(ends[-1].get("message") or "").strip()
        return f"stopped after {count}" + (f": {why}" if why else "")
    return f"unfinished: {count} so far"


def _lead(record: RunRecord, summary: LedgerSummary) -> str:
    parts = []
    scored = _scored(record)
    if len(scored) > 1:
        first, last = scored[0], scored[-1]
        gap = abs(last["eval/accuracy"] - first["eval/accuracy"])
        reach = sum(number(row.get("eval/interval95")) or 0.0 for row in (first, last))
        parts.append(
            f"Validation went from {_percent(first)} to {_percent(last)} in {_count(len(record.ticks), 'tick')}"
        )
        if reach:
            parts[-1] += "; the two 95 % intervals " + ("do not overlap" if gap > reach else "overlap")
        parts[-1] += "."
    elif record.ticks:
        parts.append(f"{_count(len(record.ticks), 'tick')} so far, too few evaluations to tell progress.")
    else:
        parts.append("No tick has been recorded yet.")
    if summary.link.dense:
        share = share_text(summary.link.message_share)
        parts.append(f"The links between the stages carried {share} of the bytes that dense bf16 would have taken.")
    return _text(" ".join(parts))


def _tiles(record: RunRecord, summary: LedgerSummary) -> str:
    scored, skips = _scored(record), [row for row in record.ticks if row.get("outcome") == "skip"]
    reasons = [str(row.get("skip_reason") or "unknown") for row in skips]
    why = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    batches = len({row["batch"] for row in record.ticks if number(row.get("batch")) is not None})
    stages = len(record.manifest.get("spans") or ()) or whole(record.knob("swarm", "stages")) or 0
    model = str(record.knob("model", "path", "name") or "unknown").rstrip("/")
    speeds = [speed for row in record.ticks if (speed := number(row.get("tokens_per_s"))) is not None]
    scores = f"{_percent(scored[0])} → {_percent(scored[-1])}" if scored else "none yet"
    squeezed = (
        "through compressed links at the end: " + _percent(scored[-1], "eval/accuracy_compressed") if scored else ""
    )
    link, total = summary.link, summary.total
    measured = f", {byte_text(total.wire)} on the wire" if total.wire is not None else ""
    cells = (
        ("model", "Model", model.rsplit("/", 1)[-1], _shape_text(record)),
        ("stages", "Pipeline", _count(stages, "stage") if stages else "unknown", _layers_text(record)),
        ("links", "Links", _count(stages - 1, "link") if stages else "unknown", _codec_text(record)),
        ("ticks", "Ticks", f"{len(record.ticks) - len(skips):,} committed",
         f"{len(skips)} skipped" + (f" ({why})" if why else "") + f" · {batches:,} rollout batch{'' if batches == 1 else 'es'}"),
        ("validation", "Validation, start → end", scores, squeezed),
        ("share", "Links, share of dense", share_text(link.message_share),
         f"as messages; {share_text(link.packet_share)} as packets · {byte_text(link.message)} for {byte_text(link.dense)}"),
        ("bytes", "All bytes sent", byte_text(total.message), _count(total.frames, "frame") + measured),
        ("wall", "Wall time", _duration(record.wall_s),
         f"median {median(speeds):,.0f} tokens/s" if speeds else "speed not recorded"),
    )  # fmt: skip
    body = "".join(
        f'<div><dt>{_text(label)}</dt><dd id="{key}-tile"><b>{_text(value)}</b>{_text(note)}</dd></div>'
        for key, label, value, note in cells
    )
    return f'<dl class="tiles">{body}</dl>'


def _shape_text(record: RunRecord) -> str:
    shape = mapping(record.manifest.get("shape"))
    names = (("family", "{}"), ("layers", "{} layers"), ("hidden", "width {}"), ("vocab", "vocabulary {:,}"))
    return " · ".join(form.format(shape[name]) for name, form in names if isinstance(shape.get(name), (int, str)))


def _layers_text(record: RunRecord) -> str:
    spans = [span for span in record.manifest.get("spans") or () if isinstance(span, dict)]
    ends = [(whole(span.get("first_layer")), whole(span.get("last_layer"))) for span in spans]
    parts = [f"{first}–{last - 1}" for first, last in ends if first is not None and last is not None]
    return "layers " + " · ".join(parts) if parts else "split not recorded"


def _codec_text(record: RunRecord) -> str:
    kind, ranks = record.knob("links", "kind"), mapping(record.manifest.get("ranks"))
    if kind == "none":
        return "dense bf16"
    if kind == "identity":
        return "lossless, uncompressed"
    forward, backward = (whole(ranks.get(direction)) for direction in ("forward", "backward"))
    if forward is None or backward is None:
        return str(kind or "codec not recorded")
    width = whole(mapping(record.manifest.get("shape")).get("hidden"))
    return f"rank {forward} forward, {backward} backward" + (f", of {width}" if width else "")


def _problems(record: RunRecord) -> str:
    return f"<aside>{''.join(f'<p>{_text(line)}</p>' for line in record.problems)}</aside>" if record.problems else ""


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numbers_from: int, name: str) -> str:
    """A table whose columns from `numbers_from` on are right-aligned; each row is (css class, cells), escaped here."""

    def cell(tag: str, place: int, value: str) -> str:
        side = ' class="n"' if place >= numbers_from else ""
        return f"<{tag}{side}>{_text(value)}</{tag}>"

    top = "".join(cell("th", place, value) for place, value in enumerate(head))
    body = "".join(
        f'<tr class="{css}">' + "".join(cell("td", place, value) for place, value in enumerate(cells)) + "</tr>"
        for css, cells in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _folded(title: str, body: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{_text(title)}</summary>{body}</details>"


def _eval_table(record: RunRecord) -> str:
    def plain(row: dict[str, Any], key: str, form: str) -> str:
        value = number(row.get(key))
        return "–" if value is None else format(value, form)

    rows = [
        ("", (str(row["tick"]), _percent(row), _percent(row, "eval/accuracy_compressed"),
              plain(row, "eval/mean_length", ".1f"), plain(row, "eval/prompts", ",.0f")))
        for row in record.evals
    ]  # fmt: skip
    if not rows:
        return ""
    head = ("tick", "validation, 95 % interval", "through compressed links", "mean length, tokens", "prompts")
    return _folded(_count(len(rows), "evaluation"), _table(head, rows, 0, "evaluations"), False)


def _byte_table(summary: LedgerSummary) -> str:
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
    rows.append(("sum", ("everything", "", "", *cells(summary.total))))
    sizes = ("dense", "packet", "message", *(("wire",) if measured else ()), "message / dense", "frames")
    table = _table(("link", "direction", "kind", *sizes), rows, 3, "ledger")
    return _folded("Every link, direction and kind", table, True)


def _vitals(record: RunRecord) -> str:
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
        f"over the first and the last {_count(part, 'tick')}.</p>"
    )
    return note + _table(("", "start", "end", "a healthy run"), rows, 4, "vitals") if record.ticks else note


def _knobs(record: RunRecord) -> str:
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
    table = _table(("knob", "value", "unit", "meaning"), rows, 4, "knobs")
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


def _events(record: RunRecord) -> str:
    if not record.events:
        return ""
    rows = []
    for event in record.events[-MAX_EVENTS:]:
        time_s, tick = number(event.get("time_s")), whole(event.get("tick"))
        when = "–" if time_s is None else _duration(time_s)
        where = "–" if tick is None else str(tick)
        rows.append(("", (when, where, str(event.get("event") or "event"), str(event.get("message") or ""))))
    left = len(record.events) - len(rows)
    title = _count(len(rows), "event") + (f", the newest of {len(record.events)}" if left else "")
    table = _table(("time", "tick", "event", "message"), rows, 4, "events")
    return f"<section><h2>Events</h2>{_folded(title, table, len(rows) <= 12)}</section>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: writes the report of one run folder, prints its path and the byte table."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m anchor_node.report RUN_DIR\n\nWrites RUN_DIR/report.html.", file=sys.stderr)
        return 0 if given in (["-h"], ["--help"]) else 2
    try:
        target = write_report(given[0])
    except OSError as error:
        print(f"no report written: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
