"""The files of a run folder that the anchor keeps while the run goes: metrics, ledger, manifest. Append-only writing only."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from swarm_core.wire.ledger import COLUMNS
from swarm_core.wire.messages import LedgerRow, Report


class Books:
    """Writes `metrics.jsonl` and `ledger.csv` of one run and keeps the byte totals the live table shows."""

    def __init__(self, out: Path, resume_at: int) -> None:
        """Open the books; on a resume at tick N, rows of later ticks belong to a lost future and are cut off."""
        out.mkdir(parents=True, exist_ok=True)
        self.started = time.time() - _cut_metrics(out / "metrics.jsonl", resume_at)
        _cut_ledger(out / "ledger.csv", resume_at)
        self._metrics = (out / "metrics.jsonl").open("a")
        self._ledger_file = (out / "ledger.csv").open("a", newline="")
        self._ledger = csv.writer(self._ledger_file)
        if self._ledger_file.tell() == 0:
            self._ledger.writerow(COLUMNS)
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # kind -> dense, packet, message
        self.by_tick: dict[int, list[int]] = {}  # tick -> dense and packet bytes of activations and gradients

    def report(self, report: Report) -> dict[str, Any] | None:
        """Write what a process reported; returns the metrics row, if it was one."""
        self.ledger(report.ledger)
        if report.type == "ledger":
            return None
        return self.row(report.type, report.tick, {**report.words, **report.numbers})

    def row(self, kind: str, tick: int, values: dict[str, Any]) -> dict[str, Any]:
        """Append one metrics row, stamped with the seconds since the run began."""
        row = {"type": kind, "tick": tick, "time_s": round(time.time() - self.started, 3)}
        row.update({name: _plain(value) for name, value in values.items()})
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        return row

    def ledger(self, rows: Iterable[LedgerRow]) -> None:
        """Append ledger rows; rows of equal key add up."""
        for row in rows:
            self._ledger.writerow(
                (
                    row.tick,
                    row.link,
                    row.direction,
                    row.kind,
                    row.dense_bytes,
                    row.packet_bytes,
                    row.message_bytes,
                    "",
                    row.frames,
                )
            )
            total = self.totals[row.kind]
            total[0] += row.dense_bytes
            total[1] += row.packet_bytes
            total[2] += row.message_bytes
            if row.kind in ("activation", "gradient"):
                sums = self.by_tick.setdefault(row.tick, [0, 0])
                sums[0] += row.dense_bytes
                sums[1] += row.packet_bytes
        self._ledger_file.flush()

    def close(self) -> None:
        self._metrics.close()
        self._ledger_file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN; a number that is not one is written as null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    return value


def _cut_metrics(path: Path, resume_at: int) -> float:
    """Drop rows at and after a tick; returns the run time so far, in seconds."""
    if not path.exists():
        return 0.0
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a torn last line
        before = row.get("tick", 0) < resume_at or row.get("type") != "tick" and row.get("tick", 0) <= resume_at
        if before:
            rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return max((float(row.get("time_s", 0.0)) for row in rows), default=0.0)


def _cut_ledger(path: Path, resume_at: int) -> None:
    if not path.exists():
        return
    with path.open(newline="", errors="replace") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]  # a torn last line can look whole, with its last number cut short
    rows = [row for row in csv.reader(whole.splitlines()) if len(row) == len(COLUMNS)]
    kept = [row for row in rows if not row[0].isdigit() or int(row[0]) < resume_at]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(kept)
