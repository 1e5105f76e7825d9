"""What every bench leaves in benchmarks/: a page, its numbers, and the machine they were measured on. Measures nothing."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def facts(load_before: float | None = None) -> dict[str, Any]:
    """Date and machine; with the load average from before the bench also both of them."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found if load_before is None else {**found, "load": [load_before, os.getloadavg()[0]]}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Container[int] = (0,)) -> str:
    """A markdown table; the columns in `left` are left-aligned, the others right."""
    rule = ["---" if column in left else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def write(
    name: str, page: str, machine: Mapping[str, Any], numbers: Mapping[str, Any], folder: Path = BENCHMARKS
) -> None:
    """NAME.md and NAME.json, the numbers behind the machine's facts; an infinite one (an interval of one value) is null."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page)
    (folder / f"{name}.json").write_text(json.dumps(_finite({"machine": machine, **numbers}), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
