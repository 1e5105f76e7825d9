"""What a turn of either side yields, and torch's side as the bench sees it: two processes that answer lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.workload import STAGES, Setup
from experiments.children import Child


@dataclass(frozen=True)
class Tick:
    """One tick, in seconds: its length, and per stage the time its compute thread was not waiting."""

    tick_s: float
    busy_s: tuple[float, ...]


@dataclass(frozen=True)
class Turn:
    """The ticks of one turn in order, and the CPU seconds per tick that the kernel charged each stage's process."""

    ticks: list[Tick]
    cpu_s: tuple[float, ...]


class TorchSide:
    """Two ranks of experiments.bench.torch_side, waiting for their turn in a read."""

    name = "torch"

    def __init__(self, setup: Setup, folder: Path, cores: Sequence[int]) -> None:
        common = ["--config", setup.config, "--rollouts", setup.rollouts, "--rendezvous", folder / "rendezvous"]
        self.ranks = [
            Child(f"torch-{i}", "experiments.bench.torch_side", ["--rank", i, *common], folder, core=cores[i])
            for i in range(STAGES)
        ]
        for rank in self.ranks:
            rank.line()

    def turn(self, ticks: int) -> Turn:
        """Train `ticks` batches."""
        before = [rank.cpu_s() for rank in self.ranks]
        for rank in self.ranks:
            rank.inlet.write(f"{ticks}\n")
            rank.inlet.flush()
        answers = [json.loads(rank.line()) for rank in self.ranks]
        after = [rank.cpu_s() for rank in self.ranks]
        measured = [Tick(own[0][0], tuple(busy for _, busy in own)) for own in zip(*answers, strict=True)]
        return Turn(measured, tuple((b - a) / ticks for a, b in zip(before, after, strict=True)))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
            rank.process.wait()
