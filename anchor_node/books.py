"""The files of a run folder that the anchor keeps while the run goes: metrics, ledger, manifest. Append-only writing only."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anchor_node.memory import Memory
from swarm_core.wire.errors import BadFrame
from swarm_core.wire.ledger import COLUMNS, KINDS, OPPOSITE
from swarm_core.wire.messages import LedgerRow, Report

STAMPED = ("type", "tick", "time_s")  # of every metrics row, by the books themselves
WORDS_OF = {"failed": ("message",), "lost": ("message",), "finished": ("message", "checkpoint", "evaluation")}
NO_END = 1 << 31  # ticks: three of them a second for 20 years
LONGEST_NAME, LONGEST_WORD = 200, 1 << 16  # characters of a metric's or a link's name; of an event's message


class Books:
    """Writes `metrics.jsonl` and `ledger.csv` of one run and keeps the byte totals the live table shows."""

    def __init__(self, out: Path, memory: Memory | None = None) -> None:
        """Open the books of a run folder, new or to be continued. A torn last line is mended.

        `memory` is that of a run at work: what lies beyond its marks was not acknowledged, and will be sent again.
        """
        out.mkdir(parents=True, exist_ok=True)
        self._out, self.memory = out, memory or Memory()
        self._metrics_path, self._ledger_path = out / "metrics.jsonl", out / "ledger.csv"
        _mend(self._metrics_path, self.memory.metrics_bytes)
        _mend(self._ledger_path, self.memory.ledger_bytes)
        rows = _whole_rows(self._metrics_path)
        self._resumed = time.time() - max((float(row.get("time_s", 0.0)) for row in rows), default=0.0)
        self.started = self.memory.began if self.memory.at_work else self._resumed  # time without an anchor counts
        self._metrics = self._metrics_path.open("a")
        self._ledger_file = self._ledger_path.open("a", newline="")
        self._ledger = csv.writer(self._ledger_file)
        if self._ledger_file.tell() == 0:
            self._ledger.writerow(COLUMNS)
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # kind -> dense, packet, message
        self.totals.update(self.memory.totals)
        # tick -> dense and packet bytes of activations and gradients
        self._link_bytes = {int(tick): sums for tick, sums in self.memory.link_bytes.items()}

    def cut(self, resume_at: int) -> None:
        """A resumed run starts at this tick: metrics of later ticks belong to a lost future. Bytes stay: they crossed."""
        self._metrics.close()
        rows = [r for r in _whole_rows(self._metrics_path) if r.get("tick", 0) < resume_at + (r.get("type") != "tick")]
        temporary = self._metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.rename(self._metrics_path)
        self._metrics = self._metrics_path.open("a")
        self.started = self._resumed

    def ticks(self) -> int:
        """Ticks that have their row here. Members may know of more: their reports can be under way."""
        rows = _whole_rows(self._metrics_path)
        return max((row["tick"] + 1 for row in rows if row.get("type") == "tick"), default=0)

    def link_bytes(self, tick: int) -> tuple[int, int]:
        """(dense, packet) bytes that the links carried in a tick, as far as they are reported; asked once a tick."""
        dense, packet = self._link_bytes.get(tick, (0, 0))
        self._link_bytes = {t: sums for t, sums in self._link_bytes.items() if t > tick}
        return dense, packet

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
                    row.wire_bytes,
                    row.frames,
                )
            )
            total = self.totals[row.kind]
            total[0] += row.dense_bytes
            total[1] += row.packet_bytes
            total[2] += row.message_bytes
            if row.kind in ("activation", "gradient"):
                sums = self._link_bytes.setdefault(row.tick, [0, 0])
                sums[0] += row.dense_bytes
                sums[1] += row.packet_bytes
        self._ledger_file.flush()

    def mark(self) -> None:
        """What has been written so far is booked: an anchor that carries on goes on from here."""
        self.memory.metrics_bytes = os.fstat(self._metrics.fileno()).st_size
        self.memory.ledger_bytes = os.fstat(self._ledger_file.fileno()).st_size
        self.memory.totals = dict(self.totals)
        self.memory.link_bytes = {str(tick): sums for tick, sums in self._link_bytes.items()}
        self.memory.save(self._out)

    def close(self) -> None:
        self._metrics.close()
        self._ledger_file.close()


def check_report(report: Report, ticks: int) -> None:
    """Raises BadFrame for a report that would leave in the books what no process has to report.

    `ticks`: after which the run ends, 0 where it does not. A row of the ledger or a kind that does not exist would stay
    in memory and on disk for the whole run; a word of an event that is missing would be missed when it is acted on.
    """
    last = ticks + 1 if ticks else NO_END
    if max(report.tick, max((row.tick for row in report.ledger), default=0)) > last:
        raise BadFrame(f"a report about a tick beyond {last}, where the run ends")
    for row in report.ledger:
        if row.kind not in KINDS or row.direction not in OPPOSITE or len(row.link) > LONGEST_NAME:
            raise BadFrame(
                f"a ledger row of kind {row.kind[:LONGEST_NAME]!r}, direction {row.direction[:9]!r}: there is none"
            )
    names = report.words.keys() | report.numbers.keys()
    if not names.isdisjoint(STAMPED) or max(map(len, names), default=0) > LONGEST_NAME:
        raise BadFrame(f"a report with a number or word that is named one of {', '.join(STAMPED)}, or too long")
    if max(map(len, report.words.values()), default=0) > LONGEST_WORD or len(report.type) > LONGEST_NAME:
        raise BadFrame(f"a report with a word of more than {LONGEST_WORD} letters")
    event = report.words.get("event", "")
    if missing := [name for name in WORDS_OF.get(event, ()) if name not in report.words]:
        raise BadFrame(f"the event {event!r} came without {', '.join(missing)}")


def _plain(value: Any) -> Any:
    """JSON has no NaN; a number that is not one is written as null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    return value


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a torn last line
    return rows


def _mend(path: Path, most: int | None) -> None:
    """Drop what lies beyond `most` bytes, and a last line without its end: it, or its last number, may be cut."""
    if not path.exists():
        return
    if most is not None and path.stat().st_size > most:
        os.truncate(path, most)
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
