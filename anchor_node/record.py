"""A run folder as plain values: metrics, ledger, manifest, and the ledger's sums. No drawing, no HTML, no sockets.

A run that is still going, was killed, or was resumed is the normal case here: a torn last line, a missing file or a
missing key is noted in `RunRecord.problems` and never raised.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

#: The kinds that cross a link inside a tick; a bare "share of dense" is always the share of these two together.
LINK_KINDS = ("activation", "gradient")
#: What compression and the anchor's corrections cost besides: a dense run would send none of it.
UPKEEP = {
    "basis": "bases",
    "sketch": "sketches",
    "snapshot": "snapshots",
    "correction": "corrections",
    "fidelity": "fidelity probes",
}
#: Reading order of tables and plots: the fast path first, then the slow loop, then everything else.
KIND_ORDER = (*LINK_KINDS, *UPKEEP, "weights", "rollout", "state", "control", "beat")

Row = Mapping[str, Any]


class LedgerRow(NamedTuple):
    """One line of `ledger.csv`; all sizes in bytes, `wire` is None where a row has none."""

    tick: int
    link: str
    direction: str
    kind: str
    dense: int
    packet: int
    message: int
    wire: int | None
    frames: int


@dataclass(frozen=True)
class ByteCount:
    """A sum of ledger rows, in bytes. `wire` is a number only when *every* row of the sum has it."""

    dense: int = 0
    packet: int = 0
    message: int = 0
    wire: int | None = None
    frames: int = 0
    rows: int = 0

    def plus(self, row: LedgerRow) -> ByteCount:
        known = row.wire is not None and (self.rows == 0 or self.wire is not None)
        wire = (self.wire or 0) + (row.wire or 0) if known else None
        return ByteCount(
            self.dense + row.dense,
            self.packet + row.packet,
            self.message + row.message,
            wire,
            self.frames + row.frames,
            self.rows + 1,
        )

    @property
    def packet_share(self) -> float | None:
        """Packet bytes per dense byte; None where nothing dense was replaced (control messages)."""
        return self.packet / self.dense if self.dense else None

    @property
    def message_share(self) -> float | None:
        """Message bytes per dense byte, the framing of the wire contract included."""
        return self.message / self.dense if self.dense else None


@dataclass(frozen=True)
class LedgerSummary:
    """The ledger in sums: by kind, by (link, direction, kind), the fast path alone (`link`) and everything (`total`)."""

    by_kind: dict[str, ByteCount] = field(default_factory=dict)
    by_flow: dict[tuple[str, str, str], ByteCount] = field(default_factory=dict)
    link: ByteCount = ByteCount()
    total: ByteCount = ByteCount()
    ticks: int = 0
    bad_rows: int = 0

    @property
    def full(self) -> ByteCount:
        """The links and their upkeep against what the links alone would have cost dense."""
        parts = [self.link, *(self.by_kind[kind] for kind in UPKEEP if kind in self.by_kind)]
        wires = [part.wire for part in parts if part.wire is not None]
        return ByteCount(
            self.link.dense,
            sum(part.packet for part in parts),
            sum(part.message for part in parts),
            sum(wires) if len(wires) == len(parts) else None,
            sum(part.frames for part in parts),
            sum(part.rows for part in parts),
        )

    @property
    def full_text(self) -> str:
        """The share of `full` with what it counts: "9.10 % with bases and sketches"; empty where there is no upkeep."""
        names = upkeep_text(self.by_kind)
        return f"{share_text(self.full.message_share)} with {names}" if names and self.link.dense else ""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says: one row per tick (the last written wins), in tick order, and what could not be read."""

    folder: Path
    ticks: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    manifest: dict[str, Any]
    ledger: list[LedgerRow]
    wall_s: float
    problems: list[str]

    def knob(self, section: str, *names: str) -> Any:
        """The first of `names` set in `[section]` of the run's configuration, or None."""
        table = mapping(mapping(self.manifest.get("config")).get(section))
        return next((table[name] for name in names if table.get(name) is not None), None)


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is a dict, else an empty one: the manifest of an old or torn run may lack any part."""
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """A finite float, or None for anything else (null, NaN, text): such points are left out, never drawn as 0."""
    if not isinstance(value, (int, float)):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def whole(value: object) -> int | None:
    """`number` as an int, or None."""
    found = number(value)
    return None if found is None else int(found)


def byte_text(count: float) -> str:
    """Bytes in decimal units, as links are sold: 1 MB = 10**6 bytes."""
    for limit, unit, digits in ((1e3, "B", 0), (1e6, "kB", 1), (1e9, "MB", 1), (1e12, "GB", 2)):
        if abs(count) < limit:
            return f"{count / (limit / 1e3):.{digits}f} {unit}"
    return f"{count / 1e12:.2f} TB"


def share_text(share: float | None) -> str:
    """A share as percent: one decimal, two below 10 %, and never a bare 0.00 for what is not 0."""
    if share is None:
        return "–"
    if 0 < abs(share) < 1e-4:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.2f} %" if abs(share) < 0.1 else f"{100 * share:.1f} %"


def ledger_row(row: Row) -> LedgerRow:
    """One CSV row (or dict of numbers) as a `LedgerRow`; ValueError when a column is missing or not a count."""
    try:
        sizes = [int(row[name]) for name in ("tick", "dense_bytes", "packet_bytes", "message_bytes", "frames")]
        wire = None if row.get("wire_bytes") in (None, "") else int(row["wire_bytes"])
        names = [str(row[name]) for name in ("link", "direction", "kind")]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"ledger row {dict(row)!r}: column missing ({error}); expected the nine ledger columns"
        ) from error
    if not all(names) or "None" in names or min(sizes[1:]) < 0:
        raise ValueError(f"ledger row {dict(row)!r}: empty name or negative count")
    return LedgerRow(sizes[0], names[0], names[1], names[2], sizes[1], sizes[2], sizes[3], wire, sizes[4])


def upkeep_text(kinds: Container[str]) -> str:
    """The upkeep among these kinds, in words: "bases, sketches and fidelity probes"."""
    *others, last = [name for kind, name in UPKEEP.items() if kind in kinds] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def read_ledger(path: Path) -> tuple[list[LedgerRow], int]:
    """All whole rows of `ledger.csv`, and how many were not. A last line without its newline may be cut inside a
    number and still look whole, so it is not believed."""
    if not path.is_file():
        return [], 0
    text = path.read_text(encoding="utf-8", errors="replace")
    torn = bool(text) and not text.endswith("\n")
    if torn:
        text = text[: text.rfind("\n") + 1]
    rows, bad = [], int(torn)
    for row in csv.DictReader(io.StringIO(text)):
        try:
            rows.append(ledger_row(row))
        except ValueError:
            bad += 1
    return rows, bad


def kind_rank(kind: str) -> tuple[int, str]:
    """Sort key that puts known kinds in reading order and unknown ones after them."""
    return (KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), kind)


def ledger_summary(source: Path | str | Iterable[LedgerRow | Row]) -> LedgerSummary:
    """The sums of a ledger: `source` is a run folder, or rows (`LedgerRow`, or dicts with the CSV's columns)."""
    bad = 0
    if isinstance(source, (str, Path)):
        rows, bad = read_ledger(Path(source) / "ledger.csv")
    else:
        rows = []
        for item in source:
            try:
                rows.append(item if isinstance(item, LedgerRow) else ledger_row(item))
            except ValueError:
                bad += 1
    by_kind: dict[str, ByteCount] = {}
    by_flow: dict[tuple[str, str, str], ByteCount] = {}
    link = total = ByteCount()
    for row in rows:
        flow = (row.link, row.direction, row.kind)
        by_kind[row.kind] = by_kind.get(row.kind, ByteCount()).plus(row)
        by_flow[flow] = by_flow.get(flow, ByteCount()).plus(row)
        total = total.plus(row)
        if row.kind in LINK_KINDS:
            link = link.plus(row)
    pipeline = {flow[0] for flow in by_flow if flow[2] in LINK_KINDS}
    in_order = sorted(by_flow, key=lambda flow: (flow[0] not in pipeline, flow[0], flow[1], kind_rank(flow[2])))
    return LedgerSummary(
        by_kind={kind: by_kind[kind] for kind in sorted(by_kind, key=kind_rank)},
        by_flow={flow: by_flow[flow] for flow in in_order},
        link=link,
        total=total,
        ticks=len({row.tick for row in rows if row.kind == LINK_KINDS[1]}),  # a score pass alone is no tick
        bad_rows=bad,
    )


def print_ledger(console: Console, summary: LedgerSummary) -> None:
    """The closing table of a run: bytes by kind, and what the links carried of what bf16 would have cost."""
    table = Table(title="Bytes sent", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("kind", no_wrap=True)
    measured = summary.total.wire is not None
    for name in ("dense", "packet", "message", *(("wire",) if measured else ()), "of dense", "frames"):
        table.add_column(name, justify="right", no_wrap=True)

    def line(name: str, count: ByteCount, style: str | None = None) -> None:
        wire = [byte_text(count.wire or 0)] if measured else []
        dense = byte_text(count.dense) if count.dense else "–"
        sizes = [dense, byte_text(count.packet), byte_text(count.message), *wire]
        table.add_row(name, *sizes, share_text(count.message_share), f"{count.frames:,}", style=style)

    for kind, count in summary.by_kind.items():
        line(kind, count)
    table.add_section()
    line("activation + gradient", summary.link, "bold")
    line("everything", summary.total, "bold")
    console.print(table)
    if summary.link.dense:
        per_tick = byte_text(summary.link.message / max(1, summary.ticks))
        shares = (
            f"{share_text(summary.link.message_share)} of dense ({share_text(summary.link.packet_share)} as packets)"
        )
        full = f"; {summary.full_text}" if summary.full_text else ""
        console.print(
            f"The links carried {shares}, {per_tick} a tick over {summary.ticks} ticks{full}.", highlight=False
        )
    if summary.bad_rows:
        console.print(f"{summary.bad_rows} ledger rows could not be read and are not in these sums.", highlight=False)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All JSON objects of `metrics.jsonl` in file order, and how many lines were not one."""
    rows: list[dict[str, Any]] = []
    bad = 0
    if not path.is_file():
        return rows, bad
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def read_run(run_dir: Path | str) -> RunRecord:
    """Everything the report needs from `run_dir`. FileNotFoundError when the folder itself is missing."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist; give the folder that holds metrics.jsonl")
    problems: list[str] = []
    rows, bad = read_metrics(folder / "metrics.jsonl")
    if bad:
        problems.append(
            f"{bad} line(s) of metrics.jsonl could not be read (a run that is killed can tear its last line)."
        )
    ticks, again = _latest_by_tick(row for row in rows if row.get("type") == "tick")
    if again:
        problems.append(f"{again} tick(s) were written more than once (a resume repeats some); the last row counts.")
    evals, _ = _latest_by_tick(row for row in rows if row.get("type") == "eval")
    events = [row for row in rows if row.get("type") == "event"]
    events.sort(key=lambda row: number(row.get("time_s")) or 0.0)
    ledger, bad = read_ledger(folder / "ledger.csv")
    if bad:
        problems.append(f"{bad} row(s) of ledger.csv could not be read; the byte sums leave them out.")
    try:
        manifest = mapping(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        manifest = {}
        problems.append(
            f"manifest.json could not be read ({type(error).__name__}); the knobs of the run are not shown."
        )
    # The anchor's clock goes on from its old value after a resume, so that the latest row tells the whole time.
    wall_s = max((number(row.get("time_s")) or 0.0 for row in rows), default=0.0)
    return RunRecord(folder, ticks, evals, events, manifest, ledger, wall_s, problems)


def _latest_by_tick(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    latest: dict[int, dict[str, Any]] = {}
    repeated = 0
    for row in rows:
        tick = whole(row.get("tick"))
        if tick is not None:
            repeated += tick in latest
            latest[tick] = {**row, "tick": tick}
    return [latest[tick] for tick in sorted(latest)], repeated
