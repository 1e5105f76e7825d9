"""What `swarm_worker doctor` finds out about this machine alone: disk, device, memory. Opens no connection."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, BAD, SKIPPED = "ok", "warning", "bad", "not checked"
TRY_BYTES, TRY_S = 32 << 20, 2.0  # written to --out, and deleted
LITTLE_BYTES, TOO_LITTLE_BYTES = 10 << 30, 1 << 30  # free: a few checkpoints of a shard; not even one of a small model
SLOW_BYTES_S = 20e6  # a shard of 2 GB then takes a minute and a half
MEMORY_BYTES = 2 << 30  # free: torch and a small stage


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, the verdict, the figure, and what to do."""

    name: str
    verdict: str
    figure: str
    advice: str = ""


def disk(out: Path) -> Finding:
    """Free space and speed where checkpoints go. What is made for it is deleted."""
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            rate = _write_rate(out)
            free = shutil.disk_usage(out).free
        finally:
            if not existed:
                out.rmdir()
    except OSError as error:
        return Finding("disk", BAD, f"{out}: {error.strerror or error}", "give an --out that can be written to")
    figure = f"{free / 1e9:.0f} GB free in {out}, {rate / 1e6:.0f} MB/s written"
    if free < LITTLE_BYTES:
        verdict = BAD if free < TOO_LITTLE_BYTES else WARNING
        return Finding(
            "disk",
            verdict,
            figure,
            "a checkpoint of a stage is 8 to 12 bytes a parameter: make room, or give another --out",
        )
    if rate < SLOW_BYTES_S:
        return Finding("disk", WARNING, figure, "checkpoints will hold up ticks: give an --out on a faster disk")
    return Finding("disk", OK, figure)


def _write_rate(folder: Path) -> float:
    block, written, started = os.urandom(1 << 20), 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < TRY_BYTES and time.monotonic() - started < TRY_S:
            written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
    return written / (time.monotonic() - started)


def device() -> Finding:
    """What would compute, and its memory."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        try:
            free, total = torch.cuda.mem_get_info()
            torch.ones(8, device="cuda").sum().item()
        except RuntimeError as error:
            return Finding(
                "device", BAD, f"cuda: {str(error).splitlines()[0]}", 'mend the driver, or set run.device = "cpu"'
            )
        name = torch.cuda.get_device_name()
        figure = f"cuda: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        little = free < total / 2
        return Finding(
            "device",
            WARNING if little else OK,
            figure,
            "somebody else holds its memory: see nvidia-smi" if little else "",
        )
    free = _free_memory()
    figure = f"cpu: {cores} cores" + (f", {free / 1e9:.1f} GB of memory free" if free else "")
    if free and free < MEMORY_BYTES:
        return Finding("device", WARNING, figure, "a stage takes 16 bytes a parameter and torch half a GB: make room")
    return Finding("device", OK, figure)


def _free_memory() -> int:
    """Bytes that could be had without swapping; 0 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 0
