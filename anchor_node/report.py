"""One self-contained page about a run, from its folder. Composes text, tables and figures; draws and sums nothing itself.

    python -m anchor_node.report RUN_DIR

The page has no script, no outside reference and its figures inside, so that it can be mailed and read offline. A run
that is still going gives the same page about what there is so far.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from anchor_node.correction_tables import correction_section, refresh_section
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
from anchor_node.tables import (
    basis_table,
    byte_table,
    counted,
    duration,
    escaped,
    eval_table,
    event_table,
    knob_table,
    percent,
    probe_table,
    skip_table,
    vital_table,
)

__all__ = ["ByteCount", "LedgerSummary", "ledger_summary", "main", "print_ledger", "write_report"]


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
    below = {
        "reward": (eval_table(record), skip_table(record)),
        "bytes": (byte_table(summary),),
        "basis": (basis_table(record),),
        "fidelity": (probe_table(record),),
        "refreshes": (refresh_section(record),),
        "corrections": (correction_section(record, summary),),
        "signal": (vital_table(record),),
    }
    figures = "".join(
        f'<section id="{d.key}"><h2>{escaped(d.title)}</h2>'
        + (f"<figure>{d.wide}{d.narrow}<figcaption>{escaped(d.caption)}</figcaption></figure>" if d.wide else "")
        + ("" if d.wide else f'<p class="quiet">{escaped(d.caption)}</p>')
        + "".join(below.get(d.key, ()))
        + "</section>"
        for d in drawings
    )
    digest = str(record.manifest.get("digest") or "")
    stamp = f" · manifest <code>{escaped(digest[:12])}</code>" if digest else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escaped(name)} · Kedge run</title><style>{PAGE_CSS}</style></head><body><main>"
        f'<header><p class="quiet">Kedge run{stamp}</p><h1>{escaped(name)}</h1>'
        f'<p><span class="state" id="state">{escaped(_state(record))}</span></p>'
        f'<p class="lead">{_lead(record, summary)}</p></header>{_tiles(record, summary)}{_problems(record)}'
        f"{figures}{knob_table(record)}{event_table(record)}"
        '<p class="quiet" style="margin-top:56px">Sizes are decimal: 1 MB is 1,000,000 bytes. Dense is what bf16 would '
        "have cost for the same rows. Packet is the encoded tensor with its header, message adds the wire contract’s "
        "fields, wire is what an Ethernet interface sends for it, computed. Down is towards the last stage.</p></main></body></html>\n"
    )


def _scored(record: RunRecord) -> list[dict[str, Any]]:
    return [row for row in record.evals if number(row.get("eval/accuracy")) is not None]


def _state(record: RunRecord) -> str:
    done, target = len(record.ticks), whole(record.knob("run", "ticks"))
    so_far = f"{done:,} of {counted(target, 'tick')}" if target else counted(done, "tick")
    if target and record.ticks and record.ticks[-1]["tick"] + 1 >= target:
        return f"finished, {so_far}"
    ends = [event for event in record.events if event.get("event") in ("start", "stop")]
    if ends and ends[-1]["event"] == "stop":  # a stop before a later start was resumed
        why = str(ends[-1].get("message") or "").strip()
        return f"stopped after {so_far}" + (f": {why}" if why else "")
    return f"unfinished: {so_far} so far"


def _lead(record: RunRecord, summary: LedgerSummary) -> str:
    parts = []
    scored = _scored(record)
    if len(scored) > 1:
        first, last = scored[0], scored[-1]
        gap = abs(last["eval/accuracy"] - first["eval/accuracy"])
        reach = sum(number(row.get("eval/interval95")) or 0.0 for row in (first, last))
        parts.append(
            f"Validation went from {percent(first)} to {percent(last)} in {counted(len(record.ticks), 'tick')}"
        )
        if reach:
            parts[-1] += "; the two 95 % intervals " + ("do not overlap" if gap > reach else "overlap")
        parts[-1] += "."
    elif record.ticks:
        parts.append(f"{counted(len(record.ticks), 'tick')} so far, too few evaluations to tell progress.")
    else:
        parts.append("No tick has been recorded yet.")
    if summary.link.dense:
        share = share_text(summary.link.message_share)
        parts.append(f"The links between the stages carried {share} of the bytes that dense bf16 would have taken")
        parts[-1] += f"; {summary.full_text}." if summary.full_text else "."
    return escaped(" ".join(parts))


def _tiles(record: RunRecord, summary: LedgerSummary) -> str:
    scored, skips = _scored(record), [row for row in record.ticks if row.get("outcome") == "skip"]
    reasons = [str(row.get("skip_reason") or "unknown") for row in skips]
    why = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    batches = len({row["batch"] for row in record.ticks if number(row.get("batch")) is not None})
    stages = len(record.manifest.get("spans") or ()) or whole(record.knob("swarm", "stages")) or 0
    model = str(record.knob("model", "path", "name") or "unknown").rstrip("/")
    speeds = [speed for row in record.ticks if (speed := number(row.get("tokens_per_s"))) is not None]
    scores = f"{percent(scored[0])} → {percent(scored[-1])}" if scored else "none yet"
    squeezed = (
        "through compressed links at the end: " + percent(scored[-1], "eval/accuracy_compressed") if scored else ""
    )
    link, total = summary.link, summary.total
    shares = f"activations and gradients as messages, {share_text(link.packet_share)} as packets"
    shares += f"; {summary.full_text}" if summary.full_text else ""
    shares += f" · {byte_text(link.message)} for {byte_text(link.dense)}"
    measured = f", {byte_text(total.wire)} on the wire" if total.wire is not None else ""
    cells = (
        ("model", "Model", model.rsplit("/", 1)[-1], _shape_text(record)),
        ("stages", "Pipeline", counted(stages, "stage") if stages else "unknown", _layers_text(record)),
        ("links", "Links", counted(stages - 1, "link") if stages else "unknown", _codec_text(record)),
        ("ticks", "Ticks", f"{len(record.ticks) - len(skips):,} committed",
         f"{len(skips)} skipped" + (f" ({why})" if why else "") + f" · {batches:,} rollout batch{'' if batches == 1 else 'es'}"),
        ("validation", "Validation, start → end", scores, squeezed),
        ("share", "Links, share of dense", share_text(link.message_share), shares),
        ("bytes", "All bytes sent", byte_text(total.message), counted(total.frames, "frame") + measured),
        ("wall", "Wall time", duration(record.wall_s),
         f"median {median(speeds):,.0f} tokens/s" if speeds else "speed not recorded"),
    )  # fmt: skip
    body = "".join(
        f'<div><dt>{escaped(label)}</dt><dd id="{key}-tile"><b>{escaped(value)}</b>{escaped(note)}</dd></div>'
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
    return f"<aside>{''.join(f'<p>{escaped(line)}</p>' for line in record.problems)}</aside>" if record.problems else ""


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
