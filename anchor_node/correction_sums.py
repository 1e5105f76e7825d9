"""What a run's rows say about the anchor's corrections: one entry a version, totals, one line of text. Pure; no
drawing, no HTML, no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from anchor_node.record import LedgerSummary, RunRecord, byte_text, number, share_text, whole

#: The measures of a merge that have a mean: the ratio c, its weight lambda, the dose's share of the merged gradient,
#: and the cosine between correction and the stages' own gradient.
MEASURES = ("c", "lambda", "share", "cos")
#: Ledger kinds that exist only because of corrections; slices are counted among the snapshots.
CORRECTION_KINDS = ("snapshot", "correction")
REFUSALS = ("snapshot_refused", "correction_refused")
#: With corrections a run should send less than this many times the bytes of activations and gradients alone.
MOST_OF_FAST_PATH = 2.0


@dataclass
class VersionUse:
    """One correction: what the anchor told when it was made (None: not told), and the ticks that merged it.

    `values` has, for each of `MEASURES`, the numbers of those ticks that have one. Replay in seconds, sizes in bytes.
    """

    version: int
    snapshot_tick: int | None = None
    born: int | None = None
    not_before: int | None = None
    replay_s: float | None = None
    size_bytes: float | None = None
    first_k: int | None = None
    ticks: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})


@dataclass(frozen=True)
class CorrectionTotals:
    """A run's corrections in sums. Means are over the merges, the ticks that merged a correction, None where none has
    the number; `wait_s` is what ticks waited for the anchor, None when it was not measured. Ages in ticks."""

    made: int
    used: int
    merges: int
    skipped_merges: int
    ticks: int
    mean_k: float | None
    mean_age: float | None
    mean_share: float | None
    mean_lambda: float | None
    replay_median_s: float | None
    replay_sum_s: float
    wait_s: float | None
    refused: dict[str, int]


@dataclass(frozen=True)
class CorrectionBytes:
    """Message bytes: the fast path (activations and gradients), what corrections add to it, and the rest."""

    fast: int
    snapshot: int
    correction: int
    other_upkeep: int
    everything: int

    @property
    def with_corrections(self) -> int:
        return self.fast + self.snapshot + self.correction

    @property
    def with_upkeep(self) -> int:
        return self.with_corrections + self.other_upkeep

    def times_fast(self, size_bytes: float) -> float | None:
        """A size as a multiple of the fast path's; None when that sent nothing."""
        return size_bytes / self.fast if self.fast else None


def version_in_use(row: Mapping[str, Any]) -> int | None:
    """The version of the correction that a tick merged; None: it merged none."""
    version = whole(row.get("correction/version"))
    return version if version is not None and version > 0 else None


def merges(record: RunRecord) -> list[dict[str, Any]]:
    """The tick rows that merged a correction."""
    return [row for row in record.ticks if version_in_use(row) is not None]


def version_uses(record: RunRecord) -> list[VersionUse]:
    """Every correction that was made or merged, by version. A version that was made twice (the anchor came back) is as
    it was told last."""
    uses: dict[int, VersionUse] = {}
    for event in record.events:
        version = whole(event.get("correction/made")) if event.get("event") == "correction" else None
        if version is None:
            continue
        use = uses.setdefault(version, VersionUse(version))
        use.snapshot_tick = whole(event.get("correction/snapshot_tick"))
        use.born, use.not_before = whole(event.get("correction/born")), whole(event.get("correction/not_before"))
        use.replay_s, use.size_bytes = number(event.get("correction/replay_s")), number(event.get("correction/bytes"))
    for row in record.ticks:
        version = version_in_use(row)
        if version is None:
            continue
        use = uses.setdefault(version, VersionUse(version))
        k = whole(row.get("correction/K"))
        if not use.ticks:
            use.first_k = k
        if use.snapshot_tick is None and k is not None:
            use.snapshot_tick = row["tick"] - k
        use.ticks.append(row["tick"])
        for name in MEASURES:
            if (value := number(row.get(f"correction/{name}"))) is not None:
                use.values[name].append(value)
    return [uses[version] for version in sorted(uses)]


def totals(record: RunRecord, uses: Sequence[VersionUse]) -> CorrectionTotals:
    merged = merges(record)
    replays = [use.replay_s for use in uses if use.replay_s is not None]
    waits = [wait for row in record.ticks if (wait := number(row.get("anchor/wait_s"))) is not None]
    return CorrectionTotals(
        made=len(uses),
        used=sum(bool(use.ticks) for use in uses),
        merges=len(merged),
        skipped_merges=sum(row.get("outcome") == "skip" for row in merged),
        ticks=len(record.ticks),
        mean_k=_mean(merged, "K"),
        mean_age=_mean(merged, "age"),
        mean_share=_mean(merged, "share"),
        mean_lambda=_mean(merged, "lambda"),
        replay_median_s=median(replays) if replays else None,
        replay_sum_s=sum(replays),
        wait_s=sum(waits) if waits else None,
        refused={kind: sum(event.get("event") == kind for event in record.events) for kind in REFUSALS},
    )


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = [value for row in rows if (value := number(row.get(f"correction/{name}"))) is not None]
    return sum(values) / len(values) if values else None


def correction_bytes(summary: LedgerSummary) -> CorrectionBytes:
    snapshot, correction = (
        summary.by_kind[kind].message if kind in summary.by_kind else 0 for kind in CORRECTION_KINDS
    )
    rest = summary.full.message - summary.link.message - snapshot - correction
    return CorrectionBytes(summary.link.message, snapshot, correction, rest, summary.total.message)


def has_corrections(record: RunRecord, summary: LedgerSummary) -> bool:
    """Whether the run has a merger, or says anything about corrections."""
    merger = record.knob("corrections", "merger")
    return (
        (isinstance(merger, str) and merger != "none")
        or any(event.get("event") in ("correction", *REFUSALS) for event in record.events)
        or any(version_in_use(row) is not None for row in record.ticks)
        or any(kind in summary.by_kind for kind in CORRECTION_KINDS)
    )


def merge_text(row: Mapping[str, Any]) -> str:
    """The correction that a tick merged, on one line: "version 3, K 12, age 12, c 0.84, ..."; empty without one."""
    version = version_in_use(row)
    if version is None:
        return ""
    parts = [f"version {version}"]
    for name, form in (("K", ".0f"), ("age", ".0f"), ("c", ".3g"), ("lambda", ".3g")):
        if (value := number(row.get(f"correction/{name}"))) is not None:
            parts.append(f"{name} {value:{form}}")
    if (share := number(row.get("correction/share"))) is not None:
        parts.append(f"share {share_text(share)}")
    if (cosine := number(row.get("correction/cos"))) is not None:
        parts.append(f"cos {cosine:+.3f}")
    return ", ".join(parts)


def made_text(event: Mapping[str, Any]) -> str:
    """What the anchor last made, on one line: "correction 4 from tick 60, replayed in 12.3 s, 1.2 MB, for ticks from
    65 on"; empty where the event tells no version."""
    version, snapshot = whole(event.get("correction/made")), whole(event.get("correction/snapshot_tick"))
    if version is None:
        return ""
    parts = [f"correction {version}" + ("" if snapshot is None else f" from tick {snapshot}")]
    if (replay_s := number(event.get("correction/replay_s"))) is not None:
        parts.append(f"replayed in {replay_s:.1f} s")
    if (size := number(event.get("correction/bytes"))) is not None:
        parts.append(byte_text(size))
    if (first := whole(event.get("correction/not_before"))) is not None:
        parts.append(f"for ticks from {first} on")
    return ", ".join(parts)
