"""The report's words and tables about corrections and basis refreshes, as escaped HTML. No figure, no file."""

from __future__ import annotations

from collections.abc import Sequence

from anchor_node.correction_sums import (
    MEASURES,
    MOST_OF_FAST_PATH,
    CorrectionTotals,
    VersionUse,
    correction_bytes,
    has_corrections,
    totals,
    version_uses,
)
from anchor_node.record import LedgerSummary, RunRecord, byte_text, share_text
from anchor_node.refreshes import Comparison, Group, Jump, Mean, compare_batches, compare_jumps, sort_ticks
from anchor_node.tables import MAX_EVENTS, counted, duration, escaped, folded, html_table

NONE, MINUS = "–", "\u2212"
FORMS = {"c": "{:.3g}", "lambda": "{:.3g}", "share": "{:.1%}", "cos": "{:+.3f}"}


# Corrections ----------------------------------------------------------------------------------------------------------


def correction_section(record: RunRecord, summary: LedgerSummary) -> str:
    """Totals in words, bytes, and one row a correction; empty for a run without any."""
    if not has_corrections(record, summary):
        return ""
    uses = version_uses(record)
    words = "".join(f"<p>{escaped(line)}</p>" for line in _totals_text(totals(record, uses)))
    return words + _byte_table(summary) + _version_table(uses)


def _totals_text(sums: CorrectionTotals) -> list[str]:
    lines = []
    if not sums.made:
        lines.append("No correction has come yet.")
    else:
        merged = f"{sums.merges:,} of {counted(sums.ticks, 'tick')} merged one"
        if sums.skipped_merges:
            merged += f" ({sums.skipped_merges:,} of them were skipped)"
        means = [
            f"{name} {value}"
            for name, value in (
                ("K", NONE if sums.mean_k is None else f"{sums.mean_k:.1f} ticks"),
                ("age", NONE if sums.mean_age is None else f"{sums.mean_age:.1f} ticks"),
                ("λ", NONE if sums.mean_lambda is None else f"{sums.mean_lambda:.3g}"),
                ("dose", f"{share_text(sums.mean_share)} of the merged gradient"),
            )
            if not value.startswith(NONE)
        ]
        lines.append(f"{counted(sums.made, 'correction')}, {sums.used:,} of them used; {merged}.")
        if means:
            lines[-1] += f" Means over these ticks: {', '.join(means)}."
    if sums.replay_median_s is not None:
        lines.append(
            f"A replay took the anchor {duration(sums.replay_median_s)} in the median, all of them "
            f"{duration(sums.replay_sum_s)}."
        )
    if sums.wait_s is None:
        lines.append("Whether ticks waited for the anchor was not recorded.")
    else:
        lines.append(f"Ticks waited {sums.wait_s:g} s for the anchor.")
    refused = [counted(count, kind.split("_")[0]) for kind, count in sums.refused.items() if count]
    if refused:
        lines.append(f"Refused: {' and '.join(refused)}; the events say why.")
    return lines


def _byte_table(summary: LedgerSummary) -> str:
    sizes = correction_bytes(summary)
    if not sizes.fast:
        return ""
    ticks = max(1, summary.ticks)
    lines = (
        ("", "activations and gradients: the fast path", sizes.fast),
        ("", "snapshots, with their slices", sizes.snapshot),
        ("", "corrections", sizes.correction),
        ("sum", "fast path with corrections", sizes.with_corrections),
        ("", "bases, sketches and fidelity probes", sizes.other_upkeep),
        ("sum", "fast path with all upkeep", sizes.with_upkeep),
        ("", "everything sent, weights and rollouts too", sizes.everything),
    )
    rows = [
        (css, (name, byte_text(size), byte_text(size / ticks), f"{sizes.times_fast(size):.2f}"))
        for css, name, size in lines
    ]
    times = (sizes.times_fast(sizes.with_corrections) or 0.0, sizes.times_fast(sizes.with_upkeep) or 0.0)
    held = "" if times[0] < MOST_OF_FAST_PATH else " not"
    words = (
        f"With snapshots and corrections the run sent {times[0]:.2f} times the bytes of its fast path; it should be below "
        f"{MOST_OF_FAST_PATH:g}, and is{held}. With all other upkeep it is {times[1]:.2f} times."
    )
    head = ("messages", "bytes", "a tick", "times the fast path")
    return f"<p>{escaped(words)}</p>" + html_table(head, rows, 1, "correction-bytes")


def _version_table(uses: Sequence[VersionUse]) -> str:
    if not uses:
        return ""
    rows = []
    for use in uses[-MAX_EVENTS:]:
        cells = [_pair(use.values[name], FORMS[name]) for name in MEASURES]
        rows.append(("", (str(use.version), _or_none(use.snapshot_tick), _or_none(use.first_k), _span(use), *cells)))
    left = len(uses) - len(rows)
    title = counted(len(rows), "correction") + (f", the newest of {len(uses)}" if left else "")
    title += ": mean and last value over the ticks that merged it"
    head = ("version", "snapshot tick", "K at first use", "ticks used", "c", "λ", "dose", "cosine")
    return folded(title, html_table(head, rows, 1, "corrections-made"), len(rows) <= 24)


