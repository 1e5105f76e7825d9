"""The results file: one JSON line a finished run, appended, and which jobs it already answers. Trains nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.codec.cells import CELLS, DENSE
from experiments.codec.figures import Cell, cell
from experiments.codec.job import Job

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """All rows; of several for one run the last counts. A torn last line (a killed process) is passed over."""
    found: dict[tuple[Any, ...], Row] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[key(row)] = row
    return list(found.values())


def key(row: Row) -> tuple[Any, ...]:
    """What a job is known by, as `Job.key`."""
    return row["model"], row["cell"], row["seed"], row["settings"]


def append(file: Path, row: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def table(rows: Sequence[Row], model: str, *, extras: bool = False) -> list[Cell]:
    """The cells of a model in the order of `CELLS`, as they are declared now; with `extras` all others behind them."""
    declared = {name: Job(model, name, 0).settings for name in CELLS[model]}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["model"] == model:
            groups.setdefault((row["cell"], row["settings"]), []).append(row)
    wanted = [group for group in declared.items() if group in groups]
    if extras:
        wanted += [group for group in groups if group not in wanted]
    return [cell(groups[group], _dense_like(groups[group][0], rows)) for group in wanted]


def _dense_like(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The dense runs that differ from this one in its links alone."""
    apart = _apart_from_links(row)
    return [r for r in rows if r["cell"].partition("+")[0] == DENSE and _apart_from_links(r) == apart]


def _apart_from_links(row: Row) -> tuple[str, dict[str, str]]:
    links = ("links.", "anchor.")
    return row["model"], {key: value for key, value in row["overrides"].items() if not key.startswith(links)}
