"""No tick waits for the anchor: killed, paused and slowed, with stages and sampler in this process and a real anchor process."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swarm_core.config import load
from swarm_core.wire.messages import Order
from swarm_worker import worker as working
from swarm_worker.anchor_link import AnchorLink
from swarm_worker.sampler.collect import Collected
from swarm_worker.sampler.process import SamplerArguments, serve_rollouts
from swarm_worker.sampler.source import Source
from swarm_worker.stage_process import StageArguments, hold_stage

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}", "OMP_NUM_THREADS": "1"}
STAGES, TICKS, GATE = 3, 20, 3  # four ticks a batch; batch GATE is delivered once the anchor is back
KNOBS: dict[str, Any] = {
    "run": {"ticks": TICKS},
    "checkpoint": {"every": 8, "keep": 2},
    "links": {"kind": "lowrank", "rank_forward": 12, "rank_backward": 12},
    "anchor": {"q_cadence": 0, "calibration_prompts": 1},
}


class Anchor:
    """`anchor_node serve` as a process of its own, on an address that stays."""

    def __init__(self, run_file: Path, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.out = out
        self._command = [sys.executable, "-m", "anchor_node.cli", "serve", "--config", str(run_file)]
        self._command += ["--out", str(out), "--listen", self.address, "--log", str(out / "anchor.log")]
        self.process = self._start()

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._command, *more], env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def resume(self) -> None:
        self.process = self._start("--resume")


class Gate:
    """Holds a batch back until it is opened; what is trained on does not depend on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
        self.opened = threading.Event()
        collect = Source.collect

        def gated(source: Source, order: Order) -> Collected | None:
            assert order.batch < batch or self.opened.wait(60)
            return collect(source, order)

        monkeypatch.setattr(Source, "collect", gated)


def journal(out: Path) -> int:
    """Ticks decided so far."""
    path = out / "journal.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def disturbed(anchor: Anchor, during: Callable[[], Awaitable[None]]) -> list[BaseException | None]:
    """Stages and a sampler beside this anchor, to their ends; `during` runs once the first ticks are decided."""
    tasks = [hold_stage(StageArguments(i, anchor.address, out=anchor.out), signals=False) for i in range(STAGES)]
    members = [asyncio.create_task(work) for work in tasks]
    members.append(asyncio.create_task(serve_rollouts(SamplerArguments(anchor.address, out=anchor.out), signals=False)))
    try:
        await until(lambda: journal(anchor.out) >= 2)
        await during()
        async with asyncio.timeout(90):
            ends = await asyncio.gather(*members, return_exceptions=True)
        await asyncio.to_thread(anchor.process.wait, 30)
        return ends
    finally:
        anchor.process.kill()
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)


def rows(out: Path, kind: str = "tick") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["type"] == kind]


def sums(out: Path) -> dict[tuple[str, ...], list[int]]:
    """The ledger of the links and feeds, by tick and kind. What the anchor's own streams cost depends on the outage."""
    found: dict[tuple[str, ...], list[int]] = {}
    with (out / "ledger.csv").open() as file:
        for row in csv.DictReader(file):
            if "anchor" not in row["link"]:
                total = found.setdefault((row["tick"], row["link"], row["direction"], row["kind"]), [0] * 5)
                for i, column in enumerate(("dense_bytes", "packet_bytes", "message_bytes", "wire_bytes", "frames")):
                    total[i] += int(row[column])
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = sorted((out / "checkpoints" / f"tick-{TICKS:08d}").glob("stage-*.safetensors"))
    assert len(files) == STAGES and (files[0].parent / "COMPLETE").exists()
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def check_books(out: Path) -> None:
    """Every row once, and no tick has waited."""
    assert Counter(row["tick"] for row in rows(out)) == {tick: 1 for tick in range(TICKS)}
    for row in rows(out):
        waits = {name: value for name, value in row.items() if name.startswith("anchor/wait_s")}
        assert waits == {"anchor/wait_s": 0, **{f"anchor/wait_s/stage_{i}": 0 for i in range(STAGES)}}


def test_an_anchor_that_is_killed_and_carries_on_changes_nothing(
    recipe: Callable[..., Any], run_swarm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = recipe().run_file(**KNOBS)
    run_swarm(run_file, tmp_path / "calm")
    gate, anchor = Gate(monkeypatch, GATE), Anchor(run_file, tmp_path / "run")

    async def during() -> None:
        anchor.kill()
        at = journal(anchor.out)
        await until(lambda: journal(anchor.out) == 4 * GATE)  # as far as there are rollouts
        assert at < 4 * GATE and len(rows(anchor.out)) <= at + 1
        anchor.resume()
        await until(lambda: any(row["event"] == "carries_on" for row in rows(anchor.out, "event")))
        gate.opened.set()

    ends = asyncio.run(disturbed(anchor, during))
    assert ends == [None] * (STAGES + 1)
    assert anchor.process.returncode == 0
    check_books(tmp_path / "run")
    assert sums(tmp_path / "run") == sums(tmp_path / "calm")
    calm, stormy = weights(tmp_path / "calm"), weights(tmp_path / "run")
    assert calm.keys() == stormy.keys() and all(torch.equal(calm[name], stormy[name]) for name in calm)
    assert [row["message"] for row in rows(tmp_path / "run", "event") if row["event"] == "carries_on"] == [
        f"{STAGES} stages at work, at tick {4 * GATE}"
    ]