def _or_none(value: int | None) -> str:
    return NONE if value is None else str(value)


def _span(use: VersionUse) -> str:
    if not use.ticks:
        return "never"
    first, last = use.ticks[0], use.ticks[-1]
    return f"{len(use.ticks)} ({first}" + (")" if last == first else f"–{last})")


def _pair(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    return f"{form} · {form}".format(sum(values) / len(values), values[-1]).replace("%", " %").replace("-", MINUS)


# Refreshes ------------------------------------------------------------------------------------------------------------


def refresh_section(record: RunRecord) -> str:
    """How the clip fraction of ticks behind a refresh differs from the others', in words and in numbers."""
    ticks = sort_ticks(record.ticks)
    after, inside = (compare_batches(ticks, group) for group in ("after", "inside"))
    jump = compare_jumps(ticks)
    lines = []
    if after:
        lines.append(_verdict("In the batches right after a refresh", after[-1]))
    elif any(t.group == "after" for t in ticks):
        lines.append("Too few ticks to compare the batches after a refresh with others.")
    if inside:
        lines.append(_verdict("From a refresh inside a batch to the end of that batch", inside[-1]))
    if jump is not None:
        lines.append(_jump_text(jump))
    rows = [*_comparison_rows("after", after), *_comparison_rows("inside", inside), *_jump_rows(jump)]
    words = "".join(f"<p>{escaped(line)}</p>" for line in lines)
    if not rows:
        return words
    head = ("clip fraction", "here", "without a refresh", "difference, 95 %", "number")
    note = (
        "Means over batches, as many as numbered, with standard errors, in % of the tokens. Compared at equal places of a "
        "batch; differences in percentage points. Ticks before the first step on a batch, whose ratio is 1 by "
        "construction, are left out."
    )
    return words + html_table(head, rows, 1, "refresh-clips") + f'<p class="quiet">{escaped(note)}</p>'


def _verdict(where: str, all_passes: Comparison) -> str:
    by = _points(all_passes.difference, all_passes.half)
    text = f"{where}, the clip fraction differs from the others’ by {by} points"
    if all_passes.within_noise is None:
        return text + "; too few batches for an interval."
    return f"{text}, which is {'within' if all_passes.within_noise else 'more than'} noise."


def _jump_text(jump: Jump) -> str:
    text = (
        f"At {jump.at.count} refresh{'' if jump.at.count == 1 else 'es'} inside a batch the clip fraction went from "
        f"{_percent(jump.before)} to {_percent(jump.at)} within one tick"
    )
    if jump.usual is None or jump.excess is None:
        return text + "; nothing to hold it against at these places."
    return f"{text}, {_points(jump.excess, jump.excess_half)} points more than without a refresh at these places."


def _comparison_rows(group: Group, compared: Sequence[Comparison]) -> list[tuple[str, tuple[str, ...]]]:
    name = {"after": "batch after a refresh", "inside": "after a refresh inside the batch"}[group]
    # One pass alone is the sum of itself.
    shown = compared[-1:] if len(compared) == 2 else compared
    return [
        ("sum" if c.passing is None else "",
         (f"{name}, {'all passes' if c.passing is None else f'pass {c.passing}'}", _percent(c.batches),
          _percent(c.others), _points(c.difference, c.half), f"{c.batches.count} : {c.others.count}"))
        for c in shown
    ]  # fmt: skip


def _jump_rows(jump: Jump | None) -> list[tuple[str, tuple[str, ...]]]:
    if jump is None:
        return []
    rise = _percent(jump.rise, signed=True)
    usual = NONE if jump.usual is None else _percent(jump.usual, signed=True)
    excess = NONE if jump.excess is None else _points(jump.excess, jump.excess_half)
    times = f"{jump.at.count} : {0 if jump.usual is None else jump.usual.count}"
    return [
        ("", ("tick before a refresh inside", _percent(jump.before), NONE, NONE, str(jump.before.count))),
        ("", ("tick of a refresh inside", _percent(jump.at), NONE, NONE, str(jump.at.count))),
        ("sum", ("rise from the one to the other", rise, usual, excess, times)),
    ]


def _percent(mean: Mean, signed: bool = False) -> str:
    text = f"{100 * mean.mean:{'+' if signed else ''}.2f} %"
    return (text if mean.error is None else f"{text} ± {100 * mean.error:.2f}").replace("-", MINUS)


def _points(difference: float, half: float | None) -> str:
    return f"{100 * difference:+.2f}".replace("-", MINUS) + ("" if half is None else f" ± {100 * half:.2f}")
