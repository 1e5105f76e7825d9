"""The journal: one line per decided tick, on disk before the decision leaves stage 0. Append-only; nothing else writes it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from swarm_core.durable import replace
from swarm_core.wire.messages import Decide, Outcome
from swarm_worker.schedule import Stamp


class Journal:
    """`journal.jsonl` of a run. The weights are a function of the initial state and these lines."""

    def __init__(self, path: Path, resume_at: int) -> None:
        """Open for appending; on a resume, lines of ticks at and after `resume_at` belong to a lost future and go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line + "\n" for line in lines if _tick_of(line) in range(resume_at)]
            replace(path, "".join(kept).encode())
        self._file = path.open("a")

    def write(self, stamp: Stamp, decide: Decide, norm: float, fault: str = "") -> None:
        """Append a decided tick and wait until it is on disk. `fault` says where a NaN or Inf was caught."""
        line = {
            "epoch": stamp.epoch,
            "tick": stamp.tick,
            "attempt": stamp.attempt,
            "lineage": f"{stamp.lineage:016x}",
            "batch": stamp.batch,
            "pass": stamp.pass_,
            "slice": stamp.slice,
            "step": stamp.step,
            "microbatches": stamp.microbatches,
            "basis_version": stamp.basis_version,
            "correction": stamp.correction,
            "outcome": Outcome(decide.outcome).name,
            "reason": decide.reason,
            "coefficient": decide.coefficient.hex(),  # exact
            "grad_norm": norm if math.isfinite(norm) else None,  # JSON has no NaN
        }
        if fault:
            line["fault"] = fault
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _tick_of(line: str) -> int:
    try:
        return int(json.loads(line)["tick"])
    except (ValueError, KeyError, TypeError):
        return -1  # a torn last line
